"""Trend curves, presets, and the two steps as a pruner calls them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from evengaze.debias import (
    Debias,
    Exponential,
    ExponentialFloor,
    Isotonic,
    PaddingMask,
    Polynomial,
    ReciprocalPolynomial,
    Table,
    TrendCurve,
    preset,
    preset_names,
)
from evengaze.debias.families import trend_from_dict
from evengaze.debias.presets import BENCHMARKS
from evengaze.debias.trend import max_log_ratio
from evengaze.errors import ConfigError, CurveError
from evengaze.layout import VisualLayout, VisualTokens

CURVES: list[TrendCurve] = [
    Exponential(1.8, 0.3),
    Exponential(-0.5),
    ExponentialFloor(0.001, 6.0, 0.2),
    Polynomial((1.0, 1.7, -4.8, 4.9)),
    ReciprocalPolynomial((1.0, -0.3, -0.4)),
    Isotonic((0.0, 0.25, 1.0), (1.0, 1.0, 3.0)),
    Table((1.0, 0.8, 0.5, 0.2)),
]


def row(grid: int = 24, frames: int = 1) -> VisualTokens:
    return VisualLayout.from_spans([(5, 5 + frames * grid * grid)], (grid, grid)).rows[0]


@pytest.mark.parametrize("curve", CURVES, ids=lambda c: c.family)
def test_weights_are_the_normalised_reciprocal_and_survive_a_file(curve: TrendCurve) -> None:
    x = torch.linspace(0, 1, 50, dtype=torch.float64)
    weight = curve.weight(x)
    assert weight[0] == 1 and weight.dtype == torch.float64
    torch.testing.assert_close(weight * curve.f(x), curve.f(x[:1]).expand(50))
    back = trend_from_dict(json.loads(json.dumps(curve.to_dict())))
    assert back == curve
    assert max_log_ratio(curve, back) == 0


def test_exponential_per_index_is_the_published_formula_on_any_grid() -> None:
    curve = Exponential.per_index(0.02, 64)
    torch.testing.assert_close(
        curve.weights(row(8)), torch.exp(-0.02 * torch.arange(64, dtype=torch.float64)), rtol=1e-12, atol=0
    )
    coarse, fine = curve.weights(row(8)), curve.weights(row(16))
    assert torch.allclose(coarse[32], fine[128])  # half-way down in both


def test_every_frame_of_a_video_gets_the_same_weights() -> None:
    weights = Exponential(2.0).weights(row(4, frames=3)).reshape(3, 16)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_isotonic_is_constant_outside_its_samples() -> None:
    f = Isotonic((0.2, 0.4), (1.0, 2.0)).f(torch.tensor([0.0, 0.2, 0.3, 0.4, 1.0]))
    assert torch.allclose(f, torch.tensor([1.0, 1.0, 1.5, 2.0, 2.0], dtype=torch.float64))
    assert Isotonic((0.5,), (3.0,)).weight(torch.tensor([0.0, 1.0])).tolist() == [1.0, 1.0]


def test_a_weight_vector_of_the_wrong_length_is_an_error() -> None:
    table = Table(tuple(np.linspace(1, 0.3, 16)))
    torch.testing.assert_close(table.weights(row(4)), torch.linspace(1, 0.3, 16, dtype=torch.float64))
    with pytest.raises(CurveError, match="16 weights, but the frames have \\[25\\]"):
        table.weights(row(5))


@pytest.mark.parametrize(
    "values",
    [
        {"family": "spline"},
        {"sigma": 1.0},
        {"family": "exponential"},
        {"family": "exponential", "sigma": 1.0, "tau": 2},
        {"family": "exponential", "sigma": "1"},
        {"family": "exponential", "sigma": float("nan")},
        {"family": "exponential", "sigma": 1000.0},
        {"family": "exponential", "sigma": 1.0, "mu": -1.0},
        {"family": "polynomial", "coefficients": [1.0, -2.0]},
        {"family": "polynomial", "coefficients": []},
        {"family": "polynomial", "coefficients": 3},
        {"family": "isotonic", "x": [0, 1], "y": [1, 2, 3]},
        {"family": "isotonic", "x": [0, 0.5, 1], "y": [1, 2, 1]},
        {"family": "isotonic", "x": [1, 0], "y": [1, 2]},
        {"family": "table", "values": [1, 0]},
        [],
    ],
)
def test_malformed_trends_are_curve_errors(values: dict[str, object]) -> None:
    with pytest.raises(CurveError):
        trend_from_dict(values)


def test_there_are_41_published_presets_and_one_mean_per_method() -> None:
    names = preset_names()
    published = [n for n in names if n.count("/") == 2] + ["llava-1.5-7b/fastv"]
    assert len(published) == 41 and len(names) == 45
    i = np.arange(576)
    k = 0.0031467344886294615
    weights = preset("llava-1.5-7b/pyramiddrop/textvqa").trend.weights(row())
    np.testing.assert_allclose(weights.numpy(), np.exp(-k * i), rtol=1e-9)
    mean = np.prod([preset(f"llava-1.5-7b/himap/{b}").trend.weights(row()).numpy() for b in BENCHMARKS], 0) ** 0.1
    np.testing.assert_allclose(preset("llava-1.5-7b/himap").trend.weights(row()).numpy(), mean, rtol=1e-9)


def test_the_fastv_preset_is_the_reciprocal_cubic() -> None:
    x = np.arange(576) / 576
    cubic = np.polyval([4.909652391659825, -4.843235638865711, 1.7367538195274923, 0.9999999999999994], x)
    weights = preset("LLaVA-1.5-7B/FastV").trend.weights(row()).numpy()
    np.testing.assert_allclose(weights, 1 / cubic, rtol=1e-12)
    assert weights[-1] == pytest.approx(0.358, abs=1e-3) and (np.diff(weights) < 0).all()


def test_unknown_presets_name_the_nearest() -> None:
    with pytest.raises(CurveError, match=r"llava-1\.5-7b/pyramiddrop/textvqa"):
        preset("llava-1.5-7b/pyramidrop/texvqa")
    assert preset("llava-1.5-7b/himap/mm-vet") == preset("llava-1.5-7b/himap/mmvet")


def test_corrected_excludes_padding_and_official_zeroes_it() -> None:
    tokens = VisualLayout.from_spans([(3, 19)], (4, 4), image_sizes=[(40, 20)]).rows[0]
    debias = Debias(PaddingMask(), Exponential(2.0))
    score = torch.rand(16) + 0.1
    weight = torch.exp(-2 * torch.arange(16) / 16)
    ours, allowed = debias(score, tokens)
    assert allowed.tolist() == [False] * 4 + [True] * 8 + [False] * 4
    torch.testing.assert_close(ours, score * weight)
    theirs, allowed = debias(score, tokens, official=True)
    assert allowed.all() and ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(theirs[4:12], (score * weight)[4:12])
    assert not theirs[:4].any() and not theirs[12:].any()


def test_without_steps_nothing_changes() -> None:
    score = torch.rand(16)
    same, allowed = Debias()(score, row(4))
    assert torch.equal(same, score) and allowed.all()
    flat, _ = Debias(trend=Exponential(0.0))(score, row(4))
    assert torch.equal(flat, score)


def test_stages() -> None:
    assert [Debias().applies(s) for s in (0, 1)] == [True, False]
    assert Debias(stages="all").applies(2)
    with pytest.raises(ConfigError, match="stages"):
        Debias(stages="last")  # type: ignore[arg-type]


@pytest.mark.parametrize("official", [False, True])
def test_debias_survives_json(official: bool) -> None:
    for debias in (Debias.preset("llava-1.5-7b/sparsevlm/gqa", official=official), Debias(), Debias.parse("padding")):
        assert Debias.from_dict(json.loads(json.dumps(debias.to_dict()))) == debias
    formula = "bilinear" if official else "share"
    assert Debias.preset("llava-1.5-7b/sparsevlm", official=official).padding.formula == formula  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="strength"):
        Debias.from_dict({"strength": 1})


@pytest.mark.parametrize("trend", [Exponential(2.0), Polynomial((1.0, -1.0, 2.0)), Isotonic((0.1, 0.9), (1.0, 3.0))])
def test_tables_in_single_precision_are_debiased_alike(trend: TrendCurve) -> None:
    tokens = VisualLayout.from_spans([(0, 576)], (24, 24), image_sizes=[(640, 480)]).rows[0]
    single = replace(tokens, x=tokens.x.float(), padding=tokens.padding.float())  # as devices without float64 have them
    score = torch.rand(576, generator=torch.Generator().manual_seed(0))
    for threshold in (0.01, 0.5):
        one, other = (Debias(PaddingMask(threshold), trend)(score, t) for t in (tokens, single))
        assert torch.equal(one[1], other[1]) and 0 < int(one[1].sum()) < 576
        torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=0)
