"""What tiny configs and the pictures for them are made of."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

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
        bare: whether it is a text decoder, whose prompts hold stand-ins for visual tokens.
        eager_tower: whether the model class has no sdpa; its decoder has, where the tower alone is given eager.
        tower: a module that stands in for a vision tower of timm, which need not be installed; from its config.
        broken: a release of transformers in which the unpruned model fails, and how.
    """

    architecture: str
    config: Callable[[dict[str, Any]], Any]
    images: Callable[[int, torch.Generator], Pictures]
    videos: Callable[[int, torch.Generator], Pictures] | None = None
    types: tuple[str, Callable[[Tensor], Tensor]] | None = None
    by_row: bool = False
    bare: bool = False
    eager_tower: bool = False
    tower: Callable[[Any], nn.Module] | None = None
    broken: tuple[str, str] | None = None

    def model(self, config: Any) -> Any:
        """The model of a config."""
        import transformers

        cls = getattr(transformers, self.architecture)
        if self.tower is None:
            return cls(config)
        module, tower = sys.modules[cls.__module__], self.tower
        original: Any = module.__dict__["AutoModel"]

        class WithStandIn:
            @staticmethod
            def from_config(config: Any, **options: Any) -> Any:
                timm = "vision" in config.model_type or "timm" in config.model_type
                return tower(config) if timm else original.from_config(config, **options)

        with mock.patch.object(module, "AutoModel", WithStandIn):
            return cls(config)

    @property
    def runs(self) -> bool:
        """Whether the installed transformers has the family, and can run it unpruned."""
        import transformers

        broken = self.broken is not None and transformers.__version__ == self.broken[0]
        return not broken and self.architecture in _known_names()


@functools.cache
def _known_names() -> frozenset[str]:
    """What the installed transformers has; listing it takes a while, and importing it longer."""
    import transformers

    return frozenset(dir(transformers))


TEXT = {
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


def text_of(name: str, changes: dict[str, Any], **family: Any) -> Any:
    """A text config."""
    import transformers

    return getattr(transformers, name)(**{**TEXT, **family, **changes})


def vision_of(name: str, **changes: Any) -> Any:
    """A vision config: towers of three layers, 4 x 4 patches."""
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


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Random pixels."""
    return torch.randn(*shape, generator=generator)


def square_images(tokens: int, *, wrap: bool = False) -> Callable[[int, torch.Generator], Pictures]:
    """Square pictures that fill `tokens` placeholders each."""

    def make(n: int, generator: torch.Generator) -> Pictures:
        picture = [IMAGE] * tokens
        picture = [START, *picture, END] if wrap else picture
        return [picture] * n, {"pixel_values": noise(generator, n, 3, 56, 56)} if n else {}

    return make


def stand_ins(n: int, generator: torch.Generator) -> Pictures:
    """Tokens that stand for pictures in a decoder's prompt."""
    return [[IMAGE] * 16] * n, {}


def frame_videos(frames: int, tokens: int, newline: int = 0) -> Callable[[int, torch.Generator], Pictures]:
    """Videos of square frames that fill `tokens` placeholders each, and `newline` more at the end."""

    def make(n: int, generator: torch.Generator) -> Pictures:
        video = [VIDEO] * (frames * tokens + newline)
        return [video] * n, {"pixel_values_videos": noise(generator, n, frames, 3, 56, 56)} if n else {}

    return make


UNLIKE_SIZES = ((56, 112), (112, 56), (70, 70), (40, 90))
"""(height, width) of pictures, used in turn."""


def anyres_images(n: int, generator: torch.Generator) -> Pictures:
    """A thumbnail of 4 x 4 patches and two or four tiles, unpadded, with a newline behind every row."""
    sizes = [UNLIKE_SIZES[k % 4] for k in range(n)]
    rows = {(56, 112): (4, 8), (112, 56): (8, 4), (70, 70): (8, 8), (40, 90): (4, 8)}
    tokens = [[IMAGE] * (16 + rows[s][0] * (rows[s][1] + 1)) for s in sizes]
    pixels = {"pixel_values": noise(generator, n, 5, 3, 56, 56), "image_sizes": torch.tensor(sizes)} if n else {}
    return tokens, pixels


def native(kind: str, grids: Sequence[tuple[int, int, int]]) -> Callable[[int, torch.Generator], Pictures]:
    """Qwen-VL: flattened patches, 2 x 2 of which become a token."""
    token = IMAGE if kind == "image" else VIDEO

    def make(n: int, generator: torch.Generator) -> Pictures:
        chosen = [grids[k % len(grids)] for k in range(n)]
        tokens = [[START, *[token] * (t * h * w // 4), END] for t, h, w in chosen]
        patches = sum(t * h * w for t, h, w in chosen)
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        values = {name: noise(generator, patches, 3 * 2 * 14 * 14), f"{kind}_grid_thw": torch.tensor(chosen)}
        return tokens, values if n else {}

    return make


def timestamped_videos(n: int, generator: torch.Generator) -> Pictures:
    """Qwen3-VL: every frame of a video stands between its own marks, behind its time in words."""
    _, values = native("video", VIDEO_GRIDS)(n, generator)
    spread = []
    for t, h, w in values.get("video_grid_thw", torch.zeros(0, 3)).tolist():
        frame = [START, *[VIDEO] * (h * w // 4), END]
        spread.append([token for k in range(t) for token in (30 + k, 31 + k, *frame)])
    return spread, values


IMAGE_GRIDS = ((1, 8, 8), (1, 4, 16), (1, 8, 6))
VIDEO_GRIDS = ((2, 8, 8), (4, 4, 8), (2, 6, 8))


def tile_images(announce: bool) -> Callable[[int, torch.Generator], Pictures]:
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
        return pictures, {"pixel_values": noise(generator, sum(counts), 3, 112, 112)} if n else {}

    return make


def images_with_breaks(n: int, generator: torch.Generator) -> Pictures:
    """Mistral 3: a token for 2 x 2 patches, a break behind every row, an end mark behind the picture."""
    sizes = [((112, 112), (84, 112), (112, 56))[k % 3] for k in range(n)]
    pictures = []
    for height, width in sizes:
        row = [IMAGE] * (width // 28)
        pictures.append([token for k in range(height // 28) for token in (*row, 282 if k < height // 28 - 1 else 283)])
    return pictures, {
        "pixel_values": noise(generator, n, 3, 112, 112),
        "image_sizes": torch.tensor(sizes),
    } if n else {}


def token_types(ids: Tensor) -> Tensor:
    """1 for images, 2 for videos, 0 for text."""
    return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()


def vlm(name: str, vision: Callable[[], Any], text: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    """A config of a vision-language model from those of its parts; `text_*` values go to the text config."""
    own = {k.removeprefix("text_"): v for k, v in values.items() if k.startswith("text_")}
    outer = {k: v for k, v in values.items() if not k.startswith("text_")}

    def make(changes: dict[str, Any]) -> Any:
        import transformers

        return getattr(transformers, name)(vision_config=vision(), text_config=text_of(text, changes, **own), **outer)

    return make


CLIP = partial(vision_of, "CLIPVisionConfig", projection_dim=32)
SIGLIP = partial(vision_of, "SiglipVisionConfig")
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
GEMMA_LAYERS = ["sliding_attention", "full_attention"] * 3


def qwen(name: str, vision: dict[str, Any], rope: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """Qwen-VL configs take their parts as dictionaries."""

    def make(changes: dict[str, Any]) -> Any:
        import transformers

        text = {**TEXT, "rope_parameters": {**MROPE, **rope}, **changes}
        return getattr(transformers, name)(vision_config=vision, text_config=text, **QWEN)

    return make
