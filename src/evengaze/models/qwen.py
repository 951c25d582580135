"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: native resolution, groups of merged patches, three-axis rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evengaze.layout import ImageInfo, VisualLayout
from evengaze.models.base import Adapter, Call
from evengaze.models.deepstack import shorten_deepstack
from evengaze.models.pictures import Panel, Picture, assemble


class Qwen2VL(Adapter):
    """Qwen2-VL and Qwen2.5-VL: pictures are resized to whole patches, never padded."""

    name = "Qwen2-VL / Qwen2.5-VL"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    padding = "none: pictures are resized to whole groups of patches"
    limits = ("renumbered positions: three-axis rotary positions have no order without gaps; originals are kept",)
    mixes = "each visual token is merged from a group of patches"

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """Grids from `image_grid_thw` and `video_grid_thw`; each temporal patch of a video is a frame."""
        config: Any = model.config
        merge = config.vision_config.spatial_merge_size
        images, videos = [], []
        for encoder in (e for e in call.encoded if not e.inner):
            for t, h, w in torch.as_tensor(encoder.arguments[f"{encoder.kind}_grid_thw"]).tolist():
                view = Panel.plain(ImageInfo((h // merge, w // merge), frames=t))
                if encoder.kind == "image":
                    images.append(Picture.still(view))
                else:
                    videos.append(Picture.video(view))
        return assemble(call, {config.image_token_id: images, config.video_token_id: videos})


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: adds features of inner tower layers to the visual tokens after the first decoder layers."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")

    def prepare(self, model: nn.Module, surviving: Callable[[], Tensor | None]) -> Callable[[], None]:
        """The deepstack step gets the features of those visual tokens that are still there."""
        return shorten_deepstack(self.decoder(model), surviving)
