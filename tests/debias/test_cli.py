"""`evengaze calibrate`, `bias` and `curves` with a tiny random model in place of a real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import evengaze as eg
from evengaze.cli import calibrate as commands
from evengaze.cli import session
from evengaze.debias import Curve, CurveWarning
from evengaze.debias import observe as observing
from evengaze.errors import ConfigError, CurveError, DataError

MODEL, INPUTS = eg.testing.tiny("llava", batch=6)


class FakeProcessor:
    """Prompts are row numbers of `INPUTS`."""

    tokenizer = SimpleNamespace(bos_token=None, padding_side="right")

    def __call__(self, *, text: list[str], images: list[Any], **_: Any) -> dict[str, Any]:
        rows = [int(t) for t in text]
        return {k: v[rows] for k, v in INPUTS.items()}


class FakeSession:
    layers = 6

    def __init__(self, model: str, **_: Any) -> None:
        self.predictor = SimpleNamespace(
            model=MODEL,
            processor=FakeProcessor(),
            revision="r1",
            spec=SimpleNamespace(name=model),
            prompt=lambda record, template: record.prompt,
        )


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(session, "Session", FakeSession)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i in range(6):
        Image.new("RGB", (8, 6), (40 * i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prompt": str(i)}))
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    yield folder


def invoke(*arguments: object, code: int = 0) -> str:
    app = typer.Typer()
    commands.register(app)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_calibrate_writes_a_curve_and_figures(pictures: Path) -> None:
    out = invoke(
        *("calibrate", "--model", "m", "--images", pictures / "list.jsonl", "-m", "fastv:keep=4", "--layers", "all"),
        *("-o", "c.json", "--figures", "figures", "--family", "exponential"),
    )
    curve = Curve.load("c.json")
    assert curve.fingerprint in out and curve.origin.layer == 1 and sorted(curve.layers) == [0, 2, 3, 4]
    assert (curve.origin.model, curve.origin.revision, curve.origin.data) == ("m", "r1", "list list.jsonl")
    assert {p.name for p in Path("figures").iterdir()} == {"trend.png", "heat_map.png"}
    assert not Path("c.state.json").exists()


def test_folders_get_default_or_given_prompts_and_limits_spread(pictures: Path) -> None:
    invoke(*("calibrate", "--model", "m", "--images", pictures, "-p", "0", "-p", "3", "--limit", 4, "-o", "c.json"))
    assert Curve.load("c.json").origin.samples == 4
    with pytest.raises(ValueError, match="invalid literal"):  # the fake processor cannot read the default prompts
        invoke("calibrate", "--model", "m", "--images", pictures, "-o", "c.json")


def test_a_killed_calibration_goes_on_to_the_same_file(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("calibrate", "--model", "m", "--images", pictures / "list.jsonl", "--batch-size", 2)
    invoke(*arguments, "-o", "whole.json")
    monkeypatch.setattr(commands, "SAVE_EVERY", -1.0)
    forward, calls = observing._forward, []

    def interrupted(model: Any, inputs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        forward(model, inputs)

    monkeypatch.setattr(observing, "_forward", interrupted)
    invoke(*arguments, "-o", "part.json", code=130)
    assert Path("part.state.json").exists() and not Path("part.json").exists()
    invoke(*arguments, "-o", "part.json")
    assert len(calls) == 4  # only the last batch was run again
    assert Path("part.json").read_bytes() == Path("whole.json").read_bytes()
    Path("part.state.json").write_text("{")
    with pytest.raises(CurveError, match="delete it"):
        invoke(*arguments, "-o", "part.json")
    invoke(*arguments, "-o", "part.json", "--fresh")


def test_bias_prints_a_table_and_writes_figures(pictures: Path) -> None:
    invoke(
        *("calibrate", "--model", "m", "--images", pictures / "list.jsonl", "--layers", "1,3", "-o", "c.json"),
        *("--family", "exponential"),
    )
    out = invoke(
        *("bias", "--model", "m", "--images", pictures / "list.jsonl", "-m", "fastv:keep=4", "--debias", "c.json"),
        *("--layers", "1,3", "-o", "b"),
    )
    assert "debiased" in out and "Spearman" in out
    rows = json.loads(Path("b/bias.json").read_text())["layers"]
    assert set(rows) == {"1", "3"} and set(rows["1"]) == {"sigma", "before", "after"}
    assert {p.name for p in Path("b").iterdir()} >= {"heat_maps.png", "layers.png", "trend_01.png", "trend_03.png"}


def test_curves_list_show_compare_validate(pictures: Path) -> None:
    invoke("calibrate", "--model", "m", "--images", pictures / "list.jsonl", "-m", "fastv:keep=4", "-o", "c.json")
    listed = invoke("curves", "list", ".")
    assert "c.json" in listed and "llava-1.5-7b/pyramiddrop/textvqa" in listed
    shown = invoke("curves", "show", "c.json", "--plot", "c.png")
    assert "sigma_low" in shown and Curve.load("c.json").fingerprint in shown and Path("c.png").exists()
    assert "published" in invoke("curves", "show", "llava-1.5-7b/fastv", "--plot", "p.png")
    same = invoke("curves", "compare", "c.json", "c.json")
    assert "factor of 1.000" in same and "overlap everywhere" in same and "6 pictures in common" in same
    assert "model llava/llama/32x4096 instead" in invoke("curves", "compare", "c.json", "llava-1.5-7b/fastv")
    checked = invoke(
        "curves", "validate", "c.json", "--model", "m", "--images", pictures / "list.jsonl", "-m", "fastv:keep=4"
    )
    assert "verdict: " in checked and "6 of these pictures" in checked


def test_bad_input_is_an_error_that_names_the_fix(pictures: Path) -> None:
    begin = ("calibrate", "--model", "m", "-o", "c.json")
    with pytest.raises(DataError, match="folder of pictures"):
        invoke(*begin)
    with pytest.raises(DataError, match="jsonl"):
        invoke(*begin, "--images", pictures / "0.png")
    (pictures / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        invoke(*begin, "--images", pictures / "empty")
    (pictures / "bad.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match="record 1"):
        invoke(*begin, "--images", pictures / "bad.jsonl")
    for option in (("--family", "spline"), ("--fit", "l1"), ("--target", "rank"), ("--layers", "one")):
        with pytest.raises(ConfigError, match=option[0]):
            invoke(*begin, "--images", pictures / "list.jsonl", *option)
    with pytest.raises(ConfigError, match=r"\.json"):
        invoke("calibrate", "--model", "m", "--images", pictures, "-o", "curve.txt")
    with pytest.raises(CurveError, match="Nearest"):
        invoke("curves", "show", "llava-1.5-7b/fastw")
    assert issubclass(CurveWarning, UserWarning)
