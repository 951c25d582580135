"""Prompts of a given size: pictures that fill about as many visual tokens as asked for, and text around them.

What a picture fills is found by encoding it: the model itself says how many features it has. Only the form of the
pixels depends on the family, and follows from the arguments of its `get_image_features`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evengaze.errors import ConfigError, UnsupportedModelError
from evengaze.models.base import EncoderCall
from evengaze.models.features import counts
from evengaze.models.filled import placeholder
from evengaze.models.llava import patch_size

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Prompt:
    """One row of a batch; `rows` repeats it.

    Attributes:
        inputs: keyword arguments of the model's forward, `input_ids` (1, L) among them.
        visual: visual tokens that a method chooses among.
        text: the other tokens, newlines and marks of pictures included.
        shown: what the pictures are, in words.
    """

    inputs: Inputs
    visual: int
    text: int
    shown: str = ""

    def rows(self, batch: int) -> Inputs:
        """The same row `batch` times: pictures and tokens both have their rows first."""
        return {name: torch.cat([value] * batch) for name, value in self.inputs.items()}

    def without_pictures(self, model: Any, batch: int) -> Inputs:
        """As many text tokens, and no picture."""
        ids = text_tokens(model.config, self.text).to(self.inputs["input_ids"].device).expand(batch, -1).contiguous()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class _Pixels:
    """What an encoder is given for one prompt.

    Attributes:
        values: keyword arguments of `get_image_features` and of the forward.
        pictures: how many there are.
        size: of one of them, in words.
    """

    values: Inputs
    pictures: int
    size: str


Maker = Callable[[Any, int, int], _Pixels]
"""From a config, how many pictures and how many visual tokens in all are wanted, to pixels."""


@torch.inference_mode()
def make_prompt(model: Any, visual: int, text: int) -> Prompt:
    """A prompt of about `visual` visual and about `text` other tokens, on the model's device.

    Raises:
        UnsupportedModelError: it is not known how pictures for this family are made without its processor.
    """
    config = model.config
    token = placeholder(config, "image")
    base = getattr(model, "base_model", model)
    encode = getattr(base, "get_image_features", None)
    if token is None or not callable(encode):
        raise UnsupportedModelError(f"{config.model_type!r} has no pictures: there is no placeholder in its config")
    maker = _maker(config, set(inspect.signature(encode).parameters))
    try:
        one = _filled(model, encode, maker(config, 1, visual))
        wanted = max(1, round(visual / sum(one[1])))
        pixels, sizes = one if wanted == 1 else _filled(model, encode, maker(config, wanted, visual))
    except Exception as error:  # encoders raise whatever they stumble over
        raise UnsupportedModelError(
            f"{config.model_type!r}: pictures of random pixels cannot be made for it without its processor "
            f"({type(error).__name__}: {' '.join(str(error).split())[:160]}). Profile a checkpoint with a picture"
        ) from error
    ids = _tokens(config, token, sizes, pixels.pictures, text)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_types(model, ids, token), **pixels.values}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    shown = f"{pixels.pictures} picture{'s' if pixels.pictures > 1 else ''} of {pixels.size}"
    filled = sum(sizes)
    return Prompt(inputs, filled, int(ids.shape[1]) - filled, shown)


def _filled(model: Any, encode: Any, pixels: _Pixels) -> tuple[_Pixels, list[int]]:
    """Pixels as the model takes them, and how many tokens each part of them fills."""
    values = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in pixels.values.items()
    }
    arguments = {name: values[name] for name in values if name in inspect.signature(encode).parameters}
    found = counts(EncoderCall("image", arguments, encode(**arguments)))
    return _Pixels(values, pixels.pictures, pixels.size), found


def text_tokens(config: Any, length: int) -> Tensor:
    """(length,) token ids that are no placeholders or marks, the same for equal lengths."""
    text = config.get_text_config()
    special = {v for c in (config, text) for k, v in vars(c).items() if "token" in k and isinstance(v, int)}
    plain = [i for i in range(3, min(int(text.vocab_size), 4096)) if i not in special]
    chosen = torch.randint(len(plain), (length,), generator=torch.Generator().manual_seed(0))
    return torch.tensor(plain)[chosen]


def _tokens(config: Any, token: int, sizes: list[int], pictures: int, text: int) -> Tensor:
    """(1, L): some text, the pictures, and the rest of the text; marks stand around pictures that have them."""
    if len(sizes) % pictures:  # parts that are no tiles of pictures: all in one run
        sizes, pictures = [sum(sizes)], 1
    each = len(sizes) // pictures
    marks = [getattr(config, name, None) for name in ("vision_start_token_id", "vision_end_token_id")]
    known = int(config.get_text_config().vocab_size)
    marked = all(mark is not None and mark < known for mark in marks)
    own = max(2, text - (2 * pictures if marked else pictures - 1))
    words = text_tokens(config, own + 1).tolist()
    ids = words[: own // 2]
    for k in range(pictures):
        run = [token] * sum(sizes[k * each : (k + 1) * each])
        ids += [words[-1]] * (k > 0 and not marked)
        ids += [marks[0], *run, marks[1]] if marked else run
    return torch.tensor([ids + words[own // 2 : own]])


def _types(model: Any, ids: Tensor, token: int) -> Inputs:
    """What marks token types, where the forward takes it."""
    taken, found = inspect.signature(model.forward).parameters, Inputs()
    if "mm_token_type_ids" in taken:
        found["mm_token_type_ids"] = (ids == token).long()
    if "token_type_ids" in taken or model.config.model_type == "paligemma":  # pictures are marked by Gemma 3 alone
        marked = "gemma3" in model.config.model_type or model.config.model_type == "shieldgemma2"
        found["token_type_ids"] = (ids == token).long() if marked else torch.zeros_like(ids)
    return found


# -- pixels ------------------------------------------------------------------------------------------------------------
def _maker(config: Any, taken: set[str]) -> Maker:
    """The form of a family's pixels, from the arguments of its encoder."""
    if "image_grid_thw" in taken:
        return _native
    if getattr(config, "image_grid_pinpoints", None) and "image_sizes" in taken:
        return _tiled
    if "image_sizes" in taken and getattr(config.vision_config, "model_type", "") == "pixtral":
        return _free
    if "pixel_attention_mask" in taken and "spatial_shapes" not in taken:
        return _by_row
    return _squares


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _side(config: Any) -> int:
    """Pixels along a picture's side."""
    size = getattr(config.vision_config, "image_size", None)
    if size is None:
        raise ConfigError("its config names no size of pictures")
    return int(size if isinstance(size, int) else size[0])


def _squares(config: Any, pictures: int, visual: int) -> _Pixels:
    side = _side(config)
    return _Pixels({"pixel_values": _noise(pictures, 3, side, side)}, pictures, f"{side} x {side} pixels")


def _by_row(config: Any, pictures: int, visual: int) -> _Pixels:
    side = _side(config)
    return _Pixels({"pixel_values": _noise(1, pictures, 3, side, side)}, pictures, f"{side} x {side} pixels")


def _native(config: Any, pictures: int, visual: int) -> _Pixels:
    """Flattened patches of one picture, of which merge x merge become a token."""
    vision = config.vision_config
    merge, patch = int(getattr(vision, "spatial_merge_size", 2)), int(vision.patch_size)
    depth = int(getattr(vision, "temporal_patch_size", 1) or 1)
    channels = int(getattr(vision, "in_channels", getattr(vision, "num_channels", 3)) or 3)
    rows, columns = (merge * side for side in near_square(visual))
    values = {
        "pixel_values": _noise(rows * columns, channels * depth * patch * patch),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
    return _Pixels(values, 1, f"{rows * patch} x {columns * patch} pixels")


def _free(config: Any, pictures: int, visual: int) -> _Pixels:
    """Pixtral's tower: pictures of any size up to a largest one."""
    step = patch_size(config) * int(getattr(config, "spatial_merge_size", 1))
    most = (_side(config) // step) ** 2
    pictures = math.ceil(visual / most)
    height, width = (step * side for side in near_square(max(1, round(visual / pictures)), _side(config) // step))
    values = {
        "pixel_values": _noise(pictures, 3, height, width),
        "image_sizes": torch.tensor([[height, width]] * pictures),
    }
    return _Pixels(values, pictures, f"{height} x {width} pixels")


def _tiled(config: Any, pictures: int, visual: int) -> _Pixels:
    """LLaVA-NeXT's: a thumbnail and tiles, of the canvas whose tokens come nearest."""
    from evengaze.models.llava_next import tiled

    tile = int(config.vision_config.image_size)
    sizes = [(int(h), int(w)) for h, w in config.image_grid_pinpoints]
    lengths = [len(tiled(config, size)) for size in sizes]
    best = min(range(len(sizes)), key=lambda k: (abs(max(1, round(visual / lengths[k])) * lengths[k] - visual), k))
    height, width = sizes[best]
    pictures = max(1, round(visual / lengths[best]))
    tiles = 1 + (height // tile) * (width // tile)
    values = {
        "pixel_values": _noise(pictures, tiles, 3, tile, tile),
        "image_sizes": torch.tensor([[height, width]] * pictures),
    }
    return _Pixels(values, pictures, f"{height} x {width} pixels")


def near_square(cells: int, most: int | None = None) -> tuple[int, int]:
    """Rows and columns of about `cells` cells, not longer than two to one where that is possible, none over `most`."""
    root = max(1, math.isqrt(cells))
    shapes = [(r, max(1, round(cells / r))) for r in range(max(1, math.ceil(root / 1.5)), root + 2)]
    if most is not None:
        shapes = [(r, min(c, most)) for r, c in shapes if r <= most] or [(most, most)]
    return min(shapes, key=lambda s: (abs(s[0] * s[1] - cells), s[1] - s[0]))
