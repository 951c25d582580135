"""Budgets for each picture or frame in place of the whole prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reference
from evengaze.errors import ConfigError, ScoreError
from evengaze.methods import Pruner, from_dict, get, parse, spec
from evengaze.schedule import Schedule
from evengaze.testing import tiny
from evengaze.testing.matrix import TOLERANCE, greedy
from evengaze.testing.oracle import replayed


def kept(family: str, method: str, batch: int = 1, **options: Any) -> tuple[Any, Any]:
    """Layout rows and what the first stage kept."""
    model, inputs = tiny(family, batch, **options)
    with torch.no_grad(), parse(method)(model) as run:
        model(**inputs)
    assert run.trace is not None
    return run.trace.layout.rows, run.trace.stages[0].rows


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl", "gemma3"])
def test_each_image_keeps_its_best(family: str) -> None:
    images = [2, 0, 1]
    layout, rows = kept(family, "fastv:keep=3,layer=2,scope=image", 3, images=images)
    eager, inputs = tiny(family, 3, "eager", images=images)
    received = reference.last_row_attention(eager, 1, inputs)
    for b, (table, row) in enumerate(zip(layout, rows, strict=True)):
        best: list[int] = []
        for k in range(images[b]):
            mine = (table.image == k).nonzero().flatten()
            best += mine[received[b, table.position[mine]].topk(3).indices].tolist()
        assert row.kept.tolist() == sorted(best)


def test_scores_of_all_parts_are_recorded_in_order() -> None:
    _, parts = kept("llava", "fastv:keep=3,layer=2,scope=image", images=2)
    _, whole = kept("llava", "fastv:keep=3,layer=2", images=2)
    assert torch.equal(parts[0].raw, whole[0].raw)


def test_the_scores_of_every_picture_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host looks at the outcome later: the first picture's is not the only one."""

    class Later:
        known = False

        def __init__(self, good: bool) -> None:
            self.good = good

        def check(self) -> None:
            if not self.good:
                raise ScoreError("NaN")

    outcomes = [True, False, True]
    monkeypatch.setattr(Pruner, "_look_for_nan", lambda self, raw, stage: Later(outcomes.pop(0)))
    model, inputs = tiny("llava", images=3)
    handle = parse("fastv:keep=3,layer=2,scope=image")(model)
    with torch.no_grad():
        model(**inputs)
    assert not outcomes
    with pytest.raises(ScoreError):
        handle.remove()


def test_each_frame() -> None:
    layout, rows = kept("video_llava", "fastv:keep=0.25,layer=2,scope=frame", 2, video=True)
    for table, row in zip(layout, rows, strict=True):
        assert torch.bincount(table.frame[row.kept]).tolist() == [4] * 8


def test_a_video_is_one_image() -> None:
    layout, rows = kept("video_llava", "fastv:keep=10,layer=2,scope=image", video=True)
    assert len(rows[0].kept) == 10
    assert len(layout[0].images) == 1


def test_thumbnail_and_detail_are_one_image_but_two_frames() -> None:
    _, rows = kept("llava_next", "fastv:keep=6,layer=2,scope=image", images=2)
    assert len(rows[0].kept) == 12
    layout, rows = kept("llava_next", "fastv:keep=6,layer=2,scope=frame", images=2)
    assert torch.bincount(layout[0].image[rows[0].kept]).tolist() == [6] * 4


def test_each_tile() -> None:
    layout, rows = kept("idefics3", "fastv:keep=2,layer=2,scope=frame", images=2)
    assert [i.frames for i in layout[0].images] == [2, 3]
    assert len(rows[0].kept) == 10


@pytest.mark.parametrize(
    "method",
    [
        "fastv:keep=3,layer=2",
        "pyramiddrop:keep=[0.5,0.25],layers=[3,5]",
        "sparsevlm:keep=[5,3],layers=[1,3]",
        "himap:keep=[6,3],layers=[2,4]",
        "tokencarve:keep=4,layer=2",
        "illava:keep=4,layer=2",
        "divprune:keep=4",
    ],
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_as_the_oracle_says(family: str, method: str) -> None:
    pruner = parse(f"{method},scope=image")
    model, inputs = tiny(family, 2, images=2)
    with pruner(model) as run:
        tokens, logits = greedy(model, inputs, 4)
    assert run.trace is not None
    eager, _ = tiny(family, 2, "eager", images=2)
    with replayed(eager, pruner, run.trace, inputs["attention_mask"]):
        expected, oracle = greedy(eager, inputs, 4, use_cache=False)
    assert torch.equal(tokens, expected)
    assert float((logits - oracle).abs().max() / oracle.abs().max()) < TOLERANCE


@pytest.mark.parametrize("scope", ["image", "frame"])
def test_keeping_everything_is_dense(scope: str) -> None:
    model, inputs = tiny("internvl", 3, images=[2, 0, 1])
    _, dense = greedy(model, inputs, 3)
    with get("sparsevlm")(keep=(10**6, 10**6), layers=(1, 3), scope=scope)(model):
        _, same = greedy(model, inputs, 3)
    assert torch.equal(dense, same)


def test_one_image_is_the_prompt() -> None:
    _, one = kept("llava", "tokencarve:keep=4,layer=2,scope=image")
    _, all_ = kept("llava", "tokencarve:keep=4,layer=2")
    assert torch.equal(one[0].kept, all_[0].kept)


def test_names() -> None:
    pruner = parse("fastv:keep=3,scope=image")
    assert pruner.scope == "image"
    assert parse(spec(pruner)) == pruner
    assert from_dict(pruner.to_dict()) == pruner
    assert "scope" not in parse("fastv:keep=3").to_dict()
    with pytest.raises(ConfigError, match="scope must be"):
        parse("fastv:keep=3,scope=video")


def test_random_tokens_are_another_draw_in_each_picture() -> None:
    _, parts = kept("llava", "random:keep=5,scope=image", images=2)
    first, second = (sorted(t % 16 for t in parts[0].kept.tolist() if t // 16 == k) for k in (0, 1))
    assert len(first) == len(second) == 5 and first != second


@pytest.mark.parametrize("scope", ["prompt", "image", "frame"])
@pytest.mark.parametrize(
    "method", ["fastv:keep=3,layer=2", "pyramiddrop:layers=[1,3],keep=[0.5,0.25]", "random:keep=5"]
)
@pytest.mark.parametrize(
    ("family", "options"),
    [("llava", {"images": 2}), ("video_llava", {"video": True}), ("llava_next", {"images": 2}), ("idefics3", {})],
)
def test_the_schedule_says_beforehand_what_is_measured(
    family: str, options: dict[str, Any], method: str, scope: str
) -> None:
    pruner = parse(f"{method},scope={scope}")
    model, inputs = tiny(family, 1, **options)
    with torch.no_grad(), pruner(model) as run:
        model(**inputs)
    assert run.trace is not None
    table = run.trace.layout.rows[0]
    schedule = pruner.schedule(run.depth, table.counts())
    assert schedule.visual == len(table)
    assert schedule.average == run.trace.average_tokens()
    solved = Schedule.solve_for_budget(pruner, schedule.average, layers=run.depth, visual=table.counts())
    assert solved.schedule(run.depth, table.counts()).average == pytest.approx(schedule.average, rel=0.15)
