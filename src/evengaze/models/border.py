"""How much of each patch is padding, from the pixels that enter the vision tower.

A processor that pads a picture to a square leaves border rows or columns of one colour. Their colour is known (the
mean colour, which is 0 after normalisation, or black, which is `-mean / std`), and only a border of that colour
counts: the white margins of a document are content. Nothing else about the processing has to be known, so pictures
that were padded before they came to the processor are found too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from evengaze.device import upload

TOLERANCE = 0.03
"""In units of normalised pixels: the mean colour truncated to whole numbers of 0..255 is at most 0.016 away from 0."""

MEAN_COLOUR = 0.0
"""The fill colour of LLaVA's expand-to-square after normalisation, whatever the mean is."""


def black(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """The value of a black pixel in each channel after normalisation."""
    return tuple(-m / s for m, s in zip(mean, std, strict=True))


def padding_share(
    pixels: Tensor, grid: tuple[int, int], fill: float | Sequence[float] = MEAN_COLOUR, tolerance: float = TOLERANCE
) -> Tensor:
    """Share of padding in each cell of a grid laid over each picture.

    A border row (or column) is padding if every pixel of it has the fill colour and so have all rows between it and
    the edge. A picture of nothing but the fill colour has no border, hence no padding.

    Args:
        pixels: (n, channels, height, width) as they enter the vision tower.
        grid: rows and columns of visual tokens.
        fill: the fill colour after normalisation: one value, or one for each channel.
        tolerance: largest distance from the fill colour in any channel.

    Returns:
        (n, rows, columns) float64 in [0, 1], on the CPU.
    """
    colour = upload(torch.as_tensor(fill, dtype=torch.float32), pixels.device).reshape(-1, 1, 1)

    def filled(part: Tensor) -> Tensor:
        return ((part.float() - colour).abs() <= tolerance).all(1)

    height, width = pixels.shape[2:]
    corners = pixels[:, :, :: max(1, height - 1), :: max(1, width - 1)]
    # Most pictures have no border, which their corners tell; on another device it would mean to wait for it twice.
    if pixels.device.type == "cpu" and not bool(filled(corners).any()):
        return torch.zeros(len(pixels), *grid, dtype=torch.float64)
    whole = filled(pixels)
    lines = torch.cat([whole.all(2), whole.all(1)], 1).cpu()
    rows, columns = torch.split(lines, [height, width], 1)
    if not bool((rows[:, [0, -1]] | columns[:, [0, -1]]).any()):
        return torch.zeros(len(pixels), *grid, dtype=torch.float64)
    nothing = rows.all(1)[:, None, None]
    padded = (_border(rows)[:, :, None] | _border(columns)[:, None, :]) & ~nothing
    return adaptive_avg_pool2d(padded.double(), grid)


def mask_share(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of padding in each cell of a grid, from masks of real pixels.

    Args:
        mask: (n, height, width), 1 for pixels of the picture.
        grid: rows and columns of visual tokens.

    Returns:
        (n, rows, columns) float64 in [0, 1], on the CPU.
    """
    return adaptive_avg_pool2d(1 - mask.double(), grid).cpu()


def _border(line: Tensor) -> Tensor:
    """(n, m) bool: the unbroken runs of True at both ends of each line."""
    ahead = line.int().cumprod(1)
    behind = line.flip(1).int().cumprod(1).flip(1)
    return (ahead | behind).bool()
