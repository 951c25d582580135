"""What methods will cost on prompts of a given size, from their schedules alone: no weights, no picture, no waiting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evengaze.methods import Pruner
from evengaze.schedule import DecoderShape, Schedule


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
    """

    method: str
    average_tokens: float
    entering: tuple[int, ...]
    flops: int
    flops_share: float
    kv_bytes: int
    kv_share: float

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
) -> list[Cost]:
    """The costs of methods, by name.

    Args:
        pruners: the methods.
        shape: the decoder's sizes, `DecoderShape.from_config(config)`.
        layers: its depth.
        visual: visual tokens of the prompt.
        text: its other tokens.
        entry_bytes: of one number in the cache; 2 for float16 and bfloat16.

    Raises:
        ConfigError: a method's stage lies outside of the decoder.
    """
    dense_flops = layers * shape.layer_flops(visual + text)
    dense_numbers = layers * shape.kv_bytes(visual + text, 1)
    costs = []
    for name, pruner in pruners.items():
        schedule: Schedule = pruner.schedule(layers, visual)
        flops, kept = schedule.flops(shape, text), sum(schedule.kv_bytes(shape, text, 1))
        shares = flops / dense_flops, kept / dense_numbers
        size = round(kept * entry_bytes)
        costs.append(Cost(name, schedule.average, schedule.entering, flops, shares[0], size, shares[1]))
    return costs


def picture_tokens(config: Any) -> int | None:
    """Visual tokens of one picture where all pictures of a model have as many; None where it depends on their size."""
    for owner in (config, getattr(config, "text_config", None)):
        for name in ("image_seq_length", "mm_tokens_per_image"):
            found = getattr(owner, name, None)
            if isinstance(found, int) and found > 0 and config.model_type in _FIXED:
                return found
    return None


_FIXED = ("llava", "gemma3", "paligemma")
"""Families whose pictures all have the same grid."""
