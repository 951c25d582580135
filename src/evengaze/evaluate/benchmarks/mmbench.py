"""MMBench-EN dev (LLaVA `model_vqa_mmbench.py`, `scripts/convert_mmbench_for_submission.py`; VLMEvalKit)."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from evengaze.errors import ConfigError, DataError
from evengaze.evaluate.benchmarks.base import LLAVA_ROOTS, Benchmark
from evengaze.evaluate.benchmarks.rows import number_repeats
from evengaze.evaluate.benchmarks.types import DataFile, Mode, Problems, Record, Score, ScoreOptions
from evengaze.evaluate.benchmarks.xlsx import read_xlsx, write_xlsx
from evengaze.evaluate.jsonl import Answer, Lines
from evengaze.evaluate.metrics.mmbench import (
    ABBREVIATIONS,
    MILLION,
    RULES,
    circular_groups,
    circular_hits,
    letter_rule,
    mean_by,
)
from evengaze.files import read_bytes

TableRow = dict[str, str | None]

LETTERS = "ABCD"
DEFAULT_RULE = "vlmevalkit"
TABLES_AT = "https://download.openmmlab.com/mmclassification/datasets/mmbench"
# What pandas reads as a missing value; so an option "N/A" ends the list of options.
_MISSING = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"}
    | {"NULL", "NaN", "None", "n/a", "nan", "null"}
)
_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
# str() of what pandas makes of an empty cell; what the reference code sees in place of a missing prediction.
_EMPTY_CELL = "nan"


def read_tsv(path: Path, hint: str = "") -> list[TableRow]:
    """Read an MMBench table as pandas would; missing values are None.

    Raises:
        DataError: The file is missing, cut off, or lacks a column.
    """
    csv.field_size_limit(sys.maxsize)  # a base64 image is one field
    text = read_bytes(path, hint).decode("utf-8", "replace").removeprefix("\ufeff")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    header = next(reader, [])
    absent = [name for name in ("index", "question", "A", "B") if name not in header]
    if absent:
        raise DataError(f"{path} has no column {', '.join(absent)}: its first line must name the columns. {hint}")
    rows: list[TableRow] = []
    for cells in reader:
        if not cells:
            continue
        row: TableRow = {name: None if cell in _MISSING else cell for name, cell in zip(header, cells, strict=False)}
        if len(cells) != len(header) or not (row["index"] or "").isdigit():
            raise DataError(
                f"{path} line {reader.line_num}: {len(cells)} columns and index {row['index']!r}, {len(header)} "
                f"columns and a number were expected. The file may be cut off. {hint}"
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{path} has no rows. {hint}")
    return rows


def _uploads(folder: Path) -> list[Path]:
    return sorted(folder.glob("answers_upload/*/*.xlsx"))


def _index(answer: Answer) -> int:
    """The row that an answer line belongs to; -1 for what is no row's number."""
    text = str(answer["question_id"])
    return int(text) if text.isdecimal() and len(text) < 20 else -1


def is_none(value: str | None) -> bool:
    """Whether LLaVA takes a cell for missing."""
    return value is None or value.lower() in ("nan", "none")


def options_of(row: TableRow) -> list[str]:
    """Return the options up to the first missing one."""
    options = []
    for letter in LETTERS:
        value = row.get(letter)
        if value is None or is_none(value):
            break
        options.append(value)
    return options


def choices_of(row: TableRow) -> dict[str, str]:
    """Return all options that are not missing, by letter."""
    return {letter: value for letter in LETTERS if (value := row.get(letter)) is not None}


def rotations(group: Sequence[TableRow]) -> int:
    """How many rotations a question should have, by its first two: the turn repeats until all options are back.

    A last option such as "All above are not right" keeps its place, so that four options may have three rotations.
    """
    options = [list(choices_of(row).values()) for row in group[:2]]
    first = options[0]
    if len(options) == 1 or sorted(first) != sorted(options[1]):
        return len(first)
    if len(set(first)) < len(first):  # which of two equal options went where cannot be told
        return len(first) - (first[-1] == options[1][-1])
    moved = [first.index(text) for text in options[1]]
    now, turns = moved, 1
    while now != sorted(now):
        now, turns = [now[i] for i in moved], turns + 1
    return turns


class MMBench(Benchmark):
    """MMBench-EN dev: circular accuracy; the table holds every rotation, so one pass is the circular test.

    Args:
        all_rounds: Also rotate the options of every row (LLaVA's `--all-rounds`, which its scripts do not use).
    """

    name = "mmbench"
    title = "MMBench"
    split = "dev"
    size: ClassVar[int | None] = 1176
    metric = "circular accuracy (%)"
    folders: ClassVar[tuple[str, ...]] = ("mmbench",)
    table: ClassVar[str] = "mmbench_dev_20230712.tsv"
    instruction: ClassVar[str] = "Answer with the option's letter from the given choices directly."
    files: ClassVar[tuple[DataFile, ...]] = (DataFile(table, f"{TABLES_AT}/{table}"),)
    server = "https://mmbench.opencompass.org.cn/mmbench-submission"
    max_new_tokens = 1024
    form = "an option's letter or text"
    quirks = ("it counts a question as wrong when a rotation has no prediction",)

    def __init__(self, all_rounds: bool = False) -> None:
        self.all_rounds = all_rounds

    def _rows(self, data: Path) -> dict[int, TableRow]:
        rows = read_tsv(self.path(data, self.table), self.source(self.table))
        return {int(row["index"] or 0): row for row in rows}

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the rows in table order, images decoded from the table.

        Raises:
            DataError: The table is malformed, or has no images.
        """
        for index, row in self._rows(data).items():
            try:
                image = base64.b64decode(row.get("image") or "", validate=True)
            except binascii.Error as error:
                raise DataError(
                    f"{self.path(data, self.table)}, index {index}: its image is not base64 ({error}). "
                    f"{self.source(self.table)}"
                ) from None
            options = options_of(row)
            rounds = len(options) if self.all_rounds else 1
            keys = number_repeats([str(index)] * rounds)
            for turn, key in enumerate(keys):
                rotated = options[turn:] + options[:turn]
                question = row["question"] or ""
                hint = row.get("hint")
                stem = question if hint is None or is_none(hint) else f"{hint}\n{question}"
                body = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, rotated, strict=False))
                letters = list(LETTERS[: len(options)])
                metadata = {
                    "round_id": turn,
                    "options": rotated,
                    "option_char": letters[turn:] + letters[:turn],
                    "stem": stem + body,
                }
                yield Record(key, index, f"{stem}{body}\n{self.instruction}", image, metadata=metadata)

    def answer_record(self, record: Record, text: str, model_id: str, answer_id: str | None = None) -> Answer:
        """Build the answer line in `model_vqa_mmbench.py`'s format."""
        return {
            "question_id": record.question_id,
            "round_id": record.metadata["round_id"],
            "prompt": record.metadata["stem"],
            "text": text,
            "options": record.metadata["options"],
            "option_char": record.metadata["option_char"],
            "answer_id": answer_id or uuid.uuid4().hex[:22],
            "model_id": model_id,
            "metadata": {},
        }

    # -- scoring -------------------------------------------------------------------------------------------------

    def read_answers(self, answers: Path) -> Lines:
        """Read an answer file, or a submission xlsx (columns `index` and `prediction`)."""
        if answers.suffix.lower() != ".xlsx":
            return super().read_answers(answers)
        found = []
        for row in read_xlsx(answers, ("index", "prediction")):
            if row["prediction"] is not None:
                found.append({"question_id": int(row["index"]), "text": str(row["prediction"])})
        return Lines(answers, tuple(found))

    def out_of_form(self, answers: Lines, data: Path, options: ScoreOptions) -> dict[str, str]:
        """Texts by index of the answers in which the rule finds no option; a refusal (Z) is none."""
        rows, read = self._truth(answers, data), RULES[options.rule or DEFAULT_RULE]
        found = {}
        for answer in answers.records:
            row, text = rows.get(_index(answer)), answer["text"]
            if row is None or letter_rule(text, {}) is not None:
                continue
            if read(text, choices_of(row)) not in choices_of(row):
                found[str(answer["question_id"])] = text
        return found

    def _truth(self, answers: Lines, data: Path) -> dict[int, TableRow]:
        """Return the rows of the table; without it those of a submission xlsx, which carries the answers as well."""
        try:
            rows = self._rows(data)
        except DataError:
            sheet = self._submitted(answers, data)
            if sheet is None:
                raise
            cells = read_xlsx(sheet, ("index", "answer", "A", "B"))
            rows = {int(row["index"]): {k: None if v is None else str(v) for k, v in row.items()} for row in cells}
        if any(row.get("answer") is None for row in rows.values()):
            raise DataError(
                f"{self.table} below {data} has rows without an answer: it is not the dev table. Test answers are "
                f"scored at {self.server}. {self.source(self.table)}"
            )
        return rows

    def _submitted(self, answers: Lines, data: Path) -> Path | None:
        """Find a submission xlsx: the predictions themselves, or one where LLaVA's converter puts them."""
        if answers.path.suffix.lower() == ".xlsx":
            return answers.path
        found = (path for root in LLAVA_ROOTS for folder in self.folders for path in _uploads(data / root / folder))
        return next((path for path in found if path.parent.name == Path(self.table).stem), None)

    def breakdown(self, metrics: dict[str, Any]) -> dict[str, float]:
        """See `Benchmark.breakdown`."""
        found = metrics["by_l2_category"][metrics["rule"]]
        return {ABBREVIATIONS.get(name, name): 100 * share for name, share in found.items() if name}

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score the questions whose every rotation has a prediction."""
        rows = self._truth(answers, data)
        notes = []
        later = [answer for answer in answers.records if answer.get("round_id", 0)]
        if later:
            notes.append(f"{len(later)} answers of later rounds (--all-rounds) are not used.")
            first = tuple(answer for answer in answers.records if not answer.get("round_id", 0))
            answers = Lines(answers.path, first, answers.malformed, answers.torn)
        joined = self.join([str(index) for index in rows], answers)
        texts = {index: joined.by_key[str(index)]["text"] for index in rows if str(index) in joined.by_key}
        groups = circular_groups(list(rows))
        short = [main for main, group in groups.items() if len(group) < rotations([rows[i] for i in group])]
        if short:
            notes.append(f"{len(short)} questions lack rotations (first: {short[0]}): the table may be cut off.")
        complete = {i for group in groups.values() if all(i in texts for i in group) for i in group}
        if len(complete) < len(texts):
            notes.append("Questions with an unanswered rotation are left out.")
        return self._score(
            "default", {i: texts[i] for i in rows if i in complete}, rows, options, joined.problems, notes
        )

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score every question; a missing prediction is an empty cell of the submission, and wrong."""
        rows = self._truth(answers, data)
        found = {str(answer["question_id"]): answer["text"] for answer in answers.records}
        texts = {index: found.get(str(index), _EMPTY_CELL) for index in rows}
        return self._score("official", texts, rows, options, Problems(), [])

    def _score(
        self,
        mode: Mode,
        texts: dict[int, str],
        rows: dict[int, TableRow],
        options: ScoreOptions,
        problems: Problems,
        notes: list[str],
    ) -> Score:
        rule = options.rule or DEFAULT_RULE
        if rule not in RULES:
            raise ConfigError(f"no letter rule {rule!r}; there are {', '.join(RULES)}.")
        truth = {index: rows[index]["answer"] or "" for index in rows}
        inferred = {
            name: {index: read(text, choices_of(rows[index])) for index, text in texts.items()}
            for name, read in RULES.items()
        }
        hits = {name: circular_hits(found, truth) for name, found in inferred.items()}
        if not hits[rule]:
            raise DataError("no question has a prediction for every rotation; resume the run first.")
        labels = {
            column: {index: row.get(column) or "" for index, row in rows.items()}
            for column in ("l2-category", "category", "split")
        }
        every = {name: sum(found.values()) / len(found) for name, found in hits.items()}
        single = {index: int(text == truth[index]) for index, text in texts.items()}
        first = [hit for index, hit in single.items() if index < MILLION]
        return self.result(
            mode,
            100 * every[rule],
            {
                "rule": rule,
                "circular": every,
                "by_category": {name: mean_by(found, labels["category"]) for name, found in hits.items()},
                "by_l2_category": {name: mean_by(found, labels["l2-category"]) for name, found in hits.items()},
                "by_split": {name: mean_by(found, labels["split"]) for name, found in hits.items()},
                "abbreviations": ABBREVIATIONS,
                "single_letter": sum(single.values()) / len(single),
                "single_letter_first_pass": sum(first) / len(first),
            },
            n_records=len(circular_groups(list(rows))),
            n_scored=len(hits[rule]),
            problems=problems,
            per_record={str(main): float(hit) for main, hit in hits[rule].items()},
            notes=notes,
        )

    def write_submission(self, answers: Path, data: Path, out: Path) -> dict[str, Any]:
        """Write the server's xlsx: the table without images, with a `prediction` column; unanswered cells empty."""
        lines = self.read_answers(answers)
        rows = self._rows(data)
        problems = self.join([str(index) for index in rows], lines).problems
        found = {str(answer["question_id"]): answer["text"] for answer in lines.records}
        columns = [name for name in next(iter(rows.values())) if name.lower() not in _NOT_SUBMITTED]
        columns.insert(6, "prediction")
        cells: list[list[Any]] = [
            [
                index if name == "index" else found.get(str(index)) if name == "prediction" else row[name]
                for name in columns
            ]
            for index, row in rows.items()
        ]
        keys = list(rows)
        cut = [str(keys[i]) for i in write_xlsx(out, columns, cells)]
        found_problems = {"missing": problems.missing, "duplicate": problems.duplicate, "cut": cut}
        return {"path": str(out), "rows": len(cells), **found_problems}
