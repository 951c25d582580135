"""`evengaze calibrate`, `bias` and `curves` with a tiny random model in place of a real one."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import evengaze as eg
from evengaze.calibration import observe as observing
from evengaze.cli import build, output, session
from evengaze.cli import calibrate as commands
from evengaze.debias import Curve, CurveWarning
from evengaze.errors import ConfigError, CurveError, DataError
from evengaze.evaluate.predictor import ModelSpec, Predictor
from runner_fakes import VideoProcessor, write_lines, write_video

MODEL, INPUTS = eg.testing.tiny("llava", batch=6)


class FakeProcessor:
    """Prompts are row numbers of `INPUTS`."""

    tokenizer = SimpleNamespace(bos_token=None, padding_side="right")

    def __call__(self, *, text: list[str], images: list[Any], **_: Any) -> dict[str, Any]:
        rows = [int(t) for t in text]
        return {k: v[rows] for k, v in INPUTS.items()}


class FakeSession:
    layers = 6

    def __init__(self, spec: ModelSpec) -> None:
        self.predictor = SimpleNamespace(
            model=MODEL,
            processor=FakeProcessor(),
            revision="r1",
            spec=spec,
            prompt=lambda record, template: record.prompt,
        )


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(session, "Session", FakeSession)
    monkeypatch.setattr(session, "depth", lambda spec: FakeSession.layers)
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
    result = CliRunner().invoke(build(), [str(a) for a in arguments])
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
    with pytest.warns(CurveWarning, match="6 of these 6"):
        out = invoke(
            *("bias", "--model", "m", "--images", pictures / "list.jsonl", "-m", "fastv:keep=4", "--debias", "c.json"),
            *("--layers", "1,3", "-o", "b"),
        )
    assert "debiased" in out and "Spearman" in out
    rows = json.loads(Path("b/bias.json").read_text())["layers"]
    assert set(rows) == {"1", "3"} and set(rows["1"]) == {"before", "after"}
    measured = {"sigma", "spearman", "kept_bottom", "kept_index"}
    for when in ("before", "after"):
        assert set(rows["3"][when]) == measured
        assert all(m["low"] < m["value"] < m["high"] for m in rows["3"][when].values())
    assert abs(rows["3"]["after"]["sigma"]["value"]) < 0.1 * abs(rows["3"]["before"]["sigma"]["value"])
    assert {p.name for p in Path("b").iterdir()} >= {"heat_maps.png", "layers.png", "trend_01.png", "trend_03.png"}


def test_bias_with_a_curve_of_the_same_pictures_is_flagged(pictures: Path) -> None:
    def measure(chosen: str, layers: str = "1") -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", CurveWarning)
            invoke("bias", "--model", "m", "--images", pictures / chosen, "--debias", "c.json", "--layers", layers)
        return [output.spoken(w.message) for w in found if issubclass(w.category, CurveWarning)]

    lines = (pictures / "list.jsonl").read_text().splitlines()
    (pictures / "one.jsonl").write_text("\n".join(lines[:4]) + "\n")
    (pictures / "two.jsonl").write_text("\n".join(lines[4:]) + "\n")
    invoke("calibrate", "--model", "m", "--images", pictures / "one.jsonl", "-o", "c.json", "--family", "exponential")
    assert any("4 of these 4" in text for text in measure("one.jsonl")) and not measure("two.jsonl")
    assert "of layer 1 and used at layers 2, 3; calibrate with --layers all" in measure("two.jsonl", "1,2,3")[0]


def test_lists_find_their_pictures_where_layouts_have_them(pictures: Path, tmp_path: Path) -> None:
    for number, place in enumerate((".", "images", "train_images", "data/images")):  # own, LLaVA's TextVQA and GQA
        folder = tmp_path / f"set{number}"
        (folder / place).mkdir(parents=True, exist_ok=True)
        for i in range(6):
            shutil.copy(pictures / f"{i}.png", folder / place)
        lines = [{"question_id": i, "image": f"{i}.png", "text": str(i), "category": "x"} for i in range(6)]
        write_lines(folder / "questions.jsonl", [*lines, {"question_id": 7, "image": "", "text": "no picture"}])
        invoke("calibrate", "--model", "m", "--images", folder / "questions.jsonl", "-o", "c.json")
        assert Curve.load("c.json").origin.samples == 6
    write_lines(tmp_path / "lost.jsonl", [{"image": "gone.png", "prompt": "0"}])
    with pytest.raises(DataError, match=r"no gone\.png in .*, .*images\. Give paths relative"):
        invoke("calibrate", "--model", "m", "--images", tmp_path / "lost.jsonl", "-o", "c.json")
    (tmp_path / "v.mp4").touch()
    write_lines(tmp_path / "mixed.jsonl", [{"image": "pictures/0.png"}, {"video": "v.mp4"}])
    with pytest.raises(DataError, match="make a list of each"):
        invoke("calibrate", "--model", "m", "--images", tmp_path / "mixed.jsonl", "-o", "c.json")


def test_videos_are_measured_within_and_over_frames(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    model, _ = eg.testing.tiny("video_llava", video=True)
    predictor = Predictor(model, VideoProcessor(), ModelSpec("tiny"))
    predictor.__dict__["revision"] = "r1"
    monkeypatch.setattr(session, "Session", lambda *_, **__: SimpleNamespace(layers=6, predictor=predictor))
    (tmp_path / "clips").mkdir()
    for i in range(5):
        write_video(tmp_path / "clips" / f"{i}.mp4", shade=30 * i)
    given = ("--model", "tiny", "--images", tmp_path / "clips", "--batch-size", 2)
    invoke("calibrate", *given, "-o", "c.json", "--layers", "1,3", "--family", "exponential")
    curve = Curve.load("c.json")
    assert (curve.origin.samples, curve.origin.data, curve.origin.grid) == (5, "videos of clips", (4, 4))
    with pytest.warns(CurveWarning, match="5 of these 5"):
        out = invoke("bias", *given, "--layers", "1,3", "--debias", "c.json")
    rows = json.loads(Path("bias/bias.json").read_text())["layers"]
    for row in rows.values():
        assert len(row["frames"]) == 8 and sum(row["frames"]) == pytest.approx(8)
        assert {"spearman", "spearman_frame", "kept_index"} <= set(row["before"]) == set(row["after"])
    assert "layer 3, mean score by frame:" in out and "Spearman" in out and "by frame" in " ".join(out.split())


def test_curves_list_show_compare_validate(pictures: Path) -> None:
    invoke("calibrate", "--model", "m", "--images", pictures / "list.jsonl", "-m", "fastv:keep=4", "-o", "c.json")
    listed = invoke("curves", "list", ".")
    assert "c.json" in listed and "llava-1.5-7b/pyramiddrop/textvqa" in listed
    shown = invoke("curves", "show", "c.json", "--plot", "c.png")
    assert re.search(r"^sigma +[-.\d]+ \[[-.\d]+, [-.\d]+\]: slope", shown, re.MULTILINE) and "sigma_low" not in shown
    assert Curve.load("c.json").fingerprint in shown and Path("c.png").exists()
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
    with pytest.raises(DataError, match="nowhere is no folder"):
        invoke("curves", "list", "nowhere")
    with pytest.raises(CurveError, match=r"no preset 'x/y'\. `evengaze list presets`"):
        invoke("curves", "show", "x/y")
    with pytest.raises(CurveError, match="Nearest"):
        invoke("curves", "show", "llava-1.5-7b/fastw")
    assert issubclass(CurveWarning, UserWarning)


def test_pictures_that_cannot_be_read_are_left_out_and_listed(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke("calibrate", "--model", "m", "--images", pictures / "list.jsonl", "-o", "whole.json")
    (pictures / "2.png").write_bytes((pictures / "2.png").read_bytes()[:40])
    out = invoke("calibrate", "--model", "m", "--images", pictures / "list.jsonl", "-o", "part.json", code=3)
    assert "1 picture could not be read and was left out:" in out and "2.png" in out
    assert (Curve.load("whole.json").origin.samples, Curve.load("part.json").origin.samples) == (6, 5)
    given = ("--model", "m", "--images", pictures / "list.jsonl")
    with pytest.warns(CurveWarning):
        out = invoke("bias", *given, "--layers", "1", "-o", "b", "--debias", "part.json", "--json", code=3)
    assert "2.png" in json.loads(Path("b/bias.json").read_text())["skipped"][0]
    out = invoke("curves", "validate", "part.json", *given, "-m", "fastv:keep=4", code=3)
    assert "2.png" in out and "validating on 6 samples" in out
    with monkeypatch.context() as patched:
        patched.setattr("evengaze.calibration.validate.judge", lambda *measures: "over-corrects")
        invoke("curves", "validate", "whole.json", *given, "-m", "fastv:keep=4", code=4)
    for i in range(6):
        (pictures / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(CurveError, match="were there pictures at all"):
        invoke("bias", *given, "--layers", "1")


def test_a_curve_prints_on_one_line(pictures: Path) -> None:
    invoke("calibrate", "--model", "m", "--images", pictures / "list.jsonl", "--layers", "all", "-o", "c.json")
    curve = Curve.load("c.json")
    for text in (str(curve), repr(curve)):
        assert len(text) < 300 and "\n" not in text and "layer 1 on m; 6 samples" in text
    assert curve.fingerprint in repr(curve)
    assert str(Curve(curve.trend)).startswith(f"{curve.trend.family} trend; f(1)/f(0) = ")


def test_figures_of_a_bias_name_the_model_as_the_user_did(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evengaze.viz import bias as figures

    drawn = []
    plot = figures.plot_trend
    monkeypatch.setattr(figures, "plot_trend", lambda curve: drawn.append(plot(curve)) or drawn[-1])
    invoke("bias", "--model", "m", "--images", pictures / "list.jsonl", "--layers", "1", "-o", "b")
    (text,) = drawn[0].axes[0].texts
    assert text.get_text().startswith("fastv on m, 6 samples")


def test_bias_concludes_and_says_what_to_type(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evengaze.calibration import conclude

    monkeypatch.setattr(conclude, "verdict", lambda measures, margin=0: "to the bottom")
    monkeypatch.setattr(conclude, "STRONG", -1.0)
    out = invoke("bias", "--model", "m", "--images", pictures / "list.jsonl", "--layers", "1,3", "-o", "b")
    assert "Layers 1, 3: biased towards the bottom" in out
    given = f"--model m --images {pictures / 'list.jsonl'}"
    assert f"  evengaze calibrate {given} -m fastv:keep=0.25,layer=2 --layers 1,3 -o curve.json" in out
    assert json.loads(Path("b/bias.json").read_text())["conclusion"]["bottom"] == [1, 3]
    pictures.rename("my pictures")
    out = invoke("bias", "--model", "m", "--images", "my pictures/list.jsonl", "--layers", "1", "-o", "b")
    assert "  evengaze calibrate --model m --images 'my pictures/list.jsonl' -m" in out
