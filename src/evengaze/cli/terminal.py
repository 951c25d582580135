"""The one place that writes to the terminal: what comes from outside can neither format nor control it.

Ids, paths, answers and errors are data. Markup in them is text, and control characters are shown instead of obeyed.
"""

from __future__ import annotations

import json
import re
from typing import Any

import typer
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from evengaze.cli import tables

# C0 without tab and newline, delete, C1, the marks that turn writing around, and halves of characters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: object) -> str:
    r"""Text with its control characters spelled out: an escape becomes `\x1b`."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode(), str(text))


def echo(text: object, *, err: bool = False) -> None:
    """Print a line."""
    typer.echo(plain(text), err=err)


def secho(text: object, *, err: bool = False, **style: Any) -> None:
    """Print a line in a style of `typer.secho`."""
    typer.secho(plain(text), err=err, **style)


def as_json(value: Any, **options: Any) -> str:
    """JSON for people: in their own script, but with nothing in it that a terminal would obey."""
    text = json.dumps(value, indent=2, ensure_ascii=False, **options)
    return _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


class Screen(Console):
    """A console that takes all text as it is; styles are given by `style` and by `Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """See `rich.console.Console`; every string passes here, those of tables, too."""
        return super().render_str(plain(text), **{**options, "markup": False, "emoji": False})

    def print(self, *objects: Any, **options: Any) -> None:
        """See `rich.console.Console`; a text is broken at blanks only, so that paths and addresses can be copied."""
        if len(objects) == 1 and isinstance(objects[0], str) and "soft_wrap" not in options:
            objects, options = (self._broken(objects[0]),), {"overflow": "ignore", "crop": False, **options}
        super().print(*objects, **options)

    def labelled(self, label: object, rest: object, style: str) -> None:
        """Print a line that begins with a styled label."""
        text = Text(self._broken(f"{label}{rest}"))
        text.stylize(style, 0, len(plain(label)))
        self.print(text, overflow="ignore", crop=False)

    def _broken(self, text: str) -> str:
        return "\n".join(tables.lines(plain(text).split("\n"), limit=self.width))


class Description(ProgressColumn):
    """A task's description, as it is."""

    def render(self, task: Task) -> Text:
        """See `rich.progress.ProgressColumn`."""
        return Text(plain(task.description))
