"""What tiny models of the generic adapter's families have in common, and how their processors shape pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from evengaze.testing.prompts import END, IMAGE, START, VIDEO
from evengaze.testing.recipes import (
    IMAGE_GRIDS,
    MROPE,
    TEXT,
    VIDEO_GRIDS,
    Pictures,
    native,
    noise,
    token_types,
)

OPENING, CLOSING = 278, 279
AUDIO, AUDIO_START, AUDIO_END = 275, 276, 277
HYBRID = ["linear_attention", "full_attention"] * 3
LINEAR = {
    "layer_types": HYBRID,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
WHOLE = {"partial_rotary_factor": 1.0}
INTERLEAVED = {"mrope_interleaved": True}
IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
GEMMA_IDS: dict[str, Any] = {
    **IDS,
    "boi_token_id": START,
    "eoi_token_id": END,
    "audio_token_id": AUDIO,
    "boa_token_id": AUDIO_START,
}
AUDIO_TOWER = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": 64,
}

GLM_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "image_size": 112,
}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 14,
    "num_position_embeddings": 64,
}
WINDOWED_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
PLAIN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}

Make = Callable[[dict[str, Any]], Any]
Draw = Callable[[int, torch.Generator], Pictures]
UNSET: Any = ...
"""In place of a value of `TEXT` that a family's config does not take."""

SEGMENTS = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 256,
    "patch_size": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 64,
}
"""A tiny tower of Segment Anything."""

MARKS = ("mm_token_type_ids", token_types)
FRAMES = {"pixel_values": "pixel_values_videos", "image_position_ids": "video_position_ids"}
STILLS = native("image", IMAGE_GRIDS)
CLIPS = native("video", VIDEO_GRIDS)


def config(
    name: str,
    vision: dict[str, Any],
    text: dict[str, Any] | None = None,
    *,
    rope: dict[str, Any] | None = None,
    **outer: Any,
) -> Callable[[dict[str, Any]], Any]:
    """A config whose parts are given as dictionaries; three-axis positions with `rope`."""

    def make(changes: dict[str, Any]) -> Any:
        import transformers

        own: dict[str, Any] = {k: v for k, v in {**TEXT, **(text or {})}.items() if v is not UNSET}
        if rope is not None:
            by_layer = all(isinstance(v, dict) for v in rope.values()) and bool(rope)
            own["rope_parameters"] = dict(rope) if by_layer else {**MROPE, **rope}
        return getattr(transformers, name)(vision_config=dict(vision), text_config={**own, **changes}, **outer)

    return make


def flat(make: Draw, *, side: int = 14, vector: bool = False, **more: Any) -> Draw:
    """Native resolution with patches (n, 3, side, side), or vectors, of one moment; `more` has a value a picture."""

    def single(n: int, generator: torch.Generator) -> Pictures:
        tokens, values = make(n, generator)
        if n:
            (name,) = (k for k in values if k.startswith("pixel"))
            shape = (3 * side**2,) if vector else (3, side, side)
            values[name] = noise(generator, len(values[name]), *shape)
            values.update({k: torch.full((n,), v) for k, v in more.items()})
        return tokens, values

    return single


def films(make: Draw, frames: int, rename: dict[str, str], told: str | None = None) -> Draw:
    """Videos of `frames` pictures each, behind the time of every one of them.

    Args:
        make: the pictures.
        frames: of a video.
        rename: what the model calls the inputs of pictures where they are frames.
        told: an input that says how many frames each video has.
    """

    def join(n: int, generator: torch.Generator) -> Pictures:
        stills, values = make(n * frames, generator)
        values = {rename[name]: value for name, value in values.items() if name in rename}
        if told and n:
            values[told] = torch.full((n,), frames)
        queue = iter(stills)
        timed = [[(30 + k, *next(queue)) for k in range(frames)] for _ in range(n)]
        return [[VIDEO if t == IMAGE else t for frame in video for t in frame] for video in timed], values

    return join


def thinned(make: Draw, times: int = 0) -> Draw:
    """Videos `times` frames of which are merged into one; all of them if it is left out."""

    def fewer(n: int, generator: torch.Generator) -> Pictures:
        videos, values = make(n, generator)
        frames = values["video_grid_thw"][:, 0].tolist() if n else []
        return [[START, *v[1 : -1 : times or t], END] for v, t in zip(videos, frames, strict=True)], values

    return fewer


def framed(make: Draw, *, opening: int, closing: int) -> Draw:
    """Videos of GLM-4V: frames on the placeholders of images, each between marks, behind which its time stands."""

    def spread(n: int, generator: torch.Generator) -> Pictures:
        _, values = make(n, generator)
        videos = []
        for t, h, w in values.get("video_grid_thw", torch.zeros(0, 3)).tolist():
            frames = [[START, *[IMAGE] * (h * w // 4), END, 30 + k] for k in range(t)]
            videos.append([opening, *(token for frame in frames for token in frame), closing])
        return videos, values

    return spread


def timed(make: Draw) -> Draw:
    """Videos whose model is told how many seconds lie between two of their frames."""

    def with_seconds(n: int, generator: torch.Generator) -> Pictures:
        tokens, values = make(n, generator)
        return tokens, {**values, "video_second_per_grid": torch.ones(n)} if n else {}

    return with_seconds


def types_in_videos(ids: torch.Tensor) -> torch.Tensor:
    """1 for images, 2 for the image tokens between the marks of a video, 0 for text."""
    inside = (ids == OPENING).cumsum(1) > (ids == CLOSING).cumsum(1)
    return (ids == IMAGE).long() * (1 + inside.long())


def sized(sizes: Sequence[tuple[int, int]], step: int) -> Draw:
    """Pictures of unlike sizes in one canvas, a token for `step` x `step` pixels of each (Pixtral)."""

    def make(n: int, generator: torch.Generator) -> Pictures:
        chosen = [sizes[k % len(sizes)] for k in range(n)]
        side = max((max(s) for s in chosen), default=0)
        values = {"pixel_values": noise(generator, n, 3, side, side), "image_sizes": torch.tensor(chosen)}
        return [[START, *[IMAGE] * (h * w // step**2), END] for h, w in chosen], values if n else {}

    return make


def squares(tokens: int, side: int, *, tiles: int = 1) -> Draw:
    """Square pictures between marks."""

    def make(n: int, generator: torch.Generator) -> Pictures:
        picture = [START, *[IMAGE] * (tokens * tiles), END]
        return [picture] * n, {"pixel_values": noise(generator, n * tiles, 3, side, side)} if n else {}

    return make


def packed(shapes: Sequence[tuple[int, int]], merge: int, patch: int, sizes: str, mask: str | None = None) -> Draw:
    """Patches (pictures, most patches, 3 * patch * patch) of pictures of unlike sizes, filled up with zeros."""

    def make(n: int, generator: torch.Generator) -> Pictures:
        chosen = [shapes[k % len(shapes)] for k in range(n)]
        most = max((h * w for h, w in chosen), default=0)
        values = noise(generator, n, most, 3 * patch * patch)
        real = torch.zeros(n, most, dtype=torch.long)
        place = torch.full((n, most, 2), -1)
        for k, (h, w) in enumerate(chosen):
            real[k, : h * w] = 1
            y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            place[k, : h * w] = torch.stack([x.flatten(), y.flatten()], 1)
        values *= real[..., None]
        inputs = {"pixel_values": values}
        inputs[sizes] = place if "position" in sizes else torch.tensor(chosen)
        if mask is not None:
            inputs[mask] = real
        return [[START, *[IMAGE] * (h * w // merge**2), END] for h, w in chosen], inputs if n else {}

    return make


FRAME_MARKS = ("mm_token_type_ids", types_in_videos)
