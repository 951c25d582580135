"""Accuracy against the share of tokens kept, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.ticker import NullLocator, PercentFormatter

from evengaze.viz.style import (
    DEBIASED,
    INK,
    MUTED,
    PADDING,
    PLAIN,
    RANDOM,
    TREND,
    UNIFORM,
    axes_of_plot,
    new_figure,
    title,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = {
    "plain": (PLAIN, "o", "-"),
    "+ trend": (TREND, "^", "-"),
    "+ padding": (PADDING, "v", "-"),
    "both": (DEBIASED, "s", "-"),
    "random": (RANDOM, "x", "--"),
    "uniform": (UNIFORM, "D", "--"),
}
_OTHER = (INK, ".", ":")


@dataclass(frozen=True)
class Point:
    """One setting: the share of tokens kept, its accuracy and the interval of that.

    Attributes:
        keep: in (0, 1].
        accuracy: in [0, 1].
        low: lower end of the 95 % interval.
        high: upper end.
        tokens: visual tokens that enter a layer on average.
    """

    keep: float
    accuracy: float
    low: float
    high: float
    tokens: float


def plot_accuracy(lines: Mapping[str, Sequence[Point]], dense: float | None = None, subtitle: str = "") -> Figure:
    """Draw one line a setting over the tokens kept (logarithmic), with 95 % intervals.

    Args:
        lines: points by the setting's label.
        dense: accuracy of the unpruned model.
        subtitle: a quieter second line of the title.
    """
    figure = new_figure(6.6, 3.9)
    ax = figure.subplots()
    ends = {}
    for number, (label, points) in enumerate(lines.items()):
        color, marker, style = _STYLES.get(label, _OTHER)
        shift = 2 ** (0.035 * (number - (len(lines) - 1) / 2))  # intervals side by side, not on top of each other
        x = [p.keep * shift for p in points]
        y = [p.accuracy for p in points]
        reach = [[p.accuracy - p.low for p in points], [p.high - p.accuracy for p in points]]
        ax.plot(x, y, style, color=color, linewidth=1.7, marker=marker, markersize=5, label=label, zorder=3)
        ax.errorbar(x, y, reach, fmt="none", ecolor=color, elinewidth=0.9, alpha=0.55, zorder=2)
        ends.update({p.keep: p.tokens for p in points})
    if dense is not None:
        ax.axhline(dense, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        ax.annotate(f"all tokens {dense:.1%}", (0, dense), (4, 3), ("axes fraction", "data"), "offset points",
                    ha="left", fontsize=8, color=INK)  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(ends), [f"{100 * k:g} %\n{ends[k]:.1f}" for k in sorted(ends)])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes_of_plot(ax, "visual tokens kept (below: average tokens a layer)", "accuracy")
    ax.legend(fontsize=8, frameon=False, labelcolor=MUTED, loc="upper left", bbox_to_anchor=(1.01, 1))
    title(ax, "Accuracy against tokens", subtitle)
    return figure
