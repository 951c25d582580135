"""Rows of question files: checked before anything is answered, so that nothing odd is found out hours later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evengaze.errors import DataError
from evengaze.evaluate.jsonl import read_jsonl, require_clean

if TYPE_CHECKING:
    from evengaze.evaluate.benchmarks.base import Benchmark

QuestionRow = dict[str, Any]
FIELDS = ("question_id", "image", "text")


def number_repeats(bases: Iterable[str]) -> list[str]:
    """Make keys unique: the k-th repetition of a key gets `#k` appended (k from 2)."""
    seen: dict[str, int] = defaultdict(int)
    keys = []
    for base in bases:
        seen[base] += 1
        keys.append(base if seen[base] == 1 else f"{base}#{seen[base]}")
    return keys


def read_rows(path: Path, hint: str = "", fields: tuple[str, ...] = FIELDS) -> tuple[QuestionRow, ...]:
    """Read a question file in LLaVA's format.

    Raises:
        DataError: It is missing, has a malformed line, or a row whose id, image or text is of the wrong kind.
    """
    rows = require_clean(read_jsonl(path, fields, hint), hint)
    check_rows(path, rows, hint)
    return rows


def check_rows(path: Path, rows: Sequence[QuestionRow], hint: str = "") -> None:
    """Check what is in rows of questions.

    Raises:
        DataError: Names the first that is wrong: an id that is neither number nor text, a question that is no text, an
            image that is no file name.
    """
    for number, row in enumerate(rows, 1):
        for field, kinds, wanted in (
            ("question_id", (int, str), "a number or a string"),
            ("text", (str,), "the question as a string"),
            ("image", (str, type(None)), "a file name, or null for a text-only question"),
        ):
            value = row.get(field)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise DataError(
                    f"{path}, row {number} (question_id {row.get('question_id')!r}): {field} is {str(value)[:60]!r} "
                    f"({type(value).__name__}), {wanted} was expected. {hint}".strip()
                )


def question_rows(benchmark: Benchmark, data: Path, name: str) -> dict[str, QuestionRow]:
    """Read a benchmark's question file, in order, by key.

    Raises:
        DataError: See `read_rows`.
    """
    rows = read_rows(benchmark.path(data, name), benchmark.source(name))
    return dict(zip(number_repeats(str(row["question_id"]) for row in rows), rows, strict=True))


def refuse_repeats(path: Path, rows: Iterable[QuestionRow]) -> None:
    """Refuse ids that stand for two questions.

    Raises:
        DataError: Names them.
    """
    seen: set[str] = set()
    twice = []
    for row in rows:
        key = str(row["question_id"])
        if key in seen:
            twice.append(key)
        seen.add(key)
    if twice:
        raise DataError(
            f"{path}: {len(twice)} question_id(s) stand twice ({', '.join(twice[:5])}). Give every question its own."
        )
