"""Cache layers that were pruned: they count logical tokens, and take what they remember along.

Whatever transformers or a caller does with a cache (crop, reorder, repeat, select, reset, copy, pickle), what its
layers remember follows, or the operation is refused before any layer has changed. Classes are made for whatever layer
class comes: an instance's class can only be exchanged for one with the same layout, hence single inheritance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache as memoize
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from evengaze.engine.kept import Fixed, Kept
from evengaze.errors import AttachError, ConfigError

_OTHER_STATES = ("conv_states", "indexer_keys")
"""What layers hold beside keys and values: linear attention, sparse attention with an indexer."""


class Gate:
    """Whether a pruned cache may store tokens: an attached pruner sees to what a running call gives it.

    Opened and shut once a call. The cache's first layer looks at it, and refuses before any has stored anything.
    """

    __slots__ = ("__weakref__", "open")

    def __init__(self) -> None:
        self.open = False

    def __reduce__(self) -> Any:
        return Gate, ()


def record(layer: Any, kept: Kept, dropped: int) -> None:
    """Make a cache layer remember what it holds, `dropped` tokens less than the sequence has in this call."""
    layer.__class__ = _logical(layer.__class__)
    layer.kept = kept
    # Graphs of compiled steps read it from the layer: it must be there, with its final shape, before the first step.
    layer.fixed = kept.fixed(layer.max_cache_len) if is_fixed(layer) else None
    if is_a(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length += dropped  # its own counter of the logical length
    layer.dropped = getattr(layer, "dropped", 0) + dropped


def record_all(told: Sequence[Any], kept: Kept | None, dropped: int) -> None:
    """The same for layers of one kind that grow and are empty."""
    if kept is None or not told:
        return
    kind = _logical(told[0].__class__)
    sliding = is_a(told[0], DynamicSlidingWindowLayer)
    for layer in told:
        layer.__class__ = kind
        layer.kept, layer.fixed, layer.dropped = kept, None, dropped
        if sliding:
            layer.cumulative_length += dropped


def put_gate(cache: Any, below: int) -> Gate | None:
    """From now on a cache stores tokens only for an attached pruner, in calls for which it opens the gate.

    Args:
        cache: the cache, or None.
        below: number of its layers that hold everything so far; the others are about to record what they do.

    Returns:
        The gate, open for the call that runs; None without a cache.
    """
    if cache is None:
        return None
    gate: Gate = getattr(cache, "gate", None) or Gate()
    gate.open = True
    layers = getattr(cache, "layers", ())
    for layer in layers[:below]:
        if hasattr(layer, "get_mask_sizes"):
            layer.__class__ = _logical(layer.__class__)
    first = next((layer for layer in layers if hasattr(layer, "get_mask_sizes")), None)
    if first is not None:
        first.__class__ = _guarding(_logical(first.__class__))
        first.gate = gate
    if isinstance(cache, Cache):
        cache.__class__ = _whole(cache.__class__)
        cache.gate = gate
    return gate


def gate_of(cache: Any) -> Gate | None:
    """The gate of a cache; None if nothing was ever dropped from it."""
    return getattr(cache, "gate", None)


def is_fixed(layer: Any) -> bool:
    """Whether the layer is a static buffer that holds the whole sequence (its mask has a column for every slot)."""
    return is_a(layer, StaticLayer) and not is_a(layer, StaticSlidingWindowLayer)


def is_a(layer: Any, kind: type) -> bool:
    """`isinstance` for cache layers, which are abstract classes: asked of every layer in every call, and slow there."""
    cls: Any = type(layer)
    if torch.compiler.is_compiling():  # which warns of functions that remember
        return issubclass(cls, kind)
    return is_kind(cls, kind)


@memoize
def is_kind(cls: type, kind: type) -> bool:
    """`issubclass`, likewise."""
    return issubclass(cls, kind)


def kind_of(cls: Any) -> Any:
    """The class of transformers' that a layer's class is, or is a pruned one of."""
    return getattr(cls, "_kind", cls)


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
        if is_a(layer, StaticLayer):  # a buffer stays where it is, as compiled graphs need
            states[:, :, : index.shape[1]] = left
        else:
            setattr(layer, name, left)
    if is_a(layer, StaticLayer):
        layer.cumulative_length.sub_(dropped)
    record(layer, kept, dropped)


@memoize
def _logical(base: Any) -> Any:
    """A subclass of a cache layer class that counts logical tokens."""
    if getattr(base, "_evengaze", False):
        return base

    class Pruned(base):  # type: ignore[misc]
        _layer_type = None  # transformers registers subclasses that name one
        _evengaze = True
        _kind = base
        keys: Any
        values: Any
        kept: Kept | None = None
        dropped = 0
        fixed: Fixed | None = None
        tables: Any = None

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _revive, (base,), {**self.__dict__, "tables": None}

        def reset(self) -> None:
            self.kept, self.dropped, self.fixed, self.tables = None, 0, None, None
            super().reset()

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._follow(lambda kept: kept.select(beam_idx))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._follow(lambda kept: kept.select(indices))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._follow(lambda kept: kept.repeat(repeats))

        def _follow(self, change: Callable[[Kept], Kept]) -> None:
            if self.kept is not None:
                self.kept = change(self.kept)
                self._fix()

        def _fix(self) -> None:
            """What compiled decoding reads follows `kept`."""
            kept = self.kept
            self.fixed = None if kept is None or not is_fixed(self) else kept.fixed(self.max_cache_len)

        def crop(self, tokens_to_remove: int) -> None:
            kept, total = self.kept, self._after(tokens_to_remove)
            if kept is None or total is None or total >= kept.end:
                self._crop(tokens_to_remove)
                return
            left = kept.before(total)
            self._shorten(int(self.get_seq_length()) - kept.end + kept.count - left.count)
            self.kept, self.dropped = (None if left.everything else left), total - left.count
            self._fix()

        def _after(self, tokens_to_remove: int) -> int | None:
            """Logical length after a crop; None if there is nothing to crop, or transformers has to refuse it."""
            if tokens_to_remove >= 0 or not self.is_initialized:
                return None
            return max(0, int(self.get_seq_length()) + tokens_to_remove)

        def _crop(self, tokens_to_remove: int) -> None:
            """What a layer that has dropped nothing does."""
            super().crop(tokens_to_remove)

        def _shorten(self, entries: int) -> None:
            """Throw the last entries away."""
            left = self.keys.shape[-2] - entries
            self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]

        def check_crop(self, tokens_to_remove: int) -> None:
            """Raise a ConfigError if a crop cannot be exact."""
            total = self._after(tokens_to_remove)
            span = None if self.kept is None or total is None else self.kept.split(total)
            if span is not None:
                raise ConfigError(
                    f"a pruned cache cannot be cropped to {total} tokens, in the midst of a picture ({span[0]} to "
                    f"{span[1]}) of which tokens were dropped or merged: what is cut off cannot be put back. Crop "
                    "to a place before or behind the picture."
                )

    if issubclass(base, DynamicSlidingWindowLayer):
        return _named(_sliding(Pruned), base)

    class PrunedFull(Pruned):
        def get_seq_length(self) -> int:
            return super().get_seq_length() + self.dropped  # type: ignore[no-any-return]

    if not issubclass(base, StaticLayer):
        return _named(PrunedFull, base)
    return _named(_static(PrunedFull), base)


def _sliding(pruned: Any) -> Any:
    """A layer that grows, but holds the last tokens only. Its counter is of logical tokens."""

    class PrunedSliding(pruned):  # type: ignore[misc]
        keys: Any
        values: Any
        cumulative_length: int

        def _crop(self, tokens_to_remove: int) -> None:
            if self._after(tokens_to_remove) is not None:
                self._shorten(-tokens_to_remove)
                return
            total = self.cumulative_length
            super()._crop(tokens_to_remove)
            self.cumulative_length = total  # transformers recounts from what is stored

        def _shorten(self, entries: int) -> None:
            super()._shorten(entries)
            shown = self.sliding_window - 1  # what `update` keeps: the next token is the window's last
            self.keys, self.values = self.keys[..., -shown:, :], self.values[..., -shown:, :]

        def crop(self, tokens_to_remove: int) -> None:
            self.check_crop(tokens_to_remove)
            total = self._after(tokens_to_remove)
            super().crop(tokens_to_remove)
            if total is not None:
                self.cumulative_length = total

        def check_crop(self, tokens_to_remove: int) -> None:
            super().check_crop(tokens_to_remove)
            total = self._after(tokens_to_remove)
            if total is None:
                return
            # The last of all entries that were ever stored are still there.
            given, left = self.cumulative_length - self.dropped, _entries(self.kept, total)
            there, start = self.keys.shape[-2] - (given - left), total - self.sliding_window + 1
            if there < min(left, self.sliding_window - 1) and there < left - _entries(self.kept, max(0, start)):
                raise ConfigError(
                    f"this cache cannot be cropped by {-tokens_to_remove} tokens: a layer with a window of "
                    f"{self.sliding_window} has thrown away what it would need again. Crop less, or keep a copy "
                    "(copy.deepcopy) of the cache as it was."
                )

    return PrunedSliding


def _static(pruned: Any) -> Any:
    """A layer that is a buffer."""

    class PrunedStatic(pruned):  # type: ignore[misc]
        def _shorten(self, entries: int) -> None:
            self.cumulative_length.sub_(entries)  # what lies behind it will be overwritten

    if not issubclass(pruned, StaticSlidingWindowLayer):
        return PrunedStatic

    class PrunedStaticSliding(PrunedStatic):
        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            # Its own counter is of entries, by which `update` finds their places; masks are made for logical tokens.
            self.cumulative_length_int += self.dropped
            try:
                return super().get_mask_sizes(query_length)  # type: ignore[no-any-return]
            finally:
                self.cumulative_length_int -= self.dropped

        def _shorten(self, entries: int) -> None:
            super()._shorten(entries)
            self.cumulative_length_int -= entries

        def check_crop(self, tokens_to_remove: int) -> None:
            super().check_crop(tokens_to_remove)
            if self._after(tokens_to_remove) is not None and not self.is_croppable:
                raise ConfigError(
                    f"this cache cannot be cropped: a static layer with a window of {self.max_cache_len} does not keep "
                    "what it would need again. Use a dynamic cache (leave out cache_implementation='static')."
                )

    return PrunedStaticSliding


def _entries(kept: Kept | None, length: int) -> int:
    """Entries that a layer was given of the first `length` tokens."""
    if kept is None:
        return length
    return kept.count + length - kept.end if length >= kept.end else kept.before(length).count


def _named(cls: Any, base: Any) -> Any:
    cls.__name__ = cls.__qualname__ = f"Pruned{base.__name__}"
    return cls


@memoize
def _guarding(pruned: Any) -> Any:
    """A subclass of a pruned layer's class that takes no tokens while the gate is shut: the first layer's."""
    if hasattr(pruned, "gate"):
        return pruned

    class Guarding(pruned):  # type: ignore[misc]
        gate: Gate | None = None

        def __reduce_ex__(self, protocol: Any) -> Any:
            _, (base,), state = super().__reduce_ex__(protocol)
            return _revive, (base, True), state

        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self.gate is not None and not self.gate.open:
                raise AttachError(
                    "this cache was pruned: masks and positions fit it only while a pruner is attached. Go on with it "
                    "inside the `with` block (or before the handle's remove()), or attach a pruner again."
                )
            return super().update(*args, **kwargs)  # type: ignore[no-any-return]

        def reset(self) -> None:
            self.gate = None
            super().reset()

    Guarding.__name__ = Guarding.__qualname__ = pruned.__name__
    return Guarding


@memoize
def _whole(base: Any) -> Any:
    """A subclass of a cache class whose operations are all or nothing, and leave nothing behind."""
    if getattr(base, "_evengaze", False):
        return base

    class PrunedCache(base):  # type: ignore[misc]
        _evengaze = True

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _revive_whole, (base,), self.__dict__

        def crop(self, tokens_to_remove: int) -> None:
            pruned = [layer for layer in self.layers if hasattr(layer, "check_crop")]
            for layer in pruned:
                layer.check_crop(tokens_to_remove)
            self._check_others(tokens_to_remove)
            super().crop(tokens_to_remove)
            if all(layer.kept is None for layer in pruned):  # nothing that was dropped belongs to the sequence
                for layer in pruned:
                    if hasattr(layer, "gate"):
                        layer.gate = None

        def _check_others(self, tokens_to_remove: int) -> None:
            if tokens_to_remove >= 0 or not any(hasattr(layer, n) for layer in self.layers for n in _OTHER_STATES):
                return
            for layer in self.layers:
                kept = getattr(layer, "kept", None)
                if kept is not None and not kept.whole_from(int(layer.get_seq_length()) + tokens_to_remove):
                    raise ConfigError(
                        f"this cache cannot be cropped by {-tokens_to_remove} tokens: tokens among them were dropped, "
                        "and some of its layers hold more than keys and values, of which it is not known to whom they "
                        "belong. Keep a copy (copy.deepcopy) of the cache as it was."
                    )

    if hasattr(base, "__iter__"):

        class PrunedIterable(PrunedCache):
            def __iter__(self) -> Iterator[Any]:
                if any(getattr(layer, "gate", None) is not None for layer in self.layers):
                    raise AttachError(
                        "this cache was pruned: its keys and values alone do not say which tokens they belong to. Copy "
                        "it with copy.deepcopy, or save it with torch.save or pickle: what it remembers goes along."
                    )
                return super().__iter__()  # type: ignore[no-any-return]

        return _named(PrunedIterable, base)
    return _named(PrunedCache, base)


def _revive(base: Any, guarding: bool = False) -> Any:
    """An empty pruned layer for pickle and copy to fill."""
    cls = _guarding(_logical(base)) if guarding else _logical(base)
    return cls.__new__(cls)


def _revive_whole(base: Any) -> Any:
    """An empty pruned cache for pickle and copy to fill."""
    cls = _whole(base)
    return cls.__new__(cls)
