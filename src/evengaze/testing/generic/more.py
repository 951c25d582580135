"""Further families whose decoders attend in every layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from evengaze.testing.generic.parts import (
    CLIPS,
    CLOSING,
    FRAME_MARKS,
    GLM_VISION,
    IDS,
    INTERLEAVED,
    MARKS,
    OPENING,
    PLAIN_VISION,
    QWEN_VISION,
    SEGMENTS,
    STILLS,
    WHOLE,
    WINDOWED_VISION,
    config,
    flat,
    framed,
    squares,
    thinned,
)
from evengaze.testing.prompts import END, IMAGE, START
from evengaze.testing.recipes import (
    GEMMA_LAYERS,
    MROPE,
    Family,
    Pictures,
    square_images,
    tile_images,
    timestamped_videos,
    vision_of,
    vlm,
)

GLM_MARKS: dict[str, Any] = {
    **IDS,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": OPENING,
    "video_end_token_id": CLOSING,
}


def rows_with_newlines(n: int, generator: torch.Generator) -> Pictures:
    """HunYuan-VL: a mark, rows of 2 x 2 merged patches with a newline behind each, a mark; all on image tokens."""
    _, values = flat(STILLS, vector=True)(n, generator)
    grids = values["image_grid_thw"].tolist() if n else []
    return [[START, *[IMAGE] * ((h // 2) * (w // 2 + 1) + 2), END] for _, h, w in grids], values


MORE: dict[str, Family] = {
    "glm46v": Family(
        "Glm46VForConditionalGeneration",
        config(
            "Glm46VConfig",
            {"model_type": "glm4v_vision", **GLM_VISION},
            {"model_type": "glm4v_text"},
            rope=WHOLE,
            **GLM_MARKS,
        ),
        STILLS,
        framed(CLIPS, opening=OPENING, closing=CLOSING),
        FRAME_MARKS,
    ),
    "glm_ocr": Family(
        "GlmOcrForConditionalGeneration",
        config("GlmOcrConfig", GLM_VISION, rope=WHOLE, **GLM_MARKS),
        STILLS,
        framed(CLIPS, opening=OPENING, closing=CLOSING),
        FRAME_MARKS,
    ),
    "cohere_compass": Family(
        "CohereCompassForConditionalGeneration",
        config(
            "CohereCompassConfig",
            {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
            {"layer_types": GEMMA_LAYERS, "sliding_window": 24, "logit_scale": 1.0},
            rope={kind: {**MROPE, **INTERLEAVED} for kind in set(GEMMA_LAYERS)},
            **IDS,
        ),
        STILLS,
        timestamped_videos,
        MARKS,
    ),
    "cosmos3_omni": Family(
        "Cosmos3OmniForConditionalGeneration",
        config(
            "Cosmos3OmniConfig",
            {"model_type": "qwen3_vl", **QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
            {"model_type": "qwen3_vl_text"},
            rope=INTERLEAVED,
            **IDS,
        ),
        STILLS,
        timestamped_videos,
        MARKS,
    ),
    "cosmos3_edge": Family(
        "Cosmos3EdgeForConditionalGeneration",
        config(
            "Cosmos3EdgeConfig", {**PLAIN_VISION, "num_patches": 64}, rope=INTERLEAVED, projector_hidden_size=64, **IDS
        ),
        flat(STILLS, vector=True),
        flat(timestamped_videos, vector=True),
        MARKS,
    ),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeForConditionalGeneration",
        config(
            "Ernie4_5_VLMoeConfig",
            {k: v for k, v in QWEN_VISION.items() if k not in ("out_hidden_size", "num_position_embeddings")},
            {"moe_intermediate_size": [32, 32], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1},
            rope={"mrope_section": [3, 3, 2]},
            **IDS,
        ),
        flat(STILLS, vector=True),
        thinned(flat(CLIPS, vector=True), 2),
        MARKS,
    ),
    "exaone4_5": Family(
        "Exaone4_5_ForConditionalGeneration",
        config(
            "Exaone4_5_Config",
            {**WINDOWED_VISION, "num_key_value_heads": 1},
            {"model_type": "exaone4", "layer_types": GEMMA_LAYERS, "sliding_window": 24},
            **IDS,
        ),
        STILLS,
        CLIPS,
    ),
    "hunyuan_vl": Family(
        "HunYuanVLForConditionalGeneration",
        config(
            "HunYuanVLConfig",
            {
                **PLAIN_VISION,
                "out_hidden_size": 64,
                "text_hidden_size": 64,
                "max_image_size": 112,
                "img_max_token_num": 64,
            },
            rope={"mrope_section": [2, 2, 2, 2]},
            image_token_id=IMAGE,
            im_start_id=START,
            im_end_id=END,
            im_newline_id=282,
        ),
        rows_with_newlines,
        types=MARKS,
    ),
    "video_llama_3": Family(
        "VideoLlama3ForConditionalGeneration",
        config("VideoLlama3Config", PLAIN_VISION, {"model_type": "qwen2"}, **IDS),
        flat(STILLS, vector=True, image_merge_sizes=2),
        flat(CLIPS, vector=True, video_merge_sizes=2),
    ),
    "hyperclovax_vision_v2": Family(
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        config(
            "HyperCLOVAXVisionV2Config",
            {"model_type": "qwen2_5_vl_vision", **WINDOWED_VISION},
            {"model_type": "hyperclovax"},
            **IDS,
        ),
        STILLS,
        CLIPS,
    ),
    "qianfan_ocr": Family(
        "QianfanOCRForConditionalGeneration",
        vlm(
            "QianfanOCRConfig",
            partial(
                vision_of, "QianfanOCRVisionConfig", image_size=[112, 112], patch_size=[14, 14], drop_path_rate=0.0
            ),
            "Qwen3Config",
            image_token_id=IMAGE,
            image_seq_length=16,
        ),
        tile_images(announce=False),
    ),
    "got_ocr2": Family(
        "GotOcr2ForConditionalGeneration",
        config("GotOcr2Config", SEGMENTS, {"model_type": "qwen2"}, image_token_index=IMAGE),
        squares(16, 256),
        eager_tower=True,
    ),
    "janus": Family(
        "JanusForConditionalGeneration",
        config(
            "JanusConfig",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
                "mlp_ratio": 2.0,
                "projection_dim": 64,
                "num_image_tokens": 16,
            },
            {"model_type": "llama"},
            vq_config={
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 64,
                "num_patches": 4,
                "image_token_embed_dim": 64,
            },
            image_token_id=IMAGE,
        ),
        squares(16, 56),
    ),
    "idefics2": Family(
        "Idefics2ForConditionalGeneration",
        config(
            "Idefics2Config",
            {**PLAIN_VISION, "image_size": 56},
            {"model_type": "mistral", "sliding_window": None},
            perceiver_config={
                "hidden_size": 64,
                "resampler_n_latents": 8,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 1,
            },
            image_token_id=IMAGE,
        ),
        square_images(8),
        by_row=True,
    ),
    "aria": Family(
        "AriaForConditionalGeneration",
        config(
            "AriaConfig",
            {"model_type": "idefics3_vision", **PLAIN_VISION, "image_size": 56},
            {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            projector_patch_to_query_dict={"16": 8},
            image_token_index=IMAGE,
        ),
        squares(8, 56),
    ),
    "muse_glimmer": Family(
        "MuseGlimmerForConditionalGeneration",
        config(
            "MuseGlimmerConfig",
            {**PLAIN_VISION, "pos_emb_height": 8, "pos_emb_width": 8},
            {"layer_types": GEMMA_LAYERS, "sliding_window": 24},
            out_hidden_size=128,
            projector_hidden_size=64,
            **IDS,
        ),
        STILLS,
        CLIPS,
    ),
    "step3p7": Family(
        "Step3p7ForConditionalGeneration",
        config(
            "Step3p7Config",
            {**PLAIN_VISION, "image_size": 224, "mlp_ratio": 2.0},
            {
                "num_local_experts": 4,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "share_expert_dim": 32,
                "layer_types": GEMMA_LAYERS,
                "sliding_window": 24,
                "num_sliding_attention_heads": 4,
                "mlp_layer_types": ["dense"] + ["sparse"] * 5,
            },
            image_token_id=IMAGE,
        ),
        squares(16, 224),
    ),
}
