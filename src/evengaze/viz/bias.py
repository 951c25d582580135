"""Figures of position bias: where attention goes on average, the trend with its fit, and its strength by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from evengaze.calibration.fit import evaluate
from evengaze.calibration.measures import Measure
from evengaze.debias.curve import Curve
from evengaze.debias.trend import TrendCurve
from evengaze.viz.style import DEBIASED, FAINT, INK, MUTED, PLAIN, RANDOM, TREND, axes_of_plot, new_figure, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL = 2.6
_COLUMNS = 5


def plot_heat_maps(maps: Mapping[int, NDArray[np.float64]]) -> Figure:
    """Mean score of each cell of the grid relative to the layer's mean, one panel a layer, with a colour bar each.

    Above each panel: the mean of the top and of the bottom half, relative to that of both.

    Args:
        maps: (rows, columns) mean scores by layer; NaN where only padding was seen.
    """
    columns = min(_COLUMNS, len(maps))
    rows = -(-len(maps) // columns)
    figure = new_figure(max(_PANEL * 1.12 * columns, 4.6), (_PANEL + 0.35) * rows + 0.25)
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for ax in axes[len(maps) :]:
        ax.axis("off")
    for ax, (layer, scores) in zip(axes, maps.items(), strict=False):
        mean = np.nanmean(scores)
        ax.set_facecolor(FAINT)
        relative = scores / mean
        most = float(np.nanquantile(relative, 0.99))
        drawn = ax.imshow(relative, cmap="magma", vmin=0, vmax=most, interpolation="nearest")
        bar = figure.colorbar(drawn, ax=ax, fraction=0.05, pad=0.03, extend="max")
        bar.ax.tick_params(labelsize=7, colors=MUTED, length=2)
        bar.outline.set_visible(False)
        ax.set_xticks([])
        ax.set_yticks([])
        top, low = (np.nanmean(half) / mean for half in np.array_split(scores, 2))
        title(ax, f"layer {layer}", f"top {top:.2f}, bottom {low:.2f}")
    figure.supxlabel("colour: mean score of a place, relative to the mean of its layer", fontsize=8, color=MUTED)
    return figure


def plot_trend(curve: Curve, others: Mapping[str, TrendCurve] | None = None) -> Figure:
    """Mean score over the raster index, the fitted trend with its confidence band, and other fits for comparison.

    The trend is drawn at the level of the mean scores; only its shape matters.

    Args:
        curve: the calibrated curve.
        others: further trends by name.
    """
    figure = new_figure(6.2, 3.4)
    ax = figure.subplots()
    x, mean = np.array(curve.samples.x), np.array(curve.samples.mean)
    x, mean = x[mean > 0], mean[mean > 0]
    grid = np.linspace(0, 1, 201)
    if len(x):
        ax.scatter(x, mean, s=7, color=RANDOM, linewidths=0, label="mean score of a position")
    else:
        mean = np.array([1.0])
    at = grid if not len(x) else x
    level = _level(curve.trend, at, mean)
    if curve.band.x:
        f = evaluate(curve.trend, np.array(curve.band.x))
        unit = level * float(np.exp(np.log(f).mean()))
        low, high = unit * np.array(curve.band.low), unit * np.array(curve.band.high)
        ax.fill_between(curve.band.x, low, high, color=TREND, alpha=0.2, linewidth=0, label=_percent(curve.band.level))
    ax.plot(grid, level * evaluate(curve.trend, grid), color=TREND, linewidth=1.8, label=f"fit: {curve.trend.family}")
    for (name, trend), style in zip((others or {}).items(), ("--", ":", "-.", (0, (5, 1))), strict=False):
        ax.plot(
            grid, _level(trend, at, mean) * evaluate(trend, grid), color=INK, linewidth=1, linestyle=style, label=name
        )
    ax.set_yscale("log")  # scores are divided by the trend
    axes_of_plot(ax, "raster index / number of tokens (0: top left, 1: bottom right)", "mean score (log scale)")
    ax.legend(fontsize=8, frameon=False, labelcolor=INK)
    summary, origin = curve.summary, curve.origin
    detail = f"{origin.method} on {origin.model or origin.architecture}, {origin.samples} samples"
    if "sigma_low" in summary:
        detail += f"; sigma {summary['sigma']:.2f} [{summary['sigma_low']:.2f}, {summary['sigma_high']:.2f}]"
    title(ax, f"Mean score over the raster index: layer {origin.layer}", detail)
    return figure


def plot_layers(
    before: Mapping[int, Mapping[str, Measure]], after: Mapping[int, Mapping[str, Measure]] | None = None
) -> Figure:
    """The measures of bias by layer with their confidence intervals, plain and debiased.

    Args:
        before: measures of the plain ranking by layer.
        after: the same with debiasing.
    """
    names = [n for n in _SHORT if any(n in m for m in before.values())]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(_PANEL * columns, 2.5 * rows + 0.3)
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for ax in axes[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes, names, strict=False):
        _line(ax, before, name, PLAIN, "plain", "o")
        if after:
            _line(ax, after, name, DEBIASED, "debiased", "s")
        even = [(float(k), m[name].even) for k, m in before.items() if name in m]
        first, last = even[0], even[-1]
        even = [(first[0] - 0.5, first[1]), *even, (last[0] + 0.5, last[1])]  # a single layer has a line, too
        ax.plot(*zip(*even, strict=True), color=MUTED, linewidth=1, linestyle="--", label="even")
        axes_of_plot(ax, "layer", "")
        ax.set_xlim(even[0][0], even[-1][0])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if name == "padding_ratio":
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # more would be written over each other
            ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            ax.yaxis.set_minor_locator(NullLocator())
        title(ax, _SHORT[name])
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower left",
        ncols=3,
        fontsize=8,
        frameon=False,
        labelcolor=INK,
    )
    return figure


_SHORT = {
    "sigma": "sigma",
    "spearman": "Spearman, score to index",
    "spearman_frame": "Spearman, score to frame",
    "kept_bottom": "kept in the bottom half",
    "kept_index": "mean index of kept tokens",
    "kept_padding": "padding among kept tokens",
    "padding_ratio": "padding / content score",
}


def _line(
    ax: Any, measures: Mapping[int, Mapping[str, Measure]], name: str, color: str, label: str, marker: str
) -> None:
    found: Sequence[tuple[int, Measure]] = [(k, m[name]) for k, m in measures.items() if name in m]
    if not found:
        return
    layers, values = [k for k, _ in found], np.array([[m.value, m.low, m.high] for _, m in found])
    reach = np.nan_to_num(np.abs(values[:, 1:] - values[:, :1]).T)
    ax.errorbar(
        layers, values[:, 0], reach, color=color, marker=marker, markersize=4, linewidth=1.2, capsize=2, label=label
    )


def _level(trend: TrendCurve, x: NDArray[np.float64], mean: NDArray[np.float64]) -> float:
    """The factor that brings a trend to the level of the mean scores."""
    return float(np.exp(np.log(np.maximum(mean, 1e-300)).mean() - np.log(evaluate(trend, x)).mean()))


def _percent(level: float) -> str:
    return f"{100 * level:g} % confidence band"
