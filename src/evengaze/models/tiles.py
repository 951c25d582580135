"""Families that cut a picture into equal tiles and close it with a view of the whole: InternVL, Idefics3, Aya Vision.

The tiles of a picture are the frames of one grid; x runs through all of them in sequence order. How many tiles a
picture has is not told to the model: it follows from the placeholders in the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from evengaze.layout import ImageInfo, VisualLayout
from evengaze.models.base import Adapter, Call, EncoderCall
from evengaze.models.llava import patch_size
from evengaze.models.pictures import Panel, Picture, assemble, runs


class Tiled(Adapter):
    """What the three have in common."""

    mixes = "pixel shuffle joins groups of patches into one visual token"

    def shrink(self, config: Any) -> int:
        """How many patches along each side of a tile become one visual token."""
        raise NotImplementedError

    def tiles(self, encoder: EncoderCall, grid: tuple[int, int]) -> list[Tensor | None]:
        """The tiles of an encoding in order; for each the (rows, columns) share of padding, or None."""
        return [None] * len(encoder.arguments["pixel_values"])

    def picture_sizes(self, call: Call, token: int, cells: int, tiles: int) -> list[int]:
        """How many tiles each picture of the call has.

        A picture is closed by its view of the whole. The token in front of a row's last tile announces that view, so
        every tile behind the same token closes a picture.
        """
        sizes, size = [], 0
        found = runs(call, token, cells * tiles)
        whole = {before for _, before, last in found if last}
        for length, before, _ in found:
            size += length // cells
            if before in whole:
                sizes.append(size)
                size = 0
        return sizes + [size] * bool(size)

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """Equal tiles; a picture's tiles are the frames of its grid."""
        config: Any = model.config
        step = patch_size(config) * self.shrink(config)
        shares: list[Tensor | None] = []
        grid = (0, 0)
        for encoder in call.encoded:
            height, width = encoder.arguments["pixel_values"].shape[-2:]
            grid = (height // step, width // step)
            shares += self.tiles(encoder, grid)
        cells = grid[0] * grid[1]
        pictures = []
        for size in self.picture_sizes(call, config.image_token_id, cells, len(shares)):
            own, shares = shares[:size], shares[size:]
            padding = None if None in own else torch.stack([s for s in own if s is not None])
            pictures.append(Picture.still(Panel.plain(ImageInfo(grid, frames=size), padding)))
        return assemble(call, {config.image_token_id: pictures})


class InternVL(Tiled):
    """InternVL (transformers' own format, `-hf` checkpoints). A video is one picture a frame in the prompt."""

    name = "InternVL"
    model_types = ("internvl",)
    padding = "none: tiles are squashed"

    def shrink(self, config: Any) -> int:
        """Pixel shuffle by `downsample_ratio`."""
        return round(1 / float(config.downsample_ratio))

    def picture_sizes(self, call: Call, token: int, cells: int, tiles: int) -> list[int]:
        """All tiles of a picture stand side by side, between `<img>` and `</img>`."""
        return [length // cells for length, _, _ in runs(call, token, cells * tiles)]


class Idefics3(Tiled):
    """Idefics3 and SmolVLM: tiles behind `<row_i_col_j>`, the whole behind `<global-img>`."""

    name = "Idefics3 / SmolVLM"
    model_types = ("idefics3", "smolvlm")
    padding = "`pixel_attention_mask`; current processors squash tiles, so that it is full"

    def shrink(self, config: Any) -> int:
        """Pixel shuffle by `scale_factor`."""
        return int(config.scale_factor)

    def tiles(self, encoder: EncoderCall, grid: tuple[int, int]) -> list[Tensor | None]:
        """Those that are not all zeros (padding of the batch); `pixel_attention_mask` says what is padding in them."""
        pixels: Tensor = encoder.arguments["pixel_values"].flatten(0, 1)
        real = (pixels != 0).flatten(1).any(1)
        mask = encoder.arguments.get("pixel_attention_mask")
        if mask is None:
            return [None] * int(real.sum())
        padded = 1 - mask.flatten(0, 1)[real].double()
        return list(adaptive_avg_pool2d(padded, grid).cpu())


class AyaVision(Tiled):
    """Aya Vision: tiles behind `TILE_i`, the whole behind `TILE_GLOBAL`."""

    name = "Aya Vision"
    model_types = ("aya_vision",)
    padding = "none: tiles are squashed"

    def shrink(self, config: Any) -> int:
        """Pixel shuffle by `downsample_factor`."""
        return int(config.downsample_factor)
