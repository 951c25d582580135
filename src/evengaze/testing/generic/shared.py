"""Families whose last layers attend to the keys of earlier ones, and towers of timm that stand-ins replace."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evengaze.testing.generic.parts import (
    IDS,
    Draw,
    config,
    squares,
)
from evengaze.testing.generic.plain import gemma4
from evengaze.testing.prompts import END, IMAGE, START, VIDEO
from evengaze.testing.recipes import Family, Pictures, noise, token_types, vision_of, vlm

SHARING: dict[str, Any] = {
    "num_hidden_layers": 12,
    "layer_types": ["sliding_attention", "full_attention"] * 6,
    "num_kv_shared_layers": 5,  # layers 7 to 11 attend to the keys of 5 and 6
    "sliding_window": 12,
    "hidden_size_per_layer_input": 16,
}


class Tower(nn.Module):
    """Convolution for a tower: (n, 3, H, W) to (n, width, rows, columns), or to a sequence."""

    def __init__(self, config: Any, *, width: int, patch: int, flat: bool = False) -> None:
        super().__init__()
        self.config, self.flat = config, flat
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, pixel_values: Tensor, *args: Any, **options: Any) -> Any:
        """As transformers' wrapper of timm models."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        states = self.proj(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=states.flatten(2).transpose(1, 2) if self.flat else states)


def _stacked(frames: int, name: str, token: int) -> Draw:
    """Perception LM: tiles of a picture, or frames, along an axis of their own."""

    def make(n: int, generator: torch.Generator) -> Pictures:
        return [[START, *[token] * (16 * frames), END]] * n, {name: noise(generator, n, frames, 3, 56, 56)} if n else {}

    return make


SHARED: dict[str, Family] = {
    "gemma4_e": gemma4(**SHARING, vocab_size_per_layer_input=300),
    "gemma3n": Family(
        "Gemma3nForConditionalGeneration",
        config(
            "Gemma3nConfig",
            {"hidden_size": 32, "vocab_size": 12, "vocab_offset": 280},
            {
                **SHARING,
                "vocab_size_per_layer_input": 280,
                "laurel_rank": 8,
                "activation_sparsity_pattern": None,
                "hidden_activation": "gelu_pytorch_tanh",
            },
            audio_config={
                "hidden_size": 32,
                "vocab_size": 8,
                "vocab_offset": 292,
                "conf_num_hidden_layers": 1,
                "conf_num_attention_heads": 2,
                "sscp_conv_channel_size": [8, 8],
            },
            image_token_id=IMAGE,
            audio_token_id=295,
            boi_token_id=START,
            eoi_token_id=END,
            vision_soft_tokens_per_image=9,
        ),
        squares(9, 84),
        types=("token_type_ids", token_types),
        tower=partial(Tower, width=32, patch=28),
    ),
    "fast_vlm": Family(
        "FastVlmForConditionalGeneration",
        vlm(
            "FastVlmConfig",
            partial(vision_of, "CLIPVisionConfig", projection_dim=32),
            "Qwen2Config",
            image_token_id=IMAGE,
        ),
        squares(16, 56),
        tower=partial(Tower, width=32, patch=14),
    ),
    "perception_lm": Family(
        "PerceptionLMForConditionalGeneration",
        config(
            "PerceptionLMConfig",
            {
                "model_type": "timm_wrapper",
                "model_args": {"embed_dim": 32},
                "architecture": "vit_pe_core_large_patch14_336",
            },
            {"model_type": "llama"},
            vision_use_cls_token=False,
            **IDS,
        ),
        _stacked(1, "pixel_values", IMAGE),
        _stacked(2, "pixel_values_videos", VIDEO),
        tower=partial(Tower, width=32, patch=14, flat=True),
    ),
}
