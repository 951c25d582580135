"""The fits of the single families: weighted least squares of scores or of their logs, by SciPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import isotonic_regression, least_squares

from evengaze.calibration.means import Array, Means
from evengaze.debias.trend import (
    Exponential,
    ExponentialFloor,
    Isotonic,
    Polynomial,
    ReciprocalPolynomial,
    TrendCurve,
)
from evengaze.errors import ConfigError, CurveError

DEGREE = 3
KNOTS = 24
_STEEP = 40.0  # |exponent| beyond which an exponential with a floor describes a single token


def fit_family(family: str, means: Means, fit: str, *, start: TrendCurve | None = None) -> TrendCurve:
    """Fit one family to mean scores, each position weighted by how many scores it averages.

    Args:
        family: its name.
        means: the mean scores; geometric ones for `fit="geometric"`.
        fit: "least-squares" compares scores, "log" and "geometric" compare logs.
        start: a solution nearby, which saves the search.

    Raises:
        CurveError: the fit is not positive on [0, 1].
    """
    if family not in _FITS:
        raise ConfigError(f"cannot fit the family {family!r}; known: {', '.join(_FITS)}")
    if fit != "least-squares":
        means = means.positive()
    x, weight = means.x, means.count / means.count.sum()
    scale = float(means.mean.mean())
    y = means.mean / scale
    if fit == "least-squares":
        return _FITS[family](_Problem(x, y, weight, False, scale), start)
    good = y > 0
    if good.sum() <= DEGREE:
        raise CurveError("too few positions with positive mean scores for a fit in the log; use 'least-squares'")
    target = np.log(y[good])
    if not means.geometric:
        # The expected log of a noisy mean lies below the log of its expectation by half its relative variance.
        target = target + np.minimum(0.5 * np.nan_to_num(means.error[good]) ** 2, 0.5)
    return _FITS[family](_Problem(x[good], target, weight[good], True, scale), start)


class _Problem:
    """Weighted residuals of a curve, in the log or not; `y` is on that scale, in units of `scale`."""

    def __init__(self, x: Array, y: Array, weight: Array, log: bool, scale: float) -> None:
        self.x, self.y, self.weight, self.log, self.scale = x, y, weight, log, scale
        self._root = np.sqrt(weight)

    @property
    def logs(self) -> Array:
        """The data in the log, for starting values."""
        return self.y if self.log else np.log(np.maximum(self.y, 0.02))

    def residual(self, log_f: Array) -> Array:
        """Weighted residuals of a curve given by its log."""
        return np.asarray(self._root * ((log_f if self.log else np.exp(np.minimum(log_f, 50))) - self.y))

    def line(self) -> tuple[float, float]:
        """Intercept and slope of the weighted line through the logs."""
        x, y = self.x - (self.weight * self.x).sum(), self.logs
        slope = float((self.weight * x * y).sum() / (self.weight * x * x).sum())
        return float((self.weight * (y - slope * self.x)).sum()), slope

    def solve(self, log_f: Callable[[Array], Array], starts: Sequence[Sequence[float]]) -> Array:
        """Levenberg-Marquardt from each start; the best solution."""
        found = [least_squares(lambda p: self.residual(log_f(p)), start, method="lm") for start in starts]
        return np.asarray(min(found, key=lambda one: float(one.cost)).x)


def _exponential(problem: _Problem, start: TrendCurve | None) -> TrendCurve:
    intercept, slope = problem.line()
    if problem.log:
        return Exponential(slope, problem.scale * float(np.exp(intercept)))
    x = problem.x
    p = problem.solve(lambda p: p[0] + p[1] * x, [(intercept, slope), (intercept - 1.0, 2 * slope + 1.0)])
    return Exponential(float(p[1]), problem.scale * float(np.exp(p[0])))


def _exponential_floor(problem: _Problem, start: TrendCurve | None) -> TrendCurve:
    x, logs = problem.x, problem.logs

    def log_f(p: Array) -> Array:
        rise = np.minimum(p[0], 50) + _STEEP * np.tanh(p[1] / _STEEP) * x
        return np.asarray(np.logaddexp(rise, np.minimum(p[2], 50)))

    if isinstance(start, ExponentialFloor) and start.a > 0 and start.c > 0:
        b = _STEEP * np.arctanh(np.clip(start.b / _STEEP, -0.999, 0.999))
        starts = [(np.log(start.a / problem.scale), b, np.log(start.c / problem.scale))]
    else:
        floor, top = np.quantile(logs, 0.1), np.quantile(logs, 0.98)
        intercept, slope = problem.line()
        starts = [(top - b * (1 if b > 0 else 0), float(b), floor) for b in (3.0, 8.0, 20.0, -4.0)]
        starts.append((intercept, slope, intercept - 3.0))
    p = problem.solve(log_f, starts)
    b = float(_STEEP * np.tanh(p[1] / _STEEP))
    return ExponentialFloor(*(float(v) for v in (problem.scale * np.exp(p[0]), b, problem.scale * np.exp(p[2]))))


def _polynomial(problem: _Problem, start: TrendCurve | None) -> TrendCurve:
    powers = np.vander(problem.x, DEGREE + 1, increasing=True)
    root = np.sqrt(problem.weight)
    linear = np.exp(problem.logs) if problem.log else problem.y
    relative = 1 / linear if problem.log else np.ones_like(linear)
    p = np.linalg.lstsq(powers * (root * relative)[:, None], linear * root * relative, rcond=None)[0]
    if problem.log:
        p = problem.solve(lambda p: np.log(np.maximum(powers @ p, 1e-9)), [p.tolist()])
    return Polynomial(tuple((problem.scale * p).tolist()))


def _reciprocal_polynomial(problem: _Problem, start: TrendCurve | None) -> TrendCurve:
    powers = np.vander(problem.x, DEGREE + 1, increasing=True)
    root = np.sqrt(problem.weight)
    inverse = np.exp(-problem.logs)
    p = np.linalg.lstsq(powers * (root / inverse)[:, None], root, rcond=None)[0]
    p = problem.solve(lambda p: -np.log(np.maximum(powers @ p, 1e-9)), [p.tolist()])
    return ReciprocalPolynomial(tuple((p / problem.scale).tolist()))


def _isotonic(problem: _Problem, start: TrendCurve | None) -> TrendCurve:
    """Averages of `KNOTS` stretches of equal weight, made monotone by pooling neighbours."""
    stretch = np.minimum((np.cumsum(problem.weight) - problem.weight / 2) * KNOTS, KNOTS - 1).astype(int)
    weight = np.bincount(stretch, problem.weight, KNOTS)
    has = weight > 0
    x = np.bincount(stretch, problem.weight * problem.x, KNOTS)[has] / weight[has]
    y: Array = np.bincount(stretch, problem.weight * problem.y, KNOTS)[has] / weight[has]
    level = isotonic_regression(y, weights=weight[has], increasing=problem.line()[1] >= 0).x
    values = np.exp(level) if problem.log else level
    return Isotonic(tuple(x.tolist()), tuple((problem.scale * values).tolist()))


_FITS: dict[str, Callable[[_Problem, TrendCurve | None], TrendCurve]] = {
    "exponential": _exponential,
    "exponential-floor": _exponential_floor,
    "polynomial": _polynomial,
    "reciprocal-polynomial": _reciprocal_polynomial,
    "isotonic": _isotonic,
}
