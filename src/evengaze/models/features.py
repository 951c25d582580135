"""What an encoding shows, from its result and its arguments alone: how many tokens each picture has, and which grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from evengaze.errors import LayoutError
from evengaze.layout import ImageInfo
from evengaze.models.base import EncoderCall
from evengaze.models.border import MEAN_COLOUR, padding_share
from evengaze.models.pictures import NO_CANDIDATE, Panel, Picture, spans

_SIZES = ("spatial_shapes", "target_sizes", "target_sizes_videos", "image_sizes", "image_grid_hw", "image_grid_hws")
"""Arguments that say (rows, columns) or (height, width) of every picture, in whatever unit."""

_MERGES = (1, 2, 3, 4)
"""How many patches along each side of a token are tried."""

_NEAR = 0.3
"""Largest difference of log aspect ratios at which a grid is taken for a picture's."""


def parts(call: EncoderCall) -> list[Tensor]:
    """The features of an encoding: (n, d) for each part that the encoder returned (picture, tile, frame or all).

    Raises:
        LayoutError: no features are found in what it returned.
    """
    value = call.result
    for name in ("pooler_output", "last_hidden_state"):
        found = getattr(value, name, None)
        if found is not None:
            value = found
            break
    if isinstance(value, Tensor) and value.dim() >= 2:
        return [value] if value.dim() == 2 else list(value.reshape(-1, *value.shape[-2:]))
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) and v.dim() >= 2 for v in value):
        return [v.reshape(-1, v.shape[-1]) for v in value if v.numel()]
    raise LayoutError(
        f"get_{call.kind}_features returned {type(call.result).__name__}, in which no features of pictures are found "
        "(looked for pooler_output, last_hidden_state, or a list of tensors). This family needs an adapter of its own."
    )


def counts(call: EncoderCall) -> list[int]:
    """How many tokens each part fills."""
    return [len(p) for p in parts(call)]


def encoded_pictures(call: EncoderCall, mask: Tensor) -> list[Picture]:
    """The pictures of one encoding, in order.

    Args:
        call: the encoding.
        mask: (B, L) bool, the tokens that it fills, together with other encodings of its kind.

    Raises:
        LayoutError: its features cannot be divided among pictures.
    """
    found = parts(call)
    thw = _grids(call)
    if thw is not None:
        return [
            _gridded(call, features, grid)
            for features, grid in zip(_regrouped(call, found, [math.prod(g) for g in thw]), thw, strict=True)
        ]
    sizes = _sizes(call)
    if sizes is not None and len(found) == 1 < len(sizes):
        found = _regrouped(call, found, [math.prod(s) for s in sizes])
    if call.kind == "video":
        return [_picture(call, f, ImageInfo(_square(len(f) // n), frames=n)) for f, n in _videos(call, found)]
    if sizes is not None and len(sizes) == len(found):
        return [_still(f, s, None) for f, s in zip(found, sizes, strict=True)]
    return list(_plain(call, found, mask))


# -- several parts --------------------------------------------------------------------------------------------------
def _regrouped(call: EncoderCall, found: list[Tensor], weight: Sequence[int]) -> list[Tensor]:
    """The features of each of several pictures, whose numbers of tokens are in the ratio of `weight`."""
    if len(found) == len(weight):
        return found
    flat = torch.cat(found)
    total = sum(weight)
    share = [len(flat) * w // total for w in weight]
    if sum(share) != len(flat) or any(len(flat) * w % total for w in weight):
        raise LayoutError(
            f"get_{call.kind}_features returned {len(flat)} features in {len(found)} parts for {len(weight)} pictures, "
            "and it is not clear which belong to which. This family needs an adapter of its own."
        )
    return list(torch.split(flat, share))


def _videos(call: EncoderCall, found: list[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """The features of each video, and its number of frames."""
    told = call.arguments.get("num_frames_per_video")
    pixels = next((v for v in call.arguments.values() if isinstance(v, Tensor) and v.dim() >= 5), None)
    if told is not None:
        lengths = [int(n) for n in told]
    elif pixels is not None:
        lengths = [int(pixels.shape[1])] * len(pixels)
    else:
        lengths = [1] * len(found)
    if len(found) == sum(lengths) != len(lengths):  # a part is a frame
        queue = iter(found)
        found = [torch.cat([next(queue) for _ in range(n)]) for n in lengths]
    yield from zip(_regrouped(call, found, lengths), lengths, strict=True)


def _plain(call: EncoderCall, found: list[Tensor], mask: Tensor) -> Iterator[Picture]:
    """Pictures of which nothing is told: parts that stand side by side in the prompt are the tiles of one."""
    runs = [stop - start for row in mask for start, stop in spans(row)]
    if len(found) == 1:  # everything in one tensor: a run is a picture
        total = sum(runs)
        once = runs[: len(runs) * len(found[0]) // total] if total else []
        found = list(torch.split(found[0], once)) if sum(once) == len(found[0]) else found
    shares = _padding(call, found)
    k = 0
    for run in runs:
        size, first = 0, k
        while k < len(found) and size < run:
            size += len(found[k])
            k += 1
        tiles = found[first:k]
        if len(tiles) > 1 and size == run and len({len(t) for t in tiles}) == 1:
            known = [s for s in shares[first:k] if s is not None]
            padding = torch.stack(known) if len(known) == len(tiles) else None
            yield Picture.still(Panel.plain(ImageInfo(_square(len(tiles[0])), frames=len(tiles)), padding))
        else:
            yield from (_still(t, None, s) for t, s in zip(tiles, shares[first:k], strict=True))
    yield from (_still(t, None, s) for t, s in zip(found[k:], shares[k:], strict=True))


def _padding(call: EncoderCall, found: list[Tensor]) -> list[Tensor | None]:
    """(rows, columns) shares of padding of each part, where its pixels are at hand."""
    pixels, mask = call.arguments.get("pixel_values"), call.arguments.get("pixel_attention_mask")
    none: list[Tensor | None] = [None] * len(found)
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or pixels.shape[:2] != (len(found), 3):
        return none
    grids = [_square(len(f)) for f in found]
    if any(1 in g or newlines(f) for g, f in zip(grids, found, strict=True)):
        return none
    if isinstance(mask, Tensor) and mask.shape[-2:] == pixels.shape[-2:]:
        padded = 1 - mask.reshape(-1, 1, *mask.shape[-2:]).double()
        return [adaptive_avg_pool2d(p, g)[0].cpu() for p, g in zip(padded, grids, strict=True)]
    return [padding_share(p[None], g, MEAN_COLOUR)[0] for p, g in zip(pixels, grids, strict=True)]


# -- one picture ----------------------------------------------------------------------------------------------------
def _picture(call: EncoderCall, features: Tensor, info: ImageInfo) -> Picture:
    """A video, or a still picture, on one grid; tokens left over at the end show nothing."""
    view, left = Panel.plain(info), len(features) - info.cells * info.frames
    if left:
        view = Panel(info, torch.cat([view.cell, torch.full((left,), NO_CANDIDATE)]))
    return Picture.video(view) if call.kind == "video" else Picture.still(view)


def _gridded(call: EncoderCall, features: Tensor, grid: tuple[int, int, int]) -> Picture:
    """A picture whose patches have a known grid (frames, rows, columns)."""
    for merge in _MERGES if grid[0] == 1 else ():
        rows, columns = grid[1] // merge, grid[2] // merge
        marks = len(features) - rows * (columns + 1)
        if rows > 1 and columns and marks in (0, 2) and _same(features[marks // 2 + columns :: columns + 1][:rows]):
            return Picture.still(_with_newlines(rows, columns, marks // 2))
    return _picture(call, features, _from_grid(len(features), grid))


def _with_newlines(rows: int, columns: int, marks: int = 0) -> Panel:
    """Rows with a newline behind each, and `marks` tokens in front of all and behind, which show nothing either."""
    cell = torch.full((rows, columns + 1), NO_CANDIDATE)
    cell[:, :columns] = torch.arange(rows * columns).reshape(rows, columns)
    mark = torch.full((marks,), NO_CANDIDATE)
    return Panel(ImageInfo((rows, columns)), torch.cat([mark, cell.flatten(), mark]))


def _same(features: Tensor) -> bool:
    return bool((features == features[:1]).all())


def _still(features: Tensor, size: tuple[int, int] | None, padding: Tensor | None) -> Picture:
    columns = newlines(features)
    if columns:
        return Picture.still(_with_newlines(len(features) // (columns + 1), columns))
    grid = _square(len(features)) if size is None else _shaped(len(features), size)
    return Picture.still(Panel.plain(ImageInfo(grid), padding))


def newlines(features: Tensor) -> int:
    """How many tokens a row of a picture has in front of its newline; 0 if there are none.

    A newline is one learned vector: the same features, bit for bit, behind every row.
    """
    same = (features == features[-1]).all(-1).nonzero()[:, 0].tolist()
    if len(same) < 2 or len(features) % len(same):
        return 0
    width = len(features) // len(same)
    return width - 1 if width > 1 and same == list(range(width - 1, len(features), width)) else 0


def _from_grid(n: int, grid: tuple[int, int, int]) -> ImageInfo:
    """Rows, columns and frames of `n` tokens that patches (frames, rows, columns) were merged into."""
    t, h, w = grid
    for frames, area in ((t, t * h * w), (1, h * w)):  # time may be pooled away
        merge = math.isqrt(max(1, area // max(n, 1)))
        if n == frames * (h // merge) * (w // merge):
            return ImageInfo((h // merge, w // merge), frames=frames)
    return ImageInfo(_shaped(n // t, (h, w)), frames=t)


def _shaped(n: int, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of `n` tokens whose aspect ratio is nearest to (height, width)."""
    if n and size[0] > 0 and size[1] > 0:
        want = size[0] / size[1]
        pairs = [(d, n // d) for d in range(1, n + 1) if n % d == 0]
        best = min(pairs, key=lambda p: abs(math.log(p[0] / p[1] / want)))
        if abs(math.log(best[0] / best[1] / want)) < _NEAR:
            return best
    return _square(n)


def _square(n: int) -> tuple[int, int]:
    """A square, or a line."""
    side = math.isqrt(n)
    return (side, side) if side * side == n else (1, n)


# -- what the arguments say -------------------------------------------------------------------------------------------
def _grids(call: EncoderCall) -> list[tuple[int, int, int]] | None:
    """(frames, rows, columns) of patches of every picture, if the encoder was told."""
    for name in (f"{call.kind}_grid_thw", "grid_thw"):
        given = call.arguments.get(name)
        if given is not None and len(given):
            return [(int(t), int(h), int(w)) for t, h, w in torch.as_tensor(given).tolist()]
    return None


def _sizes(call: EncoderCall) -> list[tuple[int, int]] | None:
    """(height, width) of every picture in some unit, if the encoder was told."""
    for name in _SIZES:
        given: Any = call.arguments.get(name)
        if given is not None and len(given):
            rows = torch.as_tensor(given)
            return [(int(h), int(w)) for h, w in rows.reshape(len(rows), -1)[:, -2:].tolist()]
    return None
