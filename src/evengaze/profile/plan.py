"""What methods will cost on prompts of a given size, from their schedules alone: no weights, no picture, no waiting.

Everything that is predicted is predicted here; `evengaze plan` prints it, `evengaze profile` puts it beside what it
measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evengaze.methods import Pruner
from evengaze.schedule import DecoderShape, Schedule

_FIXED = ("llava", "gemma3", "paligemma")
"""Families whose pictures all have the same grid."""


@dataclass(frozen=True)
class Cost:
    """One method on one size of prompt.

    Attributes:
        method: what it is called.
        average_tokens: visual tokens that enter a layer, averaged over the layers.
        entering: visual tokens that enter each layer.
        flops: of the decoder layers' matrix products in the prefill.
        flops_share: of the unpruned model's.
        kv_bytes: of the key/value cache after the prefill.
        kv_share: of the unpruned model's.
        step_bytes: what a decoding step after the prefill reads: the decoder layers' matrices once, and every row's
            cache.
        step_share: of the unpruned model's.
    """

    method: str
    average_tokens: float
    entering: tuple[int, ...]
    flops: int
    flops_share: float
    kv_bytes: int
    kv_share: float
    step_bytes: int
    step_share: float

    @property
    def steps(self) -> str:
        """Where tokens leave: "576 -> 128 at layer 2"."""
        cuts = [i for i in range(1, len(self.entering)) if self.entering[i] != self.entering[i - 1]]
        counts = [self.entering[0], *(self.entering[i] for i in cuts)]
        if not cuts:
            return f"{counts[0]} in all layers"
        return " -> ".join([str(counts[0]), *(f"{n} at layer {i}" for n, i in zip(counts[1:], cuts, strict=True))])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def plan(
    pruners: Mapping[str, Pruner],
    shape: DecoderShape,
    layers: int,
    visual: int,
    text: int = 64,
    *,
    entry_bytes: float = 2,
    weight_bytes: float = 2,
    batch: int = 1,
) -> list[Cost]:
    """The costs of methods, by name.

    Args:
        pruners: the methods.
        shape: the decoder's sizes, `DecoderShape.from_config(config)`.
        layers: its depth.
        visual: visual tokens of the prompt.
        text: its other tokens.
        entry_bytes: of one number in the cache; 2 for float16 and bfloat16.
        weight_bytes: of one number in the weights.
        batch: rows of a decoding step. FLOPs and cache are those of one.

    Raises:
        ConfigError: a method's stage lies outside of the decoder.
    """
    dense_flops = layers * shape.layer_flops(visual + text)
    dense_numbers = layers * shape.kv_bytes(visual + text, 1)
    weights = layers * shape.layer_weights * weight_bytes
    dense_step = weights + batch * dense_numbers * entry_bytes
    costs = []
    for name, pruner in pruners.items():
        schedule: Schedule = pruner.schedule(layers, visual)
        flops, kept = schedule.flops(shape, text), sum(schedule.kv_bytes(shape, text, 1))
        step = weights + batch * kept * entry_bytes
        costs.append(
            Cost(
                method=name,
                average_tokens=schedule.average,
                entering=schedule.entering,
                flops=flops,
                flops_share=flops / dense_flops,
                kv_bytes=round(kept * entry_bytes),
                kv_share=kept / dense_numbers,
                step_bytes=round(step),
                step_share=step / dense_step,
            )
        )
    return costs


@dataclass(frozen=True)
class FlopRatio:
    """What a schedule predicts, relative to the unpruned model.

    Attributes:
        flops: of the decoder layers' matrix products in the prefill.
        kv: of the key/value cache after it.
        average: visual tokens that enter a layer, averaged over the layers.
    """

    flops: float
    kv: float
    average: float


def predict(pruner: Pruner, config: Any, visual: int, text: int) -> FlopRatio:
    """What a method should save on a prompt of `visual` image tokens and `text` other tokens; `plan` of one method.

    Args:
        pruner: the method.
        config: transformers config of the model.
        visual: image tokens of the prompt.
        text: its other tokens.
    """
    (cost,) = plan({"": pruner}, DecoderShape.from_config(config), depth_of(config), visual, text)
    return FlopRatio(cost.flops_share, cost.kv_share, cost.average_tokens)


def depth_of(config: Any) -> int:
    """Decoder layers of a config."""
    return int(config.get_text_config().num_hidden_layers)


def picture_tokens(config: Any) -> int | None:
    """Visual tokens of one picture where all pictures of a model have as many; None where it depends on their size."""
    for owner in (config, getattr(config, "text_config", None)):
        for name in ("image_seq_length", "mm_tokens_per_image"):
            found = getattr(owner, name, None)
            if isinstance(found, int) and found > 0 and config.model_type in _FIXED:
                return found
    return None
