"""The curve file: round trip, bad files, use in the wrong place."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from evengaze.debias import Curve, CurveWarning, Debias, Exponential, ExponentialFloor, Origin
from evengaze.debias.curve import Band, Samples, architecture_of, hash_data, warn_if_foreign
from evengaze.errors import CurveError
from evengaze.methods import get
from evengaze.methods.illava import ILLaVA
from evengaze.testing import tiny

CURVE = Curve(
    trend=ExponentialFloor(0.01, 5.0, 0.2),
    origin=Origin(model="m", architecture="llava/llama/10x576", method="fastv", layer=1, grid=(14, 14), samples=32),
    fit="log",
    summary={"sigma": 2.0, "r2": 0.8},
    samples=Samples((0.0, 0.5), (0.1, 0.2), (0.01, 0.01), (32, 32)),
    band=Band(0.95, (0.0, 1.0), (0.9, 1.0), (1.1, 1.2)),
    layers={3: Exponential(0.2)},
)


def test_a_curve_survives_its_file_and_equal_curves_give_equal_bytes(tmp_path: Path) -> None:
    path = CURVE.save(tmp_path / "new" / "curve.json")
    back = Curve.load(path)
    assert back.trend == CURVE.trend and back.samples == CURVE.samples and back.band == CURVE.band
    assert back.layers == CURVE.layers and back.origin.fingerprint == CURVE.fingerprint == back.fingerprint
    assert back.save(tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_debias_load_takes_the_trend_of_the_asked_layer(tmp_path: Path) -> None:
    path = CURVE.save(tmp_path / "curve.json")
    debias = Debias.parse(str(path))
    assert debias.trend == CURVE.trend and debias.padding is not None
    assert Debias.from_dict(json.loads(json.dumps(debias.to_dict()))) == debias
    other = Debias.load(path, layer=3)
    assert other.trend == Exponential(0.2) and other.origin is not None and other.origin.layer == 3
    with pytest.raises(CurveError, match="layers='all'"):
        Debias.load(path, layer=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trend": {"family": "x"}}, "unknown family"),
        ({"trend": None}, "family"),
        ({"evengaze_curve": 99}, "Upgrade"),
        ({"evengaze_curve": "1"}, "schema"),
        ({"origin": {"layer": "two"}}, "layer"),
        ({"origin": {"colour": 1}}, "colour"),
        ({"origin": {"grid": [24]}}, "grid"),
        ({"origin": []}, "origin"),
        ({"samples": {"x": [1], "mean": []}}, "differ in length"),
        ({"samples": {"z": []}}, "malformed"),
        ({"summary": {"sigma": "high"}}, "malformed"),
        ({"layers": {"one": {"family": "exponential", "sigma": 1}}}, "malformed"),
        ({"summary": {"sigma": float("nan")}}, "NaN"),
        ({"summary": {"sigma": "inf"}}, "NaN"),
        ({"samples": {"x": [0.0], "mean": [float("inf")], "error": [0.0], "count": [1]}}, "NaN"),
        ({"band": {"level": "nan"}}, "NaN"),
        ({"note": float("-inf")}, "NaN"),
    ],
)
def test_malformed_files_are_errors_that_name_the_file(tmp_path: Path, change: dict[str, object], message: str) -> None:
    values = {**CURVE.to_dict(), **change}
    values.pop("fingerprint")
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(values))
    with pytest.raises(CurveError, match=message) as error:
        Curve.load(path)
    assert "bad.json" in str(error.value)
    path.write_text(json.dumps({**values, "fingerprint": CURVE.fingerprint}))
    with pytest.raises(CurveError, match=r"bad\.json"):
        Curve.load(path)


def test_missing_cut_off_edited_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    with pytest.raises(CurveError, match="does not exist"):
        Curve.load(path)
    CURVE.save(path)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(CurveError, match="no JSON"):
        Curve.load(path)
    path.write_text(text.replace("0.01", "0.02"))
    with pytest.raises(CurveError, match="fingerprint"):
        Curve.load(path)
    path.write_text("[1]")
    with pytest.raises(CurveError, match="not a curve"):
        Curve.load(path)


def test_use_for_another_model_or_layer_warns_and_says_how_far_off(tmp_path: Path) -> None:
    debias = Debias.load(CURVE.save(tmp_path / "c.json"))
    with pytest.warns(CurveWarning, match=r"layer 3 instead of 1 \(2 layers away\).*factor of"):
        debias.check(layer=3)
    with pytest.warns(CurveWarning, match="model qwen2_vl"):
        debias.check(architecture="qwen2_vl/x/1x1")
    with pytest.warns(CurveWarning, match=r"method pyramiddrop instead of fastv.*up to a factor of 2\."):
        Debias.preset("llava-1.5-7b/fastv").check(architecture="llava/llama/32x4096", method="pyramiddrop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert debias.check(architecture="llava/llama/10x576", method="fastv", layer=1) == []
        assert Debias(trend=CURVE.trend).check(architecture="anything") == []
        assert warn_if_foreign(None) == []


def test_the_layer_that_is_warned_about_is_the_first_that_ranks_by_text() -> None:
    model, _ = tiny("llava")
    debias = Debias(trend=CURVE.trend, origin=Origin(layer=1))
    tower = ILLaVA(keep=4, layer=3, vision_layers=(0,), debias=debias)  # its first stage is the tower's
    with pytest.warns(CurveWarning, match="attention of layer 2 instead of 1"):
        tower(model).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower.replace(layer=2)(model).remove()
        get("dense")(debias=debias)(model).remove()
    assert [get("divprune")().ranked_layer(32), get("pyramiddrop")().ranked_layer(32)] == [None, 2]


def test_architecture_and_data_hash() -> None:
    text = SimpleNamespace(model_type="llama", num_hidden_layers=32, hidden_size=4096)
    config = SimpleNamespace(model_type="llava", get_text_config=lambda: text)
    assert architecture_of(config) == "llava/llama/32x4096"
    assert hash_data([b"a", "b"]) == hash_data(["b", b"a"]) != hash_data([b"a"])
