"""Tables for a terminal: as wide as it, and whatever the width, no name is cut.

A table that is too wide lets its texts run over several lines; if that is not enough, the first column, the names, gets
lines of its own with the other columns below.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

GAP = "  "
NARROW = 16
"""Texts are not broken into less than this, if they are that long."""

_HARD = "\u00a0"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        head: its title; may be broken at blanks.
        left: whether its cells are flush left, as texts are; numbers are flush right.
        text: whether its cells may be broken at blanks.
    """

    head: str
    left: bool = False
    text: bool = False


def name(head: str) -> Column:
    """The column that names the rows."""
    return Column(head, left=True)


def text(head: str) -> Column:
    """A column of sentences."""
    return Column(head, left=True, text=True)


def together(words: str) -> str:
    """Words that stay on one line, such as a number and its interval."""
    return words.replace(" ", _HARD)


def width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], *, title: str = "", limit: int | None = None
) -> str:
    """A table as text.

    Args:
        columns: the first one names the rows; others in which nothing is written are left out.
        rows: equally long; an empty row is an empty line.
        title: a line above.
        limit: columns of the screen; the terminal's by default.
    """
    limit = limit or width()
    written = [i for i in range(len(columns)) if i == 0 or not rows or any(row and row[i] for row in rows)]
    columns, rows = [columns[i] for i in written], [[row[i] for i in written] if row else row for row in rows]
    filled = [row for row in rows if row]
    widths = _fit(columns, filled, limit)
    lines = [*textwrap.wrap(title, limit), ""] if title else []
    if widths is not None or len(columns) == 1:
        return "\n".join([*lines, *_lines(columns, rows, widths or [limit])])
    rest, inner = columns[1:], [row[1:] for row in filled]
    widths = _fit(rest, inner, limit - len(GAP), force=True)
    assert widths is not None
    made = [columns[0].head, *(GAP + line for line in _head(rest, widths)), _rule(limit)]
    for row in rows:
        made += [*row[: 1 if row[0] else 0], *(GAP + line for line in _row(rest, row[1:], widths))] if row else [""]
    return "\n".join([*lines, *made])


def lines(sentences: Sequence[str], *, limit: int | None = None) -> list[str]:
    """Sentences, broken where the screen ends; those that begin with a blank are commands and stay whole."""
    limit, found = limit or width(), list[str]()
    for one in sentences:
        found += [one] if one.startswith(" ") else _wrap(one, limit)
    return [one.replace(_HARD, " ") for one in found]


def pairs(items: Sequence[tuple[str, str]], *, limit: int | None = None) -> str:
    """Names with their texts beside them, which are broken where the screen ends."""
    limit, longest = limit or width(), max((len(key) for key, _ in items), default=0)
    lines = []
    for key, value in items:
        first, *more = _wrap(value, max(NARROW, limit - longest - len(GAP))) or [""]
        lines += [f"{key:<{longest}}{GAP}{first}".rstrip(), *(" " * (longest + len(GAP)) + line for line in more)]
    return "\n".join(lines).replace(_HARD, " ")


def _fit(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], limit: int, *, force: bool = False
) -> list[int] | None:
    """The columns' widths, texts as narrow as they must be; None if even that is too wide."""
    cells = [[row[i] for row in rows] for i in range(len(columns))]
    least, most = [], []
    for column, values in zip(columns, cells, strict=True):
        head = max((len(word) for word in column.head.split()), default=0)
        longest = max((len(value) for value in values), default=0)
        words = max((len(word) for value in values for word in value.split(" ")), default=0)
        most.append(max(head, longest))
        least.append(max(head, min(longest, max(NARROW, words)) if column.text else longest))
    room = limit - len(GAP) * (len(columns) - 1)
    if sum(least) > room and not force:
        return None
    widths = list(most)
    while sum(widths) > room:
        wide = [i for i in range(len(widths)) if widths[i] > least[i]]
        if not wide:
            break
        widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def _lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    lines = [*_head(columns, widths), _rule(sum(widths) + len(GAP) * (len(widths) - 1))]
    for row in rows:
        lines += _row(columns, row, widths) if row else [""]
    return lines


def _head(columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    heads = [_wrap(column.head, size) for column, size in zip(columns, widths, strict=True)]
    height = max(len(head) for head in heads)
    filled = [[""] * (height - len(head)) + head for head in heads]
    return [_line(columns, parts, widths) for parts in zip(*filled, strict=True)]


def _row(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = [
        _wrap(cell, size) if column.text else [cell] for column, cell, size in zip(columns, row, widths, strict=True)
    ]
    height = max(len(cell) for cell in cells)
    filled = [cell + [""] * (height - len(cell)) for cell in cells]
    return [_line(columns, parts, widths) for parts in zip(*filled, strict=True)]


def _line(columns: Sequence[Column], parts: Sequence[str], widths: Sequence[int]) -> str:
    placed = [
        part.ljust(size) if column.left else part.rjust(size)
        for column, part, size in zip(columns, parts, widths, strict=True)
    ]
    return GAP.join(placed).rstrip().replace(_HARD, " ")


def _rule(length: int) -> str:
    return "-" * length


def _wrap(words: str, size: int) -> list[str]:
    return textwrap.wrap(words, max(1, size), break_long_words=False, break_on_hyphens=False) or [""]
