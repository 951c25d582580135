"""Decoders some of whose layers carry a state instead of attending: Qwen3.5, LFM2-VL, Nemotron-H."""

from __future__ import annotations

import warnings

import pytest
import torch

from evengaze.errors import ConfigError
from evengaze.layout import VisualLayout
from evengaze.methods import get
from evengaze.models import find_decoder
from evengaze.models.base import attending_layers
from evengaze.testing import tiny
from evengaze.testing.matrix import METHODS, STEPS, TOLERANCE, greedy
from evengaze.testing.oracle import replayed

HYBRIDS = ("qwen3_5", "lfm2_vl")


@pytest.mark.parametrize("family", HYBRIDS)
def test_ranking_by_a_layer_without_attention_names_the_nearest_that_has_it(family: str) -> None:
    model, _ = tiny(family)
    able = attending_layers(find_decoder(model).get_submodule("layers").children())
    assert able == (1, 3, 5)
    with pytest.raises(
        ConfigError, match=r"attention of layer 2, which has none.*nearest layer that works is 4;.*1, 3, 5"
    ):
        get("fastv")(keep=5, layer=3)(model)
    with pytest.raises(ConfigError, match="nearest layer that works is 3"):
        get("pyramiddrop")(keep=(5, 3), layers=(2, 5))(model)


@pytest.mark.parametrize(
    ("method", "changes", "stages"),
    [
        ("fastv", {"keep": 5}, [4]),
        ("pyramiddrop", {"keep": 0.5}, [3, 7, 11]),
        ("sparsevlm", {"keep": (9, 6, 3)}, [4, 8]),
    ],
)
def test_default_layers_move_to_where_the_decoder_attends(method: str, changes: dict, stages: list[int]) -> None:
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 4
    model, inputs = tiny("qwen3_5", num_hidden_layers=16, layer_types=kinds)
    with get(method)(**changes)(model) as run:
        greedy(model, inputs, 2)
    assert run.trace is not None
    found = [stage.layer for stage in run.trace.stages]
    assert found[: len(stages)] == stages
    assert run.pruner.to_dict() == run.trace.pruner


def test_layers_that_nobody_chose_move_to_where_no_window_hides_tokens() -> None:
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 3
    model, inputs = tiny("gemma3", num_hidden_layers=18, layer_types=kinds, sliding_window=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with get("pyramiddrop")(keep=0.5)(model) as run:
            greedy(model, inputs, 2)
    assert run.trace is not None
    assert [stage.layer for stage in run.trace.stages] == [5, 11, 17]
    with pytest.warns(UserWarning, match="which see only the last 12"), get("fastv")(keep=5, layer=2)(model) as run:
        greedy(model, inputs, 2)
    assert run.trace.stages[0].layer == 2


def test_too_few_layers_that_attend_are_an_error() -> None:
    model, _ = tiny("qwen3_5", layer_types=["linear_attention"] * 5 + ["full_attention"])
    with pytest.raises(ConfigError, match="only 5 can rank"):
        get("pyramiddrop")(keep=0.5)(model)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_layout_by_hand_in_a_ragged_batch(family: str) -> None:
    """Fillers must not get into the state, however it is known where the pictures are."""
    model, inputs = tiny(family, 3, images=[1, 0, 2])
    tables = [[(a, b) for a, b in _runs(ids)] for ids in inputs["input_ids"]]
    grids = [(1, b - a) for row in tables for a, b in row]
    layout = VisualLayout(
        tuple(
            VisualLayout.from_spans([row or None], [(1, b - a) for a, b in row] or [(1, 1)]).rows[0] for row in tables
        )
    )
    assert len(set(grids)) > 1
    pruner = get("fastv")(**METHODS["fastv"])
    with pruner(model, layout=layout) as run:
        tokens, logits = greedy(model, inputs)
    assert run.trace is not None
    again, _ = tiny(family, 3, "eager", images=[1, 0, 2])
    with replayed(again, pruner, run.trace, inputs["attention_mask"]):
        expected, oracle = greedy(again, inputs, use_cache=False)
    assert torch.equal(tokens, expected)
    assert float((logits - oracle).abs().max() / oracle.abs().max()) < TOLERANCE
    assert tokens.shape[1] == STEPS


def _runs(ids: torch.Tensor) -> list[tuple[int, int]]:
    edge = torch.nn.functional.pad((ids == 290).int(), (1, 1)).diff()
    return list(zip((edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist(), strict=True))


def test_a_row_alone_answers_as_in_a_batch() -> None:
    model, inputs = tiny("qwen3_5", 3)
    pruner = get("fastv")(**METHODS["fastv"])
    with pruner(model):
        _, together = greedy(model, inputs)
    alone, single = tiny("qwen3_5", 1)
    with pruner(alone):
        _, first = greedy(alone, single)
    assert float((together[0] - first[0]).abs().max()) < 1e-4


@pytest.mark.parametrize("method", ["fastv", "sparsevlm", "divprune"])
@pytest.mark.parametrize("family", [*HYBRIDS, "nemotron_h_omni"])
def test_a_forward_on_rows_padded_at_their_right(family: str, method: str) -> None:
    """As in training: a state has read all of a row before it comes to the padding."""
    pruner = get(method)(**METHODS[method])
    model, inputs = tiny(family, 3, side="right", images=[2, 0, 1])
    left, same = tiny(family, 3, side="left", images=[2, 0, 1])
    with torch.no_grad(), pruner(model), pruner(left):
        found, expected = model(**inputs).logits, left(**same).logits
    for b, row in enumerate(inputs["attention_mask"]):
        difference = float((found[b, int(row.sum()) - 1] - expected[b, -1]).abs().max())
        assert difference < TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("family", HYBRIDS)
def test_generate_on_rows_padded_at_their_right_says_why_not(family: str) -> None:
    model, inputs = tiny(family, 3, side="right", images=[2, 0, 1])
    with get("fastv")(keep=5, layer=2)(model), pytest.raises(ConfigError, match="read the padding before the answer"):
        greedy(model, inputs)
