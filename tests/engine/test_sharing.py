"""Layers that attend to the keys of earlier ones (Gemma 4 E-models, Gemma 3n)."""

from __future__ import annotations

import pytest
import torch

from evengaze.engine.sharing import Fold, lenders
from evengaze.errors import ConfigError
from evengaze.methods import get
from evengaze.models import find_decoder
from evengaze.testing import tiny
from evengaze.testing.matrix import METHODS, greedy


def test_who_borrows_from_whom() -> None:
    model, _ = tiny("gemma4_e")
    decoder = find_decoder(model)
    found = lenders(list(decoder.get_submodule("layers").children()), decoder.config)
    assert found == {7: 5, 8: 6, 9: 5, 10: 6, 11: 5}


def test_tokens_cannot_leave_behind_a_lender() -> None:
    model, _ = tiny("gemma4_e")
    with pytest.raises(ConfigError, match=r"cannot leave at layer 8.*The last layer that works is 5"):
        get("fastv")(keep=5, layer=8)(model)


def test_default_layers_move_in_front_of_the_lenders() -> None:
    model, inputs = tiny("gemma4_e")
    with get("pyramiddrop")(keep=(4, 3, 2))(model) as run:
        greedy(model, inputs, 2)
    assert run.trace is not None
    at = [stage.layer for stage in run.trace.stages]
    assert len(at) == 3
    assert max(at) <= 5


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_static_buffers(method: str) -> None:
    model, inputs = tiny("gemma4_e", 2)
    with get(method)(**METHODS[method])(model):
        tokens, logits = greedy(model, inputs)
        static, same = greedy(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(tokens, static)
    torch.testing.assert_close(logits, same, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(2, 7, 4), (3, 2, 7, 4), (2, 7, 3, 4)])
def test_states_fold_and_unfold(shape: tuple[int, ...]) -> None:
    states = torch.randn(shape)
    fold = Fold(states.shape, 2, 7)
    flat = fold.flat(states)
    assert flat.shape[:2] == (2, 7)
    assert torch.equal(fold.back(flat), states)
