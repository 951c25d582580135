"""What the layers of a pruned KV cache hold, and the masks that fit them.

A pruned layer of a transformers cache stores fewer entries than the sequence has tokens. `Kept` says which ones; it
lives on the cache layer itself, so that interleaved generations, second turns, beams and reused caches need nothing
else. A pruned layer keeps reporting the *logical* length of the sequence: transformers then goes on building masks and
positions for the whole sequence, whichever layer it asks, and every layer's mask is cut to what the layer really holds.
That takes an attached pruner: without one, the layers of a pruned cache refuse what they are given.
`evengaze.engine.cache_layers` is what a layer itself does about it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from evengaze.compat import QUANTIZED_LAYER
from evengaze.engine.cache_layers import is_a, is_kind
from evengaze.engine.cache_layers import is_fixed as is_fixed
from evengaze.engine.kept import Kept, entries
from evengaze.engine.masks import causal_mask, is_flat, mask_columns, take_mask
from evengaze.errors import ConfigError


def layer_of(cache: Any, index: int) -> Any:
    """The cache's layer, made now if the cache makes its layers on first use; None without a cache."""
    if cache is None or not hasattr(cache, "layers"):
        return None
    if index < len(cache.layers):
        layer = cache.layers[index]
        return layer if hasattr(layer, "get_mask_sizes") else None
    make = getattr(cache, "layer_class_to_replicate", None)
    while len(cache.layers) <= index and make is not None:
        cache.layers.append(make())
    layer = cache.layers[index] if index < len(cache.layers) else None
    return layer if hasattr(layer, "get_mask_sizes") else None


def check(cache: Any) -> None:
    """Raise a ConfigError unless the entries of a cache's layers can be counted and dropped."""
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    kinds.add(getattr(cache, "layer_class_to_replicate", None) or type(None))
    for kind in kinds:
        if issubclass(kind, QUANTIZED_LAYER):
            raise ConfigError(
                f"the cache is quantized ({kind.__name__}): it hides its entries, so that it cannot be told which of "
                "them tokens were dropped from. Leave out cache_implementation='quantized' (or pass a DynamicCache); "
                "pruning makes the cache smaller by itself."
            )


def length_of(cache: Any) -> int:
    """Tokens in a cache. A static one counts on the device: it is asked only if it has been written to."""
    if cache is None:
        return 0
    held = getattr(cache, "layers", None)
    if held and not any(getattr(layer, "is_initialized", True) for layer in held):
        return 0
    return int(cache.get_seq_length())


def kept_of(layer: Any) -> Kept | None:
    """What a cache layer remembers, None if it was never pruned."""
    return getattr(layer, "kept", None)


def is_sliding(layer: Any) -> bool:
    """Whether the layer holds the last tokens only."""
    return is_a(layer, DynamicSlidingWindowLayer) or is_a(layer, StaticSlidingWindowLayer)


def stored(layer: Any) -> int:
    """Entries that a cache layer physically holds."""
    if layer is None or not layer.is_initialized:
        return 0
    if is_a(layer, StaticSlidingWindowLayer):
        return int(min(layer.cumulative_length_int, layer.max_cache_len - 1))
    if is_a(layer, StaticLayer):
        return int(layer.cumulative_length)
    count = int(layer.keys.shape[-2])
    # While a sliding layer records its past (assisted decoding) it stores more than it shows.
    return min(count, int(layer.sliding_window) - 1) if is_a(layer, DynamicSlidingWindowLayer) else count


def sizes(layer: Any, total: int) -> tuple[int, int]:
    """Bytes that a cache layer holds, and bytes that it would hold of `total` tokens if none had been dropped."""
    keys = getattr(layer, "keys", None)
    if keys is None:
        return 0, 0
    held, count = keys.nbytes + layer.values.nbytes, keys.shape[-2]
    kind: Any = layer.__class__
    if count == total or is_kind(kind, StaticLayer):  # a buffer, whatever is in it
        return held, held
    if is_kind(kind, DynamicSlidingWindowLayer):
        total = min(total, int(layer.sliding_window) - 1)
    return held, held // count * total if count else 0  # bytes are a multiple of the entries


def cut_mask(
    mask: Any,
    layer: Any,
    old: Kept | None,
    hidden: Tensor,
    config: Any,
    *,
    past: int,
    length: int,
    slots: Tensor | None = None,
    real: Tensor | None = None,
) -> Any:
    """An attention mask of the whole sequence, cut to what a layer hands to its attention.

    Args:
        mask: as transformers made it, in one of the forms of `take_mask`; None if attention is merely causal.
        layer: cache layer or None.
        old: what the layer remembered before this call.
        hidden: (B, M, d) the layer's input.
        config: the decoder's, whose attention implementation decides the form of a mask where none came in.
        past: logical length before this call.
        length: number of tokens of this call.
        slots: (B, M) those of them that are left; None for all.
        real: (B, M) bool, False for fillers; None without fillers.
    """
    if mask is None and real is None and (old is None or old.real is None):
        return None
    batch, queries = hidden.shape[:2]
    new = torch.arange(length, device=hidden.device).expand(batch, -1) if slots is None else slots
    held, real = entries(old, past, new + past, real)
    if mask is None:
        shown = stored(layer) + queries
        assert real is not None
        return causal_mask(real[:, -shown:], queries, config._attn_implementation or "eager", hidden.dtype)
    columns, real = _columns(layer, held, real, queries, mask, past + length)
    return take_mask(mask, slots, columns, real)


def _columns(
    layer: Any, slots: Tensor, real: Tensor | None, queries: int, mask: Any, total: int
) -> tuple[Tensor, Tensor | None]:
    """Which columns of a mask belong to what the layer hands to its attention.

    Args:
        layer: cache layer or None.
        slots: (B, K) from `entries`.
        real: (B, K) or None, from `entries`.
        queries: number of new tokens.
        mask: covers the whole sequence, or the last of it that a sliding layer sees.
        total: logical length, new tokens included.

    Returns:
        (B, k) column of each entry and (B, k) bool or None.
    """
    columns = mask_columns(mask)
    held = slots.shape[1]
    last, unwritten = held, 0  # the attention gets the last `last` entries, and so many slots behind them
    if is_a(layer, StaticSlidingWindowLayer):
        # What transformers' StaticSlidingWindowLayer.update returns. Full: its buffer, rolled on by one token, or all
        # of it but the oldest entry, and several new ones. Becoming full: all that it was given. Before: its buffer.
        window, count = layer.max_cache_len, layer.cumulative_length_int
        if count >= window:
            last = window if queries == 1 else window - 1 + queries
        elif count + queries > window:
            last = count + queries
        else:
            unwritten = window - held
    elif is_a(layer, StaticLayer):
        unwritten = layer.max_cache_len - held
    elif is_a(layer, DynamicSlidingWindowLayer):
        last = stored(layer) + queries
    if last < held:
        slots = slots[:, -last:]
        real = None if real is None else real[:, -last:]
    if columns < total:  # a sliding layer's mask covers the last `columns` logical slots only
        slots = slots - (total - columns)
        real = slots >= 0 if real is None else real & (slots >= 0)
    # A 2-D padding mask has no columns for the unwritten slots of a static buffer.
    if unwritten and not is_flat(mask):
        real = torch.ones_like(slots, dtype=torch.bool) if real is None else real
        slots = torch.nn.functional.pad(slots, (0, unwritten))
        real = torch.nn.functional.pad(real, (0, unwritten))
    return slots.clamp(0, columns - 1), real
