"""Generated tables in Markdown files, between marks."""

from __future__ import annotations

from pathlib import Path

from evengaze.errors import DataError


def marks(name: str) -> tuple[str, str]:
    """The lines in front of and behind the part of a file that is generated."""
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def between(text: str, name: str) -> str | None:
    """What stands between the marks; None if they are not there."""
    begin, end = marks(name)
    _, found, rest = text.partition(f"{begin}\n")
    inside, closed, _ = rest.partition(f"\n{end}")
    return inside if found and closed else None


def put_between(file: Path, name: str, content: str) -> None:
    """Replace it.

    Raises:
        DataError: the file has no such marks.
    """
    text, (begin, end) = file.read_text(), marks(name)
    old = between(text, name)
    if old is None:
        raise DataError(f"{file} has no lines {begin} and {end}")
    file.write_text(text.replace(f"{begin}\n{old}\n{end}", f"{begin}\n{content}\n{end}"))
