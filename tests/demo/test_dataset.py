import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from evengaze.demo import make_dataset, write_dataset
from evengaze.demo.scenes import GRID, KINDS, PALETTE, TYPES, ask, make_scene, position_of
from evengaze.errors import ConfigError


def fingerprint(records):
    digest = hashlib.sha256()
    for record in records:
        digest.update(np.asarray(record.image).tobytes())
        for one in record.questions:
            digest.update(json.dumps([one.text, one.answer, one.type, one.object_patches]).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(("split", "expected"), [("eval", "83385d4afa0d4e54"), ("calibration", "d0318a06642d1b89")])
def test_the_same_everywhere(split, expected):
    assert fingerprint(make_dataset(split, images=20)) == expected


def test_size_and_balance():
    records = make_dataset()
    questions = [one for record in records for one in record.questions]
    assert len(records) >= 300
    assert len(questions) >= 1000
    assert [one.question_id for one in questions] == list(range(len(questions)))
    types = Counter(one.type for one in questions)
    assert set(types) == set(TYPES)
    assert max(types.values()) - min(types.values()) <= 5
    for name in ("exists", "count", "position"):
        answers = Counter(one.answer for one in questions if one.type == name)
        assert max(answers.values()) < 1.6 * min(answers.values())


def test_splits_and_seeds_differ():
    prints = [fingerprint(make_dataset(split, 3, seed)) for split in ("eval", "calibration") for seed in (0, 1)]
    assert len(set(prints)) == 4


def test_more_images_extend_the_set():
    assert fingerprint(make_dataset(images=12)[:5]) == fingerprint(make_dataset(images=5))


def test_bad_arguments():
    with pytest.raises(ConfigError, match="split"):
        make_dataset("train")
    with pytest.raises(ConfigError, match="at least 1"):
        make_dataset(images=0)


def test_written_in_llava_format(tmp_path):
    records = write_dataset(tmp_path, "calibration", images=3)
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [set(row) for row in questions] == [{"question_id", "image", "text", "category"}] * len(answers)
    assert [row["question_id"] for row in questions] == [row["question_id"] for row in answers]
    asked = [one for record in records for one in record.questions]
    assert [row["answer"] for row in answers] == [one.answer for one in asked]
    for record in records:
        stored = np.asarray(Image.open(tmp_path / "images" / record.name))
        assert (stored == np.asarray(record.image)).all()


@pytest.mark.parametrize("index", range(8))
def test_things_are_where_the_scene_says(index):
    scene = make_scene(7, index)
    square = scene.padded().astype(int)
    assert square.shape == (112, 112, 3)
    seen = np.zeros((112, 112), int)
    for thing in scene.things:
        height, width = thing.mask.shape
        region = square[thing.top : thing.top + height, thing.left : thing.left + width][thing.mask]
        assert abs(region.mean(0) - np.array(PALETTE[thing.color])).max() <= 20
        seen[thing.top : thing.top + height, thing.left : thing.left + width] += thing.mask
    assert seen.max() == 1
    assert len({thing.color for thing in scene.things}) == len(scene.things) >= 3


@pytest.mark.parametrize("index", range(8))
def test_questions_are_true(index):
    scene = make_scene(8, index)
    for question in ask(scene, 8, index):
        words = question.text.rstrip("?").split()
        if question.type == "exists":
            kind, color = words[-1], words[-2] if words[-2] in PALETTE else None
            there = any(one.kind == kind and color in (None, one.color) for one in scene.things)
            assert question.answer == ("yes" if there else "no")
            assert kind in KINDS
        elif question.type == "color":
            assert [one.color for one in scene.things if one.kind == words[-1]] == [question.answer]
        elif question.type in ("shape", "digit"):
            assert [one.kind for one in scene.things if one.color == words[-1]] == [question.answer]
        elif question.type == "position":
            assert [position_of(one) for one in scene.things if one.kind == words[-1]] == [question.answer]


def test_patches_and_padding():
    scene = next(s for s in (make_scene(6, i) for i in range(20)) if s.pixels.shape[0] < 90)
    padding = scene.padding_share().reshape(GRID, GRID)
    assert (padding[0] == 1).all() and (padding[GRID // 2] == 0).all()
    covered = sum(scene.coverage(thing).sum() for thing in scene.things)
    assert covered == sum(thing.mask.sum() for thing in scene.things)
    assert set(scene.patches(scene.things)) >= set(scene.patches(scene.things[:1]))
