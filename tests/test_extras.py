"""Pruning needs none of the extras' packages, and what needs one says which extra brings it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import evengaze
from evengaze.cluster import connect
from evengaze.errors import EvengazeError, MissingExtraError
from evengaze.evaluate.benchmarks import get_benchmark
from evengaze.evaluate.benchmarks.xlsx import read_xlsx, write_xlsx
from evengaze.evaluate.judge import OpenAIJudge
from evengaze.evaluate.spec import ModelSpec, open_spec
from evengaze.evaluate.video import read_frames
from evengaze.extras import require
from evengaze.models.loading import load_adapter, quantization

EXTRAS = ("matplotlib", "typer", "rich", "jinja2", "scipy")


def run_without(code: str, *absent: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter in which some packages cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, timeout=120)


def test_pruning_needs_no_extra():
    code = """
import evengaze as eg
from evengaze.testing import tiny
model, inputs = tiny("llava")
with eg.FastV(keep=4)(model) as run:
    model.generate(**inputs, max_new_tokens=2)
print(run.trace)
for name in set(eg.__all__) - {"calibrate", "Sample"}:
    getattr(eg, name)
"""
    done = run_without(code, *EXTRAS)
    assert done.returncode == 0, done.stderr
    assert "-> 4 at layer 2" in done.stdout


@pytest.mark.parametrize(
    ("code", "absent", "extra"),
    [
        ("import evengaze.viz.overlay", "matplotlib", "viz"),
        ("import evengaze as eg; eg.calibrate", "scipy", "calibrate"),
        ("from evengaze.evaluate.report import write_report as w; w(None, None)", "jinja2", "evaluate"),
        ("import evengaze.__main__ as m; m.main()", "typer", "cli"),
        ("import evengaze.__main__ as m; m.main()", "rich", "cli"),
    ],
)
def test_what_needs_an_extra_names_it(code, absent, extra):
    done = run_without(code, absent)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert absent in last and f'pip install "evengaze[{extra}]"' in last


@pytest.mark.parametrize(
    ("call", "absent", "extra"),
    [
        (lambda: read_frames(Path("v.mp4")), "av", "video"),
        (lambda: get_benchmark("msvd-qa").check(Path()), "av", "video"),
        (lambda: write_xlsx(Path("x.xlsx"), ["a"], []), "openpyxl", "evaluate"),
        (lambda: read_xlsx(Path(__file__), ["a"]), "openpyxl", "evaluate"),
        (lambda: OpenAIJudge("gpt-4"), "openai", "judge"),
        (lambda: open_spec(ModelSpec("a/b", device="balanced")), "accelerate", "accelerate"),
        (lambda: quantization("4bit"), "bitsandbytes", "quantize"),
        (lambda: load_adapter(None, "a/b"), "peft", "lora"),
        (lambda: connect("local", gpus=None, cpus=1), "ray", "ray"),
    ],
)
def test_calls_that_need_an_extra_name_it(call, absent, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtraError, match=rf'{absent}\b.*pip install "evengaze\[{extra}\]"$'):
        call()


def test_extras_are_asked_for_in_one_place():
    source = Path(evengaze.__file__).parent
    advises = [
        p.name for p in source.rglob("*.py") if re.search(r"pip install .evengaze\[", p.read_text(encoding="utf-8"))
    ]
    assert advises == ["extras.py"]


def test_the_command_without_its_extra_is_one_line():
    done = run_without("import evengaze.__main__ as m; m.main()", "typer", "rich")
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def test_a_missing_package_is_an_error_of_ours_and_an_import_error():
    with pytest.raises(MissingExtraError, match="no_such_module") as caught:
        require("cli", "it", "json", "no_such_module")
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, EvengazeError)
