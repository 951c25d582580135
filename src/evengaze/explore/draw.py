"""Drawings for the page, fast enough for a slider: pictures by PIL, charts as SVG, all of it HTML with its words."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image as images
from PIL import ImageDraw
from torch import Tensor

from evengaze.explore.findings import Findings, Run
from evengaze.viz.patches import Canvas, Mask, Pixels
from evengaze.viz.style import DEBIASED, INK, KEPT, PLAIN, WASTED

if TYPE_CHECKING:
    from PIL.Image import Image

    from evengaze.trace import RowTrace, StageTrace

_SIDE = 300
"""About how many pixels a map's longer side has; pictures have at most twice as many."""
_GAP = 4
_WIDTH, _HEIGHT = 460, 210
_LEFT, _BOTTOM, _TOP = 46, 34, 12
"""Size and margins of a chart, in units of its SVG."""


# -- panels ------------------------------------------------------------------------------------------------------------
def panel(title: str, run: Run, findings: Findings) -> str:
    """A run: its answer, what each stage kept, and its figures."""
    trace = run.trace
    canvas = Canvas.of(trace.layout.rows[0].to("cpu"), findings.picture)
    pictures = [_stage(canvas, stage) for stage in trace.stages]
    if not pictures:
        total = int(canvas.there.sum())
        pictures = [
            _figure(
                _mosaic(canvas, list(_shown(canvas))), f"all {total} visual tokens", "the picture as the model saw it"
            )
        ]
    kv, whole = sum(trace.kv_bytes), sum(trace.kv_bytes_unpruned)
    facts = {
        "tokens a layer": f"{trace.average_tokens():.1f}",
        "prefill": f"{1000 * run.seconds:.0f} ms",
        "KV cache": f"{kv / 1024:.0f} kB" + ("" if kv == whole else f" of {whole / 1024:.0f}"),
    }
    rows = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in facts.items())
    answer = f"<p class='eg-answer'>{escape(run.answer) or '(nothing)'}</p>"
    return _section(title, f"{answer}{''.join(pictures)}<table class='eg-facts'>{rows}</table>", "eg-panel")


def no_panel(title: str) -> str:
    """In place of a run that does not exist."""
    return _section(title, _none("This method does not rank by attention from text: nothing to debias."), "eg-panel")


def _stage(canvas: Canvas, stage: StageTrace) -> str:
    decision = stage.rows[0]
    kept = decision.kept.cpu()
    recycled = None if decision.recycled is None else canvas.mask(decision.recycled.cpu())
    mask = canvas.mask(kept)
    picture = _mosaic(canvas, [_marked(canvas, f, mask, recycled) for f in range(len(canvas.pixels))])
    merged = "" if recycled is None else f", {int(recycled.sum())} merged"
    words = f"before layer {stage.layer}: {canvas.describe(kept)}{merged}"
    return _figure(picture, words, f"the picture with the kept patches bright and outlined; {words}")


def _shown(canvas: Canvas) -> Sequence[Pixels]:
    return [pixels for pixels in canvas.pixels if pixels is not None]


def _marked(canvas: Canvas, frame: int, kept: Mask, recycled: Mask | None) -> Pixels:
    """One frame with kept patches bright and outlined, kept padding outlined in red, merged tokens dotted."""
    rows, columns = canvas.there.shape[1:]
    pixels = canvas.shaded(frame, kept)
    down, across = pixels.shape[0] // rows, pixels.shape[1] // columns
    drawn = images.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    padded = canvas.padding[frame] > 0.5
    for mask, colour in ((kept[frame] & ~padded, KEPT), (kept[frame] & padded, WASTED)):
        around = np.pad(mask, 1)
        for y, x in np.argwhere(mask).tolist():
            left, top = x * across, y * down
            right, low = left + across - 1, top + down - 1
            edges = {
                (y, x + 1): (left, top, right, top),
                (y + 2, x + 1): (left, low, right, low),
                (y + 1, x): (left, top, left, low),
                (y + 1, x + 2): (right, top, right, low),
            }
            for (a, b), line in edges.items():
                if not around[a, b]:
                    pen.line(line, fill=colour, width=3)
    if recycled is not None:
        for y, x in np.argwhere(recycled[frame]).tolist():
            middle = ((x + 0.5) * across, (y + 0.5) * down)
            pen.circle(middle, min(down, across) / 5, fill="white", outline=KEPT, width=2)
    return np.asarray(drawn)


# -- maps --------------------------------------------------------------------------------------------------------------
def maps(findings: Findings) -> str:
    """The first ranking stage's scores before and after debiasing."""
    run = findings.debiased or findings.plain
    stage = _scored(run)
    if stage is None:
        return _section("Score map", _none("This method gives no scores."), "eg-maps")
    canvas = Canvas.of(run.trace.layout.rows[0].to("cpu"), findings.picture)
    decision = stage.rows[0]
    shown = [
        _figure(_heat(canvas, decision, decision.raw), "before debiasing", "scores of all patches, bright is high")
    ]
    if findings.debiased is not None and decision.scores is not None:
        allowed = None
        if findings.debias is not None and findings.debias.padding is not None:
            allowed = findings.debias.valid(run.trace.layout.rows[0].to("cpu"))
        shown.append(
            _figure(
                _heat(canvas, decision, decision.scores, allowed),
                "after debiasing",
                "scores with the trend divided out, bright is high; padding, which is left out, is grey",
            )
        )
    row = f"<div class='eg-row'>{''.join(shown)}</div>"
    return _section(f"Score map, for the cut before layer {stage.layer}", row, "eg-maps")


def _heat(canvas: Canvas, decision: RowTrace, scores: Tensor | None, allowed: Tensor | None = None) -> Image:
    """Scores as colours from 0 to their 99th percentile; grey where there are none."""
    assert scores is not None
    values = np.full(canvas.there.shape, np.nan)
    tokens = canvas.tokens
    chosen = decision.candidates.cpu()
    keep = (tokens.image[chosen] == canvas.index) & (
        allowed[chosen] if allowed is not None else tokens.image[chosen].ge(0)
    )
    chosen, found = chosen[keep], scores.cpu().float()[keep].numpy()
    values.reshape(len(values), -1)[tokens.frame[chosen], tokens.cell[chosen]] = found
    most = float(np.nanquantile(values, 0.99)) if len(found) else 1.0
    rgb = (colormaps["magma"](np.clip(values / (most or 1.0), 0, 1))[..., :3] * 255).astype(np.uint8)
    rgb[np.isnan(values)] = (150, 150, 150)
    zoom = max(1, _SIDE // max(rgb.shape[1:3]))
    return _mosaic(canvas, [frame.repeat(zoom, 0).repeat(zoom, 1) for frame in rgb])


def _mosaic(canvas: Canvas, frames: Sequence[Pixels]) -> Image:
    """The frames of a video, or the tiles of a picture, side by side."""
    height, width = frames[0].shape[:2]
    across = canvas.across
    down = -(-len(frames) // across)
    whole = images.new("RGB", (across * (width + _GAP) - _GAP, down * (height + _GAP) - _GAP), "white")
    for number, frame in enumerate(frames):
        whole.paste(images.fromarray(frame), ((number % across) * (width + _GAP), (number // across) * (height + _GAP)))
    return whole


def _figure(picture: Image, words: str, alt: str) -> str:
    """A picture in HTML; what is too large is made smaller in place."""
    buffer = BytesIO()
    picture.thumbnail((2 * _SIDE, 2 * _SIDE))
    picture.save(buffer, "WEBP", quality=85, method=1)  # a quarter of the default's time, a fifth more bytes
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<figure><img alt='{escape(alt, quote=True)}' src='data:image/webp;base64,{data}'>"
        f"<figcaption>{escape(words)}</figcaption></figure>"
    )


def _scored(run: Run) -> StageTrace | None:
    """The first stage that has scores."""
    return next((stage for stage in run.trace.stages if stage.rows[0].raw is not None), None)


def _section(title: str, body: str, kind: str = "") -> str:
    return f"<section class='{kind}'><h3>{escape(title)}</h3>{body}</section>"


def _none(text: str) -> str:
    return f"<p class='eg-none'>{escape(text)}</p>"


def thumbnail(picture: Image, name: str) -> str:
    """A small picture by its name; it is made smaller in place."""
    return _figure(picture, name, name)


# -- charts ------------------------------------------------------------------------------------------------------------
def charts(findings: Findings) -> str:
    """The trend in use over the scores it was divided out of, and the tokens that enter each layer."""
    return f"<div class='eg-row'>{_trend(findings)}{_layers(findings)}</div>"


def _trend(findings: Findings) -> str:
    debias, run = findings.debias, findings.debiased
    if debias is None or run is None or debias.trend is None:
        text = "No trend is divided out." if debias is not None else "This method is not debiased."
        return _section("Trend", _none(text))
    tokens = run.trace.layout.rows[0].to("cpu")
    x = tokens.x.numpy()
    trend = 1 / debias.weight(tokens).cpu().numpy()
    order = np.argsort(x, kind="stable")
    lines = {"the trend that is divided out": (x[order], trend[order] / trend.mean(), DEBIASED)}
    stage = _scored(run)
    if stage is not None and stage.rows[0].raw is not None:
        candidates = stage.rows[0].candidates.cpu()
        valid = debias.valid(tokens)[candidates].numpy()
        at, raw = x[candidates.numpy()][valid], stage.rows[0].raw.cpu().double().numpy()[valid]
        if len(raw) and raw.mean() > 0:
            middles, means = _binned(at, raw / raw.mean())
            lines["mean score in this picture"] = (middles, means, PLAIN)
    chart = _chart(lines, "place in the raster (0: top left, 1: bottom right)", "relative to the mean", (0.0, 1.0))
    return _section(f"Trend of layer {run.pruner.ranked_layer(run.trace.layers)}'s attention", chart)


Array = NDArray[np.float64]


def _binned(x: Array, y: Array, bins: int = 14) -> tuple[Array, Array]:
    """Middles and means of the bins of [0, 1] that hold something."""
    bin_of = np.clip((x * bins).astype(int), 0, bins - 1)
    there = np.unique(bin_of)
    return (there + 0.5) / bins, np.array([y[bin_of == b].mean() for b in there])


def _layers(findings: Findings) -> str:
    runs = {"dense": (findings.dense, INK), findings.plain.pruner.name: (findings.plain, PLAIN)}
    if findings.debiased is not None:
        runs[f"{findings.plain.pruner.name}, debiased"] = (findings.debiased, DEBIASED)
    lines = {}
    for number, (name, (run, colour)) in enumerate(runs.items()):
        counts = np.repeat(np.array(run.trace.visual_tokens(), float), 2)
        layers = np.arange(len(counts) // 2 + 1).repeat(2)[1:-1].astype(float)
        lines[name] = (layers, counts + 0.8 * number, colour)
    chart = _chart(lines, "layer", "visual tokens that enter", (0.0, float(findings.dense.trace.layers)))
    return _section("Tokens entering each layer", chart)


Line = tuple[Array, Array, str]


def _chart(lines: Mapping[str, Line], xlabel: str, ylabel: str, span: tuple[float, float]) -> str:
    """A line chart as SVG; what it shows is also its title, for those who do not see it."""
    most = max(float(y.max()) for _, y, _ in lines.values()) * 1.08
    wide, high = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - _TOP

    def place(x: float, y: float) -> str:
        return f"{_LEFT + wide * (x - span[0]) / (span[1] - span[0]):.1f},{_TOP + high * (1 - y / most):.1f}"

    parts = []
    for value in _ticks(0, most):
        y = float(place(0, value).partition(",")[2])
        parts.append(f"<line class='eg-grid' x1='{_LEFT}' x2='{_WIDTH - 8}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text class='eg-tick' x='{_LEFT - 5}' y='{y + 3:.1f}' text-anchor='end'>{value:g}</text>")
    for value in _ticks(*span):
        x = place(value, 0).partition(",")[0]
        parts.append(f"<text class='eg-tick' x='{x}' y='{_HEIGHT - 20}' text-anchor='middle'>{value:g}</text>")
    dashes = ("", "6 3", "2 2")
    legend = []
    for number, (name, (xs, ys, colour)) in enumerate(lines.items()):
        points = " ".join(place(x, y) for x, y in zip(xs.tolist(), ys.tolist(), strict=True))
        stroke = "currentColor" if colour == INK else colour
        dash = dashes[number % len(dashes)]
        parts.append(
            f"<polyline points='{points}' fill='none' stroke='{stroke}' stroke-width='2' stroke-dasharray='{dash}'/>"
        )
        legend.append(
            f"<span><i style='border-top:3px {'dashed' if dash else 'solid'} {stroke}'></i>{escape(name)}</span>"
        )
    label = f"{escape(xlabel)} across, {escape(ylabel)} up: {escape(', '.join(lines))}"
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{label}'>{''.join(parts)}"
        f"<text class='eg-tick' x='{_LEFT + wide / 2}' y='{_HEIGHT - 5}' text-anchor='middle'>{escape(xlabel)}</text>"
        f"</svg><div class='eg-legend'>{''.join(legend)}</div>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Some four to six round numbers."""
    rough = (high - low) / 5
    unit = 10.0 ** np.floor(np.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough)
    return [round(float(v), 6) for v in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]
