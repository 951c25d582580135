"""Where the time goes: tower, decoder and decoding of every method, one panel a batch size."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evengaze.viz import style
from evengaze.viz.fonts import drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = (
    ("tower", style.UNIFORM, ""),
    ("decoder's prefill", style.TREND, ""),
    ("decoding", style.DEBIASED, "///"),
)
_WIDE = 100
"""Characters of a line of the heading."""


def parts_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of milliseconds, and a mark where the decoder's FLOPs predict the end of the prefill.

    Args:
        rows: of `evengaze profile`, as its JSON has them.
    """
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["batch"])]
    longest = max(len(group) for group in groups)
    figure = style.new_figure(7.2, 1.1 + (0.42 * longest + 0.8) * len(groups))
    axes = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    first = groups[0][0]
    about = (
        f"{first['model']}, {first['visual_tokens']} visual and {first['text_tokens']} other tokens, "
        f"{first['new_tokens']} new ones; {first['device']}, {first['dtype']}"
    )
    shown, families = drawable(textwrap.fill(about, _WIDE))
    figure.suptitle(shown, x=0.02, ha="left", fontsize=8.5, color=style.MUTED, fontfamily=families)
    handles: dict[str, Any] = {}
    for ax, group in zip(axes, groups, strict=True):
        _panel(ax, group, handles)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
        )
    return figure


def _panel(ax: Any, rows: Sequence[Mapping[str, Any]], handles: dict[str, Any]) -> None:
    shown = [row for row in rows if row["prefill_seconds"] is not None]
    names = [f"{row['method']} + {row['variant']}" if row["variant"] else str(row["method"]) for row in shown]
    style.title(ax, f"batch {rows[0]['batch']}" + ("" if shown else ": nothing could be measured"))
    if not shown:
        ax.axis("off")
        return
    places = list(range(len(shown)))
    start = [0.0] * len(shown)
    for (label, color, hatch), values in zip(_PARTS, zip(*map(_parts, shown), strict=True), strict=True):
        if not any(values):
            continue
        bar = ax.barh(places, values, left=start, color=color, hatch=hatch, edgecolor="white", height=0.44, label=label)
        handles.setdefault(label, bar)
        start = [a + b for a, b in zip(start, values, strict=True)]
    dense = next((row for row in shown if row["method"] == "dense" and not row["variant"]), None)
    if dense is not None:
        ends = [(dense["tower_seconds"] + row["flops"] * dense["decoder_seconds"]) * 1e3 for row in shown]
        mark = ax.scatter(ends, places, marker="|", s=150, color=style.INK, linewidths=1.6, zorder=3)
        handles.setdefault("prefill that FLOPs predict", mark)
    for place, name in zip(places, names, strict=True):  # above the bars: names may be long
        text, families = drawable(name)
        ax.annotate(text, (0, place - 0.26), (2, 1), textcoords="offset points", fontsize=8, fontfamily=families)
    ax.set_ylim(len(shown) - 0.5, -0.75)
    style.axes_of_plot(ax, "milliseconds", "")
    ax.set_yticks([])
    ax.grid(axis="x", color=style.FAINT, linewidth=0.6)


def _parts(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Milliseconds of tower, decoder and decoding."""
    steps = 0.0 if row["step_seconds"] is None else row["step_seconds"] * (row["new_tokens"] - 1)
    return row["tower_seconds"] * 1e3, row["decoder_seconds"] * 1e3, steps * 1e3
