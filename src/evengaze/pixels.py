"""From visual tokens to pixels: which part of the picture, as the user has it, the patch of a token shows.

Where the picture lies on a grid of patches is read from the tokens' shares of padding, so that any placement is right.
A processor that crops pictures says so to nobody: a cropped picture counts as stretched to its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from torch import Tensor

from evengaze.errors import DataError
from evengaze.layout import ImageInfo, VisualTokens


def views(tokens: VisualTokens, picture: int) -> range:
    """The entries of `tokens.images` that show one picture: its thumbnail and its detail view, for instance.

    Raises:
        DataError: the row has no such picture.
    """
    starts = [k for k, info in enumerate(tokens.images) if info.part == 0]
    if not 0 <= picture < len(starts):
        raise DataError(f"the row has {len(starts)} pictures with visual tokens; there is no number {picture}")
    return range(starts[picture], [*starts, len(tokens.images)][picture + 1])


def picture_size(tokens: VisualTokens, picture: int, given: Any = None) -> tuple[int, int]:
    """(width, height) of a picture: as given (a pair, or a picture with a `size`), else as the layout knows it.

    Raises:
        DataError: neither says it.
    """
    size = getattr(given, "size", given)
    if size is None:
        size = tokens.images[views(tokens, picture)[0]].size
    if size is None:
        raise DataError(
            f"the size of picture {picture} in pixels is not known to the model: give it as size=(width, height), or "
            "give the picture"
        )
    if not isinstance(size, Sequence) or len(size) != 2 or min(size) < 1:
        raise DataError(f"a picture's size is (width, height) in pixels, not {size!r}")
    return int(size[0]), int(size[1])


def patch_boxes(tokens: VisualTokens, chosen: Tensor, size: tuple[int, int]) -> Tensor:
    """The part of its picture that each chosen token shows.

    Args:
        tokens: all visual tokens of a row.
        chosen: (m,) indices of tokens, all of one picture.
        size: (width, height) of the picture, or of each frame of the video.

    Returns:
        (m, 4) float64 left, top, right, bottom in pixels, inside the picture. Of a patch of nothing but padding no
        pixel is left: its box has no area.
    """
    tokens, chosen = tokens.to("cpu"), chosen.cpu()
    boxes = torch.zeros(len(chosen), 4, dtype=torch.float64)
    for view in torch.unique(tokens.image[chosen]).tolist():
        info, own = tokens.images[view], tokens.image == view
        padding = torch.zeros(info.frames, info.cells, dtype=torch.float64)
        padding[tokens.frame[own], tokens.cell[own]] = tokens.padding[own].double()
        padding = padding.reshape(info.frames, *info.grid)
        across = tile_columns(info, size) if is_tiled(tokens, view) else None
        here = (tokens.image[chosen] == view).nonzero().flatten()
        frame, cell = tokens.frame[chosen[here]], tokens.cell[chosen[here]]
        row, column = cell // info.grid[1], cell % info.grid[1]
        for f in torch.unique(frame).tolist():
            at = (frame == f).nonzero().flatten()
            canvas, y, x = padding[f], row[at], column[at]
            if across is not None and f < info.frames - 1:  # a tile: the canvas is that of all tiles
                canvas = _stitched(padding[:-1], across)
                y, x = y + f // across * info.grid[0], x + f % across * info.grid[1]
            top, bottom = _scaled(y, canvas.amin(1), size[1])
            left, right = _scaled(x, canvas.amin(0), size[0])
            boxes[here[at]] = torch.stack([left, top, right, bottom], 1)
    return boxes


def is_tiled(tokens: VisualTokens, view: int) -> bool:
    """Whether a view's frames are tiles of one picture: the raster runs on through them; in a video it starts again."""
    if tokens.images[view].frames == 1:
        return False
    own = tokens.image == view
    frame, x = tokens.frame[own], tokens.x[own]
    return bool(x[frame == frame.max()].min() > x[frame == 0].max())


def tile_columns(info: ImageInfo, size: tuple[int, int]) -> int:
    """How many tiles are side by side: processors choose the arrangement that is closest to the picture's shape.

    The layout does not say it; the last frame is the whole picture.
    """
    tiles, shape = info.frames - 1, info.grid[1] / info.grid[0]
    fits = [c for c in range(1, tiles + 1) if tiles % c == 0]
    return min(fits, key=lambda c: abs(log(c / (tiles // c) * shape * size[1] / size[0])))


def _stitched(tiles: Tensor, across: int) -> Tensor:
    """(down * rows, across * columns) from (tiles, rows, columns)."""
    _, rows, columns = tiles.shape
    return tiles.reshape(-1, across, rows, columns).transpose(1, 2).reshape(-1, across * columns)


def _scaled(place: Tensor, padding: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where lines of a canvas begin and end in a picture of `length` pixels that lies between the canvas's margins."""
    covered = 1 - padding
    best = (covered >= covered.max() - 1e-9).nonzero().flatten()
    first, last = int(best[0]), int(best[-1])
    before, after = float(padding[:first].sum()), float(padding[last + 1 :].sum())
    scale = length / (len(padding) - before - after)
    place = place.double()
    return ((place - before) * scale).clamp(0, length), ((place + 1 - before) * scale).clamp(0, length)
