"""Gemma 3 and PaliGemma: pictures squashed to a square, a fixed number of tokens each."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from torch import nn

from evengaze.layout import ImageInfo
from evengaze.models.base import Adapter, EncoderCall, VisionTower
from evengaze.models.filled import Filled
from evengaze.models.llava import feature_tower, patch_size
from evengaze.models.pictures import Panel, Picture


class PaliGemma(Filled):
    """PaliGemma: one token a patch."""

    name = "PaliGemma"
    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    padding = "none: pictures are squashed"
    limits: ClassVar[tuple[str, ...]] = (
        "flash attention: it cannot express bidirectional attention among a prompt's images, pruned or not",
    )
    reads_ahead: ClassVar[bool] = True
    flash: ClassVar[bool] = False

    def grid(self, config: Any, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of visual tokens of a picture."""
        return (height // patch_size(config), width // patch_size(config))

    def shown(self, config: Any, encoder: EncoderCall) -> list[Picture]:
        """One grid an image, no padding."""
        pixels = encoder.arguments["pixel_values"]
        info = ImageInfo(self.grid(config, *pixels.shape[-2:]))
        return [Picture.still(Panel.plain(info))] * len(pixels.flatten(0, -4))

    def vision_tower(self, model: nn.Module, kind: Literal["image", "video"] = "image") -> VisionTower:
        """The SigLIP tower."""
        return feature_tower(getattr(model.base_model, "vision_tower"), model.config, 0)  # noqa: B009


class Gemma3(PaliGemma):
    """Gemma 3: patches are pooled to `mm_tokens_per_image`; most decoder layers see a sliding window only."""

    name = "Gemma 3"
    model_types = ("gemma3",)
    limits = (
        *PaliGemma.limits,
        "ranking at sliding-window layers: tokens outside the window get no attention there",
    )
    mixes = "the projector averages groups of patches into one visual token"
    reads_ahead = False
    vision_tower = Adapter.vision_tower

    def grid(self, config: Any, height: int, width: int) -> tuple[int, int]:
        """The square grid that the projector pools to."""
        side = math.isqrt(config.mm_tokens_per_image)
        return (side, side)
