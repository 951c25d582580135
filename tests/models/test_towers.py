"""Methods that read or cut the vision tower, in the families whose patches are their visual tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evengaze.errors import UnsupportedModelError
from evengaze.methods import get, parse
from evengaze.models import adapter_for
from evengaze.testing import families, tiny
from evengaze.testing.matrix import TOLERANCE, greedy
from evengaze.testing.oracle import replayed

CASES = [("llava", False), ("video_llava", False), ("video_llava", True), ("paligemma", False)]


def class_attention(model: Any, inputs: dict[str, torch.Tensor], video: bool) -> torch.Tensor:
    """(pictures, patches) attention from the class token, or from all patches, in the layer that makes the features.

    From the weights that eager attention returns.
    """
    tower = adapter_for(model).vision_tower(model, "video" if video else "image")
    weights: list[torch.Tensor] = []
    attention = tower.layers[tower.output - 1].self_attn
    handle = attention.register_forward_hook(lambda m, a, out: weights.append(out[1]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    rows = weights[0].mean(1)
    return rows[:, 0, 1:] if tower.special else rows.mean(1)


@pytest.mark.parametrize(("family", "video"), CASES)
def test_visionzip_reads_the_tower(family: str, video: bool) -> None:
    model, inputs = tiny(family, 2, video=video)
    pruner = parse("visionzip:keep=5")
    with pruner(model) as run:
        tokens, logits = greedy(model, inputs)
    assert run.trace is not None
    eager, _ = tiny(family, 2, "eager", video=video)
    expected = class_attention(eager, inputs, video).reshape(2, -1)
    for b, row in enumerate(run.trace.stages[0].rows):
        assert row.kept.tolist() == expected[b].topk(5).indices.sort().values.tolist()
    with replayed(eager, pruner, run.trace, inputs["attention_mask"]):
        same, oracle = greedy(eager, inputs, use_cache=False)
    assert torch.equal(tokens, same)
    assert float((logits - oracle).abs().max() / oracle.abs().max()) < TOLERANCE


@pytest.mark.parametrize(("family", "video"), CASES)
def test_illava_drops_patches_in_the_tower(family: str, video: bool) -> None:
    model, inputs = tiny(family, 2, video=video)
    _, before = greedy(model, inputs, 2)
    with get("illava")(keep=0.5, vision_layers=(0, 1), vision_drop=0.25)(model) as run:
        _, pruned = greedy(model, inputs, 2)
    assert run.trace is not None
    frames = 8 if video else 1
    assert all(len(row.kept) == 9 * frames for row in run.trace.stages[0].rows)  # 16, 12, 9 patches of each picture
    assert all(len(row.kept) == 9 * frames - round(4.5 * frames) for row in run.trace.stages[1].rows)
    assert not torch.equal(before, pruned)
    _, after = greedy(model, inputs, 2)
    assert torch.equal(before, after)


def test_illava_drops_from_each_picture_alone() -> None:
    model, inputs = tiny("llava", images=2)
    pruner = parse("illava:keep=1.0,vision_layers=[0],vision_drop=4")
    with pruner(model) as run:
        greedy(model, inputs, 2)
    assert run.trace is not None
    kept = run.trace.stages[0].rows[0].kept
    assert [int((kept < 16).sum()), int((kept >= 16).sum())] == [12, 12]
    assert pruner.budget(0, 16, 16) == 12  # one picture's


@pytest.mark.parametrize("method", ["visionzip:keep=5", "illava:vision_layers=[0,1],vision_drop=0.25"])
def test_encoding_pictures_in_between_disturbs_nothing(method: str) -> None:
    model, inputs = tiny("llava", 2)
    pixels = inputs["pixel_values"]
    with parse(method)(model), torch.no_grad():
        expected = greedy(model, inputs)[1]
        for others in (pixels[:1].flip(-1), pixels.flip(0)):
            model.get_image_features(pixel_values=others)
            assert torch.equal(greedy(model, inputs)[1], expected)
            model.get_image_features(pixel_values=others)
            assert torch.allclose(model(**inputs).logits[:, -1], expected[:, 0], atol=1e-4)


@pytest.mark.parametrize("family", [f for f in families() if f not in ("llama", "llava", "video_llava", "paligemma")])
def test_refused_with_the_reason(family: str) -> None:
    model, _ = tiny(family)
    with pytest.raises(UnsupportedModelError, match="Prune in the decoder instead"):
        parse("visionzip:keep=5")(model)
