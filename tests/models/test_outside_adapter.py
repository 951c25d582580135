"""A family from outside: the adapter that CONTRIBUTING shows, run as it stands there, on a model that nobody knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from evengaze.methods import get
from evengaze.models import adapter_for, registry
from evengaze.models.generic import Generic
from evengaze.testing import tiny
from evengaze.testing.matrix import METHODS, TOLERANCE, greedy
from evengaze.testing.oracle import replayed

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


class KaleidoConfig(LlavaConfig):
    model_type = "kaleido"


class KaleidoForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = KaleidoConfig


def shown() -> str:
    (code,) = (c for c in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S) if "Adapter" in c)
    return str(code)


def kaleido(attention: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny model of a type that transformers does not have."""
    model, inputs = tiny("llava", 3, attention, images=[2, 0, 1])
    model.__class__, model.config.__class__ = KaleidoForConditionalGeneration, KaleidoConfig
    model.config.model_type = "kaleido"
    return model, inputs


def test_it_is_short() -> None:
    assert len([line for line in shown().splitlines() if line.strip()]) < 30


@pytest.mark.parametrize("method", METHODS)
def test_it_prunes_exactly(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    model, inputs = kaleido("sdpa")
    before = adapter_for(model)
    assert isinstance(before, Generic)  # which serves it already, with the same tokens
    exec(compile(shown(), str(PAGE), "exec"), {"__name__": "kaleido"})
    assert adapter_for(model).name == "Kaleido"
    pruner = get(method)(**METHODS[method])
    with pruner(model) as run:
        tokens, logits = greedy(model, inputs)
    assert run.trace is not None
    assert [[image.grid for image in row.images] for row in run.trace.layout.rows] == [[(4, 4)] * 2, [], [(4, 4)]]
    eager, _ = kaleido("eager")
    with replayed(eager, pruner, run.trace, inputs["attention_mask"]):
        expected, oracle = greedy(eager, inputs, use_cache=False)
    assert torch.equal(tokens, expected)
    assert float((logits - oracle).abs().max()) < TOLERANCE * float(oracle.abs().max())
