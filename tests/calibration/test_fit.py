"""Fits on synthetic scores with known trends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit
from scipy.stats import t as student_t

from evengaze.calibration.families import fit_family
from evengaze.calibration.fit import choose_family, evaluate, fit_curve, fit_scores, student
from evengaze.calibration.means import FLOOR, Profile
from evengaze.debias.trend import Exponential, ExponentialFloor, Isotonic, Polynomial
from evengaze.errors import ConfigError, CurveError

TOKENS = 100
X = np.arange(TOKENS) / TOKENS


def draw(trend: np.ndarray, samples: int = 40, noise: float = 0.5, seed: int = 0) -> np.ndarray:
    """Scores around a trend: lognormal noise per token and a factor per sample, both of mean 1."""
    random = np.random.RandomState(seed)
    token = np.exp(noise * random.randn(samples, len(trend)) - noise**2 / 2)
    sample = np.exp(0.3 * random.randn(samples, 1) - 0.045)
    return trend * token * sample


@pytest.mark.parametrize("fit", ["log", "least-squares", "geometric"])
def test_known_mu_and_sigma_are_in_the_stated_interval(fit: str) -> None:
    random = np.random.RandomState(7)
    hits = {"sigma": 0, "mu": 0, "both": 0}
    runs = 200
    for run in range(runs):
        mu, sigma = np.exp(random.uniform(-9, -3)), random.uniform(-1, 4)
        scores = draw(mu * np.exp(sigma * X), samples=32, noise=random.uniform(0.2, 1.0), seed=run)
        s = fit_scores(scores, family="exponential", fit=fit, bootstraps=2).summary
        inside = {"sigma": s["sigma_low"] <= sigma <= s["sigma_high"], "mu": s["mu_low"] <= mu <= s["mu_high"]}
        for name, hit in {**inside, "both": all(inside.values())}.items():
            hits[name] += hit
    assert hits["sigma"] >= 0.95 * runs and hits["mu"] >= 0.95 * runs, hits


def test_flat_scores_have_no_trend_beyond_noise() -> None:
    covered, weights = 0, []
    for run in range(100):
        scores = draw(np.full(TOKENS, 0.003), seed=1000 + run)
        s = fit_scores(scores, family="exponential", bootstraps=2).summary
        covered += s["sigma_low"] <= 0 <= s["sigma_high"]
        if run < 20:
            trend = fit_scores(scores, bootstraps=2).trend
            weights.append(trend.weight(torch.from_numpy(X)).log().abs().max().item())
    assert covered >= 95, covered
    # 40 samples of noise 0.5: the mean of a tenth of the tokens is known to about 0.5 / sqrt(400) = 0.025.
    assert np.median(weights) < 0.06


def test_exact_data_are_fitted_exactly() -> None:
    cases = {
        "exponential": Exponential(2.5, 0.02),
        "exponential-floor": ExponentialFloor(0.001, 6.0, 0.05),
        "polynomial": Polynomial((0.2, 0.3, -0.4, 0.5)),
    }
    for family, truth in cases.items():
        f = evaluate(truth, X)
        profile = Profile.from_scores(np.stack([f, 2 * f]))
        for fit in ("log", "least-squares", "geometric"):
            found = fit_family(family, profile.means(geometric=fit == "geometric"), fit)
            np.testing.assert_allclose(
                found.weight(torch.from_numpy(X)), f[0] / f, rtol=2e-3, err_msg=f"{family} {fit}"
            )


def test_least_squares_is_the_papers_fit_and_log_the_line_through_logs() -> None:
    scores = draw(0.01 * np.exp(2 * X) + 0.01, samples=4, seed=3)
    means = Profile.from_scores(scores).means()
    ours = fit_family("exponential", means, "least-squares")
    theirs = curve_fit(lambda x, mu, sigma: mu * np.exp(sigma * x), X, scores.mean(0), p0=(0.01, 1.0))[0]
    assert isinstance(ours, Exponential)
    assert (ours.mu, ours.sigma) == pytest.approx(tuple(theirs), rel=1e-4)
    exact = Profile.from_scores(np.stack([scores[0], scores[0]])).means()  # no noise, no correction for it
    line = fit_family("exponential", exact, "log")
    assert isinstance(line, Exponential)
    assert line.sigma == pytest.approx(np.polyfit(X, np.log(scores[0]), 1)[0], rel=1e-6)


def test_isotonic_falls_where_the_trend_falls() -> None:
    falling = fit_family("isotonic", Profile.from_scores(draw(np.exp(-2 * X))).means(geometric=True), "geometric")
    assert isinstance(falling, Isotonic)
    assert falling.y[0] > 2 * falling.y[-1] and (np.diff(falling.y) <= 0).all()


def test_auto_takes_the_simplest_family_that_is_as_good() -> None:
    plain = Profile.from_scores(draw(np.exp(2 * X)))
    assert choose_family(plain, "geometric") == "exponential"
    late = Profile.from_scores(draw(0.05 + np.exp(12 * (X - 1)), noise=0.3))
    assert choose_family(late, "geometric") == "exponential-floor"
    step = Profile.from_scores(draw(np.where(X < 0.5, 1.0, 5.0), noise=0.3))
    assert choose_family(step, "log") == "isotonic"


def test_padding_is_left_out() -> None:
    trend = 0.01 * np.exp(2 * X)
    scores = draw(trend)
    valid = np.ones_like(scores, bool)
    valid[::2, :30] = False
    valid[:, -5:] = False
    dirty = np.where(valid, scores, 50.0)
    clean, fitted = fit_scores(scores, bootstraps=40), fit_scores(dirty, valid, bootstraps=40)
    assert abs(clean.summary["sigma"] - fitted.summary["sigma"]) < 0.2
    assert fitted.samples.count[0] == 20 and fitted.samples.count[40] == 40 and len(fitted.samples.x) == 95
    assert all(0 <= x <= 1 for x in fitted.band.x) and fitted.band.width < 3


def test_the_band_covers_the_truth_and_narrows_with_samples() -> None:
    truth = ExponentialFloor(0.002, 5.0, 0.05)
    f = evaluate(truth, X)
    few, many = (fit_scores(draw(f, samples=n), family="exponential-floor", bootstraps=60) for n in (10, 160))
    assert many.band.width < few.band.width
    x = np.array(many.band.x)
    log = np.log(evaluate(truth, x))
    log -= log.mean()
    assert (np.log(many.band.low) <= log + 0.02).all() and (log <= np.log(many.band.high) + 0.02).all()


def test_zeros_do_not_undo_the_geometric_mean() -> None:
    scores = draw(np.exp(X))
    scores[3, 50] = 0.0
    fitted = fit_scores(scores, bootstraps=20)
    assert fitted.fit == "geometric" and abs(fitted.summary["sigma"] - 1) < 0.3
    frequency = (scores > np.quantile(scores, 0.75)).astype(float)
    assert fit_scores(frequency, bootstraps=20).fit == "log"
    with pytest.raises(CurveError, match="log"):
        fit_scores(frequency, fit="geometric")
    assert 0 < FLOOR < 0.01


def test_single_samples_have_no_intervals() -> None:
    fitted = fit_scores(draw(np.exp(X), samples=1))
    assert fitted.family == "exponential" and "sigma_low" not in fitted.summary and fitted.band.width == float("inf")


@pytest.mark.parametrize(
    ("scores", "options", "error"),
    [
        (np.zeros((3, 10)), {}, CurveError),
        (-np.ones((3, 10)), {}, CurveError),
        (np.full((3, 10), np.nan), {}, CurveError),
        (np.ones(10), {}, CurveError),
        (np.ones((3, 3)), {}, CurveError),
        (np.ones((0, 10)), {}, CurveError),
        (np.ones((3, 10)), {"family": "spline"}, ConfigError),
        (np.ones((3, 10)), {"fit": "l1"}, ConfigError),
        (np.ones((3, 10)), {"level": 1.0}, ConfigError),
        (np.ones((3, 10)), {"valid": np.ones((3, 9), bool)}, CurveError),
    ],
)
def test_bad_input(scores: np.ndarray, options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        fit_scores(scores, **options)  # type: ignore[arg-type]


def test_students_quantile() -> None:
    for level in (0.9, 0.95, 0.99):
        for freedom in (5, 10, 31, 200):
            assert student(level, freedom) == pytest.approx(student_t.ppf(0.5 + level / 2, freedom))


def test_the_fit_is_deterministic() -> None:
    profile = Profile.from_scores(draw(np.exp(X)))
    assert fit_curve(profile, bootstraps=20) == fit_curve(profile, bootstraps=20)


def test_how_often_tokens_are_kept_can_be_fitted_where_some_never_are() -> None:
    random = np.random.RandomState(5)
    truth = 0.03 * np.exp(2.5 * X)
    kept = (random.rand(60, TOKENS) < truth).astype(float)
    assert (kept.mean(0) == 0).any()
    summary = fit_scores(kept, family="exponential", fit="log", bootstraps=20).summary
    assert summary["sigma_low"] <= 2.5 <= summary["sigma_high"]
    assert summary["mu_low"] <= 0.03 <= summary["mu_high"]
