"""Other ways of removing bias than the paper's, behind the same protocol. None of them is a default.

* `RowsColumns`: a trend over the rows times one over the columns, in place of one over the raster index.
* `SampleTrend`: a trend estimated robustly from the very scores that are ranked; needs no calibration.
* `Prior`: what the model attends to in the same picture when it is asked nothing, or in a picture without content.
* `SinkMask`: registers, tokens with massive activations, are left out as padding is.

The first three go into `Debias(trend=...)`, the last into `Debias(sinks=...)`. docs/debiasing.md compares them.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evengaze.debias.padding import PaddingMask
from evengaze.debias.trend import FLOOR, TrendCurve, interpolate, numbers, shown
from evengaze.errors import ConfigError, CurveError
from evengaze.layout import VisualTokens
from evengaze.parameters import coerce


@dataclass(frozen=True, repr=False)
class RowsColumns(TrendCurve):
    """f = r(row) c(column), both given at evenly spaced places from the first to the last row or column.

    As a function of x alone it is the trend over the rows.

    Attributes:
        rows: the trend over the rows, top to bottom.
        columns: the trend over the columns, left to right.
    """

    rows: tuple[float, ...]
    columns: tuple[float, ...]

    family: ClassVar[str] = "rows-columns"

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            values = numbers(self.family, getattr(self, name))
            if min(values) <= 0:
                raise CurveError(f"the {name} of a rows-columns trend must be positive")
            object.__setattr__(self, name, values)

    def f(self, x: Tensor) -> Tensor:
        """See `TrendCurve.f`."""
        return interpolate(_even(len(self.rows)), self.rows, x)

    def weights(self, tokens: VisualTokens, score: Tensor | None = None) -> Tensor:
        """(n,) float64 weights of the tokens, by row and column."""
        grids = torch.tensor([i.grid for i in tokens.images], device=tokens.cell.device)[tokens.image]
        row, column = tokens.cell // grids[:, 1], tokens.cell % grids[:, 1]
        down = interpolate(_even(len(self.rows)), self.rows, row / (grids[:, 0] - 1).clamp(min=1))
        across = interpolate(_even(len(self.columns)), self.columns, column / (grids[:, 1] - 1).clamp(min=1))
        return self.rows[0] * self.columns[0] / (down * across)


def _even(count: int) -> list[float]:
    return [i / max(1, count - 1) for i in range(count)]


@dataclass(frozen=True)
class SampleTrend:
    """The trend of one sample's own scores: medians of their logs in stretches of the raster, linear in between.

    Medians are not moved by the few tokens that the question is about, but the picture's layout (sky above, things
    below) counts as trend, which a calibrated curve would not take for one.

    Attributes:
        stretches: number of stretches, each with the same number of tokens.
        strength: how much of the trend is removed, in (0, 1].
    """

    stretches: int = 4
    strength: float = 1.0

    family: ClassVar[str] = "sample"
    by_sample: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.stretches, int) or isinstance(self.stretches, bool) or self.stretches < 2:
            raise ConfigError(f"stretches={self.stretches!r} must be a whole number of at least 2")
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength={self.strength!r} must be in (0, 1]")

    def weights(self, tokens: VisualTokens, score: Tensor | None = None) -> Tensor:
        """(n,) float64 weights; 1 if fewer than four tokens a stretch are no padding.

        Raises:
            ConfigError: no scores are given.
        """
        if score is None:
            raise ConfigError("a sample's trend is in its scores: give them to Debias.weight")
        ones = torch.ones(len(tokens), dtype=torch.float64, device=score.device)
        content = PaddingMask().valid(tokens).to(score.device)
        if int(content.sum()) < 4 * self.stretches:
            return ones
        x, value = tokens.x.to(score.device), score.double()
        floor = FLOOR * value[content].mean()
        if float(floor) <= 0:
            return ones
        logs = value.clamp(min=float(floor)).log()
        order = x[content].argsort(stable=True)
        xs, ys = x[content][order].tensor_split(self.stretches), logs[content][order].tensor_split(self.stretches)
        centres, medians = [float(p.mean()) for p in xs], [float(p.median()) for p in ys]
        if any(a >= b for a, b in itertools.pairwise(centres)):  # many frames of few cells
            return ones
        # The outer stretches' slopes go on to the edges, where the trend is strongest.
        first = medians[0] - centres[0] * (medians[1] - medians[0]) / (centres[1] - centres[0])
        last = medians[-1] + (1 - centres[-1]) * (medians[-1] - medians[-2]) / (centres[-1] - centres[-2])
        trend = interpolate([0.0, *centres, 1.0], [first, *medians, last], x)
        return (-self.strength * (trend - first)).exp()

    def to_dict(self) -> dict[str, Any]:
        """`family` and the parameters as JSON-able values."""
        return {"family": self.family, **asdict(self)}


@dataclass(frozen=True, repr=False)
class Prior:
    """Scores of the same tokens without the question or without the picture; ranking goes by the ratio to them.

    Attributes:
        values: a score for each cell of a frame (content-free picture), or for each visual token of one prompt (the
            same picture with a content-free question).
        strength: power of the prior, in (0, 1].
    """

    values: tuple[float, ...]
    strength: float = 1.0

    family: ClassVar[str] = "prior"
    by_sample: ClassVar[bool] = False

    def __post_init__(self) -> None:
        values = numbers(self.family, self.values)
        if min(values) < 0 or max(values) == 0:
            raise CurveError("a prior's values must not be negative, and not all 0")
        object.__setattr__(self, "values", values)
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength={self.strength!r} must be in (0, 1]")

    def __repr__(self) -> str:
        return shown(self)

    @classmethod
    def of(cls, scores: Tensor | NDArray[Any], strength: float = 1.0) -> Prior:
        """From a vector of scores."""
        return cls(tuple(np.asarray(scores, dtype=np.float64).tolist()), strength)

    def weights(self, tokens: VisualTokens, score: Tensor | None = None) -> Tensor:
        """(n,) float64 weights, 1 on average in the log.

        Raises:
            CurveError: the prior has neither one value a cell nor one a token.
        """
        value = torch.tensor(self.values, dtype=torch.float64, device=tokens.cell.device)
        logs = value.clamp(min=FLOOR * float(value.mean())).log()
        logs = self.strength * (logs - logs.mean())
        if {i.cells for i in tokens.images} == {len(value)}:
            return (-logs)[tokens.cell].exp()
        if len(tokens) == len(value):
            return (-logs).exp()
        cells = sorted({i.cells for i in tokens.images})
        raise CurveError(f"the prior has {len(value)} values, but the prompt {len(tokens)} tokens in frames of {cells}")

    def to_dict(self) -> dict[str, Any]:
        """`family` and the parameters as JSON-able values."""
        return {"family": self.family, "values": list(self.values), "strength": self.strength}


@dataclass(frozen=True)
class SinkMask:
    """Marks tokens that draw attention as registers, whatever they show.

    Vision transformers and decoders keep global state in a few tokens of low-information patches; their hidden states
    have norms far above all others ("Vision Transformers Need Registers", arXiv 2309.16588; "Massive Activations",
    arXiv 2402.17762).

    Attributes:
        ratio: a token whose norm is more than this times the median norm of the candidates is a register.
    """

    ratio: float = 5.0

    def __post_init__(self) -> None:
        coerce(self)
        if not self.ratio > 1:
            raise ConfigError(f"ratio={self.ratio!r} must be a number above 1")

    def valid(self, features: Tensor) -> Tensor:
        """(..., n) bool, False for registers among candidates with hidden states `features` (..., n, d)."""
        norm = features.float().norm(dim=-1)
        usual: Tensor = norm <= self.ratio * norm.median(-1, keepdim=True).values
        return usual

    def to_dict(self) -> dict[str, Any]:
        """The parameters as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SinkMask:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown parameter, or one of the wrong type or out of range.
        """
        unknown = set(values) - {"ratio"}
        if unknown:
            raise ConfigError(f"SinkMask has no parameter {', '.join(sorted(map(str, unknown)))}")
        return cls(**values)
