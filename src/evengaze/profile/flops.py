"""FLOPs of a prefill: predicted from the schedule, and counted while a call runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from evengaze.methods import Pruner
from evengaze.schedule import DecoderShape


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
    """What a method should save on a prompt of `visual` image tokens and `text` other tokens.

    Args:
        pruner: the method.
        config: transformers config of the model.
        visual: image tokens of the prompt.
        text: its other tokens.
    """
    shape, layers = DecoderShape.from_config(config), int(config.get_text_config().num_hidden_layers)
    schedule = pruner.schedule(layers, visual)
    dense = layers * shape.kv_bytes(visual + text)
    return FlopRatio(schedule.flop_ratio(shape, text), sum(schedule.kv_bytes(shape, text)) / dense, schedule.average)


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs (two for a multiply-add) of all matrix products and attention kernels that a call runs."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
