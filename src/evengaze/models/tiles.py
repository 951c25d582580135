"""Families that cut a picture into equal tiles and close it with a view of the whole: InternVL, Idefics3, Aya Vision.

The tiles of a picture are the frames of one grid; x runs through all of them in sequence order. How many tiles a
picture has is not told to the model: it follows from the placeholders in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evengaze.errors import LayoutError
from evengaze.layout import ImageInfo
from evengaze.models.base import Call, EncoderCall
from evengaze.models.border import mask_share
from evengaze.models.filled import Filled
from evengaze.models.llava import patch_size
from evengaze.models.pictures import Panel, Picture, repeats, spans


class Tiled(Filled):
    """What the three have in common."""

    mixes = "pixel shuffle joins groups of patches into one visual token"
    factor: ClassVar[str]
    """What the config calls the number of patches along each side of a tile that become one visual token."""

    def tiles(self, encoder: EncoderCall, grid: tuple[int, int]) -> list[Tensor | None]:
        """The tiles of an encoding in order; for each the (rows, columns) share of padding, or None."""
        return [None] * len(encoder.arguments["pixel_values"])

    def picture_sizes(self, ids: Tensor | None, mask: Tensor) -> list[int]:
        """How many tokens each picture of the samples (n, L) fills.

        A picture is closed by its view of the whole. The token in front of a row's last tile announces that view, so
        every tile behind the same token closes a picture.
        """
        if ids is None:
            raise LayoutError(
                f"{self.name}: the text between its tiles says where a picture ends, but the model was called with "
                "inputs_embeds: give a layout by hand"
            )
        found, whole = [], set()
        for row, there in zip(ids.tolist(), mask, strict=True):
            runs = [(stop - start, row[start - 1] if start else -1) for start, stop in spans(there)]
            whole |= {before for _, before in runs[-1:]}
            found += runs
        sizes = [0]
        for length, before in found:
            sizes[-1] += length
            if before in whole:
                sizes.append(0)
        return [size for size in sizes if size]

    def pictures(self, model: nn.Module, call: Call, encoded: Sequence[EncoderCall], mask: Tensor) -> list[Picture]:
        """Equal tiles; a picture's tiles are the frames of its grid."""
        config: Any = model.config
        factor = float(getattr(config, self.factor))
        step = patch_size(config) * round(factor if factor >= 1 else 1 / factor)
        shares: list[Tensor | None] = []
        grid = (0, 0)
        for encoder in encoded:
            height, width = encoder.arguments["pixel_values"].shape[-2:]
            grid = (height // step, width // step)
            shares += self.tiles(encoder, grid)
        if not shares:
            return []
        cells = grid[0] * grid[1]
        times = repeats(mask, cells * len(shares))
        ids = None if call.input_ids is None else call.input_ids[::times].cpu()
        pictures = []
        for size in self.picture_sizes(ids, mask[::times]):
            tiles = size // cells
            own, shares = shares[:tiles], shares[tiles:]
            padding = None if None in own else torch.stack([s for s in own if s is not None])
            pictures.append(Picture.still(Panel.plain(ImageInfo(grid, frames=tiles), padding)))
        return pictures


class InternVL(Tiled):
    """InternVL (transformers' own format, `-hf` checkpoints). A video is one picture a frame in the prompt."""

    name = "InternVL"
    model_types = ("internvl",)
    padding = "none: tiles are squashed"
    factor = "downsample_ratio"  # its inverse

    def picture_sizes(self, ids: Tensor | None, mask: Tensor) -> list[int]:
        """All tiles of a picture stand side by side, between `<img>` and `</img>`."""
        return [stop - start for row in mask for start, stop in spans(row)]


class Idefics3(Tiled):
    """Idefics3 and SmolVLM: tiles behind `<row_i_col_j>`, the whole behind `<global-img>`."""

    name = "Idefics3 / SmolVLM"
    model_types = ("idefics3", "smolvlm")
    padding = "`pixel_attention_mask`; current processors squash tiles, so that it is full"
    factor = "scale_factor"

    def tiles(self, encoder: EncoderCall, grid: tuple[int, int]) -> list[Tensor | None]:
        """Those that are not all zeros (padding of the batch); `pixel_attention_mask` says what is padding in them."""
        pixels: Tensor = encoder.arguments["pixel_values"].flatten(0, 1)
        real = (pixels != 0).flatten(1).any(1)
        mask = encoder.arguments.get("pixel_attention_mask")
        if mask is None:
            return [None] * int(real.sum())
        return list(mask_share(mask.flatten(0, 1)[real], grid))


class AyaVision(Tiled):
    """Aya Vision: tiles behind `TILE_i`, the whole behind `TILE_GLOBAL`."""

    name = "Aya Vision"
    model_types = ("aya_vision",)
    padding = "none: tiles are squashed"
    factor = "downsample_factor"
