"""The report of an evaluation: one self-contained HTML page, the same as Markdown, and the figures as files."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.agreement import Agreement
from evengaze.evaluate.metrics.paired import Paired
from evengaze.evaluate.recipes import published
from evengaze.evaluate.results import FLIPPED, ComparedRows, ResultRow, load, tables
from evengaze.extras import require
from evengaze.files import write_whole
from evengaze.version import __version__

_READING = (
    "Tokens are the visual tokens that enter a decoder layer, averaged over layers and measured. FLOPs are those of "
    "the decoder's prefill, text included, relative to the dense model. A difference is in points of mean credit a "
    "question, on the questions that both have answered, with a 95 % bootstrap interval and the p-value of the exact "
    "McNemar (sign) test. For metrics that are no mean over questions (F1, points, circular accuracy) it can differ "
    "from the difference of the scores. Many comparisons are shown: one p-value near 0.05 among them proves little."
)
_FLIPS = 30
"""Changed answers a method that the report shows; its file has all."""
_LONGEST = 120


def write_report(root: Path, out: Path, *, published: bool = True) -> list[Path]:
    """Write `report.html`, `report.md` and the figures (PNG, SVG and PDF).

    Args:
        root: folder with results of `evengaze evaluate`, of one or several runs.
        out: folder to write to.
        published: set published figures for the same architecture beside the measured ones.

    Returns:
        The files written.

    Raises:
        DataError: there are no results, or files cannot be written.
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    require("evaluate", "a report", "matplotlib", "jinja2")
    from jinja2 import Environment, StrictUndefined

    from evengaze.evaluate import figures, markdown
    from evengaze.viz.style import save

    found = tables(load(root))
    if not any(row.value is not None or row.agreement is not None for table in found for row in table.rows):
        reasons = {str(row.result.problem) for table in found for row in table.rows}
        raise DataError(f"{root} holds no scored result ({'; '.join(sorted(reasons))[:300]}). Score the answers first.")
    context = _context(found, published)
    written = []
    pictures = []
    for name, title, figure in (
        ("curves", "Score against tokens", figures.curves(found)),
        ("radar", "Share of the dense model's score", figures.radar(found)),
    ):
        if figure is None:
            continue
        paths = save(figure, out / name, ("png", "svg", "pdf"))
        written += paths
        svg = base64.b64encode(paths[1].read_bytes()).decode()
        pictures.append({"title": title, "file": paths[0].name, "data": f"data:image/svg+xml;base64,{svg}"})
    context["pictures"] = pictures
    for suffix in ("html", "md"):
        template = files("evengaze.evaluate").joinpath(f"report.{suffix}.j2").read_text(encoding="utf-8")
        environment = Environment(
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=markdown.text if suffix == "md" else None,
        )
        environment.filters["code"] = markdown.code
        path = out / f"report.{suffix}"
        write_whole(path, environment.from_string(template).render(context))
        written.append(path)
    return written


def _context(found: Sequence[ComparedRows], with_published: bool) -> dict[str, Any]:
    rows = [row for table in found for row in table.rows]
    models = list(dict.fromkeys(row.model_name for row in rows if row.model_name))
    architectures = {row.architecture for row in rows if row.architecture}
    baselines = list(dict.fromkeys(name for row in rows for name in row.against_baselines))
    return {
        "models": models,
        "version": __version__,
        "reading": _READING,
        "overview": _overview(found),
        "tables": [_table(table, baselines) for table in found],
        "baselines": baselines,
        "problems": _problems(rows),
        "published": _published(found, architectures) if with_published else None,
        "provenance": [_provenance(row) for row in rows],
    }


def _overview(found: Sequence[ComparedRows]) -> dict[str, Any]:
    """Methods down, benchmarks across, and the mean share of the dense model's score."""
    names = {_label(row): row.cell for table in found for row in table.rows}
    lines = []
    for name, cell in names.items():
        values, shares = [], []
        for table in found:
            row = next((row for row in table.rows if _label(row) == name), None)
            values.append("" if row is None else _number(row.value, 2))
            dense = table.dense
            if row is not None and row.value is not None and dense is not None and dense.value:
                shares.append(100 * row.value / dense.value)
        complete = len(shares) == len(found)
        share = f"{sum(shares) / len(shares):.1f} %" if complete else ""
        look = {"role": cell.role, "debiased": cell.debias != "none"}
        lines.append({"name": name, "values": values, "share": share, **look})
    return {"titles": [f"{table.title} ({table.metric})" for table in found], "lines": lines}


def _label(row: ResultRow) -> str:
    return row.title + (f" @ {row.cell.budget:g}" if row.cell.budget and row.cell.role == "method" else "")


def _table(table: ComparedRows, baselines: Sequence[str]) -> dict[str, Any]:
    lines = []
    for row in table.rows:
        score, tokens = row.result.summary, row.result.tokens
        lines.append(
            {
                "name": row.title,
                "role": row.cell.role,
                "debiased": row.cell.debias != "none",
                "average": _number(row.average, 1),
                "flops": "" if "relative_flops" not in tokens else f"{tokens['relative_flops']:.1%}",
                "value": _number(row.value, 2),
                "plain": _difference(row.against_plain),
                "dense": _difference(row.against_dense),
                "agreement": None if row.agreement is None else _agreement(row.agreement),
                "baselines": [_difference(row.against_baselines.get(name)) for name in baselines],
                "n": f"{row.result.answered} answered" if score is None else f"{score.n_scored} of {score.n_records}",
            }
        )
    return {
        "title": f"{table.title} {table.split}",
        "metric": table.metric,
        "lines": lines,
        "parts": _parts(table),
        "flips": [_flips(row) for row in table.rows if row.agreement is not None and row.agreement.flips],
    }


def _agreement(found: Agreement) -> dict[str, str]:
    known = found.won or found.lost
    return {
        "share": f"{found.share:.1%}",
        "flips": f"{found.won} won, {found.lost} lost" if known else f"{len(found.flips)} differ",
    }


def _parts(table: ComparedRows) -> dict[str, Any] | None:
    """Scores by category, methods down; None where the benchmark has no categories."""
    names = table.categories
    if not names:
        return None
    lines = [
        {"name": row.title, "values": [_number(score.breakdown.get(name), 1) for name in names]}
        for row in table.rows
        if (score := row.result.summary) is not None
    ]
    return {"names": names, "lines": lines}


def _flips(row: ResultRow) -> dict[str, Any]:
    """The questions that a method answers otherwise than the dense model; those that it lost first."""
    assert row.agreement is not None
    flips = sorted(row.agreement.flips, key=lambda flip: flip.change)
    lines = [
        {
            "key": flip.key,
            "prompt": _cut(flip.prompt),
            "dense": _cut(flip.dense),
            "answer": _cut(flip.answer),
            "change": "won" if flip.change > 0 else "lost" if flip.change < 0 else "",
        }
        for flip in flips[:_FLIPS]
    ]
    return {"name": row.title, "lines": lines, "count": len(flips), "file": str((row.folder or Path()) / FLIPPED)}


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def _difference(paired: Paired | None) -> dict[str, str] | None:
    if paired is None:
        return None
    sign = "" if paired.p_value >= 0.05 else ("better" if paired.delta > 0 else "worse")
    return {
        "delta": f"{100 * paired.delta:+.1f}",
        "interval": f"[{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]",
        "p": f"{paired.p_value:.2g}",
        "sign": sign,
    }


def _problems(rows: Sequence[ResultRow]) -> list[str]:
    found = []
    for row in rows:
        name = f"{row.result.benchmark.title}, {row.title}"
        result = row.result
        if result.problem:
            found.append(f"{name}: {result.problem}")
        if result.errors:
            first = next(iter(result.errors.values()))
            found.append(f"{name}: {len(result.errors)} record(s) could not be read or answered, e.g. {first}")
        score = [] if result.summary is None else [*result.summary.warnings, *result.summary.notes]
        found += [f"{name}: {note}" for note in (*row.notes, *result.notes, *score)]
    return found


def _published(found: Sequence[ComparedRows], architectures: set[str]) -> dict[str, Any]:
    """Published figures of the same architecture on the same benchmarks, beside what was measured."""
    values = published()
    sources = values["sources"]
    names = [table.name for table in found]
    lines = []
    for entry in values["rows"]:
        if entry["architecture"] not in architectures or not set(names) & set(entry["values"]):
            continue
        disputed, source = entry.get("disputed", {}), sources[entry["source"]]
        variant = f" ({entry['variant']})" if "variant" in entry else ""
        lines.append(
            {
                "name": f"{entry['method']}{variant}",
                "tokens": entry["tokens"],
                "values": [_cell(entry["values"].get(name), disputed.get(name)) for name in names],
                "source": source,
                "second_hand": source["second_hand"],
            }
        )
    averages = [
        {**entry, "source": sources[entry["source"]]}
        for entry in values["averages"]
        if entry["architecture"] in architectures
    ]
    measured = [
        {"name": row.title, "tokens": _number(row.average, 1), "table": table.name, "value": _number(row.value, 2)}
        for table in found
        for row in table.rows
        if row.cell.role != "baseline"
    ]
    beside = []
    for key in dict.fromkeys((m["name"], m["tokens"]) for m in measured):
        own = {m["table"]: m["value"] for m in measured if (m["name"], m["tokens"]) == key}
        beside.append({"name": key[0], "tokens": key[1], "values": [own.get(name, "") for name in names]})
    return {
        "titles": [table.title for table in found],
        "lines": lines,
        "measured": beside,
        "averages": averages,
        "architectures": sorted(architectures),
    }


def _cell(value: Any, disputed: str | None) -> str:
    if value is None:
        return ""
    return f"{value}" + (f" (others: {disputed})" if disputed else "")


def _provenance(row: ResultRow) -> dict[str, str]:
    result = row.result
    shown = {
        "fingerprint": result.fingerprint,
        "cell": asdict(result.cell),
        "tokens": result.tokens,
        "answered": result.answered,
    }
    judge = None if result.summary is None else result.summary.judge
    return {
        "name": f"{row.result.benchmark.title}: {row.title}",
        "folder": str(row.folder),
        "text": json.dumps(shown | ({"judge": judge} if judge else {}), indent=1),
    }


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
