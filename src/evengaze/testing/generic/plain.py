"""Families whose decoders attend in every layer."""

from __future__ import annotations

from functools import partial
from typing import Any

from evengaze.testing.generic.parts import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    AUDIO_TOWER,
    CLIPS,
    CLOSING,
    EXPERTS,
    FRAME_MARKS,
    FRAMES,
    GEMMA_IDS,
    GLM_VISION,
    IDS,
    INTERLEAVED,
    LATENT,
    MARKS,
    OPENING,
    PLAIN_VISION,
    QWEN_VISION,
    ROUTED,
    STILLS,
    UNSET,
    WHOLE,
    WINDOWED_VISION,
    config,
    films,
    flat,
    framed,
    packed,
    sized,
    squares,
    thinned,
    timed,
)
from evengaze.testing.prompts import END, IMAGE, START, VIDEO
from evengaze.testing.recipes import (
    CLIP,
    GEMMA_LAYERS,
    SIGLIP,
    Family,
    square_images,
    tile_images,
    vision_of,
    vlm,
)


def gemma4(**text: Any) -> Family:
    """Gemma 4 with one of its decoders."""
    vision = {
        **PLAIN_VISION,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 16,
        "position_embedding_size": 64,
        "pooling_kernel_size": 3,
    }
    stills = packed(((6, 9), (9, 6), (6, 6)), 3, 16, "image_position_ids")
    return Family(
        "Gemma4ForConditionalGeneration",
        config("Gemma4Config", vision, text, audio_config=None, **GEMMA_IDS, eoa_token_index=AUDIO_END),
        stills,
        films(stills, 2, FRAMES, "num_frames_per_video"),
        MARKS,
    )


PLAIN: dict[str, Family] = {
    "glm4v": Family(
        "Glm4vForConditionalGeneration",
        config("Glm4vConfig", GLM_VISION, rope=WHOLE, image_start_token_id=START, image_end_token_id=END, **IDS),
        STILLS,
        framed(CLIPS, opening=OPENING, closing=CLOSING),
        FRAME_MARKS,
    ),
    "glm4v_moe": Family(
        "Glm4vMoeForConditionalGeneration",
        config("Glm4vMoeConfig", GLM_VISION, ROUTED, rope=WHOLE, **IDS),
        STILLS,
        framed(CLIPS, opening=OPENING, closing=CLOSING),
        FRAME_MARKS,
    ),
    "llama4": Family(
        "Llama4ForConditionalGeneration",
        config(
            "Llama4Config",
            {
                **PLAIN_VISION,
                "intermediate_size": 128,
                "image_size": 112,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
            },
            {
                "intermediate_size_mlp": 64,
                "num_local_experts": 2,
                "attention_chunk_size": 16,
                "no_rope_layers": [1, 0] * 3,
                "moe_layers": [1, 3, 5],
                "layer_types": ["chunked_attention", "full_attention"] * 3,
            },
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        ),
        squares(16, 112),
        broken=("5.24.0", "AttributeError: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'"),
    ),
    "kimi_k25": Family(
        "Kimi_K25ForConditionalGeneration",
        config(
            "Kimi_K25Config",
            {
                **PLAIN_VISION,
                "merge_kernel_size": (2, 2),
                "position_embedding_height": 8,
                "position_embedding_width": 8,
                "init_pos_emb_height": 8,
                "init_pos_emb_width": 8,
            },
            {**ROUTED, **LATENT, "model_type": "deepseek_v3", "head_dim": UNSET},
            projection_hidden_size=32,
            **IDS,
        ),
        flat(STILLS),
        thinned(flat(CLIPS)),
    ),
    "qwen2_5_omni_thinker": Family(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        config(
            "Qwen2_5OmniThinkerConfig",
            WINDOWED_VISION,
            rope={},
            audio_config=AUDIO_TOWER,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_token_index=AUDIO,
            vision_start_token_id=START,
            vision_end_token_id=END,
            audio_start_token_id=AUDIO_START,
            audio_end_token_id=AUDIO_END,
        ),
        STILLS,
        timed(CLIPS),
    ),
    "qwen3_omni_moe_thinker": Family(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        config(
            "Qwen3OmniMoeThinkerConfig",
            {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
            EXPERTS,
            rope=INTERLEAVED,
            audio_config={**AUDIO_TOWER, "downsample_hidden_size": 16},
            audio_token_id=AUDIO,
            vision_start_token_id=START,
            **IDS,
        ),
        STILLS,
        timed(CLIPS),
    ),
    "gemma4": gemma4(
        layer_types=GEMMA_LAYERS,
        sliding_window=12,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=300,
        num_kv_shared_layers=0,
        use_bidirectional_attention=None,
    ),
    "gemma4_moe": gemma4(
        layer_types=GEMMA_LAYERS,
        sliding_window=12,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
        use_bidirectional_attention="vision",
    ),
    "paddleocr_vl": Family(
        "PaddleOCRVLForConditionalGeneration",
        config(
            "PaddleOCRVLConfig",
            {**PLAIN_VISION, "image_size": 112},
            rope={},
            vision_start_token_id=START,
            vision_end_token_id=END,
            **IDS,
        ),
        flat(STILLS),
        types=MARKS,
    ),
    "cohere2_vision": Family(
        "Cohere2VisionForConditionalGeneration",
        vlm(
            "Cohere2VisionConfig",
            partial(vision_of, "SiglipVisionConfig", image_size=112),
            "Cohere2Config",
            image_token_id=IMAGE,
            downsample_factor=2,
            alignment_intermediate_size=128,
            text_sliding_window=24,
            text_logit_scale=1.0,
            text_layer_types=GEMMA_LAYERS,
        ),
        tile_images(announce=False),
    ),
    "ovis2": Family(
        "Ovis2ForConditionalGeneration",
        vlm(
            "Ovis2Config",
            partial(vision_of, "Ovis2VisionConfig", vocab_size=64, hidden_stride=1, num_visual_indicator_tokens=5),
            "Qwen2Config",
            image_token_id=IMAGE,
            visual_indicator_token_ids=[280, 281, 282, 283, 0],
            hidden_size=64,
            vocab_size=300,
        ),
        square_images(16),
    ),
    "vipllava": Family(
        "VipLlavaForConditionalGeneration",
        vlm("VipLlavaConfig", CLIP, "LlamaConfig", image_token_index=IMAGE, vision_feature_layers=[-1, -2, 1]),
        square_images(16),
    ),
    "deepseek_vl": Family(
        "DeepseekVLForConditionalGeneration",
        vlm("DeepseekVLConfig", SIGLIP, "LlamaConfig", image_token_id=IMAGE),
        square_images(16),
    ),
    "lighton_ocr": Family(
        "LightOnOcrForConditionalGeneration",
        vlm(
            "LightOnOcrConfig",
            partial(vision_of, "PixtralVisionConfig", image_size=112),
            "Qwen3Config",
            image_token_id=IMAGE,
            spatial_merge_size=2,
        ),
        sized(((112, 112), (84, 112), (112, 56)), 28),
    ),
}
