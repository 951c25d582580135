"""A model that was never tried is looked at when it reads its first prompt; what does not hold is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evengaze.errors import UnsupportedModelError
from evengaze.methods import get
from evengaze.models import find_decoder
from evengaze.testing import tiny
from evengaze.testing.matrix import greedy

FAMILY = "vipllava"
PRUNER = {"keep": 5, "layer": 2}


def decoder_of(model: Any) -> Any:
    return find_decoder(model)


def test_a_decoder_that_gives_back_another_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(FAMILY)
    norm = decoder_of(model).norm
    original = norm.forward
    monkeypatch.setattr(norm, "forward", lambda states: torch.cat([original(states), original(states[:, -1:])], 1))
    with (
        pytest.raises(
            UnsupportedModelError, match=r"'vipllava' model did not go as pruning needs: the decoder returned"
        ),
        get("fastv")(**PRUNER)(model),
    ):
        greedy(model, inputs, 2)


def test_layers_that_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(FAMILY)
    layers = decoder_of(model).layers
    original = layers[5].forward

    def twice(states: torch.Tensor, **kwargs: Any) -> Any:
        monkeypatch.setattr(layers[5], "forward", original)
        return layers[5](original(states, **kwargs), **kwargs)

    monkeypatch.setattr(layers[5], "forward", twice)
    with pytest.raises(UnsupportedModelError, match=r"layers ran|holds"), get("fastv")(**PRUNER)(model):
        greedy(model, inputs, 2)


def test_features_added_inside_the_loop_name_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that adds features to placeholders between its layers, by a mask over the whole prompt."""
    model, inputs = tiny(FAMILY)
    layers = decoder_of(model).layers
    mask = inputs["input_ids"] == 290
    original = layers[3].forward

    def adding(states: torch.Tensor, **kwargs: Any) -> Any:
        if states.shape[1] > 1:
            states = states.clone()
            states[mask] += 1
        return original(states, **kwargs)

    monkeypatch.setattr(layers[3], "forward", adding)
    with pytest.raises(IndexError) as caught, get("fastv")(**PRUNER)(model):
        greedy(model, inputs, 2)
    assert any("first prompt of a 'vipllava' model" in note for note in caught.value.__notes__)


def test_only_the_last_token_of_a_forward() -> None:
    model, inputs = tiny("gemma4_e")
    with torch.no_grad(), get("fastv")(**PRUNER)(model):
        whole = model(**inputs).logits
        last = model(**inputs, logits_to_keep=1).logits
    assert last.shape[1] == 1
    torch.testing.assert_close(whole[:, -1:], last, atol=1e-4, rtol=1e-4)
