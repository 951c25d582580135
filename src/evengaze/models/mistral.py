"""Mistral 3 with a Pixtral tower: native resolution; row breaks are text tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from evengaze.layout import ImageInfo, VisualLayout
from evengaze.models.base import Adapter, Call
from evengaze.models.llava import patch_size
from evengaze.models.pictures import Panel, Picture, assemble


class Mistral3(Adapter):
    """Mistral Small 3.1 and later. `[IMG_BREAK]` and `[IMG_END]` have ids of their own and stay."""

    name = "Mistral 3"
    model_types = ("mistral3",)
    padding = "none: what a batch is padded to is cut off again (`image_sizes`)"
    mixes = "the patch merger joins groups of patches into one visual token"

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """Grids from `image_sizes`: what the batch was padded to never becomes a token."""
        config: Any = model.config
        step = patch_size(config) * config.spatial_merge_size
        pictures = []
        for encoder in call.encoded:
            for height, width in torch.as_tensor(encoder.arguments["image_sizes"]).tolist():
                pictures.append(Picture.still(Panel.plain(ImageInfo((height // step, width // step)))))
        return assemble(call, {config.image_token_id: pictures})
