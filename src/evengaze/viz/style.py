"""One look for all figures, without pyplot and its global state."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from evengaze.files import write_whole
from evengaze.viz.fonts import drawable

INK = "#1f2430"
MUTED = "#6b7280"
FAINT = "#d7dbe2"
KEPT = "#ffb000"
"""Outline of kept patches."""
WASTED = "#ff4d4d"
"""Outline of kept patches that are padding."""
RIGHT, WRONG = "#1a7f37", "#cf222e"
PLAIN, DEBIASED, RANDOM, UNIFORM, TREND, PADDING = "#d1495b", "#1a7f72", "#9aa3af", "#c9a227", "#3d6fb6", "#8b5fbf"
"""Colours of the settings that figures compare; told apart by brightness and by markers as well."""

DPI = 200
"""Dots an inch of PNG files."""


def new_figure(width: float, height: float) -> Figure:
    """A white figure of a size in inches whose layout arranges itself."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.14)
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)


def save(figure: Figure, path: str | Path, formats: Sequence[str] = ()) -> list[Path]:
    """Write a figure; equal figures give equal bytes, and vector files look the same whatever fonts a reader has.

    Args:
        figure: the figure.
        path: the file; its ending says the format (.png, .pdf, .svg).
        formats: write these in place of the one of the ending.

    Returns:
        The files.

    Raises:
        DataError: one cannot be written.
    """
    path = Path(path)
    targets = [path.with_suffix(f".{one}") for one in formats] or [path]
    with matplotlib.rc_context({"svg.hashsalt": "evengaze", "svg.fonttype": "path", "pdf.fonttype": 42}):
        for target in targets:
            kind, drawn = target.suffix.lower().removeprefix("."), BytesIO()
            dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
            figure.savefig(drawn, format=kind, dpi=DPI, metadata=dated)
            write_whole(target, drawn.getvalue())
    return targets


def title(ax: Any, text: str, detail: str = "", right: bool | None = None, room: float | None = None) -> None:
    """A bold title flush left, with a quieter second line.

    Args:
        ax: a matplotlib axes.
        text: the title.
        detail: the second line.
        right: put a mark for right or wrong in front of the title; None puts none.
        room: inches; what is longer is written smaller, never cut.
    """
    mark = {None: "", True: "\u2713 ", False: "\u2717 "}[right]
    color = {None: INK, True: RIGHT, False: WRONG}[right]
    shown, families = drawable(mark + text)
    size = _fitting(shown, 9.5, 0.72, room)
    ax.set_title(
        shown, loc="left", fontsize=size, fontweight="bold", color=color, pad=17 if detail else 5, fontfamily=families
    )
    if detail:
        shown, families = drawable(detail)
        size = _fitting(shown, 8.0, 0.6, room)
        ax.annotate(
            shown, (0, 1), (0, 4), "axes fraction", "offset points", fontsize=size, color=MUTED, fontfamily=families
        )


def _fitting(text: str, size: float, wide: float, room: float | None) -> float:
    """A font size at which a text fits; characters are about `wide` times as wide as the font is high."""
    return size if room is None else min(size, 72 * room / (wide * max(1, len(text))))


def axes_of_plot(ax: Any, xlabel: str, ylabel: str) -> None:
    """Quiet axes for a line plot."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(FAINT)
    ax.tick_params(colors=MUTED, labelsize=8, length=3)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel(xlabel, fontsize=8.5, color=MUTED)
    ax.set_ylabel(ylabel, fontsize=8.5, color=MUTED)
