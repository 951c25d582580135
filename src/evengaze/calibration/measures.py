"""How biased a ranking is, in numbers with confidence intervals.

All measures compare with what an unbiased choice among the same tokens would give ("even"), so that the shape of a
picture and its padding do not count as bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from evengaze.calibration.fit import student
from evengaze.calibration.means import Array, Profile
from evengaze.debias.padding import PaddingMask
from evengaze.layout import VisualTokens

LEVEL = 0.95


@dataclass(frozen=True)
class Measure:
    """A mean over samples.

    Attributes:
        value: the mean.
        low: lower bound at confidence `LEVEL`; NaN with fewer than two samples.
        high: upper bound.
        even: mean of what no bias would give.
        samples: number of samples that have the measure.
        biased: whether the interval of the difference to even, sample by sample, excludes 0.
    """

    value: float
    low: float
    high: float
    even: float
    samples: int
    biased: bool

    def __str__(self) -> str:
        spread = "" if isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{spread} (even {self.even:.3f})"


NAMES = {
    "spearman": "Spearman correlation of score and raster index, padding left out",
    "spearman_frame": "Spearman correlation of score and frame in a video, padding left out",
    "kept_bottom": "share of the kept tokens in the bottom half of the picture",
    "kept_index": "mean raster index of the kept tokens, as a fraction",
    "kept_padding": "share of the kept tokens that are padding",
}
"""The measures of `sample_measures` and what they say."""

BOUNDS = {"spearman": (-1.0, 1.0), "spearman_frame": (-1.0, 1.0)} | dict.fromkeys(
    ("kept_bottom", "kept_index", "kept_padding"), (0.0, 1.0)
)
"""Least and largest value of each, which no interval leaves."""


def sample_measures(
    score: Tensor, tokens: VisualTokens, kept: Tensor, *, padding: PaddingMask | None = None
) -> dict[str, tuple[float, float]]:
    """Measures of one sample's ranking.

    Args:
        score: (n,) scores of the candidates.
        tokens: the n candidates.
        kept: (m,) indices of the candidates that were kept.
        padding: what counts as padding; more than half by default.

    Returns:
        For each name in `NAMES` (value, even value); a measure that the sample does not have is left out, such as the
        padding share of a picture without padding.
    """
    content = (padding or PaddingMask()).valid(tokens).cpu().numpy()
    values = score.detach().double().cpu().numpy()
    x, low, frame = tokens.x.cpu().numpy(), bottom(tokens), tokens.frame.cpu().numpy()
    chosen = np.zeros(len(values), bool)
    chosen[kept.cpu().numpy()] = True
    found: dict[str, tuple[float, float]] = {}
    if content.sum() > 2 and np.ptp(values[content]) > 0:
        found["spearman"] = (spearman(values[content], x[content]), 0.0)
        if np.ptp(frame[content]) > 0:
            found["spearman_frame"] = (spearman(values[content], frame[content]), 0.0)
    inside = chosen & content
    if inside.any():
        found["kept_bottom"] = (float(low[inside].mean()), float(low[content].mean()))
        found["kept_index"] = (float(x[inside].mean()), float(x[content].mean()))
    if chosen.any() and not content.all():
        found["kept_padding"] = (float((~content[chosen]).mean()), float((~content).mean()))
    return found


def sigma(summary: Mapping[str, float]) -> Measure:
    """Sigma of a fit's summary (`evengaze.calibration.fit.Fitted`) as a measure; 0 is even, confidence the fit's."""
    low, high = summary.get("sigma_low", float("nan")), summary.get("sigma_high", float("nan"))
    return Measure(summary["sigma"], low, high, 0.0, int(summary["samples"]), low > 0 or high < 0)


def summarise(samples: Sequence[Mapping[str, tuple[float, float]]], level: float = LEVEL) -> dict[str, Measure]:
    """Means over samples with Student intervals."""
    result = {}
    for name in NAMES:
        pairs = np.array([s[name] for s in samples if name in s], dtype=np.float64).reshape(-1, 2)
        if not len(pairs):
            continue
        value, even = pairs.mean(0)
        half = gap = float("nan")
        if len(pairs) > 1:
            factor = student(level, len(pairs) - 1) / np.sqrt(len(pairs))
            half = float(factor * pairs[:, 0].std(ddof=1))
            gap = float(factor * (pairs[:, 0] - pairs[:, 1]).std(ddof=1))
        least, most = BOUNDS[name]
        result[name] = Measure(
            float(value),
            float(np.maximum(value - half, least)),
            float(np.minimum(value + half, most)),
            float(even),
            len(pairs),
            bool(abs(value - even) > gap),
        )
    return result


def padding_ratio(content: Profile, padding: Profile, level: float = LEVEL) -> Measure | None:
    """Mean score of padding over the mean score of content at the same raster positions.

    Padding often sits where the trend is high or low; comparing position by position tells attention that padding draws
    as such from attention that it gets for its place.

    Args:
        content: profile of the tokens that are not padding.
        padding: profile of those that are, in the same groups.
        level: confidence of the jackknife interval.

    Returns:
        The ratio (1 is even), or None if no position has both.
    """
    whole = _ratio(content, padding, np.ones(content.groups))
    if whole is None:
        return None
    parts = []
    for group in range(content.groups):
        part = _ratio(content, padding, (np.arange(content.groups) != group).astype(np.float64))
        if part is not None and part > 0 and whole > 0:
            parts.append(np.log(part))
    half = float("nan")
    if len(parts) > 1:
        half = student(level, len(parts) - 1) * float(np.sqrt(len(parts) - 1) * np.std(parts))
    biased = abs(np.log(whole)) > half if whole > 0 else False
    low, high = (whole * float(np.exp(sign * half)) for sign in (-1, 1))
    return Measure(whole, low, high, 1.0, content.samples, bool(biased))


def _ratio(content: Profile, padding: Profile, weight: Array) -> float | None:
    inside, outside = weight @ content.count, weight @ padding.count
    both = (inside > 0) & (outside > 0)
    if not both.any():
        return None
    expected = outside[both] * (weight @ content.total)[both] / inside[both]
    return float((weight @ padding.total)[both].sum() / expected.sum()) if expected.sum() > 0 else None


def bottom(tokens: VisualTokens) -> Array:
    """(n,) 1 for tokens in the bottom half of their frame, 0.5 in the middle row of an odd number of rows."""
    grids = np.array([i.grid for i in tokens.images]).reshape(-1, 2)[tokens.image.cpu().numpy()]
    middle = 2 * (tokens.cell.cpu().numpy() // grids[:, 1]) + 1 - grids[:, 0]
    return np.asarray((np.sign(middle) + 1) / 2, dtype=np.float64)


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's rank correlation; ties get their mean rank. 0 if one side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
