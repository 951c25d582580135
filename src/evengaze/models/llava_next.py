"""LLaVA-NeXT (also Video), LLaVA-OneVision and Granite 4 Vision: a thumbnail and a detail view stitched from tiles.

The detail view is padded (black) to the canvas that the tiles form; the model then drops the rows or columns of
features that are padding and closes every row with a learned newline. The shares of padding go through the same
functions as the features, so what is left of them at the edge is exact. Newlines are no candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from evengaze.layout import ImageInfo
from evengaze.models.base import EncoderCall
from evengaze.models.deepstack import shorten_arguments
from evengaze.models.filled import Filled
from evengaze.models.llava import patch_size
from evengaze.models.pictures import NO_CANDIDATE, Panel, Picture


class LlavaNext(Filled):
    """LLaVA-NeXT (1.6)."""

    name = "LLaVA-NeXT"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    padding = "the black canvas of the detail view; what unpadding leaves at the edge, from `image_sizes`"
    mixes = "the features of the tiles are stitched, unpadded or pooled on their way to the decoder"

    def shown(self, config: Any, encoder: EncoderCall) -> list[Picture]:
        """Two views an image (thumbnail, detail); x runs through both in sequence order."""
        if encoder.kind == "image":
            return self._images(config, encoder)
        videos, frames = encoder.arguments["pixel_values_videos"].shape[:2]
        return [self._video(config, frames)] * videos

    def _images(self, config: Any, encoder: EncoderCall) -> list[Picture]:
        sizes = [(int(h), int(w)) for h, w in torch.as_tensor(encoder.arguments["image_sizes"]).tolist()]
        return [tiled(config, size) for size in sizes]

    def _video(self, config: Any, frames: int) -> Picture:
        """LLaVA-NeXT-Video: each frame's grid is pooled by a stride."""
        side = _side(config) // config.spatial_pool_stride
        return Picture.video(Panel.plain(ImageInfo((side, side), frames)))


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: images as in LLaVA-NeXT, frames pooled."""

    name = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: large detail views are shrunk; a video is pooled frames and one newline."""

    name = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    padding = "as LLaVA-NeXT, blended where a large detail view is shrunk"

    def _images(self, config: Any, encoder: EncoderCall) -> list[Picture]:
        sizes = [(int(h), int(w)) for h, w in torch.as_tensor(encoder.arguments["image_sizes"]).tolist()]
        aspect = encoder.arguments.get("vision_aspect_ratio") or config.vision_aspect_ratio
        most = int(str(aspect).removeprefix("anyres_max_"))
        together: Sequence[int] | None = encoder.arguments.get("batch_num_images")
        alone = [True] * len(sizes)
        if together is not None:
            alone = [int(n) == 1 for n in together for _ in range(int(n))]
        return [
            tiled(config, s, most) if detail else _thumbnail(config, s) for s, detail in zip(sizes, alone, strict=True)
        ]

    def _video(self, config: Any, frames: int) -> Picture:
        side = math.ceil(_side(config) / 2)
        view = Panel.plain(ImageInfo((side, side), frames))
        return Picture.video(Panel(view.info, torch.cat([view.cell, torch.tensor([NO_CANDIDATE])])))


class Granite4Vision(LlavaNext):
    """Granite 4 Vision: views as of LLaVA-NeXT, tiles downsampled; features enter in front of several layers."""

    name = "Granite 4 Vision"
    model_types = ("granite4_vision",)
    mixes = "windows of patches are joined into one visual token, and tiles are stitched and unpadded"

    def prepare(self, model: nn.Module, surviving: Callable[[], Tensor | None]) -> Callable[[], None]:
        """Deepstack features are shortened where the decoder adds them."""
        return shorten_arguments(self.decoder(model), surviving)


def tiled(config: Any, size: tuple[int, int], most_tiles: int | None = None) -> Picture:
    """A picture of (height, width) as thumbnail and detail view; the latter shrunk if it exceeds `most_tiles`."""
    side = _side(config)
    canvas = select_best_resolution(size, config.image_grid_pinpoints)
    tiles = [length // config.vision_config.image_size for length in canvas]
    share = unpad_image(_canvas_padding(size, canvas, (side * tiles[0], side * tiles[1])), size)
    rows, columns = share.shape[1:]
    if most_tiles is not None:
        # As transformers' LlavaOnevisionModel.pack_image_features does, its threshold included.
        ratio = math.sqrt(rows * columns / (most_tiles * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
            share = interpolate(share[None], [rows, columns], mode="bilinear")[0]
    cell = torch.arange(rows * columns).reshape(rows, columns)
    detail = torch.cat([cell, torch.full((rows, 1), NO_CANDIDATE)], 1).flatten()
    whole = (size[1], size[0])
    base = Panel.plain(ImageInfo((side, side), size=whole))
    if rows * columns == 0:  # of a very long picture nothing but newlines may be left
        return Picture.still(Panel(base.info, torch.cat([base.cell, detail])))
    return Picture.still(base, Panel(ImageInfo((rows, columns), size=whole, part=1), detail, share))


def _thumbnail(config: Any, size: tuple[int, int]) -> Picture:
    """A picture among several of a prompt in LLaVA-OneVision: one grid and a newline."""
    view = Panel.plain(ImageInfo((_side(config), _side(config)), size=(size[1], size[0])))
    return Picture.still(Panel(view.info, torch.cat([view.cell, torch.tensor([NO_CANDIDATE])])))


def _side(config: Any) -> int:
    """Visual tokens along one side of a tile."""
    rate = Fraction(getattr(config, "downsample_rate", 1))
    return int(int(config.vision_config.image_size) // patch_size(config) * rate)


def _canvas_padding(size: tuple[int, int], canvas: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(1, rows, columns) share of padding of each patch of a canvas on which a picture (height, width) is centred."""
    scale = min(c / s for c, s in zip(canvas, size, strict=True))
    filled = [_filled(min(math.ceil(s * scale), c), c, cells) for s, c, cells in zip(size, canvas, grid, strict=True)]
    return (1 - filled[0][:, None] * filled[1][None, :])[None]


def _filled(length: int, total: int, cells: int) -> Tensor:
    """Part of each of `cells` equal intervals of `total` pixels that `length` centred pixels fill."""
    start = (total - length) // 2
    edge = torch.arange(cells + 1, dtype=torch.float64) * (total / cells)
    return (edge[1:].clamp(max=start + length) - edge[:-1].clamp(min=start)).clamp(min=0) * (cells / total)
