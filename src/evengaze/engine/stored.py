"""What a captured segment does to a cache: nothing. It shows layers what they attend to, and keeps what they store.

The keys and values of a segment are copied out of the graph's buffers together; each layer of the real cache gets its
own at its turn, and is given them, not a copy, where it would only hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache as memoize
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from evengaze.engine import cache as kv
from evengaze.engine.graphs import copies_of


class StandIn:
    """In place of the cache while a segment is captured: it takes what layers store, and shows what they attend to.

    Args:
        sizes: of the static buffers, by layer.
    """

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._sizes = sizes

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The layer's own keys and values; in a static buffer, empty behind them."""
        self.stored[layer] = (key, value)
        size = self._sizes.get(layer)
        return (key, value) if size is None else (_buffer(key, size), _buffer(value, size))

    def get_seq_length(self, *args: Any) -> int:
        """Nothing was there before."""
        return 0


def _buffer(states: Tensor, size: int) -> Tensor:
    batch, heads, length, width = states.shape
    held = states.new_zeros(batch, heads, size, width)
    held[:, :, :length] = states
    return held


def without(run: Any, cache: Cache | None, first: int, end: int) -> tuple[str | None, dict[int, int]]:
    """Why a segment runs as ever; and the sizes of static buffers, by layer."""
    if run.past:
        return "further turn", {}
    sizes: dict[int, int] = {}
    if cache is None:
        return None, sizes
    for i in range(first, end):
        layer = kv.layer_of(cache, i)
        kind: Any = type(layer)
        if layer is None or not _is_known(kind) or getattr(layer, "record_past", False):
            return f"cache of {type(cache if layer is None else layer).__name__}", {}
        if kv.is_fixed(layer):
            sizes[i] = layer.max_cache_len
    return None, sizes


@memoize
def _is_known(kind: Any) -> bool:
    """Whether a class of cache layers shows and stores what `StandIn` and `put_away` do."""
    base = _unpruned(kind)
    fixed = issubclass(base, StaticLayer) and not issubclass(base, StaticSlidingWindowLayer)
    return fixed or base in (DynamicLayer, DynamicSlidingWindowLayer)


@memoize
def _is_growing(kind: Any) -> bool:
    """Whether a class of cache layers stores what it is given, and nothing else."""
    return _unpruned(kind) is DynamicLayer


def _unpruned(kind: Any) -> Any:
    """The class of transformers' of which a pruned layer's is a subclass; an unpruned layer's own."""
    return next(c for c in kind.__mro__ if not getattr(c, "_evengaze", False))


def copied_states(stored: dict[int, tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values out of a graph's buffers, all of them together."""
    copies = iter(copies_of([states for pair in stored.values() for states in pair]))
    return {i: (next(copies), next(copies)) for i in stored}


def put_away(cache: Any, i: int, key: Tensor, value: Tensor) -> None:
    """Put a layer's keys and values, which are nobody else's, into the cache; copied only where it must be."""
    layer = cache.layers[i]
    kind: Any = type(layer)
    if not _is_growing(kind) or layer.is_initialized or getattr(cache, "offloading", False):
        cache.update(key, value, i)
        return
    layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
    layer.keys, layer.values = key, value
