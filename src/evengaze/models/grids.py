"""The grid of a picture, by what is known of it: patches or sizes that its encoder was told, newlines among its
features, else a square, else a line of tokens in order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from evengaze.layout import ImageInfo
from evengaze.models.base import EncoderCall

_SIZES = ("spatial_shapes", "target_sizes", "target_sizes_videos", "image_sizes", "image_grid_hw", "image_grid_hws")
"""Arguments that say (rows, columns) or (height, width) of every picture, in whatever unit."""

_MERGES = (1, 2, 3, 4)
"""How many patches along each side of a token are tried."""

_NEAR = 0.3
"""Largest difference of log aspect ratios at which a grid is taken for a picture's."""


def told_patches(call: EncoderCall) -> list[tuple[int, int, int]] | None:
    """(frames, rows, columns) of patches of every picture, if the encoder was told."""
    for name in (f"{call.kind}_grid_thw", "grid_thw"):
        given = call.arguments.get(name)
        if given is not None and len(given):
            return [(int(t), int(h), int(w)) for t, h, w in torch.as_tensor(given).tolist()]
    return None


def told_sizes(call: EncoderCall) -> list[tuple[int, int]] | None:
    """(height, width) of every picture in some unit, if the encoder was told."""
    for name in _SIZES:
        given: Any = call.arguments.get(name)
        if given is not None and len(given):
            rows = torch.as_tensor(given)
            return [(int(h), int(w)) for h, w in rows.reshape(len(rows), -1)[:, -2:].tolist()]
    return None


def merged(n: int, patches: tuple[int, int, int]) -> ImageInfo | None:
    """Rows, columns and frames of `n` tokens, if groups of patches (frames, rows, columns) were merged into them."""
    t, h, w = patches
    for frames, area in ((t, t * h * w), (1, h * w)):  # time may be pooled away
        merge = math.isqrt(max(1, area // max(n, 1)))
        if n == frames * (h // merge) * (w // merge):
            return ImageInfo((h // merge, w // merge), frames=frames)
    return None


def merged_with_newlines(features: Tensor, patches: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Rows, columns and marks of a still picture of which groups of patches were merged, with a newline behind every
    row, and `marks` tokens in front of all and as many behind; None if it is none."""
    for merge in _MERGES if patches[0] == 1 else ():
        rows, columns = patches[1] // merge, patches[2] // merge
        marks = len(features) - rows * (columns + 1)
        if rows > 1 and columns and marks in (0, 2):
            behind = features[marks // 2 + columns :: columns + 1][:rows]
            if bool((behind == behind[:1]).all()):
                return rows, columns, marks // 2
    return None


def newlines(features: Tensor) -> int:
    """How many tokens a row of a picture has in front of its newline; 0 if there are none.

    A newline is one learned vector: the same features, bit for bit, behind every row.
    """
    same = (features == features[-1]).all(-1).nonzero()[:, 0].tolist()
    if len(same) < 2 or len(features) % len(same):
        return 0
    width = len(features) // len(same)
    return width - 1 if width > 1 and same == list(range(width - 1, len(features), width)) else 0


def shaped(n: int, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of `n` tokens whose aspect ratio is nearest to (height, width); a square or a line if none is near."""
    if n and size[0] > 0 and size[1] > 0:
        want = size[0] / size[1]
        pairs = [(d, n // d) for d in range(1, n + 1) if n % d == 0]
        best = min(pairs, key=lambda p: abs(math.log(p[0] / p[1] / want)))
        if abs(math.log(best[0] / best[1] / want)) < _NEAR:
            return best
    return square(n)


def square(n: int) -> tuple[int, int]:
    """A square, or a line."""
    side = math.isqrt(n)
    return (side, side) if side * side == n else (1, n)
