"""The trend of attention over the raster index, and the weights that divide it out.

Mean text-to-vision attention rises with the raster index of the visual token (arXiv 2508.17807, positional bias). A
`TrendCurve` is that trend as a function f of x in [0, 1], the fraction of the raster that precedes the token; a score
is debiased by the weight w(x) = f(0) / f(x). Being functions of x, curves apply to grids of any size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from evengaze.errors import CurveError
from evengaze.layout import VisualTokens

FLOOR = 1e-4
"""Scores below this share of their sample's mean count as this much in averages of logs."""

_CHECKED_POINTS = 513
_WRITTEN = 6
"""Numbers of a tuple that are written in full."""


class Trend(Protocol):
    """What `Debias` needs from a trend: weights for the tokens of one prompt, and a name and values for files.

    `by_sample` says whether the weights depend on the scores; a trend that does not say is taken for one of these.
    """

    family: ClassVar[str]

    def weights(self, tokens: VisualTokens, score: Tensor | None = None) -> Tensor:
        """(n,) float64 factors for the tokens' scores; `score` (n,) is there for trends that look at the sample."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """`family` and the parameters as JSON-able values."""
        ...


@dataclass(frozen=True)
class TrendCurve(ABC):
    """A positive function f on [0, 1], known up to a factor."""

    family: ClassVar[str]
    by_sample: ClassVar[bool] = False

    def __repr__(self) -> str:
        return shown(self)

    @abstractmethod
    def f(self, x: Tensor) -> Tensor:
        """The trend at x, float64 of any shape, in the unit of the fitted scores."""

    def weight(self, x: Tensor) -> Tensor:
        """w(x) = f(0) / f(x), float64, 1 at x = 0."""
        x = x.double()
        return self.f(torch.zeros(1, dtype=torch.float64, device=x.device)) / self.f(x)

    def weights(self, tokens: VisualTokens, score: Tensor | None = None) -> Tensor:
        """(n,) float64 weights of the tokens; the score is not looked at."""
        return self.weight(tokens.x)

    def to_dict(self) -> dict[str, Any]:
        """`family` and the parameters as JSON-able values."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"family": self.family, **values}

    def _check(self) -> None:
        """Raise a CurveError unless f is finite and positive everywhere."""
        values = self.f(torch.linspace(0, 1, _CHECKED_POINTS, dtype=torch.float64))
        if not bool(values.isfinite().all()):
            raise CurveError(f"the {self.family} curve is not finite on [0, 1]: {self}")
        if not bool((values > 0).all()):
            raise CurveError(
                f"the {self.family} curve is not positive on [0, 1], so scores cannot be divided by it: "
                f"{self}. Fit another family, or in the log (fit='log')."
            )


@dataclass(frozen=True, repr=False)
class Exponential(TrendCurve):
    """f(x) = mu exp(sigma x), the paper's family.

    Attributes:
        sigma: log of the trend's ratio between the last and the first token; 0 is no trend.
        mu: mean score at x = 0; does not influence the weights.
    """

    sigma: float
    mu: float = 1.0

    family: ClassVar[str] = "exponential"

    def __post_init__(self) -> None:
        numbers(self.family, [self.sigma, self.mu])
        self._check()

    @classmethod
    def per_index(cls, k: float, tokens: int) -> Exponential:
        """The curve whose weights are w_i = exp(-k i), i = 0 .. tokens-1, as the published files have them."""
        return cls(sigma=k * tokens)

    def f(self, x: Tensor) -> Tensor:
        """See `TrendCurve.f`."""
        return self.mu * torch.exp(self.sigma * x.double())


@dataclass(frozen=True, repr=False)
class ExponentialFloor(TrendCurve):
    """f(x) = a exp(b x) + c: a level that all tokens get, and a rise on top of it."""

    a: float
    b: float
    c: float

    family: ClassVar[str] = "exponential-floor"

    def __post_init__(self) -> None:
        numbers(self.family, [self.a, self.b, self.c])
        self._check()

    def f(self, x: Tensor) -> Tensor:
        """See `TrendCurve.f`."""
        return self.a * torch.exp(self.b * x.double()) + self.c


@dataclass(frozen=True, repr=False)
class Polynomial(TrendCurve):
    """f(x) = sum of coefficients[k] x^k, so that the weight is the reciprocal of a polynomial.

    The published FastV weights are of this family ("reciprocal cubic").
    """

    coefficients: tuple[float, ...]

    family: ClassVar[str] = "polynomial"

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", numbers(self.family, self.coefficients))
        self._check()

    def f(self, x: Tensor) -> Tensor:
        """See `TrendCurve.f`."""
        return _horner(self.coefficients, x)


@dataclass(frozen=True, repr=False)
class ReciprocalPolynomial(TrendCurve):
    """f(x) = 1 / sum of coefficients[k] x^k, so that the weight itself is a polynomial."""

    coefficients: tuple[float, ...]

    family: ClassVar[str] = "reciprocal-polynomial"

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", numbers(self.family, self.coefficients))
        self._check()

    def f(self, x: Tensor) -> Tensor:
        """See `TrendCurve.f`."""
        return 1 / _horner(self.coefficients, x)


@dataclass(frozen=True, repr=False)
class Isotonic(TrendCurve):
    """A monotone trend given by samples, linear in between and constant outside.

    Attributes:
        x: sample positions in [0, 1], ascending.
        y: the trend there, positive, never falling or never rising.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]

    family: ClassVar[str] = "isotonic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", numbers(self.family, self.x))
        object.__setattr__(self, "y", numbers(self.family, self.y))
        if len(self.x) != len(self.y):
            raise CurveError(f"the isotonic curve has {len(self.x)} positions but {len(self.y)} values")
        if any(a >= b for a, b in zip(self.x, self.x[1:], strict=False)):
            raise CurveError("the isotonic curve's positions must ascend")
        steps = [b - a for a, b in zip(self.y, self.y[1:], strict=False)]
        if min(steps, default=0) < 0 < max(steps, default=0):
            raise CurveError("the isotonic curve both rises and falls; use a polynomial or a table for such a trend")
        self._check()

    def f(self, x: Tensor) -> Tensor:
        """See `TrendCurve.f`."""
        return interpolate(self.x, self.y, x)


@dataclass(frozen=True, repr=False)
class Table(TrendCurve):
    """Explicit weights for a grid of one size, as in the weight files of the published patches.

    Attributes:
        values: the weight of each visual token of a frame, in raster order, as used (not normalised).
    """

    values: tuple[float, ...]

    family: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", numbers(self.family, self.values))
        if any(v <= 0 for v in self.values):
            raise CurveError("the table's weights must be positive")

    def f(self, x: Tensor) -> Tensor:
        """1 / weight, linear between the tokens' positions."""
        count = len(self.values)
        return interpolate([i / count for i in range(count)], [1 / v for v in self.values], x)

    def weights(self, tokens: VisualTokens, score: Tensor | None = None) -> Tensor:
        """(n,) float64 weights of the tokens.

        Raises:
            CurveError: a frame has another number of tokens than the table.
        """
        cells = {i.cells for i in tokens.images}
        if cells - {len(self.values)}:
            raise CurveError(
                f"the table holds {len(self.values)} weights, but the frames have {sorted(cells)} visual tokens. Use a "
                "curve over x (evengaze.calibration.fit.fit_curve, `evengaze calibrate`), which fits any grid."
            )
        return torch.tensor(self.values, dtype=torch.float64, device=tokens.cell.device)[tokens.cell]


def max_log_ratio(one: TrendCurve, other: TrendCurve, points: int = _CHECKED_POINTS) -> float:
    """How far two curves are apart: the largest |log(w1 / w2)| on [0, 1]; at 0.1 some weight differs by 10 %."""
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    return float((one.weight(x).log() - other.weight(x).log()).abs().max())


def numbers(family: str, values: Any) -> tuple[float, ...]:
    """A non-empty sequence of finite numbers as floats.

    Raises:
        CurveError: it is anything else; the message names the family.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise CurveError(f"the {family} curve needs a list of numbers, not {values!r:.80}")
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise CurveError(f"the {family} curve's parameters must be numbers, not {values!r:.80}")
    if not all(-1e300 < v < 1e300 for v in values):
        raise CurveError(f"the {family} curve's parameters must be finite, not {values!r:.80}")
    return tuple(float(v) for v in values)


def shown(trend: Any) -> str:
    """A dataclass as Python writes it, but of many numbers only the ends and how many they are."""
    values = {f.name: getattr(trend, f.name) for f in fields(trend)}
    texts = {
        name: f"({value[0]:.4g}, ..., {value[-1]:.4g}: {len(value)} numbers)"
        if isinstance(value, tuple) and len(value) > _WRITTEN
        else repr(value)
        for name, value in values.items()
    }
    return f"{type(trend).__name__}({', '.join(f'{name}={text}' for name, text in texts.items())})"


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    x = x.double()
    result = torch.zeros_like(x)
    for c in reversed(coefficients):
        result = result * x + c
    return result


def interpolate(xs: Sequence[float], ys: Sequence[float], x: Tensor) -> Tensor:
    """Linear interpolation between the points (xs, ys), xs ascending; constant outside. float64, of the shape of x."""
    knots = torch.tensor(xs, dtype=torch.float64, device=x.device)
    values = torch.tensor(ys, dtype=torch.float64, device=x.device)
    x = x.double().clamp(knots[0], knots[-1])
    high = torch.searchsorted(knots, x).clamp(1, max(1, len(knots) - 1)).clamp(max=len(knots) - 1)
    low = (high - 1).clamp(min=0)
    gap = (knots[high] - knots[low]).clamp(min=1e-300)
    share = ((x - knots[low]) / gap).clamp(0, 1)
    return values[low] + share * (values[high] - values[low])
