"""The oracle can say no: an engine that is wrong in one place fails the matrix, whichever place it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from evengaze.engine import cache as kv
from evengaze.engine import decode, prefill
from evengaze.engine.masks import take
from evengaze.engine.prefill import Prefill
from evengaze.engine.rows import Cut
from evengaze.models import deepstack
from evengaze.testing.matrix import Cell, Result, check

Patch = Callable[[pytest.MonkeyPatch], None]


def planned(change: Callable[[Cut], Cut]) -> Patch:
    """Another plan of what survives than the one that the trace tells."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = prefill.cut
        monkeypatch.setattr(prefill, "cut", lambda *args, **options: change(original(*args, **options)))

    return patch


def method(owner: Any, name: str, wrong: Callable[..., Any]) -> Patch:
    """`wrong(original, *args)` in place of a function."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: wrong(original, *args, **options))

    return patch


def _next_row(plan: Cut) -> Cut:
    """The state of a neighbour in the place of one survivor."""
    source = plan.source.clone()
    source[:, source.shape[1] // 2] += 1
    return replace(plan, source=source)


def _one_further(original: Any, self: Prefill, before: Any, name: str, value: Any, hidden: Tensor) -> Any:
    """Positions of the tokens behind the survivors."""
    if self.slots is None or not (isinstance(value, tuple) and isinstance(value[0], Tensor)):
        return original(self, before, name, value, hidden)
    return tuple(take(part, (self.slots + 1).clamp(max=self.length - 1), -2) for part in value)


def _compact(original: Any, self: Prefill, before: Any, name: str, value: Any, hidden: Tensor) -> Any:
    """Positions without gaps, where they are to stay."""
    if self.slots is None or not (isinstance(value, tuple) and isinstance(value[0], Tensor)):
        return original(self, before, name, value, hidden)
    index = torch.arange(self.slots.shape[1]).expand_as(self.slots)
    return tuple(take(part, index, -2) for part in value)


def _fillers_seen(original: Any, mask: Any, layer: Any, old: Any, hidden: Tensor, how: str, **options: Any) -> Any:
    return original(mask, layer, old, hidden, how, **{**options, "real": None})


def _later_columns(original: Any, self: Any, layer: int, args: Any, kwargs: Any, cache: Any) -> Any:
    """In decoding, the mask of the first tokens, as if those had been kept."""
    whole = kwargs.get("attention_mask")
    found = original(self, layer, args, dict(kwargs), cache)
    if found is None or whole is None:
        return found
    return found[0], {**found[1], "attention_mask": whole[..., : found[1]["attention_mask"].shape[-1]]}


def _unmerged(original: Any, hidden: Tensor, out: Tensor, *args: Any) -> Tensor:
    return out


def _first_features(original: Any, mask: Tensor, features: Tensor, kept: Tensor | None) -> Any:
    """Features of a picture's first tokens on those that are left."""
    if kept is None:
        return original(mask, features, kept)
    mask = mask.gather(1, kept)
    return mask, features[: int(mask.sum())]


WRONG: dict[str, tuple[Patch, Cell]] = {
    "a neighbour's state": (planned(_next_row), Cell("vipllava", "fastv", "sdpa", 1)),
    "a neighbour's state, cut before the decoder": (planned(_next_row), Cell("glm4v", "divprune", "eager", 1)),
    "positions off by one": (
        method(Prefill, "_positions", _one_further),
        Cell("vipllava", "fastv", "sdpa", 1),
    ),
    "positions without gaps": (method(Prefill, "_positions", _compact), Cell("qwen3_5", "fastv", "sdpa", 1)),
    "fillers are attended to": (
        method(kv, "cut_mask", _fillers_seen),
        Cell("vipllava", "fastv", "sdpa", 3, images=(2, 0, 1)),
    ),
    "fillers in the middle of a recurrent row": (
        method(prefill, "cut", lambda original, *args, front, **options: original(*args, front=False, **options)),
        Cell("qwen3_5", "fastv", "sdpa", 3, images=(2, 0, 1)),
    ),
    "fillers go into the state": (
        method(Prefill, "_alive", lambda original, self, device: None),
        Cell("lfm2_vl", "fastv", "sdpa", 3, images=(2, 0, 1)),
    ),
    "columns of other tokens while decoding": (
        method(decode.Steps, "arguments", _later_columns),
        Cell("vipllava", "fastv", "sdpa", 3, images=(2, 0, 1)),
    ),
    "no merging": (method(prefill, "_merged", _unmerged), Cell("vipllava", "sparsevlm", "sdpa", 1)),
    "caches below a stage keep what was dropped": (
        method(Prefill, "_trim_below", lambda original, self, layer, device: None),
        Cell("vipllava", "tokencarve", "sdpa", 1),
    ),
    "deepstack features of other tokens": (
        method(deepstack, "_left", _first_features),
        Cell("qwen3_omni_moe_thinker", "divprune", "sdpa", 1),
    ),
    "deepstack features of other tokens, added inside of the decoder": (
        method(deepstack, "_left", _first_features),
        Cell("granite4_vision", "divprune", "sdpa", 1),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_engine_fails(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, cell = WRONG[what]
    options = {"images": cell.images}
    arguments = (cell.family, cell.method, cell.attention, cell.batch)
    assert check(*arguments, **options).passed
    patch(monkeypatch)
    result = check(*arguments, **options)
    assert isinstance(result, Result)
    assert result.dense  # with everything kept it is not asked
    assert not result.passed, f"the oracle agrees with {what}: {result}"
    assert not result.tokens or result.distance > 5e-4
