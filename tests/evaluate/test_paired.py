import numpy as np
import pytest
from scipy.stats import binomtest

from evengaze.errors import DataError
from evengaze.evaluate.metrics.paired import compare, mcnemar_exact


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 9), (10, 10), (40, 17), (2500, 2300)])
def test_p_value_is_the_exact_binomial_one(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses, 0.5).pvalue if wins + losses else 1.0
    assert mcnemar_exact(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_comparison_uses_common_questions_only() -> None:
    result = compare({"a": 1.0, "b": 0.0, "c": 1.0, "x": 1.0}, {"a": 0.0, "b": 0.0, "c": 0.6, "y": 0.0})
    assert (result.n, result.wins, result.losses) == (3, 2, 0)
    assert result.delta == pytest.approx((1 + 0 + 0.4) / 3)
    assert result.low <= result.delta <= result.high
    assert result.p_value == 0.5


def test_equal_credits_leave_an_interval_that_shrinks_with_n() -> None:
    few, many = ({str(i): 1.0 for i in range(n)} for n in (10, 1000))
    assert compare(few, few).high == pytest.approx(1 - 0.05**0.1)
    assert compare(many, many).high < 0.0031
    assert compare(few, few).delta == 0.0


def test_rounding_of_partial_credit_is_no_difference() -> None:
    result = compare({"a": 0.6000000000000001, "b": 1.0}, {"a": 0.6, "b": 0.0})
    assert (result.wins, result.losses) == (1, 0)


def test_interval_covers_the_true_difference() -> None:
    draw, hits = np.random.default_rng(0), 0
    for _ in range(200):
        a, b = draw.random(400) < 0.7, draw.random(400) < 0.6
        keys = [str(i) for i in range(400)]
        result = compare(
            dict(zip(keys, a.astype(float), strict=True)), dict(zip(keys, b.astype(float), strict=True)), resamples=1000
        )
        hits += result.low <= 0.1 <= result.high
    assert hits >= 180


def test_results_of_different_benchmarks_are_refused() -> None:
    with pytest.raises(DataError, match="share no question"):
        compare({"a": 1.0}, {"b": 1.0})
