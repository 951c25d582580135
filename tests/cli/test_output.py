"""What commands say besides their results, how much of it, and what they check before the work starts."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from evengaze.cli import main, output
from evengaze.demo import make_dataset
from evengaze.errors import ConfigError, DataError


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    make_dataset("eval", images=1)[0].image.save(path)
    return path


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is checked before loading must not need the model."""
    from evengaze.evaluate.predictor import Predictor

    def load(*_: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(Predictor, "load", load)


def test_flags_may_stand_anywhere() -> None:
    assert output.take(["-q", "run", "--plugin", "a", "-p", "x", "--verbose", "--plugin=b.py"]) == ["run", "-p", "x"]
    assert (output.voice.quiet, output.voice.verbose, output.voice.plugins) == (True, True, ["a", "b.py"])
    assert output.take(["run", "--", "-q"]) == ["run", "--", "-q"] and not output.voice.quiet


def test_quiet_leaves_the_answer_only_and_verbose_says_how_it_was_loaded(
    scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("run", "-i", scene, "-p", "what color is it?", "-m", "fastv:keep=49", "--max-new-tokens", 2)
    code, out, err = call(capsys, *given, "-q")
    assert code == 0 and out.strip() and not err
    code, out, err = call(capsys, *given, "-v", "--attention", "eager")
    assert "eager attention" in err and "synthetic pictures" in err and "-> 49 at layer 2" in err
    code, out, _ = call(capsys, *given, "--json")
    found = json.loads(out)
    assert code == 0 and found["answer"] and len(found["kept"]) == 49 and found["method"]["method"] == "fastv"


def test_plugins_bring_methods(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom evengaze import methods\n"
        "@methods.register\n@dataclass(frozen=True)\nclass Mine(methods.OneStage):\n"
        '    name = "mine-of-a-test"\n    attention = None\n'
        "    def score(self, view):\n        return view.tokens.x\n"
    )
    given = ("run", "-i", scene, "-p", "what is it?", "-m", "mine-of-a-test:keep=5", "--max-new-tokens", 1)
    code, _, err = call(capsys, *given)
    assert code == 2 and "unknown method" in err
    code, _, err = call(capsys, *given, "--plugin", tmp_path / "mine.py")
    assert code == 0 and "-> 5 at layer 2" in err
    code, _, err = call(capsys, *given, "--plugin", tmp_path / "other.py")
    assert code == 2 and "no such file" in err


@pytest.mark.parametrize("command", ["run", "compare", "profile", "calibrate", "bias", "curves validate"])
@pytest.mark.parametrize(
    ("method", "message"), [("fastvv:keep=3", "Did you mean 'fastv'"), ("fastv:layer=99", "outside the model")]
)
def test_methods_and_layers_are_checked_before_loading(
    command: str,
    method: str,
    message: str,
    scene: Path,
    tmp_path: Path,
    never_loads: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = {
        "run": ["-i", scene, "-p", "?"],
        "compare": ["-i", scene, "-p", "?", "-o", tmp_path / "c.png"],
        "calibrate": ["-o", tmp_path / "c.json"],
        "bias": ["-o", tmp_path / "b"],
        "curves validate": ["llava-1.5-7b/fastv"],
    }.get(command, [])
    code, _, err = call(capsys, *command.split(), *more, "-m", method)
    assert code == 2 and message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "fastvv"], "Did you mean 'fastv'"),
        (["-m", "fastv:layer=99"], "outside the model"),
        (["-m", "fastv", "--debias", "paddin"], "Did you mean 'padding'"),
        (["-m", "fastv", "--debias", "none,missing.json"], "missing.json"),
        (["-b", "popee"], "popee"),
    ],
)
def test_evaluate_checks_its_plan_before_loading(
    arguments: list[str], message: str, tmp_path: Path, never_loads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", "--model", "demo", "-b", "questions", "--data", tmp_path, "--out", tmp_path / "o"]
    code, _, err = call(capsys, *given, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["calibrate", "bias"])
def test_layers_are_checked_before_loading(
    command: str, tmp_path: Path, never_loads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, command, "-o", tmp_path / "c.json", "--layers", "3,77")
    assert code == 2 and "layers 0 to 8 can be ranked by" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "FOLDER"], "/b.jpg, and repeat"),
        (["--trace", "FOLDER/t.json/", "--image", "PICTURE"], "t.json"),
        (["--trace", "nowhere/t.json", "--image", "PICTURE"], "does not exist"),
        (["--plot", "FOLDER/p.jpg", "--image", "PICTURE"], "ends in .png or .pdf or .svg"),
        (["--debias", "paddin", "--image", "PICTURE"], "Did you mean 'padding'"),
        (["--method", "fastv:kep=3", "--image", "PICTURE"], "Did you mean 'keep'"),
    ],
)
def test_what_is_given_is_checked_before_loading(
    arguments: list[str],
    message: str,
    scene: Path,
    tmp_path: Path,
    never_loads: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "t.json").mkdir()
    for name in ("a.jsonl", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    given = [a.replace("FOLDER", str(tmp_path)).replace("PICTURE", str(scene)) for a in arguments]
    code, _, err = call(capsys, "run", "-p", "?", *given)
    assert code == 2 and message in err and "Traceback" not in err


def test_an_animation_says_which_frame_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from evengaze.cli import session

    frames = [Image.new("RGB", (8, 8), (90 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert len(session.read_pictures([tmp_path / "a.gif"])) == 1
    assert "animation of 3 frames: the model sees the first one" in capsys.readouterr().err


def test_huge_pictures_get_advice_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evengaze.cli import session

    Image.new("L", (400, 300)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"huge\.png has more pixels than are read .* Make it smaller"):
        session.read_pictures([tmp_path / "huge.png"])


def test_large_pictures_are_read_and_pillows_alarm_is_put_into_words(
    scene: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(scene) as picture:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", picture.width * picture.height * 2 // 3)
    given = ("run", "-i", scene, "-p", "what is it?", "-m", "fastv:keep=9", "--max-new-tokens", 1)
    code, _, err = call(capsys, *given)
    assert code == 0 and "very many pixels" in err and "attack" not in err


def test_files_are_never_replaced_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from evengaze.cli import session

    path, folder = tmp_path / "c.json", tmp_path / "b"
    session.check_output(path, ".json")
    session.check_folder(folder)
    assert not capsys.readouterr().err
    path.write_text("{}")
    (folder / "x.png").write_bytes(b"")
    session.check_output(path, ".json")
    session.check_folder(folder)
    err = capsys.readouterr().err
    assert f"{path} is there already" in err and f"{folder} is there already" in err
    with pytest.raises(DataError, match="is a file; give a folder"):
        session.check_folder(path)
    with pytest.raises(ConfigError, match="give some of png, pdf and svg"):
        session.formats("png,jpg")


def test_parameters_are_called_as_on_the_command_line() -> None:
    error = ConfigError("lacks weights; allow it with allow_missing. Give a smaller batch_size, or batch_size=1")
    assert output.spoken(error) == (
        "lacks weights; allow it with --allow-missing. Give a smaller --batch-size, or batch_size=1"
    )
    assert output.spoken("calibrate with layers='all'\nor not") == "calibrate with --layers all or not"


def test_only_the_command_line_knows_its_flags() -> None:
    """The kind of the fault: advice that people who work in Python cannot follow."""
    import evengaze

    found = []
    for path in Path(evengaze.__file__).parent.rglob("*.py"):
        if "cli" in path.parts or path.name in ("__main__.py", "matrix.py", "lmms_eval.py"):  # command lines themselves
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Raise):
                continue
            text = "".join(n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))
            outside = re.sub(r"`evengaze [^`]*`|`ray [^`]*`", "", text)
            found += [f"{path.name}:{node.lineno} {flag}" for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", outside)]
    assert not found


def test_every_command_tells_of_the_flags_that_work_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "bias", "curves show", "list methods", "profile"):
        code, out, _ = call(capsys, *command.split(), "--help")
        assert code == 0 and "--plugin MODULE" in " ".join(out.split()), command


LOADING = {"--revision", "--dtype", "--device", "--attention", "--adapter", "--quantize", "--allow-missing"}


def test_commands_that_load_a_model_have_the_same_options() -> None:
    import typer

    from evengaze.cli import build

    app = typer.main.get_command(build())
    commands = dict(app.commands)  # type: ignore[attr-defined]
    commands |= {f"curves {k}": v for k, v in commands["curves"].commands.items()}
    for name in ("run", "compare", "profile", "calibrate", "bias", "curves validate", "evaluate", "serve", "explore"):
        options = {o for p in commands[name].params for o in p.opts}
        assert not LOADING - options, name
    for name, command in commands.items():
        if name not in ("list", "curves", "serve", "explore"):
            assert "--json" in {o for p in command.params for o in p.opts}, name
