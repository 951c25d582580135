"""Drawing primitives: a picture as the model saw it, and its patches bright, dimmed, hatched and outlined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from PIL import Image as images
from torch import Tensor

from evengaze.errors import DataError
from evengaze.layout import VisualTokens
from evengaze.pixels import is_tiled, tile_columns
from evengaze.viz.fonts import drawable
from evengaze.viz.style import INK, KEPT, MUTED, RIGHT, WASTED, WRONG, new_figure, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

FILL = (122, 116, 104)
"""CLIP's mean colour, with which LLaVA pads."""

_BLANK = (214, 218, 225)
_GAP = 0.08  # between the frames of a video, as a share of a frame's longer side

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Canvas:
    """One picture (or the frames of one video) of a prompt, ready to be drawn.

    Attributes:
        tokens: the row's visual tokens.
        index: which picture of the row.
        pixels: for each frame (height, width, 3) uint8, or None for a plain grid.
        padding: (frames, rows, columns) share of each patch that is padding.
        there: (frames, rows, columns) False where the grid has no visual token.
        across: how many frames are drawn side by side.
    """

    tokens: VisualTokens
    index: int
    pixels: tuple[Pixels | None, ...]
    padding: NDArray[np.float64]
    there: Mask
    across: int

    @classmethod
    def of(cls, tokens: VisualTokens, image: Image | Sequence[Image] | None = None, index: int = 0) -> Canvas:
        """The canvas of picture `index` of a row.

        Args:
            tokens: the row's visual tokens.
            image: the picture as the user has it, one for each frame of a video, or None. A picture that the model
                reads in tiles is cut into them.
            index: which picture of the row.

        Raises:
            DataError: the row has no such picture, or a video is given another number of frames.
        """
        if not 0 <= index < len(tokens.images):
            raise DataError(f"the row has {len(tokens.images)} pictures with visual tokens; there is no number {index}")
        info = tokens.images[index]
        shape = (info.frames, *info.grid)
        there = on_grid(tokens, None, index)
        padding = np.zeros(shape)
        own = (tokens.image == index).cpu()
        padding.reshape(info.frames, -1)[tokens.frame.cpu()[own], tokens.cell.cpu()[own]] = tokens.padding.cpu()[own]
        across = _across(*shape)
        frames: list[Image | None]
        if image is None:
            frames = [None] * info.frames
        elif isinstance(image, Sequence):
            frames = list(image)
        elif is_tiled(tokens, index):
            across = tile_columns(info, image.size)
            frames = cut(image, info.frames - 1, across)
        else:
            frames = [image]
        if len(frames) != info.frames:
            raise DataError(f"picture {index} of the row has {info.frames} frames, but {len(frames)} images were given")
        seen = tuple(None if f is None else as_seen(f, p) for f, p in zip(frames, padding, strict=True))
        return cls(tokens, index, seen, padding, there, across)

    def mask(self, chosen: Tensor) -> Mask:
        """(frames, rows, columns) True at the visual tokens `chosen` (indices into the row's)."""
        return on_grid(self.tokens, chosen, self.index)

    def describe(self, chosen: Tensor) -> str:
        """How many tokens were kept, and how many of them are padding."""
        kept, padded = self.mask(chosen), self.padding > 0.5
        text = f"{int(kept.sum())} of {int(self.there.sum())} kept"
        return text + (f", {int((kept & padded).sum())} of them padding" if padded.any() else "")

    @property
    def aspect(self) -> float:
        """Width of the drawing over its height."""
        frames, rows, columns = self.there.shape
        down, across = ceil(frames / self.across), self.across
        gap = _GAP * max(rows, columns)
        return float((across * (columns + gap) - gap) / (down * (rows + gap) - gap))

    def draw(self, ax: Any, kept: Mask | None = None, recycled: Mask | None = None) -> None:
        """Draw all frames into an axes.

        Args:
            ax: a matplotlib axes.
            kept: what to show bright, as from `mask`, and outlined, padding in a colour of its own; None shows the
                picture as it is.
            recycled: tokens that stand for merged ones, marked by a dot.
        """
        frames, rows, columns = self.there.shape
        across = self.across
        gap = _GAP * max(rows, columns)
        for f in range(frames):
            top, left = (f // across) * (rows + gap), (f % across) * (columns + gap)
            base = self.shaded(f, kept)
            extent = (left, left + columns, top + rows, top)
            ax.imshow(base, extent=extent, interpolation="nearest", aspect="equal")
            if kept is None:
                continue
            padded = self.padding[f] > 0.5
            self._hatch(ax, padded & ~kept[f], top, left)
            _outline(ax, kept[f] & ~padded, top, left, KEPT)
            _outline(ax, kept[f] & padded, top, left, WASTED)
            if recycled is not None:
                y, x = np.nonzero(recycled[f])
                ax.scatter(x + left + 0.5, y + top + 0.5, s=9, color="white", edgecolor=KEPT, linewidth=0.9, zorder=4)
        down = ceil(frames / across)
        ax.set_xlim(-0.06, across * (columns + gap) - gap + 0.06)
        ax.set_ylim(down * (rows + gap) - gap + 0.06, -0.06)
        ax.set_axis_off()

    def shaded(self, f: int, kept: Mask | None) -> Pixels:
        """(height, width, 3) uint8: frame `f` with what is not `kept` dim and greyish; as it is if that is None."""
        rows, columns = self.there.shape[1:]
        pixels = self.pixels[f]
        if pixels is None:
            pixels = _checkered(self.there[f])
        if kept is None:
            return pixels
        zoom = (pixels.shape[0] // rows, pixels.shape[1] // columns)
        bright = np.kron(kept[f], np.ones(zoom, bool))[:, :, None]
        grey = pixels.mean(2, keepdims=True)
        dim = (0.4 * (0.4 * pixels + 0.6 * grey) + 8).astype(np.uint8)
        return np.where(bright, pixels, dim)

    @staticmethod
    def _hatch(ax: Any, where: Mask, top: float, left: float) -> None:
        """Rectangles over runs of padding, joined over equal rows so that the hatching is seamless."""
        runs: dict[tuple[int, int], list[int]] = {}
        for y, row in enumerate(where):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
            for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                runs.setdefault((start, stop), []).append(y)
        for (start, stop), lines in runs.items():
            for group in np.split(lines, np.flatnonzero(np.diff(lines) != 1) + 1):
                corner = (left + start, top + float(group[0]))
                box = Rectangle(corner, stop - start, len(group), fill=False, hatch="////", linewidth=0, zorder=2)
                box.set_edgecolor((1, 1, 1, 0.28))
                ax.add_patch(box)


@dataclass(frozen=True)
class Drawing:
    """One drawing of a figure.

    Attributes:
        canvas: the picture.
        head: title.
        detail: a quieter second line.
        kept: tokens to show bright (indices into the row's visual tokens); None shows the picture as it is.
        recycled: tokens that stand for merged ones, marked by a dot.
        right: whether what was answered is right, marked in front of the title; None if that is not known.
    """

    canvas: Canvas
    head: str
    detail: str = ""
    kept: Tensor | None = None
    recycled: Tensor | None = None
    right: bool | None = None


def draw_panels(rows: Sequence[Sequence[Drawing | None]], *, height: float = 3.1, heading: str = "") -> Figure:
    """Draw panels in rows and columns, with a legend of the marks that occur in them.

    Args:
        rows: equally long; None leaves a place empty.
        height: of a panel, in inches.
        heading: above all of them.
    """
    widest = max(panel.canvas.aspect for row in rows for panel in row if panel is not None)
    width = max(2.5, height * widest) * len(rows[0])
    room = width / len(rows[0]) - 0.15
    figure = new_figure(width, (height + 0.52) * len(rows) + (0.35 if heading else 0) + 0.5)
    if heading:
        shown, families = drawable(heading)
        figure.suptitle(shown, x=0.01, ha="left", fontsize=11, color=INK, fontfamily=families)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for ax, panel in zip(line, row, strict=True):
            if panel is None:
                ax.set_axis_off()
                continue
            canvas = panel.canvas
            kept = None if panel.kept is None else canvas.mask(panel.kept)
            canvas.draw(ax, kept, None if panel.recycled is None else canvas.mask(panel.recycled))
            title(ax, panel.head, panel.detail, panel.right, room)
            ax.set_anchor("S")  # what the layout leaves over is the titles'
    _legend(figure, [panel for row in rows for panel in row if panel is not None])
    return figure


def _legend(figure: Figure, panels: Sequence[Drawing]) -> None:
    """What the marks mean, below all panels; only those that occur."""
    chosen = [(p.canvas, p.canvas.mask(p.kept)) for p in panels if p.kept is not None]
    if not chosen:
        return
    padding = [canvas.padding > 0.5 for canvas, _ in chosen]
    wasted = any((kept & pad).any() for (_, kept), pad in zip(chosen, padding, strict=True))
    unseen = any((~kept & pad).any() for (_, kept), pad in zip(chosen, padding, strict=True))
    marks: list[tuple[Any, str]] = [
        (Patch(facecolor="white", edgecolor=KEPT, linewidth=1.6), "kept"),
        (Patch(facecolor="#5c5c5c", edgecolor="none"), "dropped"),
    ]
    if wasted:
        marks.append((Patch(facecolor="white", edgecolor=WASTED, linewidth=1.6), "kept, but padding"))
    if unseen:
        marks.append((Patch(facecolor="#5c5c5c", edgecolor="#c8c8c8", hatch="////", linewidth=0), "padding, dropped"))
    if any(p.recycled is not None and len(p.recycled) for p in panels):
        dot = Line2D([], [], marker="o", linestyle="", markerfacecolor="white", markeredgecolor=KEPT, markersize=4)
        marks.append((dot, "stands for merged tokens"))
    rights = {p.right for p in panels} - {None}
    for known, sign, color, text in ((True, "\u2713", RIGHT, "right"), (False, "\u2717", WRONG, "wrong")):
        if known in rights:
            marks.append((Line2D([], [], linestyle="", marker=f"${sign}$", color=color, markersize=7), text))
    handles, labels = zip(*marks, strict=True)
    columns = max(2, min(len(marks), int(figure.get_figwidth() / 1.5)))
    figure.legend(
        handles, labels, loc="outside lower left", ncols=columns, fontsize=8, frameon=False, labelcolor=MUTED,
        handlelength=1.2, handleheight=1.0,
    )  # fmt: skip


def on_grid(tokens: VisualTokens, chosen: Tensor | None, index: int) -> Mask:
    """(frames, rows, columns) True where picture `index` has one of the tokens `chosen` (all of them if None)."""
    info = tokens.images[index]
    mask = np.zeros((info.frames, info.cells), bool)
    part = (tokens if chosen is None else tokens.take(chosen.to(tokens.cell.device))).to("cpu")
    own = part.image == index
    mask[part.frame[own], part.cell[own]] = True
    return mask.reshape(info.frames, *info.grid)


def as_seen(image: Image, padding: NDArray[np.float64], side: int = 560) -> Pixels:
    """A picture as it reached the vision tower: inside its padding, or stretched to the grid if there is none.

    Where the picture lies is read from the shares of padding, so that any placement is right. A picture that comes
    with its padding already on it is used as it is.

    Args:
        image: the picture.
        padding: (rows, columns) share of padding of each patch.
        side: about how many pixels the longer side gets.

    Returns:
        (height, width, 3) uint8, a whole number of pixels for each patch.
    """
    rows, columns = padding.shape
    zoom = max(1, side // max(rows, columns))
    height, width = rows * zoom, columns * zoom
    covered = 1 - padding
    top, bottom = _margins(covered.max(1))
    left, right = _margins(covered.max(0))
    box = [round(left * zoom), round(top * zoom), round(width - right * zoom), round(height - bottom * zoom)]
    inner = (box[2] - box[0]) / max(1, box[3] - box[1])
    aspect = image.width / image.height
    if abs(np.log(aspect * rows / columns)) < abs(np.log(aspect / max(inner, 1e-6))):
        box = [0, 0, width, height]
    picture = images.new("RGB", (width, height), FILL)
    inside = image.convert("RGB").resize((max(1, box[2] - box[0]), max(1, box[3] - box[1])), images.Resampling.LANCZOS)
    picture.paste(inside, (box[0], box[1]))
    return np.asarray(picture)


def _margins(covered: NDArray[np.float64]) -> tuple[float, float]:
    """Padding in front of and behind the covered part of a line, in cells."""
    best = np.flatnonzero(covered >= covered.max() - 1e-9)
    first, last = int(best[0]), int(best[-1])
    return float((1 - covered[:first]).sum()), float((1 - covered[last + 1 :]).sum())


def cut(image: Image, tiles: int, across: int) -> list[Image | None]:
    """The tiles of a picture in raster order, and the whole picture behind them."""
    down = tiles // across
    width, height = image.width / across, image.height / down
    boxes = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in range(down) for x in range(across)]
    size = (max(1, round(width)), max(1, round(height)))
    return [*(image.resize(size, images.Resampling.LANCZOS, box=box) for box in boxes), image]


def _across(frames: int, rows: int, columns: int) -> int:
    """Frames side by side, for a mosaic that is about a third wider than high."""
    return min(frames, max(1, round(sqrt(frames * 4 / 3 * rows / columns))))


def _checkered(there: Mask, zoom: int = 24) -> Pixels:
    """A stand-in for a picture: one square a token, white where the grid has none."""
    rows, columns = there.shape
    tone = np.where((np.add.outer(np.arange(rows), np.arange(columns)) % 2)[..., None], _BLANK, np.add(_BLANK, 12))
    tone = np.where(there[..., None], tone, 255).astype(np.uint8)
    return np.asarray(tone.repeat(zoom, 0).repeat(zoom, 1))


def _outline(ax: Any, mask: Mask, top: float, left: float, colour: str) -> None:
    """The border between patches inside and outside of a mask."""
    around = np.pad(mask, 1).astype(int)
    lines = []
    y, x = np.nonzero(np.diff(around, axis=0)[:, 1:-1])
    lines += [((left + a, top + b), (left + a + 1, top + b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    y, x = np.nonzero(np.diff(around, axis=1)[1:-1])
    lines += [((left + a, top + b), (left + a, top + b + 1)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    ax.add_collection(LineCollection(lines, colors=colour, linewidths=1.3, capstyle="projecting", zorder=3))
