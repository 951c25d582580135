"""A pruner that lets a method rank at any layers of one pass and drops nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from evengaze.errors import ConfigError
from evengaze.methods.base import Pruner
from evengaze.protocol import Selection, Stage, View

Sink = Callable[[int, View, Tensor], None]


@dataclass(frozen=True)
class Observer(Pruner):
    """Lets a method score at chosen layers and keeps all tokens.

    Attributes:
        inner: the method; its first stage says whose attention is read.
        layers: 0-based layers whose attention is ranked by, ascending.
        sink: called with the index into `layers`, a view of one row and its raw scores (n,).
    """

    inner: Pruner = field(kw_only=True)
    layers: tuple[int, ...] = field(kw_only=True)
    sink: Sink = field(kw_only=True, compare=False)

    name: ClassVar[str] = "observer"

    def stages(self, layers: int) -> Sequence[Stage]:
        """One for each observed layer."""
        first = first_stage(self.inner, layers)
        after = int(first.attention == "previous")
        return [Stage(layer + after, first.attention) for layer in self.layers]

    def score(self, view: View) -> Tensor:
        """What the method's first stage would score here."""
        inside = replace(view, stage=0, sources=view.sources[:1])
        # `select` prepares what some methods need for scoring; one that keeps everything anyway does not score in it.
        chosen = self.inner.select(inside)
        if any(selection.raw is None for selection in chosen):
            return self.inner.ranked(inside).raw
        raw = torch.empty(len(view.rows), len(view), device=view.hidden.device)
        for selection in chosen:
            assert selection.raw is not None
            raw[torch.tensor(selection.rows or range(len(view.rows)))] = selection.raw
        return raw

    def budget(self, stage: int, current: int, original: int) -> int:
        """All."""
        return current

    def select(self, view: View) -> Sequence[Selection]:
        """Score, report row by row, keep all."""
        score = self.score(view)
        for one, values in zip(view.split(), score, strict=True):
            self.sink(view.stage, one, values)
        return [replace(Selection.everything(view), raw=score)]

    def to_dict(self) -> dict[str, Any]:
        """The parameters as JSON-able values."""
        return {"method": self.name, "inner": self.inner.to_dict(), "layers": list(self.layers)}


def first_stage(method: Pruner, layers: int) -> Stage:
    """The stage that debiasing applies to.

    Raises:
        ConfigError: the method does not rank visual tokens by attention from text, or not all of them.
    """
    stages, ranked = method.stages(layers), method.ranked_stages(layers)
    if not ranked:
        raise ConfigError(f"{method.name} does not rank by attention from text: there is no trend to calibrate")
    if stages[0] != ranked[0]:
        raise ConfigError(
            f"{method.name} drops tokens before text first ranks them, so that the trend over all of them cannot be "
            "observed. Calibrate it without that stage (illava: without vision_layers); the curve serves with it, too."
        )
    return stages[0]


def first_layer(method: Pruner, layers: int) -> int:
    """The 0-based layer whose attention `first_stage` reads."""
    layer = first_stage(method, layers).attended
    assert layer is not None
    return layer
