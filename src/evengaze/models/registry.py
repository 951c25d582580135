"""Which adapter serves which model: built-in families, outside packages, and adapters registered at run time.

Families are told apart by `config.model_type`. Built-in adapters are imported when first needed. Another package adds
its own through the entry-point group `evengaze.adapters` (the entry's name is the model type, its value an `Adapter`
class); a script calls `register`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

from torch import nn

from evengaze.errors import ConfigError, NoAdapterError, UnsupportedModelError
from evengaze.layout import VisualLayout
from evengaze.models.base import Adapter, Call, VisionTower, find_decoder
from evengaze.models.generic import generic_for
from evengaze.models.refusals import refuse_decoder, refuse_type

ENTRY_POINTS = "evengaze.adapters"

BUILT_IN = {
    "aya_vision": "tiles:AyaVision",
    "gemma3": "gemma:Gemma3",
    "granite4_vision": "llava_next:Granite4Vision",
    "idefics3": "tiles:Idefics3",
    "internvl": "tiles:InternVL",
    "llava": "llava:Llava",
    "llava_next": "llava_next:LlavaNext",
    "llava_next_video": "llava_next:LlavaNextVideo",
    "llava_onevision": "llava_next:LlavaOnevision",
    "mistral3": "llava:Mistral3",
    "paligemma": "gemma:PaliGemma",
    "qwen2_vl": "qwen:Qwen2VL",
    "qwen2_5_vl": "qwen:Qwen2VL",
    "qwen3_vl": "qwen:Qwen3VL",
    "qwen3_vl_moe": "qwen:Qwen3VL",
    "smolvlm": "tiles:Idefics3",
    "video_llava": "llava:VideoLlava",
}
"""Model type -> `module:class` under `evengaze.models`."""

_registered: dict[str, Adapter] = {}


class BareDecoder(Adapter):
    """A text decoder without a vision side: prunable with an explicit layout only."""

    name = "bare text decoder"
    model_types = ()
    padding = "as the given layout says"
    limits = ("finding visual tokens: say where they are, `pruner(model, layout=VisualLayout.from_spans(...))`",)

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """None: a text decoder cannot know which of its inputs are visual tokens."""
        return None

    def vision_tower(self, model: nn.Module, kind: Literal["image", "video"] = "image") -> VisionTower:
        """Refused: there is none."""
        raise UnsupportedModelError(f"{self.name}: it has no vision tower")


def register(adapter: Adapter | type[Adapter]) -> None:
    """Make an adapter known for its `model_types`; it takes precedence over built-in ones and entry points.

    Raises:
        ConfigError: the adapter names no model types.
    """
    instance = adapter() if isinstance(adapter, type) else adapter
    if not isinstance(instance, Adapter) or not instance.model_types:
        raise ConfigError(f"{adapter!r} is no Adapter with model_types; see evengaze.models.Adapter")
    for model_type in instance.model_types:
        _registered[model_type] = instance


def adapter_for_type(model_type: str) -> Adapter | None:
    """The adapter of a `config.model_type`, or None."""
    if model_type not in _registered:
        found = next(iter(entry_points(group=ENTRY_POINTS, name=model_type)), None)
        if found is not None:
            loaded: Any = found.load()
        elif model_type in BUILT_IN:
            module, _, name = BUILT_IN[model_type].partition(":")
            loaded = getattr(import_module(f"evengaze.models.{module}"), name)
        else:
            return None
        _registered[model_type] = loaded() if isinstance(loaded, type) else loaded
    return _registered[model_type]


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model.

    A text decoder without a vision side gets a `BareDecoder`, which needs an explicit layout.

    Raises:
        UnsupportedModelError: the family cannot be pruned in principle, or (`NoAdapterError`) no adapter matches.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config.model_type: give a transformers model (not a pipeline or a wrapper)"
        )
    adapter = adapter_for_type(config.model_type)
    if adapter is None:
        refuse_type(config.model_type)
        adapter = generic_for(model)
    if adapter is None:
        refusal = why_not(config)
        if refusal is not None:
            raise refusal
        find_decoder(model)
        adapter = BareDecoder()
    refuse_decoder(adapter.decoder(model))
    return adapter


def why_not(config: Any) -> UnsupportedModelError | None:
    """Why a config without an adapter cannot be served; None if it is a plain text decoder."""
    kind, text = config.model_type, config.get_text_config()
    if getattr(text, "cross_attention_layers", None):
        return UnsupportedModelError(
            f"{kind!r} feeds its images to cross-attention layers: there are no visual tokens in the decoder's "
            "sequence, so there is nothing to prune in it."
        )
    if getattr(config, "is_encoder_decoder", False):
        return UnsupportedModelError(f"{kind!r} is an encoder-decoder; only decoder-only models can be pruned.")
    if text is not config or getattr(config, "vision_config", None) is not None:
        return NoAdapterError(
            f"no adapter for config.model_type {kind!r}. Looked for it in evengaze.models.register(), in the entry "
            f"points {ENTRY_POINTS!r} and among the built-in families ({', '.join(sorted(BUILT_IN))}). Write an "
            "Adapter subclass (`evengaze doctor MODEL` prints a skeleton) and pass it to evengaze.models.register()."
        )
    return None
