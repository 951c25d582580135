"""What commands say besides their results: notes, progress and what they replace; and how much of it is wanted.

`-q`, `-v`, `--debug` and `--plugin` may stand anywhere on the command line, as they mean the same for every command.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from evengaze.cli import terminal

ANYWHERE = (
    "Anywhere: -q says errors only, -v says more, --plugin MODULE brings methods of your own, --debug shows tracebacks."
)
RECORDS_LOST = 3
"""Exit status of a command that went through, but without some pictures or records."""
INTERRUPTED, TERMINATED = 130, 143
_NAMED = 5
_PATIENCE = 3.0
"""Seconds of work after which the rest can be estimated."""


@dataclass
class Voice:
    """What was asked for.

    Attributes:
        quiet: errors only.
        verbose: more than usual.
        debug: tracebacks.
        plugins: modules to import first.
    """

    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    plugins: list[str] = field(default_factory=list)


voice = Voice()
_FLAGS = {"-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose", "--debug": "debug"}


def take(arguments: Sequence[str]) -> list[str]:
    """Set `voice` from the flags that may stand anywhere; returns the other arguments."""
    voice.__init__()  # type: ignore[misc]
    rest: list[str] = []
    items = iter(arguments)
    for item in items:
        if item == "--":
            return [*rest, item, *items]
        if item in _FLAGS:
            setattr(voice, _FLAGS[item], True)
        elif item == "--plugin":
            voice.plugins.append(next(items, ""))
        elif item.startswith("--plugin="):
            voice.plugins.append(item.partition("=")[2])
        else:
            rest.append(item)
    return rest


def note(text: object) -> None:
    """Say something besides the result, unless it shall be quiet."""
    if not voice.quiet:
        terminal.secho(text, err=True, dim=True)


def detail(text: object) -> None:
    """Say something that most people need not know."""
    if voice.verbose:
        terminal.secho(text, err=True, dim=True)


def warn(text: object) -> None:
    """A warning on one line."""
    if not voice.quiet:
        terminal.secho(f"Warning: {spoken(text)}", fg=typer.colors.YELLOW, err=True)


def replaces(path: Path) -> None:
    """Say before the work starts that a file, or what a folder holds, will be written over."""
    if path.is_dir():
        if any(path.iterdir()):
            note(f"{path} is there already; files of the same names in it will be replaced")
    elif path.exists():
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        note(f"{path} is there already (of {changed}) and will be replaced")


def skipped(reasons: Sequence[str], what: str = "picture") -> int:
    """List what could not be read; returns the exit status that says so."""
    if not reasons:
        return 0
    said = (
        f"1 {what} could not be read and was"
        if len(reasons) == 1
        else f"{len(reasons)} {what}s could not be read and were"
    )
    terminal.secho(f"{said} left out:", fg=typer.colors.YELLOW, err=True)
    for reason in reasons if voice.verbose else reasons[:_NAMED]:
        terminal.secho(f"  {reason}", err=True)
    if len(reasons) > _NAMED and not voice.verbose:
        terminal.secho(f"  and {len(reasons) - _NAMED} more (-v lists them all)", err=True)
    return RECORDS_LOST


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere one line with an estimate as soon as there is one.

    Yields:
        A function that is told how many are done.
    """
    columns = (terminal.Description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    screen = terminal.Screen(stderr=True)
    if voice.quiet:
        yield lambda count: None
        return
    if screen.is_terminal:
        with Progress(*columns, console=screen, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda count: bar.update(task, completed=count)
        return
    start, told = time.monotonic(), False

    def advance(count: int) -> None:
        nonlocal told
        spent = time.monotonic() - start
        if told or spent < _PATIENCE or count <= done:
            return
        told = True
        left = spent / (count - done) * (total - count)
        if left > _PATIENCE:
            note(f"{what}: {count} of {total} after {spent:.0f} s, {duration(left)} to go")

    yield advance


def duration(seconds: float) -> str:
    """About how long, in words."""
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"


_OPTIONS = (
    *("allow_missing", "batch_size", "max_new_tokens", "shuffle_seed", "judge_url", "judge_local", "judge_cache"),
    *("ray_actors", "ray_gpus", "ray_cpus"),
)
_GIVEN = re.compile(r"(?<![-\w.:,])(layers|prompt)='(\w+)'")
_WORD = re.compile(rf"(?<![-\w.])({'|'.join(_OPTIONS)})(?=[^\w=]|$)")


def spoken(message: object) -> str:
    """A message on one line, with parameters as the command line calls them."""
    text = _GIVEN.sub(r"--\1 \2", " ".join(str(message).split()))
    return _WORD.sub(lambda found: "--" + found[1].replace("_", "-"), text)


def here() -> None:
    """Let modules in the current folder be imported, as `python -m evengaze` does."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
