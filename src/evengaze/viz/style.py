"""One look for all figures, without pyplot and its global state."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK = "#1f2430"
MUTED = "#6b7280"
FAINT = "#d7dbe2"
KEPT = "#ffb000"
"""Outline of kept patches."""
WASTED = "#ff4d4d"
"""Outline of kept patches that are padding."""
PLAIN, DEBIASED, RANDOM, UNIFORM, TREND, PADDING = "#d1495b", "#1a7f72", "#9aa3af", "#c9a227", "#3d6fb6", "#8b5fbf"
"""Colours of the settings that figures compare; told apart by brightness and by markers as well."""

DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """A white figure of a size in inches whose layout arranges itself."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.14)
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)


def title(ax: Any, text: str, detail: str = "") -> None:
    """A bold title flush left, with a quieter second line."""
    ax.set_title(text, loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=17 if detail else 5)
    if detail:
        ax.annotate(detail, (0, 1), (0, 4), "axes fraction", "offset points", fontsize=8, color=MUTED)


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
