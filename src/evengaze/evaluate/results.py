"""Results on disk, read back: every method beside its plain self, the dense model and the baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks import BENCHMARKS
from evengaze.evaluate.grid import RESULT, SCHEMA
from evengaze.evaluate.metrics.paired import Paired, compare

Result = dict[str, Any]
"""The content of one ``result.json``."""


def short(debias: str) -> str:
    """How a debiasing is called in tables: a curve file by its name, without folder and ending."""
    return "plain" if debias == "none" else Path(debias).stem if debias.endswith(".json") else debias


@dataclass
class Row:
    """One method on one benchmark.

    Attributes:
        result: its ``result.json``.
        folder: where that is; None for a result that has not been read from disk.
        against_dense: comparison with the dense model on the same questions.
        against_plain: comparison with the same method without debiasing.
        against_baselines: comparison with random and uniform at the same average tokens, by their names.
    """

    result: Result
    folder: Path | None = None
    against_dense: Paired | None = None
    against_plain: Paired | None = None
    against_baselines: dict[str, Paired] = field(default_factory=dict)

    @property
    def cell(self) -> dict[str, Any]:
        """The cell's description."""
        return dict(self.result["cell"])

    @property
    def value(self) -> float | None:
        """The benchmark's headline number."""
        score = self.result["score"]
        return None if score is None else score["value"]

    @property
    def title(self) -> str:
        """Method and debiasing, in short."""
        cell = self.cell
        if cell["role"] == "dense":
            return "dense"
        return str(cell["method"]) + ("" if cell["debias"] == "none" else f" + {short(cell['debias'])}")

    @property
    def average(self) -> float | None:
        """Measured average visual tokens a layer; None if the cell failed."""
        return (self.result.get("tokens") or {}).get("average_tokens")

    @property
    def credits(self) -> dict[str, float]:
        """Credit by question."""
        score = self.result["score"]
        return {} if score is None else dict(score["per_record"])


@dataclass
class Table:
    """All rows of one benchmark: the dense model, then methods by family and average tokens, then baselines."""

    name: str
    title: str
    split: str
    metric: str
    rows: list[Row]

    @property
    def dense(self) -> Row | None:
        """The dense model's row."""
        return next((row for row in self.rows if row.cell["role"] == "dense"), None)


def load(root: Path) -> list[Row]:
    """Read every ``result.json`` below a folder.

    Raises:
        DataError: there is none, or one is damaged or of a newer schema.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a directory. Give the --out folder of `evengaze evaluate`.")
    rows = []
    for path in sorted(root.rglob(RESULT)):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({error}). Delete it and give the evaluation's command again."
            ) from None
        schema = result.get("evengaze_result") if isinstance(result, dict) else None
        if schema != SCHEMA:
            raise DataError(f"{path}: result schema {schema!r}, this evengaze reads {SCHEMA}. Evaluate again.")
        rows.append(Row(result, path.parent))
    if not rows:
        raise DataError(
            f"{root} holds no {RESULT}. Give the --out folder of `evengaze evaluate`; a cell's result is written when "
            "all its questions are through."
        )
    return rows


def tables(rows: Sequence[Row], *, resamples: int = 10_000) -> list[Table]:
    """Group rows by benchmark and make all paired comparisons."""
    found: dict[str, Table] = {}
    for row in rows:
        about = row.result["benchmark"]
        table = found.setdefault(
            about["name"], Table(about["name"], about["title"], about["split"], about["metric"], [])
        )
        table.rows.append(row)
    for table in found.values():
        _compare(table, resamples)
        table.rows.sort(key=_order)
    order = list(BENCHMARKS)
    return sorted(found.values(), key=lambda table: order.index(table.name) if table.name in order else len(order))


def _compare(table: Table, resamples: int) -> None:
    by_name = {row.cell["name"]: row for row in table.rows}
    plain = {_pair(row): row for row in table.rows if row.cell["debias"] == "none"}

    def against(row: Row, other: Row | None) -> Paired | None:
        if other is None or other is row or not row.credits or not other.credits:
            return None
        return compare(row.credits, other.credits, resamples=resamples)

    for row in table.rows:
        row.against_dense = against(row, table.dense)
        if row.cell["debias"] != "none":
            row.against_plain = against(row, plain.get(_pair(row)))
        for name in row.cell["baselines"]:
            made = against(row, by_name.get(name))
            if made is not None:
                row.against_baselines[by_name[name].cell["family"]] = made


def _pair(row: Row) -> tuple[Any, ...]:
    return row.cell["method"], row.cell["budget"]


def _order(row: Row) -> tuple[Any, ...]:
    cell = row.cell
    rank = ("dense", "method", "baseline").index(cell["role"])
    return rank, cell["family"], -cell["average_planned"], cell["method"], cell["debias"] != "none", cell["debias"]
