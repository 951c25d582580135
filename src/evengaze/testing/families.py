"""How to make a tiny model of each family with an adapter of its own, and pictures for it."""

from __future__ import annotations

from functools import partial

import torch

from evengaze.testing.prompts import END, IMAGE, PAD, START, VIDEO
from evengaze.testing.recipes import (
    CLIP,
    GEMMA_LAYERS,
    IMAGE_GRIDS,
    PINPOINTS,
    SIGLIP,
    VIDEO_GRIDS,
    Family,
    anyres_images,
    frame_videos,
    images_with_breaks,
    native,
    qwen,
    square_images,
    text_of,
    tile_images,
    timestamped_videos,
    token_types,
    vision_of,
    vlm,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", lambda text: text_of("LlamaConfig", text), lambda n, _: ([[IMAGE] * 16] * n, {})
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        vlm("LlavaConfig", CLIP, "LlamaConfig", image_token_id=IMAGE, image_seq_length=16),
        square_images(16),
    ),
    "video_llava": Family(
        "VideoLlavaForConditionalGeneration",
        vlm("VideoLlavaConfig", CLIP, "LlamaConfig", image_token_index=IMAGE, video_token_index=VIDEO),
        square_images(16),
        frame_videos(8, 17),
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        vlm(
            "LlavaNextConfig",
            CLIP,
            "MistralConfig",
            image_token_id=IMAGE,
            image_grid_pinpoints=PINPOINTS,
            text_sliding_window=None,
        ),
        anyres_images,
    ),
    "llava_next_video": Family(
        "LlavaNextVideoForConditionalGeneration",
        vlm(
            "LlavaNextVideoConfig",
            CLIP,
            "LlamaConfig",
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            spatial_pool_stride=2,
        ),
        anyres_images,
        frame_videos(8, 4),
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        vlm(
            "LlavaOnevisionConfig",
            SIGLIP,
            "Qwen2Config",
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        anyres_images,
        frame_videos(8, 4, newline=1),
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        qwen("Qwen2VLConfig", {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}, {}),
        native("image", IMAGE_GRIDS),
        native("video", VIDEO_GRIDS),
        ("mm_token_type_ids", token_types),
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        qwen(
            "Qwen2_5_VLConfig",
            {
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 2,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            {},
        ),
        native("image", IMAGE_GRIDS),
        native("video", VIDEO_GRIDS),
        ("mm_token_type_ids", token_types),
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        qwen(
            "Qwen3VLConfig",
            {
                "depth": 4,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 2,
                "patch_size": 14,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 1, 2],
            },
            {"mrope_interleaved": True},
        ),
        native("image", IMAGE_GRIDS),
        timestamped_videos,
        ("mm_token_type_ids", token_types),
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        vlm(
            "InternVLConfig",
            partial(vision_of, "InternVLVisionConfig", image_size=[112, 112], patch_size=[14, 14]),
            "Qwen2Config",
            image_token_id=IMAGE,
            downsample_ratio=0.5,
            image_seq_length=16,
        ),
        tile_images(announce=False),
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        vlm(
            "Idefics3Config",
            partial(vision_of, "Idefics3VisionConfig", image_size=112),
            "LlamaConfig",
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        ),
        tile_images(announce=True),
        by_row=True,
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        vlm(
            "SmolVLMConfig",
            partial(vision_of, "SmolVLMVisionConfig", image_size=112),
            "LlamaConfig",
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        ),
        tile_images(announce=True),
        by_row=True,
    ),
    "aya_vision": Family(
        "AyaVisionForConditionalGeneration",
        vlm(
            "AyaVisionConfig",
            partial(vision_of, "SiglipVisionConfig", image_size=112),
            "Cohere2Config",
            image_token_index=IMAGE,
            downsample_factor=2,
            text_sliding_window=24,
            text_logit_scale=1.0,
            text_layer_types=GEMMA_LAYERS,
        ),
        tile_images(announce=True),
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        vlm(
            "Gemma3Config",
            SIGLIP,
            "Gemma3TextConfig",
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            mm_tokens_per_image=16,
            text_sliding_window=12,
            text_layer_types=GEMMA_LAYERS,
            text_query_pre_attn_scalar=16,
        ),
        square_images(16, wrap=True),
        types=("token_type_ids", token_types),
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        vlm("PaliGemmaConfig", SIGLIP, "GemmaConfig", image_token_index=IMAGE, projection_dim=64),
        square_images(16),
        types=("token_type_ids", torch.zeros_like),
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        vlm(
            "Mistral3Config",
            partial(vision_of, "PixtralVisionConfig", image_size=112),
            "MistralConfig",
            image_token_index=IMAGE,
            spatial_merge_size=2,
            vision_feature_layer=-1,
            text_sliding_window=None,
        ),
        images_with_breaks,
    ),
}
