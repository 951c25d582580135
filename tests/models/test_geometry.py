"""A token's cell is where its picture really is: change the pixels of a cell, see which feature changes most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evengaze.layout import VisualTokens
from evengaze.testing import families, tiny
from evengaze.testing.prompts import IMAGE, VIDEO
from models.helpers import PIXELS, encode, layout

FAMILIES = [f for f in families() if f != "llama"]
TILED = ("internvl", "aya_vision", "idefics3", "smolvlm")
ANYRES = ("llava_next", "llava_next_video", "llava_onevision", "granite4_vision")


def square(picture: Tensor, grid: tuple[int, int], cell: int) -> Tensor:
    """The pixels (3, h, w) of a cell, as a view."""
    height, width = picture.shape[-2] // grid[0], picture.shape[-1] // grid[1]
    r, c = divmod(cell, grid[1])
    return picture[..., r * height : (r + 1) * height, c * width : (c + 1) * width]


def pixels_of(family: str, kind: str, pixels: Tensor, row: VisualTokens, k: int) -> Tensor:
    """The pixels that the k-th candidate shows, as a view into `pixels` (row 0 of two pictures)."""
    image, frame, cell = int(row.image[k]), int(row.frame[k]), int(row.cell[k])
    grid = row.images[image].grid
    if family.startswith("qwen"):  # flattened patches, the four that become a token side by side
        return pixels[4 * k : 4 * k + 4]
    if kind == "video":
        return square(pixels[image, frame], grid, cell)
    if family in TILED:
        tile = frame + sum(i.frames for i in row.images[:image])
        return square(pixels[0, tile] if pixels.dim() == 5 else pixels[tile], grid, cell)
    if family in ANYRES:
        tiles, view = pixels[image // 2], image % 2
        if view == 0:
            return square(tiles[0], grid, cell)
        r, c = divmod(cell, grid[1])
        tile = (r // 4) * (grid[1] // 4) + c // 4
        return square(tiles[1 + tile], (4, 4), r % 4 * 4 + c % 4)
    if family == "mistral3":
        height, width = grid[0] * 28, grid[1] * 28
        return square(pixels[image, :, :height, :width], grid, cell)
    return square(pixels[image], grid, cell)


def check(family: str, kind: str, **options: Any) -> None:
    model, inputs = tiny(family, images=2, **options)
    found = layout(model, inputs)
    assert found is not None
    row = found.rows[0]
    token = IMAGE if kind == "image" else VIDEO
    ordinal = {int(p): n for n, p in enumerate((inputs["input_ids"][0] == token).nonzero()[:, 0])}
    _, before = encode(model, inputs)
    picks = torch.linspace(0, len(row) - 1, 9).long().tolist()
    for k in picks:
        pixels = inputs[PIXELS[kind]].clone()
        view = pixels_of(family, kind, pixels, row, k)
        view += 3 * torch.randn(view.shape, generator=torch.Generator().manual_seed(k))
        _, after = encode(model, {**inputs, PIXELS[kind]: pixels})
        change = (after[kind] - before[kind]).norm(dim=1)
        assert int(change.argmax()) == ordinal[int(row.position[k])], (k, int(row.cell[k]))


@pytest.mark.parametrize("family", FAMILIES)
def test_image(family: str) -> None:
    check(family, "image")


@pytest.mark.parametrize("family", families(video=True))
def test_video(family: str) -> None:
    check(family, "video", video=True)
