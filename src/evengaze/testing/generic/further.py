"""Still further families: documents, other decoders, and types that share a model class with another."""

from __future__ import annotations

from typing import Any

import torch

from evengaze.testing.families import FAMILIES
from evengaze.testing.generic.more import MORE
from evengaze.testing.generic.parts import (
    CLIPS,
    EXPERTS,
    FRAMES,
    GEMMA_IDS,
    IDS,
    INTERLEAVED,
    LINEAR,
    MARKS,
    PLAIN_VISION,
    QWEN_VISION,
    ROUTED,
    SEGMENTS,
    STILLS,
    WHOLE,
    Make,
    config,
    films,
    packed,
    sized,
    squares,
)
from evengaze.testing.prompts import END, IMAGE, START, VIDEO
from evengaze.testing.recipes import (
    GEMMA_LAYERS,
    TEXT,
    Family,
    Pictures,
    noise,
    timestamped_videos,
)


def retyped(make: Make, name: str) -> Make:
    """A config of another class with the same values."""

    def again(changes: dict[str, Any]) -> Any:
        import transformers

        values = make(changes).to_dict()
        return getattr(transformers, name)(**{k: v for k, v in values.items() if k != "model_type"})

    return again


def strips(n: int, generator: torch.Generator) -> Pictures:
    """MiniCPM-V 4.6: the patches of all pictures side by side in one strip."""
    shapes = [((16, 16), (16, 24), (24, 16))[k % 3] for k in range(n)]
    values = {
        "pixel_values": noise(generator, 1, 3, 14, 14 * sum(h * w for h, w in shapes)),
        "target_sizes": torch.tensor(shapes, dtype=torch.int32),
    }
    return [[START, *[IMAGE] * (h * w // 16), END] for h, w in shapes], values if n else {}


frames_in_strips = films(strips, 2, {"pixel_values": "pixel_values_videos", "target_sizes": "target_sizes_videos"})


def pooled(n: int, generator: torch.Generator) -> Pictures:
    """Molmo 2: crops of 8 x 8 patches, and for every token the patches that it is pooled from."""
    index = torch.arange(64).reshape(4, 2, 4, 2).permute(0, 2, 1, 3).reshape(16, 4)
    values = {
        "pixel_values": noise(generator, n, 64, 3 * 14 * 14),
        "image_token_pooling": torch.cat([index + 64 * k for k in range(n)]) if n else index[:0],
        "image_grids": torch.tensor([[4, 4, 0, 0]] * n),
        "image_num_crops": torch.ones(n, dtype=torch.long),
    }
    return [[START, *[IMAGE] * 16, END]] * n, values if n else {}


def pooled_frames(n: int, generator: torch.Generator) -> Pictures:
    """The same of two frames a video."""
    names = {"pixel_values": "pixel_values_videos", "image_token_pooling": "video_token_pooling"}
    videos, values = films(pooled, 2, names)(n, generator)
    videos = [[IMAGE if t == VIDEO else t for t in video] for video in videos]
    return videos, {**values, "video_grids": torch.tensor([[2, 4, 4]] * n)} if n else {}


def masked(n: int, generator: torch.Generator) -> Pictures:
    """Granite Docling: tiles of 4 x 4 tokens, and which of a row's tiles are real."""
    tokens, values = squares(16, 112)(n, generator)
    return tokens, {**values, "pixel_attention_mask": torch.ones(n, dtype=torch.bool)} if n else {}


UNIFIED_STILLS = packed(((3, 4), (4, 3), (4, 4)), 1, 16, "image_position_ids")


def fuyu(changes: dict[str, Any]) -> Any:
    """Fuyu, whose decoder, Persimmon, has as many keys as queries and no width of heads of its own."""
    from transformers import FuyuConfig

    text = {**{k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads")}, **changes}
    text["model_type"] = "persimmon"
    return FuyuConfig(patch_size=14, image_size=56, image_token_id=IMAGE, text_config=text)


def two_towers(n: int, generator: torch.Generator) -> Pictures:
    """DeepSeek-VL: each picture in a low and in a high resolution."""
    tokens, values = squares(16, 56)(n, generator)
    return tokens, {**values, "high_res_pixel_values": noise(generator, n, 3, 256, 256)} if n else {}


_OCR_TEXT = {
    **{k: v for k, v in ROUTED.items() if k not in ("first_k_dense_replace", "n_group", "topk_group")},
    "num_key_value_heads": 4,
    "mlp_layer_types": ["dense"] + ["sparse"] * 5,
}
_MINI = {**PLAIN_VISION, "num_hidden_layers": 3, "image_size": 224, "insert_layer_id": 1}


def _mini(name: str, **outer: Any) -> Make:
    """The MiniCPM-V family on a Qwen3.5 decoder."""
    text = {**LINEAR, "model_type": "qwen3_5_text"}
    return config(name, _MINI, text, rope={**INTERLEAVED, **WHOLE}, insert_layer_id=1, **IDS, **outer)


FURTHER: dict[str, Family] = {
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        config(
            "Qwen3VLMoeConfig",
            {**QWEN_VISION, "deepstack_visual_indexes": [0, 1, 2]},
            EXPERTS,
            rope=INTERLEAVED,
            **IDS,
        ),
        STILLS,
        timestamped_videos,
        MARKS,
    ),
    "shieldgemma2": Family(
        "Gemma3ForConditionalGeneration",
        retyped(FAMILIES["gemma3"].config, "ShieldGemma2Config"),
        FAMILIES["gemma3"].images,
        types=FAMILIES["gemma3"].types,
    ),
    "pp_chart2table": Family(
        "GotOcr2ForConditionalGeneration",
        retyped(MORE["got_ocr2"].config, "PPChart2TableConfig"),
        MORE["got_ocr2"].images,
        eager_tower=True,
    ),
    "glmga": Family(
        "Glm46VForConditionalGeneration",
        retyped(MORE["glm46v"].config, "GlmgaConfig"),
        MORE["glm46v"].images,
        MORE["glm46v"].videos,
        MORE["glm46v"].types,
    ),
    "minimax_m3_vl": Family(
        "MiniMaxM3SparseForConditionalGeneration",
        config(
            "MiniMaxM3VLConfig",
            PLAIN_VISION,
            {
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "dense_intermediate_size": 64,
                "shared_intermediate_size": 32,
                "rotary_dim": 8,
            },
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            projector_hidden_size=64,
        ),
        STILLS,
        CLIPS,
    ),
    "apertus1p5": Family(
        "Apertus1p5ForConditionalGeneration",
        config(
            "Apertus1p5Config",
            {
                "codebook_size": 64,
                "embed_dim": 8,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "resolution": 32,
            },
            {"vocab_size": 400, "output_vocab_size": 300},
            audio_config={"codebook_size": 8, "num_filters": 4, "hidden_size": 32, "codebook_dim": 32},
            image_token_id=IMAGE,
            audio_token_id=275,
            image_token_offset=300,
            audio_token_offset=364,
        ),
        sized(((16, 16), (12, 24), (24, 8)), 4),
        eager_tower=True,
    ),
    "deepseek_ocr2": Family(
        "DeepseekOcr2ForConditionalGeneration",
        config(
            "DeepseekOcr2Config",
            {
                "sam_config": {**SEGMENTS, "downsample_channels": [16, 32]},
                "encoder_config": {**PLAIN_VISION, "num_key_value_heads": 2},
            },
            _OCR_TEXT,
            image_token_id=IMAGE,
        ),
        squares(145, 256),
    ),
    "gemma4_unified": Family(
        "Gemma4UnifiedForConditionalGeneration",
        config(
            "Gemma4UnifiedConfig",
            {
                "patch_size": 16,
                "pooling_kernel_size": 1,
                "mm_embed_dim": 64,
                "mm_posemb_size": 64,
                "output_proj_dims": 64,
            },
            {"layer_types": GEMMA_LAYERS, "sliding_window": 12, "use_bidirectional_attention": None},
            audio_config=None,
            **{k: v for k, v in GEMMA_IDS.items() if k != "boa_token_id"},
        ),
        UNIFIED_STILLS,
        films(UNIFIED_STILLS, 2, FRAMES, "num_frames_per_video"),
        MARKS,
    ),
    "lfm3_vl": Family(
        "Lfm3VlForConditionalGeneration",
        config(
            "Lfm3VlConfig",
            {**PLAIN_VISION, "num_key_value_heads": 2},
            {"model_type": "lfm3", "layer_types": ["conv", "full_attention"] * 3},
            projector_hidden_size=64,
            **IDS,
        ),
        STILLS,
        CLIPS,
    ),
    "minicpmv4_6": Family("MiniCPMV4_6ForConditionalGeneration", _mini("MiniCPMV4_6Config"), strips, frames_in_strips),
    "minicpmv4_7": Family(
        "MiniCPMV4_7ForConditionalGeneration", _mini("MiniCPMV4_7Config"), strips, frames_in_strips, MARKS
    ),
    "minicpm_ocr": Family(
        "MiniCPMOcrForConditionalGeneration", _mini("MiniCPMOcrConfig", downsample_mode="16x"), strips, frames_in_strips
    ),
    "deepseek_vl_hybrid": Family(
        "DeepseekVLHybridForConditionalGeneration",
        config(
            "DeepseekVLHybridConfig",
            {"model_type": "siglip_vision_model", **PLAIN_VISION, "image_size": 56},
            {"model_type": "llama"},
            high_res_vision_config={"model_type": "sam_vision_model", **SEGMENTS},
            image_token_id=IMAGE,
        ),
        two_towers,
        eager_tower=True,
    ),
    "molmo2": Family(
        "Molmo2ForConditionalGeneration",
        config(
            "Molmo2Config",
            {
                **PLAIN_VISION,
                "num_hidden_layers": 3,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "image_size": [112, 112],
                "num_position_embeddings": 64,
            },
            {"additional_vocab_size": 8},
            adapter_config={
                "vision_feature_layer": [-1, -2],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 64,
                "text_hidden_size": 64,
            },
            image_start_token_id=START,
            image_end_token_id=END,
            image_patch_id=IMAGE,
        ),
        pooled,
        pooled_frames,
        MARKS,
    ),
    "granite_docling": Family(
        "GraniteDoclingForConditionalGeneration",
        config(
            "GraniteDoclingConfig",
            {
                **PLAIN_VISION,
                "image_size": 112,
                "out_hidden_size": 64,
                "scale_factor": 2,
                "deepstack_visual_indexes": [0, 1],
                "use_fine_route": False,
            },
            image_token_id=IMAGE,
        ),
        masked,
        by_row=True,
    ),
    "muse_spark": Family(
        "MuseSparkForConditionalGeneration",
        config(
            "MuseSparkConfig",
            {**PLAIN_VISION, "pos_emb_height": 8, "pos_emb_width": 8},
            {
                "layer_types": GEMMA_LAYERS,
                "sliding_window": 24,
                "moe_intermediate_size": 32,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "moe_hidden_size": 32,
            },
            out_hidden_size=128,
            projector_hidden_size=64,
            audio_config={
                "hidden_sizes": [8] * 4,
                "depths": [1] * 4,
                "num_hidden_layers": 4,
                "out_hidden_size": 64,
            },
            **IDS,
        ),
        STILLS,
        CLIPS,
    ),
    "fuyu": Family(
        "FuyuForCausalLM",
        fuyu,
        lambda n, g: ([[START, *[IMAGE] * 16, END]] * n, {"pixel_values": noise(g, n, 16, 3 * 14 * 14)} if n else {}),
    ),
}
