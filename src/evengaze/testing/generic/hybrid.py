"""Families some of whose decoder layers carry a state through the sequence instead of attending."""

from __future__ import annotations

from functools import partial

from evengaze.testing.generic.parts import (
    EXPERTS,
    IDS,
    INTERLEAVED,
    LINEAR,
    MARKS,
    QWEN_VISION,
    STILLS,
    WHOLE,
    config,
    packed,
)
from evengaze.testing.prompts import IMAGE
from evengaze.testing.recipes import Family, timestamped_videos, vision_of, vlm

HYBRID: dict[str, Family] = {
    "qwen3_5": Family(
        "Qwen3_5ForConditionalGeneration",
        config("Qwen3_5Config", QWEN_VISION, LINEAR, rope={**INTERLEAVED, **WHOLE}, **IDS),
        STILLS,
        timestamped_videos,
        MARKS,
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForConditionalGeneration",
        config(
            "Qwen3_5MoeConfig",
            QWEN_VISION,
            {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
            rope={**INTERLEAVED, **WHOLE},
            **IDS,
        ),
        STILLS,
        timestamped_videos,
        MARKS,
    ),
    "lfm2_vl": Family(
        "Lfm2VlForConditionalGeneration",
        vlm(
            "Lfm2VlConfig",
            partial(vision_of, "Siglip2VisionConfig", num_patches=64),
            "Lfm2Config",
            image_token_id=IMAGE,
            downsample_factor=2,
            projector_hidden_size=64,
            text_layer_types=["conv", "full_attention"] * 3,
            text_block_auto_adjust_ff_dim=False,
        ),
        packed(((4, 6), (6, 4), (4, 4)), 2, 14, "spatial_shapes", "pixel_attention_mask"),
    ),
}
