"""Results on disk, read back: every method beside its plain self, the dense model and the baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from evengaze.errors import DataError
from evengaze.evaluate.agreement import Agreement, agree
from evengaze.evaluate.benchmarks import BENCHMARKS
from evengaze.evaluate.fingerprint import digest
from evengaze.evaluate.jsonl import read_jsonl
from evengaze.evaluate.metrics.paired import Paired, compare
from evengaze.evaluate.schema import build
from evengaze.evaluate.shards import ANSWERS
from evengaze.files import read_json, write_whole

RESULT = "result.json"
SCHEMA = 1
FLIPPED = "flipped.jsonl"
_AGAIN = "Delete it and give the evaluation's command again."

Role = Literal["dense", "method", "baseline"]


def short(debias: str) -> str:
    """How a debiasing is called in tables: a curve file by its name, without folder and ending."""
    return "plain" if debias == "none" else Path(debias).stem if debias.endswith(".json") else debias


@dataclass(frozen=True)
class About:
    """Which benchmark it was; see `Benchmark`."""

    name: str
    title: str
    split: str
    metric: str


@dataclass(frozen=True)
class CellInfo:
    """Which cell of the grid it was; see `grid.Cell`."""

    name: str
    role: str
    method: str
    family: str
    debias: str
    average_planned: float
    budget: float | None = None
    baselines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ScoreInfo:
    """What tables and reports need of a score; see `Score`."""

    value: float | None
    n_scored: int
    n_records: int
    per_record: dict[str, float]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    breakdown: dict[str, float] = field(default_factory=dict)
    judge: dict[str, Any] | None = None


@dataclass(frozen=True)
class CellResult:
    """The content of one `result.json`.

    Attributes:
        benchmark: which benchmark.
        cell: which cell.
        fingerprint: everything that the answers depend on.
        tokens: means of visual tokens, average tokens and relative FLOPs; empty if there was no picture.
        answered: answers there are.
        errors: reasons by record for those without an answer.
        overlap: answers about pictures that the debias curve knows.
        waiting: records that other processes are at.
        failed: the model cannot do it.
        score: the whole score as plain JSON.
        problem: why there is none.
        notes: what a reader must know.
    """

    benchmark: About
    cell: CellInfo
    fingerprint: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    answered: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    overlap: int = 0
    waiting: int = 0
    failed: bool = False
    score: dict[str, Any] | None = None
    problem: str | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> CellResult:
        """Read a `result.json`.

        Raises:
            DataError: it is damaged, of a newer schema, or something in it is missing or of another type.
        """
        try:
            found = read_json(path, dict, _AGAIN, strict=True)
        except DataError as error:
            raise DataError(f"a result cannot be read: {error}") from None
        schema = found.get("evengaze_result")
        if schema != SCHEMA:
            raise DataError(f"{path}: result schema {schema!r}, this evengaze reads {SCHEMA}. Evaluate again.")
        try:
            made = build(cls, found)
            _ = made.summary
        except DataError as error:
            raise DataError(f"{path}: {error}. {_AGAIN}") from None
        return made

    @cached_property
    def summary(self) -> ScoreInfo | None:
        """The score, as far as it is shown."""
        return None if self.score is None else build(ScoreInfo, self.score, "score")


@dataclass
class ResultRow:
    """One method on one benchmark.

    Attributes:
        result: what came out.
        folder: where it is; None for a result that is not on disk.
        against_dense: comparison with the dense model on the same questions.
        against_plain: comparison with the same method without debiasing.
        against_baselines: comparison with random and uniform at the same average tokens, by their names.
        agreement: how many answers are the dense model's own, and which are not; None for itself, or without answers.
        prefix: the model's name, where a table has several models.
        notes: what there is to say about the row itself.
    """

    result: CellResult
    folder: Path | None = None
    against_dense: Paired | None = None
    against_plain: Paired | None = None
    against_baselines: dict[str, Paired] = field(default_factory=dict)
    agreement: Agreement | None = None
    prefix: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def cell(self) -> CellInfo:
        """The cell's description."""
        return self.result.cell

    @property
    def value(self) -> float | None:
        """The benchmark's headline number."""
        score = self.result.summary
        return None if score is None else score.value

    @property
    def title(self) -> str:
        """Method and debiasing, in short."""
        if self.cell.role == "dense":
            return self.prefix + "dense"
        return self.prefix + self.cell.method + ("" if self.cell.debias == "none" else f" + {short(self.cell.debias)}")

    @property
    def average(self) -> float | None:
        """Measured average visual tokens a layer; None if the cell failed."""
        return self.result.tokens.get("average_tokens")

    @property
    def credits(self) -> dict[str, float]:
        """Credit by question."""
        score = self.result.summary
        return {} if score is None else score.per_record

    @property
    def model(self) -> str:
        """What tells its model from those of other rows."""
        return digest(self.result.fingerprint.get("model"))

    @property
    def model_name(self) -> str:
        """The model's name in answer records."""
        return str(_of(self.result.fingerprint.get("model"), "name"))

    @property
    def architecture(self) -> str:
        """The model's architecture, as curves name it."""
        return str(_of(self.result.fingerprint.get("model"), "architecture"))

    @cached_property
    def answers(self) -> dict[str, dict[str, Any]]:
        """Answer lines by key; empty if they are not there (any more)."""
        path = None if self.folder is None else self.folder / ANSWERS
        if path is None or not path.is_file():
            return {}
        lines = read_jsonl(path, ("text", "metadata")).records
        return {str(_of(line["metadata"], "key")): line for line in lines if isinstance(line["text"], str)}

    def save(self) -> None:
        """Write `result.json` into its folder."""
        assert self.folder is not None
        values = {"evengaze_result": SCHEMA, **asdict(self.result)}
        write_whole(self.folder / RESULT, json.dumps(values, indent=1) + "\n")

    def save_flips(self) -> None:
        """Write all questions that are answered otherwise than by the dense model into its folder."""
        if self.agreement is not None and self.folder is not None:
            lines = (json.dumps(asdict(flip)) + "\n" for flip in self.agreement.flips)
            write_whole(self.folder / FLIPPED, "".join(lines))


def _of(value: Any, key: str) -> Any:
    return value.get(key, "") if isinstance(value, dict) else ""


@dataclass
class ComparedRows:
    """All rows of one benchmark: the dense model, then methods by family and average tokens, then baselines."""

    name: str
    title: str
    split: str
    metric: str
    rows: list[ResultRow]

    @property
    def dense(self) -> ResultRow | None:
        """The (first) dense model's row."""
        return next((row for row in self.rows if row.cell.role == "dense"), None)

    @property
    def categories(self) -> list[str]:
        """Parts of the benchmark that have scores of their own."""
        scores = [row.result.summary for row in self.rows]
        return list(dict.fromkeys(name for score in scores if score is not None for name in score.breakdown))

    def dense_of(self, row: ResultRow) -> ResultRow | None:
        """The dense row of the same model."""
        return next((one for one in self.rows if one.cell.role == "dense" and one.model == row.model), None)


def load(root: Path) -> list[ResultRow]:
    """Read every `result.json` below a folder; of several for the same cell (a renamed or copied folder) one.

    Raises:
        DataError: there is none, or one is damaged or of a newer schema.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a directory. Give the out folder of `evengaze evaluate`.")
    found: dict[str, ResultRow] = {}
    for path in sorted(root.rglob(RESULT)):
        row = ResultRow(CellResult.load(path), path.parent)
        result = row.result
        same = digest([result.benchmark.name, result.cell.name, result.fingerprint])
        other = found.setdefault(same, row)
        if other is row:
            continue
        kept, left = (row, other) if path.parent.name == result.cell.name else (other, row)
        kept.notes = [*other.notes, f"{left.folder} holds the same cell as {kept.folder}, which alone is shown"]
        found[same] = kept
    if not found:
        raise DataError(
            f"{root} holds no {RESULT}. Give the out folder of `evengaze evaluate`; a cell's result is written when "
            "all its questions are through."
        )
    return list(found.values())


def tables(rows: Sequence[ResultRow], *, resamples: int = 10_000) -> list[ComparedRows]:
    """Group rows by benchmark and make all paired comparisons, each within one model."""
    found: dict[str, ComparedRows] = {}
    for row in rows:
        about = row.result.benchmark
        table = found.setdefault(about.name, ComparedRows(about.name, about.title, about.split, about.metric, []))
        table.rows.append(row)
    for table in found.values():
        _name_models(table)
        _compare(table, resamples)
        table.rows.sort(key=_order)
    order = list(BENCHMARKS)
    return sorted(found.values(), key=lambda table: order.index(table.name) if table.name in order else len(order))


def _name_models(table: ComparedRows) -> None:
    names = dict.fromkeys((row.model, row.model_name) for row in table.rows)
    if len(names) < 2:
        return
    shown: dict[str, str] = {}
    for model, name in names:
        again = sum(other == name for other in shown.values())
        shown[model] = name
        for row in table.rows:
            if row.model == model:
                row.prefix = f"{name}{f' ({again + 1})' if again else ''}: "


def _compare(table: ComparedRows, resamples: int) -> None:
    by_name = {(row.model, row.cell.name): row for row in table.rows}
    plain = {_pair(row): row for row in table.rows if row.cell.debias == "none"}

    def against(row: ResultRow, other: ResultRow | None) -> Paired | None:
        if other is None or other is row or not row.credits or not other.credits:
            return None
        if not row.credits.keys() & other.credits.keys():
            return None
        return compare(row.credits, other.credits, resamples=resamples)

    for row in table.rows:
        dense = table.dense_of(row)
        row.against_dense = against(row, dense)
        if dense is not None and dense is not row:
            row.agreement = agree(dense.answers, row.answers, dense.credits, row.credits)
        if row.cell.debias != "none":
            row.against_plain = against(row, plain.get(_pair(row)))
        for name in row.cell.baselines:
            other = by_name.get((row.model, name))
            made = against(row, other)
            if made is not None and other is not None:
                row.against_baselines[other.cell.family] = made


def _pair(row: ResultRow) -> tuple[Any, ...]:
    return row.model, row.cell.method, row.cell.budget


def _order(row: ResultRow) -> tuple[Any, ...]:
    cell = row.cell
    roles = ("dense", "method", "baseline")
    rank = roles.index(cell.role) if cell.role in roles else len(roles)
    return row.prefix, rank, cell.family, -cell.average_planned, cell.method, cell.debias != "none", cell.debias
