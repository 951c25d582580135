"""The ways of debiasing that go beyond the paper."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evengaze.calibration.rows_columns import fit_rows_columns
from evengaze.debias import Curve, Debias, PaddingMask, Prior, RowsColumns, SampleTrend, SinkMask
from evengaze.debias.families import trend_from_dict
from evengaze.errors import ConfigError, CurveError
from evengaze.layout import VisualLayout, VisualTokens


def row(grid: tuple[int, int] = (14, 14), size: tuple[int, int] | None = None, frames: int = 1) -> VisualTokens:
    n = grid[0] * grid[1] * frames
    return VisualLayout.from_spans([(0, n)], grid, image_sizes=None if size is None else [size]).rows[0]


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def slope(score: torch.Tensor, tokens: VisualTokens) -> float:
    return float(np.polyfit(tokens.x.numpy(), score.double().log().numpy(), 1)[0])


def test_rows_and_columns_are_recovered_and_divided_out() -> None:
    random = np.random.RandomState(0)
    rows, columns = np.linspace(0, 2, 12), 0.5 * np.cos(np.linspace(0, 3, 10))
    logs = rows[:, None] + columns - 5
    count = random.randint(1, 40, logs.shape).astype(float)
    count[:2] = 0  # only padding at the top
    count[5, 3] = 0
    trend = fit_rows_columns(np.where(count > 0, logs, 99.0), count, smoothing=1e-6)
    tokens = row((12, 10))
    flat = trend.weights(tokens).log().numpy().reshape(12, 10) + logs
    np.testing.assert_allclose(flat[2:] - flat[2, 0], 0, atol=1e-3)
    coarse = trend.weights(row((6, 5)))
    assert coarse.shape == (30,) and float(coarse[0]) == pytest.approx(1.0)
    assert trend_from_dict(json.loads(json.dumps(trend.to_dict()))) == trend
    with pytest.raises(CurveError, match="two rows"):
        fit_rows_columns(logs[:1], count[2:3])


def test_a_rows_columns_trend_lives_in_a_curve_file(tmp_path: object) -> None:
    curve = Curve(RowsColumns((1.0, 2.0, 4.0), (1.0, 1.0)))
    assert Curve.from_dict(json.loads(json.dumps(curve.to_dict()))).trend == curve.trend
    assert float(curve.trend.weight(torch.ones(1))) == 0.25


@pytest.mark.parametrize("trend", [0.0, 2.0, -1.5])
def test_a_samples_own_trend_is_removed_whatever_a_few_tokens_do(trend: float) -> None:
    tokens = row(size=(140, 112))
    score = torch.exp(trend * tokens.x + 0.3 * noise(196))
    score[60:70] *= 50  # what the question is about
    score = torch.where(tokens.padding > 0.5, 7.0, score)
    weight = SampleTrend(4).weights(tokens, score)
    content = (tokens.padding <= 0.5) & (score < 20)
    assert abs(slope((score * weight)[content], tokens.take(content.nonzero().flatten()))) < 0.25
    half = SampleTrend(4, strength=0.5).weights(tokens, score)
    torch.testing.assert_close(half.log(), 0.5 * weight.log())


def test_a_samples_trend_leaves_small_and_dark_samples_alone() -> None:
    few = row().take(torch.arange(10))
    assert torch.equal(SampleTrend().weights(few, noise(10).exp()), torch.ones(10, dtype=torch.float64))
    assert torch.equal(SampleTrend().weights(row(), torch.zeros(196)), torch.ones(196, dtype=torch.float64))
    with pytest.raises(ConfigError, match="scores"):
        SampleTrend().weights(row())


def test_a_prior_is_one_value_a_cell_or_a_token() -> None:
    values = noise(16).exp()
    tokens = row((4, 4), frames=2)
    weights = Prior.of(values).weights(tokens)
    torch.testing.assert_close(weights[:16], weights[16:])
    torch.testing.assert_close((weights[:16] * values).std(), torch.tensor(0.0, dtype=torch.float64), atol=1e-6, rtol=0)
    each = noise(32, 1).exp()
    assert float((Prior.of(each).weights(tokens) * each).std()) < 1e-6
    assert Prior.of(torch.cat([values[:15], torch.zeros(1)])).weights(row((4, 4))).isfinite().all()
    with pytest.raises(CurveError, match="16 values, but the prompt 25 tokens"):
        Prior.of(values).weights(row((5, 5)))


@pytest.mark.parametrize("trend", [SampleTrend(3, 0.5), Prior((1.0, 2.0)), RowsColumns((1.0, 2.0), (1.0,))])
def test_they_work_as_a_debias_and_survive_json(trend: SampleTrend | Prior | RowsColumns) -> None:
    debias = Debias(trend=trend)
    assert Debias.from_dict(json.loads(json.dumps(debias.to_dict()))) == debias
    tokens = row((1, 2)) if isinstance(trend, Prior) else row()
    score, allowed = debias(noise(len(tokens)).exp(), tokens)
    assert score.shape == (len(tokens),) and score.dtype == torch.float32 and allowed.all()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: SampleTrend(1), ConfigError),
        (lambda: SampleTrend(4, 0.0), ConfigError),
        (lambda: Prior((0.0,)), CurveError),
        (lambda: Prior((-1.0, 2.0)), CurveError),
        (lambda: Prior((1.0,), 2.0), ConfigError),
        (lambda: RowsColumns((1.0, -1.0), (1.0,)), CurveError),
        (lambda: Curve.from_dict({"evengaze_curve": 1, "origin": {}, "trend": {"family": "sample"}}), CurveError),
    ],
)
def test_bad_parameters(make: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()  # type: ignore[operator]


def test_registers_are_left_out_unless_nothing_else_is_there() -> None:
    features = torch.randn(196, 8, generator=torch.Generator().manual_seed(0))
    features[[3, 77]] *= 40
    debias = Debias(sinks=SinkMask())
    _, allowed = debias(torch.ones(196), row(), features=features)
    assert (~allowed).nonzero().flatten().tolist() == [3, 77]
    _, allowed = debias(torch.ones(196), row(), features=features, official=True)
    assert allowed.all()
    _, allowed = debias(torch.ones(196), row())
    assert allowed.all()
    padded = row(size=(140, 112))
    both = Debias(PaddingMask(), sinks=SinkMask())
    assert not both(torch.ones(196), padded, features=features)[1][77]
    assert not both(torch.ones(196), padded, features=features)[1][0]
    with pytest.raises(ConfigError, match="above 1"):
        SinkMask(1.0)
    assert Debias.from_dict(json.loads(json.dumps(both.to_dict()))) == both
