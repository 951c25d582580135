"""What a pruned KV cache remembers.

A pruned layer of a transformers cache stores fewer entries than the sequence has tokens. `Kept` says which ones; it
lives on the cache layer itself, so that interleaved generations, second turns, beams and reused caches need nothing
else. A pruned layer keeps reporting the *logical* length of the sequence: transformers then goes on building masks and
positions for the whole sequence, whichever layer it asks, and every layer's mask is cut to what the layer really holds.
That takes an attached pruner: without one, the layers of a pruned cache refuse what they are given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache as memoize
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from evengaze.compat import QUANTIZED_LAYER
from evengaze.engine.masks import causal_mask, is_flat, mask_columns, take_mask
from evengaze.errors import AttachError, ConfigError


@dataclass(frozen=True, eq=False)
class Kept:
    """The entries that a pruned cache layer holds.

    Attributes:
        slots: (B, M) logical index of each entry up to `end`; later entries are `end`, `end + 1`, ...
        real: (B, M) bool, False for fillers of rows that kept fewer tokens than others; None if there are none.
        end: logical length of the sequence when this was recorded.
        shift: (B, 1) how far positions were moved down, for methods that renumber; None otherwise.
    """

    slots: Tensor
    real: Tensor | None
    end: int
    shift: Tensor | None = None

    def select(self, rows: Tensor) -> Kept:
        """The same for other batch rows (beams)."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows.to(t.device)]

        return replace(self, slots=self.slots[rows.to(self.slots.device)], real=pick(self.real), shift=pick(self.shift))

    def reality(self) -> Tensor:
        """`real` as a tensor."""
        return torch.ones_like(self.slots, dtype=torch.bool) if self.real is None else self.real


def layer_of(cache: Any, index: int) -> Any:
    """The cache's layer, made now if the cache makes its layers on first use; None without a cache."""
    if cache is None or not hasattr(cache, "layers"):
        return None
    make = getattr(cache, "layer_class_to_replicate", None)
    while len(cache.layers) <= index and make is not None:
        cache.layers.append(make())
    layer = cache.layers[index] if index < len(cache.layers) else None
    return layer if hasattr(layer, "get_mask_sizes") else None


def check(cache: Any) -> None:
    """Raise a ConfigError unless the entries of a cache's layers can be counted and dropped."""
    kinds = [type(layer) for layer in getattr(cache, "layers", ())]
    kinds.append(getattr(cache, "layer_class_to_replicate", None) or type(None))
    for kind in kinds:
        if issubclass(kind, QUANTIZED_LAYER):
            raise ConfigError(
                f"the cache is quantized ({kind.__name__}): it hides its entries, so that it cannot be told which of "
                "them tokens were dropped from. Leave out cache_implementation='quantized' (or pass a DynamicCache); "
                "pruning makes the cache smaller by itself."
            )


def kept_of(layer: Any) -> Kept | None:
    """What a cache layer remembers, None if it was never pruned."""
    return getattr(layer, "kept", None)


def is_fixed(layer: Any) -> bool:
    """Whether the layer is a static buffer that holds the whole sequence (its mask has a column for every slot)."""
    return isinstance(layer, StaticLayer) and not isinstance(layer, StaticSlidingWindowLayer)


def is_sliding(layer: Any) -> bool:
    """Whether the layer holds the last tokens only."""
    return isinstance(layer, (DynamicSlidingWindowLayer, StaticSlidingWindowLayer))


def stored(layer: Any) -> int:
    """Entries that a cache layer physically holds."""
    if layer is None or not layer.is_initialized:
        return 0
    if isinstance(layer, StaticSlidingWindowLayer):
        return int(min(layer.cumulative_length_int, layer.max_cache_len - 1))
    if isinstance(layer, StaticLayer):
        return int(layer.cumulative_length)
    count = int(layer.keys.shape[-2])
    # While a sliding layer records its past (assisted decoding) it stores more than it shows.
    return min(count, int(layer.sliding_window) - 1) if isinstance(layer, DynamicSlidingWindowLayer) else count


def sizes(layer: Any, total: int) -> tuple[int, int]:
    """Bytes that a cache layer holds, and bytes that it would hold of `total` tokens if none had been dropped."""
    if layer is None or not layer.is_initialized:
        return 0, 0
    held = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    if isinstance(layer, StaticLayer):  # a buffer, whatever is in it
        return held, held
    if isinstance(layer, DynamicSlidingWindowLayer):
        total = min(total, int(layer.sliding_window) - 1)
    count = int(layer.keys.shape[-2])
    return held, held // count * total if count else 0


def entries(old: Kept | None, past: int, slots: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logical index of everything a cache layer was ever given, the new tokens included.

    Args:
        old: what the layer remembered before this call.
        past: logical length before the new tokens.
        slots: (B, M) logical indices of the new tokens.
        real: (B, M) bool, or None if all are real.

    Returns:
        (B, K) indices and (B, K) bool or None.
    """
    if past == 0:
        return slots, real
    start = 0 if old is None else old.end
    between = torch.arange(start, past, device=slots.device).expand(slots.shape[0], -1)
    parts = [between, slots] if old is None else [old.slots.to(slots.device), between, slots]
    if real is None and (old is None or old.real is None):
        return torch.cat(parts, 1), None
    flags = [torch.ones_like(p, dtype=torch.bool) for p in parts]
    if old is not None:
        flags[0] = old.reality().to(slots.device)
    if real is not None:
        flags[-1] = real
    return torch.cat(parts, 1), torch.cat(flags, 1)


def cut_mask(
    mask: Any,
    layer: Any,
    old: Kept | None,
    hidden: Tensor,
    implementation: str,
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
        implementation: attention implementation, which decides the form of a mask where none came in.
        past: logical length before this call.
        length: number of tokens of this call.
        slots: (B, M) those of them that are left; None for all.
        real: (B, M) bool, False for fillers; None without fillers.
    """
    batch, queries = hidden.shape[:2]
    new = torch.arange(length, device=hidden.device).expand(batch, -1) if slots is None else slots
    held, real = entries(old, past, new + past, real)
    if mask is None:
        shown = stored(layer) + queries
        return None if real is None else causal_mask(real[:, -shown:], queries, implementation, hidden.dtype)
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
    last, unwritten = held, 0
    if isinstance(layer, StaticSlidingWindowLayer):
        window, count = layer.max_cache_len, layer.cumulative_length_int
        if count >= window:
            last = window if queries == 1 else window - 1 + queries
        elif count + queries > window:
            last = count + queries
        else:
            unwritten = window - held
    elif isinstance(layer, StaticLayer):
        unwritten = layer.max_cache_len - held
    elif isinstance(layer, DynamicSlidingWindowLayer):
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


def fixed_columns(layer: Any, kept: Kept, columns: int) -> tuple[Tensor, Tensor]:
    """`_columns` for decoding into a static buffer: fixed shapes and no counters, as compiled graphs need.

    Slots that are not written yet lie behind the current position, where the mask is False anyway.
    """
    tail = torch.arange(kept.end, kept.end + layer.max_cache_len - kept.slots.shape[1], device=kept.slots.device)
    batch = kept.slots.shape[0]
    slots = torch.cat([kept.slots, tail.clamp(max=columns - 1).expand(batch, -1)], 1)
    return slots, torch.cat([kept.reality(), (tail < columns).expand(batch, -1)], 1)


def record(layer: Any, kept: Kept, dropped: int) -> None:
    """Make a cache layer remember what it holds, `dropped` tokens less than the sequence has in this call."""
    layer.__class__ = _logical(layer.__class__)
    layer.kept, layer.guarded = kept, True
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length += dropped  # its own counter of the logical length
    layer.dropped = getattr(layer, "dropped", 0) + dropped


def guard(cache: Any) -> None:
    """From now on the layers of a cache store tokens only for an attached pruner, which `admit`s them.

    All layers, also those that have nothing dropped: the first one refuses before any has stored anything.
    """
    for layer in getattr(cache, "layers", ()):
        if hasattr(layer, "get_mask_sizes"):
            layer.__class__ = _logical(layer.__class__)
            layer.guarded = True


def admit(layer: Any) -> None:
    """An attached pruner has seen to the arguments of the call in which a guarded layer is about to store tokens."""
    if getattr(layer, "guarded", False):
        layer.admitted = True


def trim(layer: Any, index: Tensor, kept: Kept, dropped: int) -> None:
    """Throw entries of a layer that has already run out of its cache.

    Args:
        layer: a cache layer that holds the whole sequence.
        index: (B, M) which of its entries stay, ascending.
        kept: what it holds afterwards.
        dropped: number of entries that go.
    """
    for name in ("keys", "values"):
        states = getattr(layer, name)
        at = index.to(states.device)[:, None, :, None]
        left = states.gather(2, at.expand(-1, states.shape[1], -1, states.shape[3]))
        if isinstance(layer, StaticLayer):  # a buffer stays where it is, as compiled graphs need
            states[:, :, : index.shape[1]] = left
        else:
            setattr(layer, name, left)
    if isinstance(layer, StaticLayer):
        layer.cumulative_length.sub_(dropped)
    record(layer, kept, dropped)


@memoize
def _logical(base: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    """A subclass of a cache layer class that counts logical tokens. Single inheritance: an instance's class can only
    be exchanged for one with the same layout."""
    if getattr(base, "_evengaze", False):
        return base

    class Pruned(base):  # type: ignore[misc]
        _layer_type = None  # transformers registers subclasses that name one
        _evengaze = True
        kept: Kept | None = None
        dropped = 0
        guarded = admitted = False

        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self.guarded and not self.admitted:
                raise AttachError(
                    "this cache was pruned: masks and positions fit it only while a pruner is attached. Go on with it "
                    "inside the `with` block (or before the handle's remove()), or attach a pruner again."
                )
            self.admitted = False
            return super().update(*args, **kwargs)  # type: ignore[no-any-return]

        def reset(self) -> None:
            self.kept, self.dropped, self.guarded, self.admitted = None, 0, False, False
            super().reset()

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._reorder(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._reorder(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            if self.kept is not None:
                rows = torch.arange(self.kept.slots.shape[0])
                self._reorder(rows.repeat_interleave(repeats))

        def _reorder(self, rows: Tensor) -> None:
            if self.kept is not None:
                self.kept = self.kept.select(rows)

    if issubclass(base, DynamicSlidingWindowLayer):

        class PrunedSliding(Pruned):
            def crop(self, tokens_to_remove: int) -> None:
                below = self.cumulative_length < self.sliding_window
                super().crop(tokens_to_remove)
                if below:  # transformers recounts from what is stored
                    self.cumulative_length += self.dropped

        return _named(PrunedSliding, base)

    class PrunedFull(Pruned):
        def get_seq_length(self) -> int:
            return super().get_seq_length() + self.dropped  # type: ignore[no-any-return]

    if issubclass(base, StaticSlidingWindowLayer):

        class PrunedStaticSliding(PrunedFull):
            def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
                self.cumulative_length_int += self.dropped
                try:
                    return super().get_mask_sizes(query_length)  # type: ignore[no-any-return]
                finally:
                    self.cumulative_length_int -= self.dropped

        return _named(PrunedStaticSliding, base)
    return _named(PrunedFull, base)


def _named(cls: type[CacheLayerMixin], base: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    cls.__name__ = cls.__qualname__ = f"Pruned{base.__name__}"
    return cls
