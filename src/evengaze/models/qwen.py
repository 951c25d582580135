"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: native resolution, groups of merged patches, three-axis rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evengaze.errors import UnsupportedModelError
from evengaze.layout import ImageInfo, VisualLayout
from evengaze.models.base import Adapter, Call, EncoderCall, VisionTower
from evengaze.models.pictures import Picture, View, assemble


class Qwen2VL(Adapter):
    """Qwen2-VL and Qwen2.5-VL: pictures are resized to whole patches, never padded."""

    name = "Qwen2-VL / Qwen2.5-VL"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    padding = "none: pictures are resized to whole groups of patches"
    limits = ("renumbered positions: three-axis rotary positions have no order without gaps; originals are kept",)

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """Grids from `image_grid_thw` and `video_grid_thw`; each temporal patch of a video is a frame."""
        config: Any = model.config
        merge = config.vision_config.spatial_merge_size
        images, videos = [], []
        for encoder in _outermost(call.encoded):
            for t, h, w in torch.as_tensor(encoder.arguments[f"{encoder.kind}_grid_thw"]).tolist():
                view = View.plain(ImageInfo((h // merge, w // merge), frames=t))
                if encoder.kind == "image":
                    images.append(Picture.still(view))
                else:
                    videos.append(Picture.video(view))
        return assemble(call, {config.image_token_id: images, config.video_token_id: videos})

    def vision_tower(self, model: nn.Module, kind: Literal["image", "video"] = "image") -> VisionTower:
        """Refused: the merger joins groups of patches."""
        raise UnsupportedModelError(
            f"{self.name}: each visual token is merged from a group of patches, so single patches cannot be dropped in "
            "the vision tower. Prune in the decoder instead."
        )


def _outermost(encoded: Sequence[EncoderCall]) -> list[EncoderCall]:
    """Without the calls that others made: Qwen3-VL encodes a video through its function for images."""
    videos = {id(e.arguments["pixel_values_videos"]) for e in encoded if e.kind == "video"}
    return [e for e in encoded if e.kind == "video" or id(e.arguments["pixel_values"]) not in videos]


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: adds features of inner tower layers to the visual tokens after the first decoder layers."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")

    def prepare(self, model: nn.Module, surviving: Callable[[], Tensor | None]) -> Callable[[], None]:
        """Give the decoder's deepstack step the features of those visual tokens that are still there.

        The decoder adds them by a mask over the whole prompt, between two layers, where no hook sees it; the method is
        shadowed on this one instance.
        """
        decoder: Any = self.decoder(model)
        original = decoder._deepstack_process

        def shortened(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
            kept = surviving()
            if kept is not None and hidden_states.shape[1] != visual_pos_masks.shape[1]:
                kept = kept.to(visual_pos_masks.device)
                rank = (visual_pos_masks.flatten().cumsum(0) - 1).view_as(visual_pos_masks).gather(1, kept)
                visual_pos_masks = visual_pos_masks.gather(1, kept)
                visual_embeds = visual_embeds[rank[visual_pos_masks].to(visual_embeds.device)]
            added: Tensor = original(hidden_states, visual_pos_masks, visual_embeds)
            return added

        decoder._deepstack_process = shortened
        return lambda: decoder.__dict__.pop("_deepstack_process", None) and None
