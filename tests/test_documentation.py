"""What the documentation shows works: its Python runs as it stands, its commands exist with these options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
RUN = ("README.md", "docs/getting-started.md")
"""Pages whose Python blocks are run, one after the other in one interpreter."""

# What a test has not: a checkpoint of 14 GB and somebody's photograph. Everything else is as it stands on the page.
STAND_INS = """
import matplotlib
import transformers
from dataclasses import dataclass
from PIL import Image
import evengaze as eg

model, processor = eg.demo.load()
transformers.AutoModelForImageTextToText.from_pretrained = lambda *_, **__: model
eg.llava_processor = lambda *_: processor
eg.demo.make_dataset("eval", images=1)[0].image.convert("RGB").save("photo.jpg")
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", RUN)
def test_python_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    found = blocks(REPOSITORY / page, "python")
    assert found
    script = tmp_path / "script.py"
    script.write_text("\n".join([STAND_INS if page == "README.md" else "", *found]), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "average tokens" in done.stdout and (tmp_path / "kept.png").stat().st_size > 1000


def commands(page: Path) -> list[str]:
    """The lines that call `evengaze`, continuations joined."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    shown = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in shown for line in block.splitlines()]
    lines += [line.strip() for line in text.splitlines() if line.startswith("    evengaze ")]
    return [line for line in lines if line.startswith("evengaze ")]


EVERY = [(page, line) for page in PAGES for line in commands(page)]


def test_commands_are_found() -> None:
    assert len(EVERY) > 20


@pytest.mark.parametrize(("page", "line"), EVERY, ids=lambda value: value if isinstance(value, str) else value.stem)
def test_commands_take_the_options_that_are_shown(page: Path, line: str) -> None:
    import typer

    from evengaze.cli import build, output

    words = output.take(shlex.split(line.replace(" ...", ""), comments=True)[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command = typer.main.get_command(build())
    context = command.make_context("evengaze", words)
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context, resilient_parsing="..." in line)
