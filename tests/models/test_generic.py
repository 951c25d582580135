"""Families that only the generic adapter serves: a quick part of the matrix, and what it sees."""

from __future__ import annotations

import pytest
import torch
import transformers

import reference
from evengaze.errors import UnsupportedModelError
from evengaze.methods import get
from evengaze.models import BUILT_IN, Call, adapter_for
from evengaze.models.base import EncoderCall
from evengaze.models.features import encoded_pictures, newlines
from evengaze.models.generic import Generic
from evengaze.models.inspect import diagnose
from evengaze.testing import families, tiny
from evengaze.testing.matrix import METHODS, check, greedy
from evengaze.testing.models import bare, layout_of

NAMES = families(generic=True)
VIDEOS = families(generic=True, video=True)


@pytest.mark.parametrize("family", NAMES)
def test_a_batch_of_unlike_rows(family: str) -> None:
    """Two pictures, text only, one picture; the methods take turns, `python -m evengaze.testing.matrix` runs all."""
    method = list(METHODS)[NAMES.index(family) % len(METHODS)]
    result = check(family, method, "eager", 3, images=[2, 0, 1])
    assert result.passed, result


def _unable(family: str) -> str | None:
    """Why a release cannot do a family's videos by itself."""
    try:
        model, inputs = tiny(family, video=True)
        (_, cached), (_, whole) = greedy(model, inputs, 2), greedy(model, inputs, 2, use_cache=False)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None if torch.allclose(cached, whole, atol=1e-2) else "answers differ with and without a cache"


def _needs_videos(family: str) -> None:
    """Skip a test where an older release cannot do a family's videos by itself."""
    if not transformers.__version__.startswith("5.24"):
        reason = _unable(family) if family in VIDEOS else "it has no such type"
        if reason:
            pytest.skip(f"transformers {transformers.__version__}, {family} unpruned: {reason}")


@pytest.mark.parametrize("family", VIDEOS)
def test_videos(family: str) -> None:
    _needs_videos(family)
    result = check(family, "fastv", "sdpa", 2, video=True)
    assert result.passed, result


@pytest.mark.parametrize("family", [name for name in NAMES if not bare(name)])
def test_every_placeholder_is_a_candidate_or_a_newline(family: str) -> None:
    model, inputs = tiny(family, 2)
    assert family in BUILT_IN or isinstance(adapter_for(model), Generic)
    with get("fastv")(keep=10**6, layer=2)(model) as run:
        greedy(model, inputs, 1)
    assert run.trace is not None
    for row, ids in zip(run.trace.layout.rows, inputs["input_ids"], strict=True):
        placed = (ids == 290).nonzero()[:, 0].tolist()
        assert set(row.position.tolist()) <= set(placed)
        assert len(row) == sum(i.cells * i.frames for i in row.images)
        assert bool((row.x >= 0).all()) and bool((row.x < 1).all())


@pytest.mark.parametrize("family", NAMES)
def test_fastv_keeps_what_eager_attention_says(family: str) -> None:
    """The oracle replays a selection; here it is decided again, from the weights that eager attention returns."""
    model, inputs = tiny(family, 2)
    layout = {"layout": layout_of(inputs)} if bare(family) else {}
    with get("fastv")(keep=5, layer=2)(model, **layout) as run:
        greedy(model, inputs, 1)
    assert run.trace is not None
    eager, _ = tiny(family, 2, "eager")
    received = reference.last_row_attention(eager, 1, inputs)
    for b, row in enumerate(run.trace.layout.rows):
        best = received[b, row.position].topk(5).indices.sort().values
        assert run.trace.stages[0].rows[b].kept.tolist() == best.tolist()


def test_newlines_are_seen_by_their_equal_features() -> None:
    features = torch.randn(12, 8)
    assert newlines(features) == 0
    features[3::4] = features[3]
    assert newlines(features) == 3
    assert newlines(torch.ones(12, 8)) == 0  # a blank picture


def _call(count: int, **arguments: object) -> EncoderCall:
    return EncoderCall("image", arguments, torch.randn(count, 8))


@pytest.mark.parametrize(
    ("arguments", "count", "grid"),
    [
        ({"image_grid_thw": torch.tensor([[1, 8, 6]])}, 12, (4, 3)),
        ({"image_grid_thw": torch.tensor([[1, 8, 6]])}, 4 * 4 + 2, None),
        ({"image_sizes": torch.tensor([[112, 56]])}, 32, (8, 4)),
        ({"spatial_shapes": torch.tensor([[4, 6]])}, 6, (2, 3)),
        ({}, 16, (4, 4)),
        ({}, 15, (1, 15)),
    ],
)
def test_grids(arguments: dict[str, object], count: int, grid: tuple[int, int] | None) -> None:
    call = _call(count, **arguments)
    (picture,) = encoded_pictures(call, torch.ones(1, count, dtype=torch.bool))
    assert len(picture) == count
    if grid is not None:
        assert picture.images[0].grid == grid


def test_a_blank_picture_has_no_newlines() -> None:
    """All of its features may be alike: a grid that the encoder was told says what they are."""
    call = EncoderCall("image", {"image_grid_thw": torch.tensor([[1, 6, 4]])}, torch.ones(6, 8))
    (picture,) = encoded_pictures(call, torch.ones(1, 6, dtype=torch.bool))
    assert picture.images[0].grid == (3, 2)
    assert picture.cell.tolist() == list(range(6))


def test_beams_do_not_mix_the_tiles_of_rows() -> None:
    """Two, one and three tiles a row, each row twice: a picture has the tiles that stand side by side in its own."""
    tiles, times = (2, 1, 3), 2
    call = EncoderCall("image", {}, [torch.randn(16, 8) for _ in range(sum(tiles))])
    ids = torch.zeros(len(tiles) * times, 60, dtype=torch.long)
    for b, n in enumerate(t for t in tiles for _ in range(times)):
        ids[b, 2 : 2 + 16 * n] = 290
    model, _ = tiny("got_ocr2")
    found = Generic().layout(model, Call(ids, None, 0, [call]))
    assert found is not None
    assert [[i.frames for i in row.images] for row in found.rows] == [[n] for n in tiles for _ in range(times)]


def test_videos_that_the_model_prunes_by_itself_are_refused() -> None:
    _needs_videos("nemotron_h_omni")
    model, inputs = tiny("nemotron_h_omni", video=True)
    _, pictures = tiny("nemotron_h_omni")
    model.video_pruning_rate = 0.5
    with get("fastv")(keep=5, layer=2)(model) as run:
        with pytest.raises(UnsupportedModelError, match=r"drops 50% of their tokens.*video_pruning_rate = 0"):
            greedy(model, inputs, 1)
        greedy(model, pictures, 1)  # pictures it does not prune
        assert run.trace is not None
        model.video_pruning_rate = 0
        greedy(model, inputs, 1)


@pytest.mark.skipif("nemotron_h_omni" not in NAMES, reason=f"transformers {transformers.__version__} has no such type")
def test_doctor_says_which_videos_are_refused() -> None:
    model, _ = tiny("nemotron_h_omni")
    assert not any(line.startswith("videos:") for line in diagnose(model.config).cannot)
    model.config.video_pruning_rate = 0.5
    assert any(line.startswith("videos: the model drops 50%") for line in diagnose(model.config).cannot)


def test_beams_of_videos_on_the_placeholders_of_pictures() -> None:
    _needs_videos("nemotron_h_omni")
    model, inputs = tiny("nemotron_h_omni", 2, video=True)
    with get("fastv")(keep=10**6, layer=2)(model) as run:
        model.generate(**inputs, max_new_tokens=1, num_beams=2)
    assert run.trace is not None
    assert [[i.frames for i in row.images] for row in run.trace.layout.rows] == [[2]] * 4
