"""Mean score per position, kept in groups of samples so that its uncertainty is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evengaze.debias.trend import FLOOR
from evengaze.errors import CurveError

Array = NDArray[np.float64]

GROUPS = 32
"""Most groups of samples: what the bootstrap and the jackknife take and leave."""


@dataclass(frozen=True)
class Means:
    """Averages over samples at the p positions that have data.

    Attributes:
        x: (p,) positions.
        mean: (p,) mean score, arithmetic or geometric.
        error: (p,) standard error of the mean, relative to it; NaN if there is one group only.
        count: (p,) number of scores averaged.
        geometric: whether `mean` is the exponential of the mean log.
    """

    x: Array
    mean: Array
    error: Array
    count: Array
    geometric: bool = False

    def positive(self) -> Means:
        """Neighbours averaged in pairs, again and again, until all means are positive (or few are left).

        How often a token is selected is often 0 at single positions; leaving those out would bias a fit in the log.
        """
        now = self
        while (now.mean <= 0).any() and len(now.x) > 8:
            start = np.arange(0, len(now.x), 2)
            count = np.add.reduceat(now.count, start)
            mean, x = (np.add.reduceat(now.count * v, start) / count for v in (now.mean, now.x))
            spread = np.sqrt(np.add.reduceat((now.count * now.error * np.abs(now.mean)) ** 2, start)) / count
            with np.errstate(divide="ignore", invalid="ignore"):
                now = Means(x, mean, spread / np.abs(mean), count, now.geometric)
        return now


@dataclass(frozen=True)
class Profile:
    """Sums of scores at P positions of the raster, in G groups of samples.

    Samples are dealt to the groups in turn; resampling groups is the bootstrap over samples at a fixed memory. With up
    to G samples every sample is a group of its own.

    Attributes:
        x: (P,) positions in [0, 1), ascending.
        total: (G, P) sums of the scores of tokens that are not padding.
        logs: (G, P) sums of their logs, floored (see `FLOOR`).
        count: (G, P) how many there were.
        floored: how many scores were below the floor.
        samples: number of samples.
    """

    x: Array
    total: Array
    logs: Array
    count: Array
    floored: int = 0
    samples: int = 0

    @classmethod
    def from_scores(
        cls, scores: Any, valid: Any | None = None, x: Any | None = None, *, groups: int = GROUPS
    ) -> Profile:
        """Collect the scores of samples that share a grid.

        Args:
            scores: (S, P) scores, samples by tokens in raster order.
            valid: (S, P) bool, False for padding; all valid if left out.
            x: (P,) positions; i / P if left out.
            groups: number of groups.

        Raises:
            CurveError: no samples, shapes that do not agree, or scores that are not finite.
        """
        table = np.asarray(scores, dtype=np.float64)
        if table.ndim != 2 or 0 in table.shape:
            raise CurveError(f"scores must be (samples, tokens), not of shape {table.shape}")
        mask = np.ones(table.shape, bool) if valid is None else np.asarray(valid, dtype=bool)
        place = np.arange(table.shape[1]) / table.shape[1] if x is None else np.asarray(x, dtype=np.float64)
        if mask.shape != table.shape or place.shape != table.shape[1:]:
            raise CurveError(f"scores of shape {table.shape}, but valid {mask.shape} and x {place.shape}")
        if not np.isfinite(table[mask]).all():
            raise CurveError("the scores hold NaN or infinity")
        number = min(groups, len(table))
        total, logs, count = (np.zeros((number, table.shape[1])) for _ in range(3))
        floored = 0
        for i, (row, good) in enumerate(zip(table, mask, strict=True)):
            if not good.any():
                continue
            log, low = floored_log(row[good])
            total[i % number, good] += row[good]
            logs[i % number, good] += log
            count[i % number, good] += 1
            floored += low
        return cls(place, total, logs, count, floored, len(table))

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.total)

    @property
    def positive(self) -> bool:
        """Whether the scores can be averaged in the log: less than 1 % of them are at the floor."""
        return self.floored < 0.01 * float(self.count.sum())

    def means(self, weight: NDArray[Any] | None = None, *, geometric: bool = False) -> Means:
        """Averages over all groups, or over groups taken `weight` (G,) times each."""
        w = np.ones(self.groups) if weight is None else np.asarray(weight, dtype=np.float64)
        number = w @ self.count
        has = number > 0
        count, number = self.count[:, has], number[has]
        total = (self.logs if geometric else self.total)[:, has]
        mean = (w @ total) / number
        groups = float(w.sum())
        if groups > 1:
            error = np.sqrt(groups / (groups - 1) * (w @ (total - mean * count) ** 2)) / number
        else:
            error = np.full(len(mean), np.nan)
        if geometric:
            return Means(self.x[has], np.exp(mean), error, number, True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return Means(self.x[has], mean, error / np.abs(mean), number)


def floored_log(scores: Array) -> tuple[Array, int]:
    """Logs of one sample's scores with the floor applied, and how many scores were below it.

    Exact zeros occur where a window or a mask hides tokens; without a floor one of them would undo the average.
    """
    floor = max(FLOOR * float(scores.mean()), 1e-300)
    return np.log(np.maximum(scores, floor)), int((scores < floor).sum())
