"""What can be said about a model from its config alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from evengaze.errors import UnsupportedModelError
from evengaze.models.base import Adapter, attending_layers
from evengaze.models.refusals import refuse_format, why_not_videos
from evengaze.models.registry import adapter_for


class CannotBuildError(UnsupportedModelError):
    """transformers cannot make a model of a config: a package is missing, or the config lacks values."""


@dataclass(frozen=True)
class Diagnosis:
    """How pruning fits a model.

    Attributes:
        model_type: `config.model_type`.
        adapter: the family's adapter.
        layers: where the decoder layers are, as an attribute path of the model.
        depth: number of decoder layers.
        full: layers that attend to the whole sequence; the others see a sliding window.
        attention: attention implementations under which tokens are really removed.
        cannot: what does not work, each with its reason.
    """

    model_type: str
    adapter: Adapter
    layers: str
    depth: int
    full: tuple[int, ...]
    attention: tuple[str, ...]
    cannot: tuple[str, ...]


def diagnose(config: Any, source: str = "") -> Diagnosis:
    """Look at a model without weights.

    Args:
        config: a transformers config.
        source: the hub id that it comes from, if it is known.

    Raises:
        UnsupportedModelError: no adapter serves it.
    """
    refuse_format(config, source)
    model = skeleton_model(config)
    adapter = adapter_for(model)
    decoder: Any = adapter.decoder(model)
    path = next(name for name, module in model.named_modules() if module is decoder)
    full = adapter.full_attention_layers(model)
    return Diagnosis(
        model_type=config.model_type,
        adapter=adapter,
        layers=f"{path}.layers" if path else "layers",
        depth=len(decoder.layers),
        full=full,
        attention=_attention(model, adapter),
        cannot=(
            *_tower(adapter, model),
            *adapter.limits,
            *filter(None, [why_not_videos(model)]),
            "chunked prefill: the question is read last",
        ),
    )


def skeleton_model(config: Any) -> Any:
    """A model of a config on the meta device: modules without weights."""
    import transformers

    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    auto = (
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModel,
    )
    try:
        with torch.device("meta"):
            for cls in filter(None, named):
                return cls(config)
            for cls in auto:
                if type(config) in cls._model_mapping:
                    return cls.from_config(config)
    except ImportError as error:
        raise CannotBuildError(
            f"{config.model_type!r} needs a package that is not installed: {_line(error)}"
        ) from error
    except Exception as error:  # whatever transformers' modules raise for a config that they cannot build
        raise CannotBuildError(
            f"transformers {transformers.__version__} cannot build a model of this {config.model_type!r} config: "
            f"{type(error).__name__}: {_line(error)}"
        ) from error
    if config.architectures:
        raise UnsupportedModelError(
            f"{', '.join(config.architectures)} is no class of transformers {transformers.__version__} (model_type "
            f"{config.model_type!r}); code of a checkpoint's own is not run."
        )
    raise UnsupportedModelError(f"transformers has no model class for config.model_type {config.model_type!r}")


def _attention(model: Any, adapter: Adapter) -> tuple[str, ...]:
    """Implementations that the model supports; all that go through transformers' attention interface can be read."""
    decoder: Any = adapter.decoder(model)
    cls: Any = type(decoder)
    able = attending_layers(decoder.layers)
    code = sys.modules[type(decoder.layers[able[0]]).__module__] if able else None
    # The flag is missing on some classes whose attention does go through the interface.
    if not getattr(cls, "_supports_attention_backend", False) and not hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
        return ()
    found = ["eager"]
    for name, flag in (("sdpa", "sdpa"), ("flash_attention_2", "flash_attn"), ("flex_attention", "flex_attn")):
        blocked = flag == "flash_attn" and not adapter.flash
        if getattr(cls, f"_supports_{flag}", False) and not blocked:
            found.append(name)
    return tuple(found)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _tower(adapter: Adapter, model: nn.Module) -> tuple[str, ...]:
    try:
        adapter.vision_tower(model)
    except UnsupportedModelError:
        return (f"dropping patches in the vision tower: {adapter.mixes}. Prune in the decoder instead.",)
    return ()


SKELETON = """\
from evengaze.layout import ImageInfo
from evengaze.models import Adapter, Panel, Picture, assemble, register


class {name}(Adapter):
    name = "{model_type}"
    model_types = ("{model_type}",)

    # def decoder(self, model): the module whose `layers` are the decoder layers, if it is not found by itself

    def layout(self, model, call):
        pictures = []
        for encoded in call.encoded:  # every call of get_image_features, with its arguments by name
            pixels = encoded.arguments["pixel_values"]
            grid = (pixels.shape[-2] // 14, pixels.shape[-1] // 14)  # rows and columns of *visual tokens* of an image
            for _ in pixels:
                pictures.append(Picture.still(Panel.plain(ImageInfo(grid))))
        return assemble(call, {{model.config.image_token_id: pictures}})


register({name})
"""


def skeleton(model_type: str) -> str:
    """An adapter to fill in."""
    name = "".join(part.capitalize() for part in model_type.replace("-", "_").split("_"))
    return SKELETON.format(name=name, model_type=model_type)
