"""Families some of whose decoder layers carry a state through the sequence, or mix no tokens, instead of attending."""

from __future__ import annotations

from functools import partial

import torch

from evengaze.testing.generic.parts import (
    EXPERTS,
    IDS,
    INTERLEAVED,
    LINEAR,
    MARKS,
    QWEN_VISION,
    STILLS,
    UNSET,
    WHOLE,
    config,
    flat,
    packed,
)
from evengaze.testing.generic.parts import (
    HYBRID as HYBRID_LAYERS,
)
from evengaze.testing.prompts import END, IMAGE, START
from evengaze.testing.recipes import Family, Pictures, noise, stand_ins, text_of, timestamped_videos, vision_of, vlm

MAMBA = {"use_mamba_kernels": False, "chunk_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8}


def _patches(n: int, generator: torch.Generator) -> Pictures:
    """Nemotron Omni: flattened patches, and the grid of each picture."""
    tokens, values = flat(STILLS, vector=True)(n, generator)
    grids = {"image_grid_hw": values.pop("image_grid_thw")[:, 1:]} if n else {}
    return tokens, {**values, **grids}


def _tubelets(n: int, generator: torch.Generator) -> Pictures:
    """Nemotron Omni: two frames stacked in a tubelet, on the placeholders of images."""
    return [[START, *[IMAGE] * 8, END]] * n, {"pixel_values_videos": noise(generator, n, 2, 6, 56, 56)} if n else {}


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
    "nemotron_h_omni": Family(
        "NemotronH_Omni_Reasoning_V3",
        config(
            "NemotronH_Omni_Reasoning_V3_Config",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 14,
                "image_size": 56,
                "max_img_size": 224,
                "video_temporal_patch_size": 2,
            },
            {
                **MAMBA,
                "num_hidden_layers": UNSET,
                "layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"] * 2 + ["mlp"],
                "n_groups": 2,
                "n_routed_experts": 4,
                "moe_intermediate_size": 32,
                "moe_shared_expert_intermediate_size": 32,
            },
            vision_hidden_size=32,
            projector_hidden_size=64,
            audio_config=None,
            **IDS,
        ),
        _patches,
        _tubelets,
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        partial(
            text_of,
            "GraniteMoeHybridConfig",
            layer_types=HYBRID_LAYERS,
            shared_intermediate_size=64,
            num_local_experts=4,
            mamba_n_heads=8,
            mamba_d_state=8,
            mamba_chunk_size=8,
        ),
        stand_ins,
        bare=True,
    ),
}
