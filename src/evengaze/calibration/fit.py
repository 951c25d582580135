"""Fitting a trend to mean scores: families, three ways of fitting, held-out choice, confidence.

The paper (arXiv 2508.17807) fits f(x) = mu exp(sigma x) to the mean attention per raster index by least squares. That
is `family="exponential", fit="least-squares"` here. But scores are *divided* by f, so the relative error of f matters
everywhere, while least squares looks at the few large values at the end; and tokens are *ranked*, so a typical score
matters, while a mean of attention is made by the few tokens that draw most of it. Hence:

* "least-squares": squared differences of the mean scores;
* "log": squared differences of the logs of the mean scores;
* "geometric" (default): squared differences of the mean logs of the scores.

docs/debiasing.md has the comparison from which the default was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit

from evengaze.calibration.families import fit_family
from evengaze.calibration.means import Array, Means, Profile
from evengaze.debias.curve import Band, Samples
from evengaze.debias.trend import Exponential, TrendCurve
from evengaze.errors import ConfigError, CurveError

Fit = Literal["least-squares", "log", "geometric"]
Family = Literal["exponential", "exponential-floor", "polynomial", "reciprocal-polynomial", "isotonic", "auto"]

AUTO = ("exponential", "exponential-floor", "polynomial", "isotonic")
"""What "auto" chooses from, the simplest first."""

BAND_POINTS = 33
BOOTSTRAPS = 200
LEVEL = 0.99
FOLDS = 5


@dataclass(frozen=True)
class Fitted:
    """A fitted trend and how sure it is.

    Attributes:
        trend: the fitted curve.
        family: its family.
        fit: how it was fitted.
        summary: `mu` and `sigma` of the paper's model mu exp(sigma x) of the mean scores, whatever the family, with
            `_low` and `_high` bounds at confidence `level`; `r2` of the trend on the fitted scale; `held_out`, the
            relative error on held-out groups (root mean square of logs); `samples`, `tokens`.
        samples: the averages that were fitted.
        band: confidence band of the trend.
    """

    trend: TrendCurve
    family: str
    fit: str
    summary: dict[str, float]
    samples: Samples
    band: Band


def fit_curve(
    profile: Profile,
    *,
    family: Family = "auto",
    fit: Fit | None = None,
    level: float = LEVEL,
    bootstraps: int = BOOTSTRAPS,
    seed: int = 0,
) -> Fitted:
    """Fit a trend to a profile.

    Args:
        profile: mean scores per position.
        family: the family, or "auto": the one with the smallest held-out relative error; a simpler one if it is as
            good within one standard error.
        fit: see the module's text. None: "geometric" where scores are positive, as attention is, else "log".
        level: confidence of the intervals and the band.
        bootstraps: number of resamplings of the groups.
        seed: of the resampling.

    Raises:
        ConfigError: unknown family or fit, or a level outside (0, 1).
        CurveError: too little data, scores that are not positive, or a fit that is not positive.
    """
    if family not in get_args(Family):
        raise ConfigError(f"family must be one of {', '.join(get_args(Family))}, not {family!r}")
    if fit is not None and fit not in get_args(Fit):
        raise ConfigError(f"fit must be one of {', '.join(get_args(Fit))}, not {fit!r}")
    if not 0 < level < 1:
        raise ConfigError(f"level={level} must be in (0, 1)")
    if fit is None:
        fit = "geometric" if profile.positive else "log"
    elif fit == "geometric" and not profile.positive:
        raise CurveError(f"{profile.floored} scores are zero or negative, so their logs have no mean; use fit='log'")
    plain = profile.means()
    if len(plain.x) < 4:
        raise CurveError(f"only {len(plain.x)} positions have tokens that are not padding; a trend needs at least 4")
    if plain.mean.mean() <= 0:
        raise CurveError("the mean scores are not positive, so they have no trend to divide by")
    chosen = choose_family(profile, fit) if family == "auto" else str(family)
    fitted = _means(profile, fit)
    trend = fit_family(chosen, fitted, fit)
    line = _line(plain, fit)
    summary: dict[str, float] = {
        "mu": line.mu,
        "sigma": line.sigma,
        "level": level,
        "r2": r_squared(trend, fitted, fit),
        "samples": float(profile.samples),
        "tokens": float(plain.count.sum()),
    }
    band = Band(level)
    if profile.groups > 1:
        summary["held_out"] = float(np.sqrt(np.mean(held_out(profile, chosen, fit))))
        grid = np.linspace(0, 1, BAND_POINTS)
        factor = student(level, profile.groups - 1)
        reach = factor * _jackknife(profile, fit)
        summary |= {"sigma_low": line.sigma - reach[0], "sigma_high": line.sigma + reach[0]}
        summary |= {"mu_low": line.mu * np.exp(-reach[1]), "mu_high": line.mu * np.exp(reach[1])}
        logs = _bootstrap(profile, chosen, fit, trend, grid, bootstraps, seed)
        # The resampled groups are few, their spread is too small by this much.
        centre, half = relative(trend, grid), factor * np.sqrt(profile.groups / (profile.groups - 1)) * logs.std(0)
        band = Band(
            level, tuple(grid.tolist()), tuple(np.exp(centre - half).tolist()), tuple(np.exp(centre + half).tolist())
        )
    error = np.nan_to_num(plain.error) * np.abs(plain.mean)
    samples = Samples(
        tuple(plain.x.tolist()), tuple(plain.mean.tolist()), tuple(error.tolist()), tuple(int(c) for c in plain.count)
    )
    return Fitted(trend, chosen, fit, {k: float(v) for k, v in summary.items()}, samples, band)


def fit_scores(scores: Any, valid: Any | None = None, **options: Any) -> Fitted:
    """`fit_curve` on a table of scores (S samples, P tokens); `valid` (S, P) is False for padding."""
    return fit_curve(Profile.from_scores(scores, valid), **options)


def choose_family(profile: Profile, fit: Fit, families: tuple[str, ...] = AUTO) -> str:
    """The family with the smallest held-out error; the first one that is as good within one standard error.

    Raises:
        CurveError: no family gives a positive trend.
    """
    if profile.groups < 2:
        return families[0]
    errors = {}
    for name in families:
        try:
            fit_family(name, _means(profile, fit), fit)
            errors[name] = held_out(profile, name, fit)
        except CurveError:  # not positive on all data or on a fold: no candidate
            continue
    if not errors:
        raise CurveError("no family gives a positive trend; collect more samples")
    best = min(errors, key=lambda n: float(errors[n].mean()))
    for name, error in errors.items():
        excess = error - errors[best]
        if excess.mean() <= excess.std(ddof=1) / np.sqrt(len(excess)):
            return name
    return best


def held_out(profile: Profile, family: str, fit: Fit, folds: int = FOLDS) -> Array:
    """Mean squared relative error (of logs) of a fit on each fold of groups that it has not seen, (folds,)."""
    folds = min(folds, profile.groups)
    member = np.arange(profile.groups) % folds
    errors = []
    for fold in range(folds):
        trend = fit_family(family, _means(profile, fit, member != fold), fit)
        errors.append(_variances(trend, _means(profile, fit, member == fold), True)[0])
    return np.array(errors)


def r_squared(trend: TrendCurve, means: Means, fit: Fit) -> float:
    """Share of the variance of the mean scores (of their logs, unless `fit` is "least-squares") that is explained."""
    rest, total = _variances(trend, means, fit != "least-squares")
    return 1 - rest / total if total > 0 else 0.0


def _variances(trend: TrendCurve, means: Means, log: bool) -> tuple[float, float]:
    """Weighted variance about the trend, whose level is free, and about the mean."""
    means = means.positive() if log else means
    value, expected, weight = means.mean, evaluate(trend, means.x), means.count
    if log:
        good = value > 0
        value, expected, weight = np.log(value[good]), np.log(expected[good]), weight[good]
    weight = weight / weight.sum()
    gap = value - expected
    if log:
        gap = gap - (weight * gap).sum()
    return float((weight * gap**2).sum()), float((weight * (value - (weight * value).sum()) ** 2).sum())


def _means(profile: Profile, fit: Fit, weight: NDArray[Any] | None = None) -> Means:
    """The averages that a fit looks at."""
    return profile.means(weight, geometric=fit == "geometric")


def evaluate(trend: TrendCurve, x: NDArray[np.float64]) -> Array:
    """f(x) as a NumPy array."""
    return trend.f(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def relative(trend: TrendCurve, grid: Array) -> Array:
    """log f on a grid, centred."""
    value = np.log(evaluate(trend, grid))
    return np.asarray(value - value.mean())


def student(level: float, freedom: int) -> float:
    """Two-sided quantile of Student's t."""
    return float(stdtrit(max(1, freedom), 0.5 + level / 2))


def _line(means: Means, fit: Fit) -> Exponential:
    """The paper's model of the mean scores, fitted in the log unless least squares are asked for."""
    trend = fit_family("exponential", means, "least-squares" if fit == "least-squares" else "log")
    assert isinstance(trend, Exponential)
    return trend


def _jackknife(profile: Profile, fit: Fit) -> Array:
    """Standard errors of sigma and log mu by leaving out one group at a time, (2,).

    Unlike the bootstrap's they do not depend on a seed and do not come out too small with few groups.
    """
    lines = []
    for group in range(profile.groups):
        line = _line(profile.means(np.arange(profile.groups) != group), fit)
        lines.append((line.sigma, np.log(line.mu)))
    return np.asarray(np.sqrt(profile.groups - 1) * np.std(lines, 0))


def _bootstrap(profile: Profile, family: str, fit: Fit, trend: TrendCurve, grid: Array, times: int, seed: int) -> Array:
    """Centred log f on `grid` of fits to resampled groups, (times, points)."""
    random = np.random.RandomState(seed)
    logs = []
    for _ in range(times):
        weight = np.bincount(random.randint(0, profile.groups, profile.groups), minlength=profile.groups)
        try:
            logs.append(relative(fit_family(family, _means(profile, fit, weight), fit, start=trend), grid))
        except CurveError:  # a resampling without a positive fit says nothing about the others
            continue
    if len(logs) < times / 2:
        raise CurveError(f"the {family} fit fails on most resamplings; use another family or more samples")
    return np.array(logs)
