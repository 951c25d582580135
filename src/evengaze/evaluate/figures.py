"""Figures of an evaluation: accuracy against tokens, and how much of the dense model each method keeps (radar)."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from evengaze.evaluate.results import Row, Table, short

# Okabe and Ito's colours, which people with any colour vision can tell apart; a family keeps its colour everywhere.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#4C3A9E", "#56B4E9", "#7A3B2E")
_GREY = {"random": "#9a9a9a", "uniform": "#6b6b6b"}
_STYLES = ("-", "-.", (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def curves(tables: Sequence[Table]) -> Figure:
    """Score against average tokens, one panel a benchmark: plain dashed, debiased solid, baselines grey."""
    shown = [table for table in tables if any(row.value is not None for row in table.rows)]
    colours, styles = _colours(shown), _styles(shown)
    columns = min(3, max(1, len(shown)))
    lines = -(-max(1, len(shown)) // columns)
    figure = Figure(
        figsize=(4.6 * columns + 0.4, 3.6 * lines + 0.9), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1)
    )
    axes = figure.subplots(lines, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axis, table in zip(axes.flat, shown, strict=False):
        for (family, debias, role), rows in _series(table).items():
            points = sorted((row.average, row.value) for row in rows)
            label = family if role == "baseline" else f"{family}, {short(debias)}"
            (handle,) = axis.plot(
                *zip(*points, strict=True), label=label, **_look(family, debias, role, colours, styles)
            )
            handles.setdefault(label, handle)
        dense = table.dense
        if dense is not None and dense.value is not None:
            handle = axis.axhline(dense.value, color="black", lw=1, ls=":", label="dense")
            handles.setdefault("dense", handle)
        axis.set_title(f"{table.title} {table.split}", fontsize=10)
        axis.set_xlabel("average visual tokens a layer", fontsize=9)
        axis.set_ylabel(table.metric, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(2 * columns, len(handles)),
            fontsize=8,
            frameon=False,
        )
    return figure


def radar(tables: Sequence[Table]) -> Figure | None:
    """Percent of the dense model's score, one panel a method, one spoke a benchmark; None with fewer than three.

    Where a method was run at several budgets, the smallest one is shown.
    """
    usable = [t for t in tables if t.dense is not None and t.dense.value]
    families = list(_colours(usable))
    if len(usable) < 3 or not families:
        return None
    colours, styles = _colours(usable), _styles(usable)
    angles = [2 * pi * i / len(usable) for i in range(len(usable))]
    columns = min(3, len(families))
    lines = -(-len(families) // columns)
    figure = Figure(
        figsize=(4.2 * columns + 0.3, 4.0 * lines + 0.5), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1)
    )
    axes = figure.subplots(lines, columns, squeeze=False, subplot_kw={"projection": "polar"})
    lowest = 100.0
    for axis, family in zip(axes.flat, families, strict=False):
        smallest = _smallest(usable, family)
        labels = dict.fromkeys(row.cell["debias"] for rows in smallest for row in rows)
        for debias in labels:
            values = [_share(table, rows, debias) for table, rows in zip(usable, smallest, strict=True)]
            if any(value is None for value in values):
                continue
            lowest = min(lowest, *[value for value in values if value is not None])
            look = _look(family, debias, "method", colours, styles)
            axis.plot([*angles, angles[0]], [*values, values[0]], label=short(debias), **look)
            if debias != "none":
                axis.fill([*angles, angles[0]], [*values, values[0]], color=look["color"], alpha=0.08)
        axis.plot([a * 2 * pi / 100 for a in range(101)], [100] * 101, color="black", lw=1, ls=":", label="dense")
        axis.set_xticks(angles, [table.title for table in usable], fontsize=8)
        axis.tick_params(axis="y", labelsize=7, colors="#666666")
        axis.set_title(family, fontsize=11, pad=14)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False)
    for axis in axes.flat:
        axis.set_ylim(max(0.0, lowest - 8), 104)
    for axis in list(axes.flat)[len(families) :]:
        axis.set_visible(False)
    figure.supxlabel("percent of the dense model's score", fontsize=9)
    return figure


def _series(table: Table) -> dict[tuple[str, str, str], list[Row]]:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in table.rows:
        cell = row.cell
        if cell["role"] == "dense" or row.value is None or row.average is None:
            continue
        found.setdefault((cell["family"], cell["debias"], cell["role"]), []).append(row)
    return found


def _colours(tables: Sequence[Table]) -> dict[str, str]:
    families = dict.fromkeys(
        row.cell["family"] for table in tables for row in table.rows if row.cell["role"] == "method"
    )
    return {family: _GREY.get(family, _COLOURS[i % len(_COLOURS)]) for i, family in enumerate(families)}


def _styles(tables: Sequence[Table]) -> dict[str, Any]:
    """Plain is dashed; each kind of debiasing has a line style of its own."""
    labels = dict.fromkeys(row.cell["debias"] for table in tables for row in table.rows if row.cell["debias"] != "none")
    return {"none": "--"} | {label: _STYLES[i % len(_STYLES)] for i, label in enumerate(labels)}


def _look(family: str, debias: str, role: str, colours: dict[str, str], styles: dict[str, Any]) -> dict[str, Any]:
    if role == "baseline":
        marker = "x" if family == "random" else "+"
        return {"color": _GREY.get(family, "#808080"), "ls": ":", "marker": marker, "ms": 5, "lw": 1}
    marker = _MARKERS[list(colours).index(family) % len(_MARKERS)]
    return {"color": colours[family], "ls": styles[debias], "marker": marker, "ms": 4, "lw": 1.6}


def _smallest(tables: Sequence[Table], family: str) -> list[list[Row]]:
    """The family's rows at its smallest budget, for each benchmark."""
    found = []
    for table in tables:
        rows = [row for row in table.rows if row.cell["family"] == family and row.cell["role"] == "method"]
        least = min((row.cell["average_planned"] for row in rows), default=0.0)
        found.append([row for row in rows if row.cell["average_planned"] == least])
    return found


def _share(table: Table, rows: Sequence[Row], debias: str) -> float | None:
    dense = table.dense
    value = next((row.value for row in rows if row.cell["debias"] == debias), None)
    return None if value is None or dense is None or not dense.value else 100 * value / dense.value
