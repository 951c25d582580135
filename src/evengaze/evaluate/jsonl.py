"""JSON-lines files of questions and answers: bad lines are collected by number, not raised, and a torn tail is cut."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.files import cannot_write, parse_json, read_bytes, read_json

Answer = dict[str, Any]
"""One answer line in LLaVA's record format: at least `question_id` and `text`."""


@dataclass(frozen=True)
class Malformed:
    """A line that is not a usable record.

    Attributes:
        line: Line number, from 1.
        reason: Why it cannot be used.
        excerpt: Its first characters.
        is_json: False when the line is not JSON at all (what LLaVA's converters count as `error_line`).
    """

    line: int
    reason: str
    excerpt: str
    is_json: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"line": self.line, "reason": self.reason, "excerpt": self.excerpt}


@dataclass(frozen=True)
class Lines:
    """A JSON-lines file: its records in order, and the lines that are none.

    Attributes:
        path: The file.
        records: Well-formed records, in file order.
        malformed: All other lines.
        torn: True when the last line is incomplete: no newline at its end and no JSON (a run killed while writing).
    """

    path: Path
    records: tuple[dict[str, Any], ...]
    malformed: tuple[Malformed, ...] = ()
    torn: bool = False


def read_jsonl(path: Path, fields: tuple[str, ...], hint: str = "") -> Lines:
    r"""Read a JSON-lines file; bad lines are collected, not raised.

    Only `\n` ends a line: JSON strings may hold other Unicode line separators.

    Args:
        path: File to read.
        fields: Keys that every record must have.
        hint: Where the file can be had.

    Raises:
        DataError: The file is missing or unreadable.
    """
    raw = read_bytes(path, hint).removeprefix(codecs.BOM_UTF8)
    pieces = raw.split(b"\n")
    complete = pieces.pop() if pieces[-1] == b"" else None
    records: list[dict[str, Any]] = []
    bad: list[Malformed] = []
    for number, piece in enumerate(pieces, 1):
        problem, value, is_json = _parse_line(piece, fields)
        if problem:
            bad.append(Malformed(number, problem, piece[:80].decode("utf-8", "replace"), is_json))
        else:
            records.append(value)
    torn = complete is None and bool(bad) and bad[-1].line == len(pieces) and not bad[-1].is_json
    return Lines(path, tuple(records), tuple(bad), torn)


def _parse_line(piece: bytes, fields: tuple[str, ...]) -> tuple[str, dict[str, Any], bool]:
    """Return (problem or "", record, whether the line is JSON)."""
    if not piece.strip():
        return "blank line", {}, False
    try:
        value = parse_json(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8", {}, False
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})", {}, False
    except ValueError as error:
        return f"not JSON ({error})", {}, False
    if not isinstance(value, dict):
        return f"a JSON {type(value).__name__}, an object was expected", {}, True
    absent = [name for name in fields if name not in value]
    return (f"without {', '.join(absent)}" if absent else ""), value, True


def require_clean(lines: Lines, hint: str = "") -> tuple[dict[str, Any], ...]:
    """Return the records of a dataset file, which must not have bad lines (blank ones are let pass).

    Raises:
        DataError: A line is malformed, or there is none at all.
    """
    bad = [item for item in lines.malformed if item.reason != "blank line"]
    if bad:
        raise DataError(
            f"{lines.path} line {bad[0].line}: {bad[0].reason} ({bad[0].excerpt!r}); {len(bad)} such line(s). "
            f"{hint or 'Fetch the file again.'}"
        )
    if not lines.records:
        raise DataError(f"{lines.path} is empty. {hint or 'Fetch the file again.'}")
    return lines.records


def read_answers(path: Path) -> Lines:
    """Read a predictions file in LLaVA's or Video-LLaVA's record format.

    Video-LLaVA's `{"id", "question", "answer", "pred"}` lines come back with `question_id` and `text` added. A
    JSON list, as in GQA's `*_predictions.json` (`questionId`, `prediction`), is read as well.

    Raises:
        DataError: The file is missing or unreadable.
    """
    raw = read_bytes(path, "Give the JSON-lines file that the model's answers were written to.")
    if raw.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        return Lines(path, *_parse_items(enumerate(read_json(path, list), 1)))
    lines = read_jsonl(path, ())
    torn = {item.line for item in lines.malformed}
    numbers = [n for n in range(1, len(lines.records) + len(torn) + 1) if n not in torn]
    records, bad = _parse_items(zip(numbers, lines.records, strict=True))
    return Lines(path, records, tuple(sorted([*lines.malformed, *bad], key=lambda item: item.line)), lines.torn)


_ALIASES = (("question_id", ("id", "questionId")), ("text", ("pred", "prediction")))


def _parse_items(numbered: Iterable[tuple[int, Any]]) -> tuple[tuple[Answer, ...], tuple[Malformed, ...]]:
    """The answers among numbered JSON values, and the others."""
    records, bad = [], []
    for number, item in numbered:
        problem, value = _parse_item(item)
        if problem:
            bad.append(Malformed(number, problem, str(item)[:80], is_json=True))
        else:
            records.append(value)
    return tuple(records), tuple(bad)


def _parse_item(item: Any) -> tuple[str, Answer]:
    """Bring one answer to `question_id` and `text`; return (problem or "", answer)."""
    if not isinstance(item, dict):
        return f"a JSON {type(item).__name__}, an object was expected", {}
    answer = dict(item)
    for name, others in _ALIASES:
        for other in others:
            if name not in answer and other in answer:
                answer[name] = answer[other]
        if name not in answer:
            return f"without {name}", {}
    if isinstance(answer["question_id"], bool) or not isinstance(answer["question_id"], (int, str)):
        return f"question_id is a {type(answer['question_id']).__name__}, a number or a string was expected", {}
    if not isinstance(answer["text"], str):
        return f"text is a {type(answer['text']).__name__}, a string was expected", {}
    return "", answer


def repair_tail(path: Path) -> bytes:
    """Cut an incomplete last line off an append-only JSON-lines file, so that writing can go on after it.

    A last line that is complete JSON and only lacks its newline is kept and ended.

    Returns:
        The bytes that were cut off (empty when the file was whole or does not exist).
    """
    if not path.exists():
        return b""
    with path.open("r+b") as handle:
        raw = handle.read()
        if not raw or raw.endswith(b"\n"):
            return b""
        start = raw.rfind(b"\n") + 1
        tail = raw[start:]
        try:
            parse_json(tail.decode("utf-8"))
        except ValueError:
            handle.truncate(start)
            return tail
        handle.write(b"\n")
    return b""


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON line and force it to the disk.

    Raises:
        DataError: It cannot be written (disk full, no permission).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(value) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error
