"""Two methods on the same questions: is the difference more than chance?

The test is exact: McNemar's, which for questions with partial credit becomes the sign test (won against lost
questions, ties left out). The interval of the mean difference comes from a bootstrap over questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np

from evengaze.errors import DataError


@dataclass(frozen=True)
class Paired:
    """A comparison of two sets of credits (0 to 1 a question); `delta` is first minus second.

    Attributes:
        n: questions that both have answered.
        first: mean credit of the first.
        second: mean credit of the second.
        delta: their difference.
        low: lower end of its confidence interval.
        high: upper end.
        level: of the interval.
        wins: questions in which the first got more credit.
        losses: questions in which the second did.
        p_value: of the exact McNemar (sign) test, two-sided.
    """

    n: int
    first: float
    second: float
    delta: float
    low: float
    high: float
    level: float
    wins: int
    losses: int
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact p-value that `wins` and `losses` differ, each as likely as the other.

    Args:
        wins: pairs in which only the first is right.
        losses: pairs in which only the second is right.
    """
    n, few = wins + losses, min(wins, losses)
    term, tail = 1, 1  # binomial coefficients, exact whatever their size
    for i in range(few):
        term = term * (n - i) // (i + 1)
        tail += term
    share: float = 2 * tail / 2**n
    return min(1.0, share)


def compare(
    first: Mapping[str, float],
    second: Mapping[str, float],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Paired:
    """Compare credits on the questions that both have.

    Args:
        first: credit by question, e.g. `Score.per_record` with debiasing.
        second: the same of what it is compared with, e.g. without.
        level: of the confidence interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: they have no question in common.
    """
    common = [key for key in first if key in second]
    if not common:
        raise DataError("the two results share no question: they belong to different benchmarks or splits")
    a = np.array([first[key] for key in common], dtype=np.float64)
    b = np.array([second[key] for key in common], dtype=np.float64)
    difference = np.round(a - b, 9)  # sums of thirds and tenths differ in the last digits
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    low, high = _interval(difference, level, resamples, seed)
    return Paired(
        n=len(common),
        first=float(a.mean()),
        second=float(b.mean()),
        delta=float(difference.mean()),
        low=low,
        high=high,
        level=level,
        wins=wins,
        losses=losses,
        p_value=mcnemar_exact(wins, losses),
    )


def _interval(difference: Any, level: float, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean. Differences take few distinct values, so their counts are resampled."""
    n = len(difference)
    values, counts = np.unique(difference, return_counts=True)
    if len(values) == 1:
        # Resampling equal differences claims certainty. What n equal ones exclude, at this level, is that a larger
        # share than this of all questions differs.
        unseen = -math.expm1(math.log1p(-level) / n)
        return max(-1.0, float(values[0]) - unseen), min(1.0, float(values[0]) + unseen)
    means = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples) @ values / n
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval, which holds near 0 and 1 as well)."""
    z = 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # At 0 and 1 one end is the share itself, and rounding must not put it on the wrong side.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
