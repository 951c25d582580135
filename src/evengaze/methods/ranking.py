"""From raw scores to a ranking: the debiasing steps for many rows at once, without asking a device for values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from evengaze.candidates import Start
from evengaze.debias import Debias
from evengaze.device import counting, device_rows, upload
from evengaze.layout import VisualTokens
from evengaze.protocol import Pending, View


@dataclass(frozen=True)
class Ranking:
    """How the candidates of some rows rank.

    Attributes:
        raw: (rows, n) float32 scores as the method gave them.
        score: (rows, n) float32 scores after debiasing.
        allowed: (rows, n) bool, False for candidates that may not be chosen; None: all may.
        valid: how many may, row by row.
        pending: a check of the scores whose outcome is not known yet.
    """

    raw: Tensor
    score: Tensor
    allowed: Tensor | None
    valid: tuple[int, ...]
    pending: Pending | None = None

    @property
    def masked(self) -> Tensor:
        """(rows, n) scores, minus infinity for what may not be chosen."""
        return self.score if self.allowed is None else self.score.masked_fill(~self.allowed, float("-inf"))

    def select(self, rows: Sequence[int]) -> Self:
        """The same of some rows."""
        if len(rows) == len(self.valid):
            return self
        at = device_rows(rows, self.raw.device)
        allowed = None if self.allowed is None else self.allowed[at]
        valid = tuple(self.valid[b] for b in rows)
        return replace(self, raw=self.raw[at], score=self.score[at], allowed=allowed, valid=valid)


@dataclass(frozen=True)
class Unpadded:
    """Remembered once a ranking left padding out: what is left of the rows shows pictures."""


Allowed = tuple[Tensor | None, tuple[int, ...]]
"""Which candidates may be chosen, (rows, n) bool or None for all, and how many in each row."""


def every(view: View) -> Allowed:
    """All candidates."""
    return None, (len(view),) * len(view.rows)


def debiased(debias: Debias, raw: Tensor, view: View, *, official: bool) -> tuple[Tensor, Allowed]:
    """Apply the debiasing steps to (rows, n) scores.

    Args:
        debias: the steps.
        raw: the scores.
        view: whose candidates they are of.
        official: do as the published patches: padding's score becomes 0 and may still be chosen when too few other
            tokens are there.
    """
    weight = weights(debias, view, raw, raw.dtype)
    allowed, valid = content(debias, view, official=official)
    if official:
        score = raw if allowed is None else raw * allowed
        return score if weight is None else score * weight, every(view)
    score = raw if weight is None else raw * weight
    if debias.sinks is None:
        return score, (allowed, valid)
    usual = debias.sinks.valid(view.features)
    without = usual if allowed is None else allowed & usual
    some = without.any(1, keepdim=True)
    allowed = torch.where(some, without, True if allowed is None else allowed)
    return score, (allowed, tuple(allowed.sum(1).tolist()))  # which tokens are registers only the device knows


def content(debias: Debias, view: View, *, official: bool) -> Allowed:
    """The candidates that are no padding; if a row has nothing else, all of it, unless `official`."""
    if debias.padding is None or (not official and view.memory.get(Unpadded) is not None):
        return every(view)
    padding, tokens = debias.padding, view.tokens
    flags = by_table(tokens.start, padding.valid)
    if tokens.origin is None:
        if not official:
            flags = flags | ~flags.any(1, keepdim=True)
        valid = tuple(flags.sum(1).tolist())
        if min(valid) == len(view):
            return every(view)
        return upload(flags, view.hidden.device), valid
    left = tokens.of_start(upload(flags, view.hidden.device))
    if not official:
        left = left | ~left.any(1, keepdim=True)
    return left, tuple(left.sum(1).tolist())  # which tokens are left only the device knows


def weights(debias: Debias, view: View, raw: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(rows, n) weights of the trend step; None without a trend."""
    trend, tokens = debias.trend, view.tokens
    if trend is None:
        return None
    if getattr(trend, "by_sample", True):
        rows = [debias.weight(tokens.row(b), raw[b]) for b in range(len(view.rows))]
        return torch.stack(rows).to(dtype).to(raw.device)
    values = by_table(tokens.start, trend.weights).to(dtype)
    return tokens.of_start(upload(values, raw.device))


def places(score: Tensor) -> Tensor:
    """How many entries come before each along the last axis: larger ones, and equal ones with a lower index."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(-1, order, counting(order.shape[-1], order.device).expand_as(order))


def by_table(start: Start, values: Callable[[VisualTokens], Tensor]) -> Tensor:
    """(rows, n) on the host: what a function says of each row's table; asked once if all rows are alike."""
    if start.alike:
        return values(start.tables[0]).expand(len(start.tables), -1)
    return torch.stack([values(table) for table in start.tables])
