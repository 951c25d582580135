"""Configs of well-known models by name, for machines that cannot reach the hub."""

from __future__ import annotations

from typing import Any

_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 32768,
}
_LLAMA_13B = {
    **_LLAMA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_LLAVA = {"model_type": "llava", "vision_config": _CLIP, "image_token_id": 32000, "image_seq_length": 576}
_QWEN_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_QWEN = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {**_LLAVA, "text_config": _LLAMA_7B},
    "llava-1.5-13b": {**_LLAVA, "text_config": _LLAMA_13B},
    "llava-1.6-vicuna-7b": {
        "model_type": "llava_next",
        "vision_config": _CLIP,
        "text_config": _LLAMA_7B,
        "image_token_id": 32000,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        **_QWEN,
        "vision_config": {**_QWEN_TOWER, "out_hidden_size": 3584},
        "text_config": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    },
    "smolvlm-256m": {
        "model_type": "smolvlm",
        "image_token_id": 49190,
        "scale_factor": 4,
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49280,
            "max_position_embeddings": 8192,
        },
    },
}
"""Sizes only: enough to build a model with random weights, or to plan."""


def shape_of(name: str) -> Any | None:
    """The transformers config of one of `SHAPES`; None for other names."""
    from transformers import AutoConfig

    values = SHAPES.get(name.lower())
    return None if values is None else AutoConfig.for_model(**values)
