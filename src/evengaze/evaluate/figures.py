"""Figures of an evaluation: accuracy against tokens, and how much of the dense model each method keeps (radar)."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from evengaze.evaluate.metrics.paired import wilson
from evengaze.evaluate.results import ComparedRows, ResultRow, short
from evengaze.methods import OneStage, parse
from evengaze.viz.style import new_figure

# Okabe and Ito's colours, which people with any colour vision can tell apart; a family keeps its colour everywhere.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#4C3A9E", "#56B4E9", "#7A3B2E")
_GREY = {"random": "#9a9a9a", "uniform": "#6b6b6b"}
_STYLES = ("-", "-.", (0, (3, 1, 1, 1, 1, 1)))
_FIRST = (":", "-.", "--", (0, (1, 3)))
"""Of baselines that begin at different layers."""
_MARKERS = ("s", "^", "D", "v", "P", "X", "*")
"""Of kinds of debiasing; plain is a circle."""

_APART = 0.012
"""Between neighbouring methods at one budget, of the width of all budgets."""

Series = dict[tuple[str, str, str], list[ResultRow]]
"""Rows by family, debiasing and role."""


def curves(tables: Sequence[ComparedRows]) -> Figure | None:
    """Score against average tokens, one panel a benchmark; bars where everything was run at one budget.

    Plain methods are hollow, pale and dashed, debiased ones filled, in full colour and solid; baselines are grey. Bars
    are 95 % intervals where the score is a mean over questions. None if nothing was scored.
    """
    shown = [table for table in tables if any(row.value is not None for row in table.rows)]
    if not shown:
        return None
    looks = _Looks(shown)
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = new_figure(4.6 * columns + 0.4, 3.6 * lines + 0.9)
    axes = figure.subplots(lines, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axis, table in zip(axes.flat, shown, strict=False):
        series = _series(table)
        one_budget = len(series) > 1 and all(len(rows) == 1 for rows in series.values())
        (_bars if one_budget else _lines)(axis, series, looks, handles)
        dense = table.dense
        if dense is not None and dense.value is not None:
            handle = axis.axhline(dense.value, color="black", lw=1, ls=":", label="dense")
            handles.setdefault("dense", handle)
        axis.set_title(f"{table.title} {table.split}", fontsize=10)
        axis.set_ylabel(table.metric, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, lw=0.6, axis="y" if one_budget else "both")
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


def _lines(axis: Any, series: Series, looks: _Looks, handles: dict[str, Any]) -> None:
    """A line a method over its budgets, with intervals."""
    middle = (len(series) - 1) / 2
    means = [row.average for rows in series.values() for row in rows if row.average is not None]
    # At equal budgets, intervals would lie on each other.
    step = _APART * ((max(means) - min(means) if means else 0.0) or 1.0)
    for place, (key, rows) in enumerate(series.items()):
        aside = step * (place - middle)
        points = sorted((float(row.average or 0.0) + aside, row.value, *_interval(row)) for row in rows)
        x, y, low, high = zip(*points, strict=True)
        below, above = ([abs(b - a) for a, b in zip(y, ends, strict=True)] for ends in (low, high))
        handle = axis.errorbar(x, y, yerr=[below, above], capsize=2, elinewidth=0.8, **looks.of(*key))
        handles.setdefault(looks.label(*key), handle)
    axis.set_xlabel("average visual tokens a layer (methods side by side)", fontsize=9)


def _bars(axis: Any, series: Series, looks: _Looks, handles: dict[str, Any]) -> None:
    """A bar a method, with its interval; from the lowest value on, as differences matter."""
    lowest = min(_interval(rows[0])[0] for rows in series.values())
    for at, (key, (row, *_)) in enumerate(series.items()):
        look, value = looks.of(*key), float(row.value or 0.0)
        low, high = _interval(row)
        filled = look["markerfacecolor"] != "white"
        handle = axis.bar(
            at,
            value,
            0.7,
            yerr=[[value - low], [high - value]],
            capsize=3,
            facecolor=look["color"] if filled else "white",
            edgecolor=look["color"],
            hatch=None if filled else "///",
            error_kw={"elinewidth": 0.9, "ecolor": "#333333"},
        )
        handles.setdefault(looks.label(*key), handle)
        axis.annotate(
            f"{row.average:.0f} tokens", (at, high), (0, 3), textcoords="offset points", ha="center", fontsize=6
        )
    axis.set_ylim(bottom=max(0.0, lowest - 0.15 * max(lowest, 1.0)))
    axis.set_xticks([])


def _interval(row: ResultRow) -> tuple[float, float]:
    """95 % interval of a score that is the mean over questions; else the score itself."""
    value, credits = float(row.value or 0.0), row.credits
    if not credits or abs(100 * sum(credits.values()) / len(credits) - value) > 1e-6:
        return value, value
    low, high = wilson(value / 100, len(credits))
    return 100 * low, 100 * high


def radar(tables: Sequence[ComparedRows]) -> Figure | None:
    """Percent of the dense model's score, one panel a method, one spoke a benchmark; None with fewer than three.

    Where a method was run at several budgets, the smallest one is shown.
    """
    usable = [t for t in tables if t.dense is not None and t.dense.value]
    looks = _Looks(usable)
    families = list(looks.families)
    if len(usable) < 3 or not families:
        return None
    angles = [2 * pi * i / len(usable) for i in range(len(usable))]
    columns = min(3, len(families))
    lines = -(-len(families) // columns)
    figure = new_figure(4.2 * columns + 0.3, 4.0 * lines + 0.5)
    axes = figure.subplots(lines, columns, squeeze=False, subplot_kw={"projection": "polar"})
    lowest = 100.0
    for axis, family in zip(axes.flat, families, strict=False):
        smallest = _smallest(usable, family)
        labels = dict.fromkeys(row.cell.debias for rows in smallest for row in rows)
        for debias in labels:
            values = [_share(table, rows, debias) for table, rows in zip(usable, smallest, strict=True)]
            if any(value is None for value in values):
                continue
            lowest = min(lowest, *[value for value in values if value is not None])
            look = looks.of(family, debias, "method")
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


def _series(table: ComparedRows) -> Series:
    found: Series = {}
    shown = [r for r in table.rows if r.cell.role != "dense" and r.value is not None and r.average is not None]
    first = {_first_layer(row) for row in shown if row.cell.role == "baseline"}
    for row in shown:
        cell, name = row.cell, row.prefix + row.cell.family
        if cell.role == "baseline" and len(first) > 1:  # equal averages, but not the same baseline
            name += f"{_FROM}{_first_layer(row)}"
        found.setdefault((name, cell.debias, cell.role), []).append(row)
    return found


_FROM = " from layer "


def _first_layer(row: ResultRow) -> int:
    """The layer from which on a baseline has fewer tokens."""
    return next((pruner.layer for pruner in [parse(row.cell.method)] if isinstance(pruner, OneStage)), 0)


class _Looks:
    """A method family keeps its colour everywhere; plain and debiased differ in shade, filling, marker and line."""

    def __init__(self, tables: Sequence[ComparedRows]) -> None:
        rows = [row for table in tables for row in table.rows]
        families = dict.fromkeys(row.prefix + row.cell.family for row in rows if row.cell.role == "method")
        labels = dict.fromkeys(row.cell.debias for row in rows if row.cell.debias != "none")
        self.families = {name: _GREY.get(name, _COLOURS[i % len(_COLOURS)]) for i, name in enumerate(families)}
        self._labels = list(labels)

    def label(self, family: str, debias: str, role: str) -> str:
        """What the legend calls it."""
        return family if role == "baseline" else f"{family}, {short(debias)}"

    def of(self, family: str, debias: str, role: str) -> dict[str, Any]:
        """Arguments of matplotlib's line."""
        if role == "baseline":
            name, _, first = family.rpartition(": ")[2].partition(_FROM)
            grey = _GREY.get(name, "#808080")
            marker = "x" if name == "random" else "+"
            style = ":" if not first else _FIRST[int(first) % len(_FIRST)]
            return {"color": grey, "ls": style, "marker": marker, "ms": 5, "lw": 1, "markerfacecolor": grey}
        colour = self.families[family]
        if debias == "none":
            pale = tuple(0.55 * part + 0.45 for part in to_rgb(colour))
            return {"color": pale, "ls": "--", "marker": "o", "ms": 5, "lw": 1.4, "markerfacecolor": "white"}
        place = self._labels.index(debias)
        return {
            "color": colour,
            "ls": _STYLES[place % len(_STYLES)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "ms": 5,
            "lw": 1.8,
            "markerfacecolor": colour,
        }


def _smallest(tables: Sequence[ComparedRows], family: str) -> list[list[ResultRow]]:
    """The family's rows at its smallest budget, for each benchmark."""
    found = []
    for table in tables:
        rows = [row for row in table.rows if row.prefix + row.cell.family == family and row.cell.role == "method"]
        least = min((row.cell.average_planned for row in rows), default=0.0)
        found.append([row for row in rows if row.cell.average_planned == least])
    return found


def _share(table: ComparedRows, rows: Sequence[ResultRow], debias: str) -> float | None:
    dense = table.dense
    value = next((row.value for row in rows if row.cell.debias == debias), None)
    return None if value is None or dense is None or not dense.value else 100 * value / dense.value
