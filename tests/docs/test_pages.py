"""Every code block of the documentation is run or checked, or says why not."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from docs.pages import PAGES, ROOT, Block, blocks
from evengaze.cli import build

BLOCKS = [block for page in PAGES for block in blocks(page)]
ANYWHERE = {"--debug", "--plugin", "-q", "-v", "--help", "-h"}
OUTPUT = ""  # a block without a language shows what a command printed
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def commands(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            yield words


def parse_options(words: list[str]) -> None:
    """Whether the command line would take these words: commands and options exist, values are of their types."""
    command = get_command(build())
    name, rest = "evengaze", words[1:]
    while isinstance(command, typer.core.TyperGroup):
        if rest and rest[0] == "--version":
            return
        name, rest = rest[0], rest[1:]
        assert name in command.commands, f"evengaze has no command {name}"
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    assert set(given) - ANYWHERE <= known, f"{name} has no {set(given) - known - ANYWHERE}"


def test_the_blocks_are_found() -> None:
    assert len(BLOCKS) > 25
    fences = sum(page.read_text().count("\n```") for page in PAGES)
    assert fences == 2 * len(BLOCKS)  # no block is indented, unclosed or of another form
    assert {block.language for block in BLOCKS} <= {"python", "bash", "toml", "yaml", "json", OUTPUT}


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "bash" and b.not_run is None], ids=lambda block: block.place
)
def test_commands_exist(block: Block) -> None:
    for words in commands(block.code):
        head = words[0]
        if head == "evengaze":
            parse_options(words)
        elif head == "make":
            targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
            targets |= {f"compat-{release}" for release in ("newest", "5.23", "5.21")}
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        elif head == "python":
            place = words[1] if words[1] != "-m" else f"src/{words[2].replace('.', '/')}.py"
            assert (ROOT / place).is_file() or words[2] == "pytest", words
        elif head == "pip":
            asked = re.findall(r"\[([^\]]+)\]", " ".join(words))
            assert {extra for part in asked for extra in part.split(",")} <= EXTRAS, words
        else:
            pytest.fail(f"{block.place}: say why `{' '.join(words)}` is not checked: <!-- not run: why -->")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "toml"], ids=lambda block: block.place)
def test_toml_can_be_read(block: Block) -> None:
    assert tomllib.loads(block.code)


@pytest.mark.slow
def test_python_runs() -> None:
    """All pages in one process of its own: some register methods and adapters."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "pages.py")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    ran = done.stdout.count("ran ")
    expected = [b for b in BLOCKS if b.language == "python" and b.not_run is None]
    assert ran + done.stdout.count("skipped ") == len(expected) and ran > 10
