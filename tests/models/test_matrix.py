"""Every family with every method: dense if everything is kept, else what the slow oracle computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reference
from evengaze.methods import get
from evengaze.testing import families, layout_of, tiny
from evengaze.testing.matrix import METHODS, STEPS, Result, check, greedy
from evengaze.testing.oracle import replayed

VIDEOS = families(video=True)


def assert_passed(result: Result) -> None:
    assert result.passed, result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", families())
def test_matrix(family: str, method: str) -> None:
    for attention in ("sdpa", "eager"):
        for batch in (1, 3):
            assert_passed(check(family, method, attention, batch))


@pytest.mark.parametrize("family", families())
def test_two_images_and_rows_of_text(family: str) -> None:
    assert_passed(check(family, "fastv", batch=1, images=2))
    assert_passed(check(family, "sparsevlm", batch=3, images=[2, 0, 1]))


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
@pytest.mark.parametrize("family", VIDEOS)
def test_video(family: str, method: str) -> None:
    assert_passed(check(family, method, batch=1, video=True))
    assert_passed(check(family, method, batch=3, video=True))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "idefics3", "gemma3"])
def test_right_padding(family: str) -> None:
    """A forward call on rows padded at their ends: the last real token of each row predicts what the row alone does."""
    model, inputs = tiny(family, 3, side="right")
    pruner = get("fastv")(**METHODS["fastv"])
    with torch.no_grad(), pruner(model) as run:
        model(**inputs, use_cache=False)
        assert run.trace is not None
        together = [row.kept.tolist() for row in run.trace.stages[0].rows]
    left, inputs = tiny(family, 3, side="left")
    with torch.no_grad(), pruner(left) as run:
        left(**inputs, use_cache=False)
        assert run.trace is not None
        assert together == [row.kept.tolist() for row in run.trace.stages[0].rows]


@pytest.mark.parametrize("family", families())
def test_fastv_keeps_what_eager_attention_says(family: str) -> None:
    """The selection, decided again from the weights that eager attention returns."""
    model, inputs = tiny(family, 3)
    pruner = get("fastv")(**METHODS["fastv"])
    with pruner(model, **({"layout": layout_of(inputs)} if family == "llama" else {})) as run:
        greedy(model, inputs, 1)
        trace = run.trace
    assert trace is not None
    eager, _ = tiny(family, 3, "eager")
    received = reference.last_row_attention(eager, 1, inputs)
    for b, row in enumerate(trace.layout.rows):
        best = received[b, row.position].topk(5).indices.sort().values
        assert trace.stages[0].rows[b].kept.tolist() == best.tolist()


@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "video_llava", "qwen2_5_vl", "idefics3", "internvl", "gemma3"]
)
def test_beams(family: str) -> None:
    """Rows are repeated for beams, pictures are not."""
    options: dict[str, Any] = {"num_beams": 3}
    model, inputs = tiny(family, 2)
    pruner = get("fastv")(**METHODS["fastv"])
    with pruner(model) as run:
        tokens = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **options)
    assert run.trace is not None
    assert len(run.trace.layout.rows) == 6
    eager, _ = tiny(family, 2, "eager")
    with replayed(eager, pruner, run.trace, inputs["attention_mask"].repeat_interleave(3, 0)):
        expected = eager.generate(**inputs, max_new_tokens=STEPS, do_sample=False, use_cache=False, **options)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "mistral3"])
def test_bfloat16(family: str) -> None:
    model, inputs = tiny(family, 3, dtype=torch.bfloat16)
    _, dense = greedy(model, inputs)
    with get("fastv")(keep=10**6, layer=2)(model):
        _, same = greedy(model, inputs)
    assert torch.equal(dense, same)
    with get("fastv")(**METHODS["fastv"])(model) as run:
        _, pruned = greedy(model, inputs)
    assert run.trace is not None
    assert all(len(row.kept) == 5 for row in run.trace.stages[0].rows)
    assert bool(pruned.isfinite().all())


@pytest.mark.parametrize("family", families())
def test_model_is_as_before_afterwards(family: str) -> None:
    model, inputs = tiny(family)
    _, before = greedy(model, inputs, 2)
    attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    layout = {"layout": layout_of(inputs)} if family == "llama" else {}
    with get("sparsevlm")(**METHODS["sparsevlm"])(model, **layout):
        greedy(model, inputs, 2)
    _, after = greedy(model, inputs, 2)
    assert torch.equal(before, after)
    assert attributes == {n: sorted(m.__dict__) for n, m in model.named_modules()}
