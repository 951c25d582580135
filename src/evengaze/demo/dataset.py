"""Fixed sets of pictures and questions for evaluation and calibration, in memory and in LLaVA's on-disk format."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from evengaze.demo.scenes import TYPES, make_scene
from evengaze.demo.scenes import ask as ask_scene
from evengaze.errors import ConfigError
from evengaze.files import write_whole

SPLITS = {"eval": 2, "calibration": 3}  # first number of a scene's seed; training uses 1
IMAGES = {"eval": 320, "calibration": 64}
QUESTIONS_PER_IMAGE = 4
PROMPT = "<|im_start|>User:<image>\n{question}\nAssistant:"


@dataclass(frozen=True)
class DemoQuestion:
    """One question about one picture.

    Attributes:
        question_id: number within the split, from 0.
        image_index: index of its picture in the split.
        text: the question.
        answer: the one-word answer.
        type: color, shape, digit, exists, count or position.
        object_patches: raster indices (14 x 14) of the visual tokens that show what is asked for; empty if absent.
    """

    question_id: int
    image_index: int
    text: str
    answer: str
    type: str
    object_patches: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The text to give to the processor together with the picture."""
        return PROMPT.format(question=self.text)


@dataclass(frozen=True)
class DemoImage:
    """One picture.

    Attributes:
        name: its file name.
        image: the picture as it is, not yet padded to a square.
        padding_patches: raster indices of the visual tokens that are more than half padding.
        background_patches: raster indices of those that show neither padding nor any object.
        questions: the questions about it.
    """

    name: str
    image: Image.Image
    padding_patches: tuple[int, ...] = field(repr=False)
    background_patches: tuple[int, ...] = field(repr=False)
    questions: tuple[DemoQuestion, ...]


def make_dataset(split: str = "eval", images: int | None = None, seed: int = 0) -> list[DemoImage]:
    """Generate a split; the same on every platform.

    Each picture has up to four questions. The types take turns, so that every type is asked about equally often as far
    as the pictures allow it.

    Args:
        split: "eval" or "calibration".
        images: number of pictures; 320 for "eval" and 64 for "calibration" by default.
        seed: another seed gives other pictures; the model was trained on none of them.

    Returns:
        The pictures with their questions.

    Raises:
        ConfigError: unknown split, or no pictures.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    count = IMAGES[split] if images is None else images
    if count < 1:
        raise ConfigError(f"images must be at least 1, not {count}")
    asked = dict.fromkeys(TYPES, 0)
    records: list[DemoImage] = []
    number = 0
    for index in range(count):
        scene = make_scene(SPLITS[split], seed, index)
        padding_share = scene.padding_share()
        seen = np.zeros(padding_share.shape, bool)
        for thing in scene.things:
            seen |= scene.coverage(thing) > 0
        pool = ask_scene(scene, SPLITS[split], seed, index)
        questions: list[DemoQuestion] = []
        while pool and len(questions) < QUESTIONS_PER_IMAGE:
            taken = {question.type for question in questions}
            # The rarest type so far, another one each time; `min` keeps the pool's random order among equals.
            choice = min(pool, key=lambda question: (question.type in taken, asked[question.type]))
            pool.remove(choice)
            asked[choice.type] += 1
            questions.append(
                DemoQuestion(number, index, choice.text, choice.answer, choice.type, scene.patches(choice.things))
            )
            number += 1
        records.append(
            DemoImage(
                name=f"{split}_{seed}_{index:04d}.png",
                image=Image.fromarray(scene.pixels),
                padding_patches=tuple(int(i) for i in np.flatnonzero(padding_share > 0.5)),
                background_patches=tuple(int(i) for i in np.flatnonzero((padding_share == 0) & ~seen)),
                questions=tuple(questions),
            )
        )
    return records


def write_dataset(
    directory: str | Path, split: str = "eval", images: int | None = None, seed: int = 0
) -> list[DemoImage]:
    """Generate a split and write it in LLaVA's on-disk format.

    Writes the pictures as PNG into `images/`, `questions.jsonl` with question_id, image, text and category, and
    `answers.jsonl` with question_id, answer, type and object_patches.

    Args:
        directory: where to; made if it is not there.
        split: see `make_dataset`.
        images: see `make_dataset`.
        seed: see `make_dataset`.

    Returns:
        What was written, as `make_dataset` returns it.

    Raises:
        ConfigError: see `make_dataset`.
        DataError: a file cannot be written.
    """
    records = make_dataset(split, images, seed)
    folder = Path(directory)
    questions, answers = [], []
    for record in records:
        picture = BytesIO()
        record.image.save(picture, "PNG")
        write_whole(folder / "images" / record.name, picture.getvalue())
        for one in record.questions:
            questions.append(
                {"question_id": one.question_id, "image": record.name, "text": one.text, "category": one.type}
            )
            answers.append(
                {
                    "question_id": one.question_id,
                    "answer": one.answer,
                    "type": one.type,
                    "object_patches": list(one.object_patches),
                }
            )
    for name, rows in (("questions.jsonl", questions), ("answers.jsonl", answers)):
        write_whole(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    return records
