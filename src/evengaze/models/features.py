"""What an encoding shows, from its result and its arguments alone: how many tokens each picture has, and which grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evengaze.errors import LayoutError
from evengaze.layout import ImageInfo
from evengaze.models.base import EncoderCall
from evengaze.models.border import mask_share, padding_share
from evengaze.models.grids import merged, merged_with_newlines, newlines, shaped, square, told_patches, told_sizes
from evengaze.models.pictures import NO_CANDIDATE, Panel, Picture, spans


def encoded_pictures(call: EncoderCall, mask: Tensor) -> list[Picture]:
    """The pictures of one encoding, in order.

    Args:
        call: the encoding.
        mask: (samples, L) bool, the tokens that it fills, together with other encodings of its kind.

    Raises:
        LayoutError: its features cannot be divided among pictures.
    """
    found = parts(call)
    patches = told_patches(call)
    if patches is not None:
        divided = _regrouped(call, found, [math.prod(p) for p in patches])
        return [_of_patches(call, features, p) for features, p in zip(divided, patches, strict=True)]
    sizes = told_sizes(call)
    if sizes is not None and len(found) == 1 < len(sizes):
        found = _regrouped(call, found, [math.prod(s) for s in sizes])
    if call.kind == "video":
        return [_picture(call, f, ImageInfo(square(len(f) // n), frames=n)) for f, n in _videos(call, found)]
    if sizes is not None and len(sizes) == len(found):
        return [_still(f, s, None) for f, s in zip(found, sizes, strict=True)]
    return list(_untold(call, found, mask))


def counts(call: EncoderCall) -> list[int]:
    """How many tokens each part fills."""
    return [len(p) for p in parts(call)]


# -- several parts --------------------------------------------------------------------------------------------------
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
    else:
        layers = getattr(value, "deepstack_features", None)  # Granite 4 Vision has no others: the first layer's
        value = layers[0][1] if layers else value
    if isinstance(value, Tensor) and value.dim() >= 2:
        return [value] if value.dim() == 2 else list(value.reshape(-1, *value.shape[-2:]))
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) and v.dim() >= 2 for v in value):
        return [v.reshape(-1, v.shape[-1]) for v in value if v.numel()]
    raise LayoutError(
        f"get_{call.kind}_features returned {type(call.result).__name__}, in which no features of pictures are found "
        "(looked for pooler_output, last_hidden_state, or a list of tensors). This family needs an adapter of its own."
    )


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


def _untold(call: EncoderCall, found: list[Tensor], mask: Tensor) -> Iterator[Picture]:
    """Pictures of which nothing is told: parts that stand side by side in the prompt are the tiles of one."""
    runs = [stop - start for row in mask for start, stop in spans(row)]
    if len(found) == 1 and sum(runs) == len(found[0]):  # everything in one tensor: a run is a picture
        found = list(torch.split(found[0], runs))
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
            yield Picture.still(Panel.plain(ImageInfo(square(len(tiles[0])), frames=len(tiles)), padding))
        else:
            yield from (_still(t, None, s) for t, s in zip(tiles, shares[first:k], strict=True))
    yield from (_still(t, None, s) for t, s in zip(found[k:], shares[k:], strict=True))


def _padding(call: EncoderCall, found: list[Tensor]) -> list[Tensor | None]:
    """(rows, columns) shares of padding of each part, where its pixels are at hand."""
    pixels, mask = call.arguments.get("pixel_values"), call.arguments.get("pixel_attention_mask")
    none: list[Tensor | None] = [None] * len(found)
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or pixels.shape[:2] != (len(found), 3):
        return none
    grids = [square(len(f)) for f in found]
    if any(1 in g or newlines(f) for g, f in zip(grids, found, strict=True)):
        return none
    if isinstance(mask, Tensor) and mask.shape[-2:] == pixels.shape[-2:]:
        masks = mask.reshape(-1, 1, *mask.shape[-2:])
        return [mask_share(m, g)[0] for m, g in zip(masks, grids, strict=True)]
    return [padding_share(p[None], g)[0] for p, g in zip(pixels, grids, strict=True)]


# -- one picture ----------------------------------------------------------------------------------------------------
def _of_patches(call: EncoderCall, features: Tensor, patches: tuple[int, int, int]) -> Picture:
    """A picture or video whose patches (frames, rows, columns) are known."""
    frames, height, width = patches
    info = merged(len(features), patches)
    # Whole groups come first: a blank picture has equal features at a constant stride, too.
    if info is None or info.grid[0] * width != info.grid[1] * height:
        lines = merged_with_newlines(features, patches)
        if lines is not None:
            return Picture.still(_with_newlines(*lines))
    return _picture(call, features, info or ImageInfo(shaped(len(features) // frames, (height, width)), frames))


def _picture(call: EncoderCall, features: Tensor, info: ImageInfo) -> Picture:
    """A video, or a still picture, on one grid; tokens left over at the end show nothing."""
    view, left = Panel.plain(info), len(features) - info.cells * info.frames
    if left:
        view = Panel(info, torch.cat([view.cell, torch.full((left,), NO_CANDIDATE)]))
    return Picture.video(view) if call.kind == "video" else Picture.still(view)


def _still(features: Tensor, size: tuple[int, int] | None, padding: Tensor | None) -> Picture:
    columns = newlines(features)
    if columns:
        return Picture.still(_with_newlines(len(features) // (columns + 1), columns))
    grid = square(len(features)) if size is None else shaped(len(features), size)
    return Picture.still(Panel.plain(ImageInfo(grid), padding))


def _with_newlines(rows: int, columns: int, marks: int = 0) -> Panel:
    """Rows with a newline behind each, and `marks` tokens in front of all and behind, which show nothing either."""
    cell = torch.full((rows, columns + 1), NO_CANDIDATE)
    cell[:, :columns] = torch.arange(rows * columns).reshape(rows, columns)
    mark = torch.full((marks,), NO_CANDIDATE)
    return Panel(ImageInfo((rows, columns)), torch.cat([mark, cell.flatten(), mark]))
