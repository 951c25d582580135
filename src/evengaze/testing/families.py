"""How to make a tiny config of each family, and pictures for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from evengaze.testing.prompts import BOS, END, IMAGE, PAD, START, VIDEO, VOCABULARY

Inputs = dict[str, Tensor]
Pictures = tuple[list[list[int]], Inputs]
"""The tokens of each picture, and the tensors that the model takes beside them."""


@dataclass(frozen=True)
class Family:
    """A recipe.

    Attributes:
        architecture: name of the model class in transformers.
        config: from overrides of the text config to the config of the model.
        images: (number of images, generator) -> pictures.
        videos: the same for videos, or None.
        types: name of an input that marks token types, and how it follows from the ids.
        by_row: pixels are (rows, most tiles of a row, ...) with zeros where a row has fewer.
    """

    architecture: str
    config: Callable[[dict[str, Any]], Any]
    images: Callable[[int, torch.Generator], Pictures]
    videos: Callable[[int, torch.Generator], Pictures] | None = None
    types: tuple[str, Callable[[Tensor], Tensor]] | None = None
    by_row: bool = False

    def model(self) -> Any:
        """The model class."""
        import transformers

        return getattr(transformers, self.architecture)


_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32768,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}


def _text(name: str, changes: dict[str, Any], **family: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**{**_TEXT, **family, **changes})


def _vision(name: str, **changes: Any) -> Any:
    import transformers

    values = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    return getattr(transformers, name)(**{**values, **changes})


def _pixels(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _square_images(tokens: int, *, wrap: bool = False) -> Callable[[int, torch.Generator], Pictures]:
    """Square pictures that fill `tokens` placeholders each."""

    def make(n: int, generator: torch.Generator) -> Pictures:
        picture = [IMAGE] * tokens
        picture = [START, *picture, END] if wrap else picture
        return [picture] * n, {"pixel_values": _pixels(generator, n, 3, 56, 56)} if n else {}

    return make


def _frames(frames: int, tokens: int, newline: int = 0) -> Callable[[int, torch.Generator], Pictures]:
    """Videos of square frames that fill `tokens` placeholders each, and `newline` more at the end."""

    def make(n: int, generator: torch.Generator) -> Pictures:
        video = [VIDEO] * (frames * tokens + newline)
        return [video] * n, {"pixel_values_videos": _pixels(generator, n, frames, 3, 56, 56)} if n else {}

    return make


_UNLIKE_SIZES = ((56, 112), (112, 56), (70, 70), (40, 90))
"""(height, width) of pictures, used in turn."""


def _anyres_images(n: int, generator: torch.Generator) -> Pictures:
    """A thumbnail of 4 x 4 patches and two or four tiles, unpadded, with a newline behind every row."""
    sizes = [_UNLIKE_SIZES[k % 4] for k in range(n)]
    rows = {(56, 112): (4, 8), (112, 56): (8, 4), (70, 70): (8, 8), (40, 90): (4, 8)}
    tokens = [[IMAGE] * (16 + rows[s][0] * (rows[s][1] + 1)) for s in sizes]
    pixels = {"pixel_values": _pixels(generator, n, 5, 3, 56, 56), "image_sizes": torch.tensor(sizes)} if n else {}
    return tokens, pixels


def _native(kind: str, grids: Sequence[tuple[int, int, int]]) -> Callable[[int, torch.Generator], Pictures]:
    """Qwen-VL: flattened patches, 2 x 2 of which become a token."""
    token = IMAGE if kind == "image" else VIDEO

    def make(n: int, generator: torch.Generator) -> Pictures:
        chosen = [grids[k % len(grids)] for k in range(n)]
        tokens = [[START, *[token] * (t * h * w // 4), END] for t, h, w in chosen]
        patches = sum(t * h * w for t, h, w in chosen)
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        values = {name: _pixels(generator, patches, 3 * 2 * 14 * 14), f"{kind}_grid_thw": torch.tensor(chosen)}
        return tokens, values if n else {}

    return make


def _timestamped(n: int, generator: torch.Generator) -> Pictures:
    """Qwen3-VL: every frame of a video stands between its own marks, behind its time in words."""
    _, values = _native("video", _VIDEO_GRIDS)(n, generator)
    spread = []
    for t, h, w in values.get("video_grid_thw", torch.zeros(0, 3)).tolist():
        frame = [START, *[VIDEO] * (h * w // 4), END]
        spread.append([token for k in range(t) for token in (30 + k, 31 + k, *frame)])
    return spread, values


_IMAGE_GRIDS = ((1, 8, 8), (1, 4, 16), (1, 8, 6))
_VIDEO_GRIDS = ((2, 8, 8), (4, 4, 8), (2, 6, 8))


def _tiles(announce: bool) -> Callable[[int, torch.Generator], Pictures]:
    """InternVL: two or three tiles of 4 x 4 tokens a picture, side by side, or each behind tokens that announce it."""

    def make(n: int, generator: torch.Generator) -> Pictures:
        counts = [2 + k % 2 for k in range(n)]
        pictures = []
        for count in counts:
            if announce:
                tiles = [t for k in range(count - 1) for t in (20 + k, *[IMAGE] * 16)] + [282, *[IMAGE] * 16]
            else:
                tiles = [IMAGE] * (16 * count)
            pictures.append([START, *tiles, END])
        return pictures, {"pixel_values": _pixels(generator, sum(counts), 3, 112, 112)} if n else {}

    return make


def _native_breaks(n: int, generator: torch.Generator) -> Pictures:
    """Mistral 3: a token for 2 x 2 patches, a break behind every row, an end mark behind the picture."""
    sizes = [((112, 112), (84, 112), (112, 56))[k % 3] for k in range(n)]
    pictures = []
    for height, width in sizes:
        row = [IMAGE] * (width // 28)
        pictures.append([token for k in range(height // 28) for token in (*row, 282 if k < height // 28 - 1 else 283)])
    return pictures, {
        "pixel_values": _pixels(generator, n, 3, 112, 112),
        "image_sizes": torch.tensor(sizes),
    } if n else {}


def _marks(ids: Tensor) -> Tensor:
    """1 for images, 2 for videos, 0 for text."""
    return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()


def _vlm(name: str, vision: Callable[[], Any], text: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    """A config of a vision-language model from those of its parts; `text_*` values go to the text config."""
    own = {k.removeprefix("text_"): v for k, v in values.items() if k.startswith("text_")}
    outer = {k: v for k, v in values.items() if not k.startswith("text_")}

    def make(changes: dict[str, Any]) -> Any:
        import transformers

        return getattr(transformers, name)(vision_config=vision(), text_config=_text(text, changes, **own), **outer)

    return make


_CLIP = partial(_vision, "CLIPVisionConfig", projection_dim=32)
_SIGLIP = partial(_vision, "SiglipVisionConfig")
_PINPOINTS = [[56, 112], [112, 56], [112, 112]]
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
_QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_GEMMA_LAYERS = ["sliding_attention", "full_attention"] * 3


def _qwen(name: str, vision: dict[str, Any], rope: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """Qwen-VL configs take their parts as dictionaries."""

    def make(changes: dict[str, Any]) -> Any:
        import transformers

        text = {**_TEXT, "rope_parameters": {**_MROPE, **rope}, **changes}
        return getattr(transformers, name)(vision_config=vision, text_config=text, **_QWEN)

    return make


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", lambda text: _text("LlamaConfig", text), lambda n, _: ([[IMAGE] * 16] * n, {})),
    "llava": Family(
        "LlavaForConditionalGeneration",
        _vlm("LlavaConfig", _CLIP, "LlamaConfig", image_token_id=IMAGE, image_seq_length=16),
        _square_images(16),
    ),
    "video_llava": Family(
        "VideoLlavaForConditionalGeneration",
        _vlm("VideoLlavaConfig", _CLIP, "LlamaConfig", image_token_index=IMAGE, video_token_index=VIDEO),
        _square_images(16),
        _frames(8, 17),
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        _vlm(
            "LlavaNextConfig",
            _CLIP,
            "MistralConfig",
            image_token_id=IMAGE,
            image_grid_pinpoints=_PINPOINTS,
            text_sliding_window=None,
        ),
        _anyres_images,
    ),
    "llava_next_video": Family(
        "LlavaNextVideoForConditionalGeneration",
        _vlm(
            "LlavaNextVideoConfig",
            _CLIP,
            "LlamaConfig",
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=_PINPOINTS,
            spatial_pool_stride=2,
        ),
        _anyres_images,
        _frames(8, 4),
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        _vlm(
            "LlavaOnevisionConfig",
            _SIGLIP,
            "Qwen2Config",
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=_PINPOINTS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        _anyres_images,
        _frames(8, 4, newline=1),
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        _qwen("Qwen2VLConfig", {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}, {}),
        _native("image", _IMAGE_GRIDS),
        _native("video", _VIDEO_GRIDS),
        ("mm_token_type_ids", _marks),
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        _qwen(
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
        _native("image", _IMAGE_GRIDS),
        _native("video", _VIDEO_GRIDS),
        ("mm_token_type_ids", _marks),
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        _qwen(
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
        _native("image", _IMAGE_GRIDS),
        _timestamped,
        ("mm_token_type_ids", _marks),
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        _vlm(
            "InternVLConfig",
            partial(_vision, "InternVLVisionConfig", image_size=[112, 112], patch_size=[14, 14]),
            "Qwen2Config",
            image_token_id=IMAGE,
            downsample_ratio=0.5,
            image_seq_length=16,
        ),
        _tiles(announce=False),
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        _vlm(
            "Idefics3Config",
            partial(_vision, "Idefics3VisionConfig", image_size=112),
            "LlamaConfig",
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        ),
        _tiles(announce=True),
        by_row=True,
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        _vlm(
            "SmolVLMConfig",
            partial(_vision, "SmolVLMVisionConfig", image_size=112),
            "LlamaConfig",
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=PAD,
        ),
        _tiles(announce=True),
        by_row=True,
    ),
    "aya_vision": Family(
        "AyaVisionForConditionalGeneration",
        _vlm(
            "AyaVisionConfig",
            partial(_vision, "SiglipVisionConfig", image_size=112),
            "Cohere2Config",
            image_token_index=IMAGE,
            downsample_factor=2,
            text_sliding_window=24,
            text_logit_scale=1.0,
            text_layer_types=_GEMMA_LAYERS,
        ),
        _tiles(announce=True),
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        _vlm(
            "Gemma3Config",
            _SIGLIP,
            "Gemma3TextConfig",
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            mm_tokens_per_image=16,
            text_sliding_window=12,
            text_layer_types=_GEMMA_LAYERS,
            text_query_pre_attn_scalar=16,
        ),
        _square_images(16, wrap=True),
        types=("token_type_ids", _marks),
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        _vlm("PaliGemmaConfig", _SIGLIP, "GemmaConfig", image_token_index=IMAGE, projection_dim=64),
        _square_images(16),
        types=("token_type_ids", torch.zeros_like),
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        _vlm(
            "Mistral3Config",
            partial(_vision, "PixtralVisionConfig", image_size=112),
            "MistralConfig",
            image_token_index=IMAGE,
            spatial_merge_size=2,
            vision_feature_layer=-1,
            text_sliding_window=None,
        ),
        _native_breaks,
    ),
}
