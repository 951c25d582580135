"""The command line as a whole: quick to start, one clear line for an error."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from evengaze import __version__
from evengaze.cli import ERROR, main


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code or 0


def test_help_does_not_import_torch_or_transformers():
    code = (
        "import sys\n"
        "from evengaze.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().splitlines()[-1] == "[]"
    assert time.perf_counter() - start < 10  # about half a second on an idle machine
    for command in (
        "demo",
        "run",
        "compare",
        "calibrate",
        "bias",
        "curves",
        "evaluate",
        "score",
        "report",
        "profile",
        "doctor",
        "env",
        "list",
    ):
        assert f" {command} " in out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == __version__


def test_an_error_is_one_line_and_exit_status_2(capsys, tmp_path):
    assert run("run", "-i", str(tmp_path / "none.png"), "-p", "what is this?") == ERROR == 2
    err = capsys.readouterr().err
    assert err.startswith("Error: --image") and err.count("\n") == 1 and "Traceback" not in err


def test_a_file_that_cannot_be_written_is_one_line(capsys, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("")
    assert run("demo", "--out", str(taken)) == ERROR
    err = capsys.readouterr().err
    assert "taken" in err and err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path):
    from evengaze.errors import DataError

    with pytest.raises(DataError, match="no such file"):
        main(["run", "-i", str(tmp_path / "none.png"), "-p", "?", "--debug"])


@pytest.mark.parametrize("arguments", [["run"], ["run", "--nope"], ["nope"]])
def test_wrong_usage_is_reported_by_the_parser(arguments, capsys):
    assert run(*arguments) == 2
    assert "Usage" in capsys.readouterr().err


def test_env_names_versions_devices_and_the_check(capsys):
    assert run("env", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evengaze"] == __version__ and found["packages"]["torch"] and found["self_check"]["passed"]
    assert {"eager", "sdpa"} <= set(found["attention"]) and found["devices"]["cpu"]["cores"]
    assert run("env") == 0
    out = capsys.readouterr().out
    for name in ("evengaze", "python", "torch", "transformers", "tokenizers", "CUDA", "attention"):
        assert any(line.startswith(f"{name} ") for line in out.splitlines()), name
    assert "passed" in out


def test_env_ends_with_1_where_pruning_does_not_work(monkeypatch, capsys):
    from evengaze.engine import selfcheck

    monkeypatch.setattr(selfcheck, "TOLERANCE", -1.0)
    assert run("env") == 1
    assert "FAILED: pruning does not work" in capsys.readouterr().out
