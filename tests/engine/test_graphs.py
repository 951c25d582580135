"""Graphs between stages: exact for other pictures and lengths, refused by name where they cannot be.

A CPU captures nothing: a stand-in runs the captured function again, on its own copies of the inputs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import evengaze as eg
from evengaze.compat import cache_of
from evengaze.engine import segments
from evengaze.errors import ConfigError
from evengaze.methods import parse
from evengaze.testing import layout_of, tiny

METHODS = [
    "dense",
    "fastv:keep=5",
    "pyramiddrop:keep=[0.5,0.25],layers=[2,4]",
    "sparsevlm:keep=[6,3],layers=[1,3]",
    "himap:keep=[6,3],layers=[2,3]",
    "tokencarve:keep=5",
    "illava:keep=5,layer=2",
    "divprune:keep=5",
    "visionzip:keep=5",
]


class Replay:
    """Runs the function again in its own buffers, and poisons what an earlier call returned."""

    made = 0

    def __init__(self, function: Any, inputs: Any, pool: Any) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._function, self._last = function, None
        type(self).made += 1

    def __call__(self, inputs: Any) -> Any:
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        if self._last is not None:
            states = self._last.hidden if isinstance(self._last, segments._Result) else None
            if isinstance(states, torch.Tensor):
                states.fill_(float("nan"))  # a graph's buffers are written over
        self._last = self._function(self._inputs)
        return self._last

    @staticmethod
    def pool() -> None:
        return None


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "recorder", lambda model: Replay)


def prefill(model: Any, inputs: Any) -> list[torch.Tensor]:
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    return [out.logits, *(t for layer in cache_of(out).layers for t in (layer.keys, layer.values))]


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_replayed_prefills_are_the_engines_bit_for_bit(method: str, batch: int, family: str) -> None:
    if family == "llama" and method.startswith("visionzip"):
        pytest.skip("no tower")
    model, first = tiny(family, batch)
    _, second = tiny(family, batch, seed=5)
    layout = layout_of(first) if family == "llama" else None
    with torch.inference_mode():
        with parse(method)(model, layout=layout):
            expected = [prefill(model, first), prefill(model, second)]
        with parse(method)(model, layout=layout, graphs=True) as run:
            found = [prefill(model, x) for x in (first, first, first, second, first)]
            counts = run._segments.counts
        again = prefill(model, first)
    for got, number in zip(found, (0, 0, 0, 1, 0), strict=True):
        assert len(got) == len(expected[number])
        assert all(torch.equal(a, b) for a, b in zip(got, expected[number], strict=True))
    assert counts["replayed"] >= 4 * max(1, counts["plain"]) - 1 and counts["captured"] >= counts["plain"] > 0
    model_again, _ = tiny(family, batch)
    with torch.inference_mode():
        assert torch.equal(again[0], prefill(model_again, first)[0])  # nothing is left behind


@pytest.mark.parametrize("method", ["fastv:keep=5", "pyramiddrop:keep=[0.5,0.25],layers=[2,4]", "tokencarve:keep=5"])
def test_generations_and_second_turns(method: str) -> None:
    model, inputs = tiny("llava", 2)
    options = {"max_new_tokens": 5, "do_sample": False}
    with parse(method)(model):
        expected = model.generate(**inputs, **options)
    with parse(method)(model, graphs=True) as run:
        for _ in range(3):
            assert torch.equal(model.generate(**inputs, **options), expected)
        assert run._segments.counts["replayed"]
        out = model.generate(**inputs, **options, return_dict_in_generate=True)
        longer = torch.cat([out.sequences, torch.full((2, 3), 9)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
        replayed = run._segments.counts["replayed"]
        turn = {"input_ids": longer, "attention_mask": mask, **options}
        second = model.generate(**turn, past_key_values=cache_of(out)) if _named("past_key_values", model) else None
        assert run._segments.counts["replayed"] == replayed  # further turns run as ever
    if second is not None:
        with parse(method)(model):
            out = model.generate(**inputs, **options, return_dict_in_generate=True)
            assert torch.equal(model.generate(**turn, past_key_values=cache_of(out)), second)


def _named(name: str, model: Any) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters


def test_what_graphs_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny("llava")
    with eg.FastV(keep=5)(model, graphs=True), pytest.raises(ConfigError, match="gradients"):
        model(**inputs)
    gemma, inputs = tiny("gemma3")
    handle = eg.FastV(keep=5, layer=4)(gemma, graphs=True)
    with torch.inference_mode(), handle, pytest.raises(ConfigError, match="between its layers"):
        gemma(**inputs)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="CUDA"):
        eg.FastV(keep=5)(model, graphs=True)
    with torch.inference_mode():
        model(**tiny("llava")[1])  # nothing stays attached


def test_the_number_of_graphs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SHAPES", 3)
    model, _ = tiny("llama")
    with torch.inference_mode():
        for length in range(3):
            _, inputs = tiny("llama", seed=length)
            ids = torch.cat([inputs["input_ids"], torch.full((1, length), 7)], 1)
            with eg.FastV(keep=5)(model, layout=layout_of(inputs), graphs=True) as run:
                for extra in range(4):
                    longer = torch.cat([ids, torch.full((1, extra), 9)], 1)
                    for _ in range(2):
                        model(input_ids=longer)
                assert len(run._segments._graphs) <= 3
