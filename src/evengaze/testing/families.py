"""How to make a tiny config of each family, and pictures for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evengaze.testing.prompts import BOS, IMAGE, PAD, VOCABULARY

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
    """

    architecture: str
    config: Callable[[dict[str, Any]], Any]
    images: Callable[[int, torch.Generator], Pictures]
    videos: Callable[[int, torch.Generator], Pictures] | None = None
    types: tuple[str, Callable[[Tensor], Tensor]] | None = None

    def model(self) -> Any:
        """The model class."""
        import transformers

        return getattr(transformers, self.architecture)


def _text(name: str, changes: dict[str, Any], **family: Any) -> Any:
    import transformers

    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
    }
    return getattr(transformers, name)(**{**values, **family, **changes})


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


def _square_images(tokens: int, size: int = 56) -> Callable[[int, torch.Generator], Pictures]:
    def make(n: int, generator: torch.Generator) -> Pictures:
        return [[IMAGE] * tokens] * n, {"pixel_values": _pixels(generator, n, 3, size, size)} if n else {}

    return make


def _llava(text: dict[str, Any]) -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=_vision("CLIPVisionConfig", projection_dim=32),
        text_config=_text("LlamaConfig", text),
        image_token_id=IMAGE,
        image_seq_length=16,
    )


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", lambda text: _text("LlamaConfig", text), lambda n, _: ([[IMAGE] * 16] * n, {})),
    "llava": Family("LlavaForConditionalGeneration", _llava, _square_images(16)),
}
