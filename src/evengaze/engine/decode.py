"""Decoding into caches that an earlier call pruned: every layer's mask and positions, cut to what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evengaze.compat import is_mask
from evengaze.engine import cache as kv
from evengaze.engine.kept import Kept
from evengaze.engine.masks import is_flat, take_mask
from evengaze.engine.rotary import Rotary


def in_graph(
    args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A layer's arguments in code that is being compiled, or None if they are right as they are.

    All that depends on what was pruned is in tensors that the cache layer carries, of shapes that depend on the buffer
    alone: one graph serves every request, and every attachment.

    Args:
        args: positional arguments; the hidden states come first.
        kwargs: keyword arguments, as the model passes them.
        cache: the layer's cache, or None.
    """
    fixed = getattr(cache, "fixed", None)
    if fixed is None:
        return None
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    cut = dict(kwargs)
    name = next((n for n, value in kwargs.items() if is_mask(n, value)), "attention_mask")
    mask = kwargs.get(name)
    if fixed.shift is not None:
        cut["position_ids"] = kwargs["position_ids"] - fixed.shift
        for table, call in (cache.tables or {}).items():
            if kwargs.get(table) is not None:
                cut[table] = call.at(hidden, cut["position_ids"])
    if mask is not None:
        cut[name] = take_mask(mask, None, fixed.columns, fixed.seen)
    return args, cut


class Steps:
    """Fits the arguments of layers to their caches, in a call that prunes nothing itself.

    Args:
        config: the decoder's.
        rotary: the call's.
        remember: whether masks are remembered for further layers; of one call only.

    Attributes:
        rotary: the call's.
        relayed: whether the call's first layer has seen to the others.
    """

    def __init__(self, config: Any, rotary: Rotary, *, remember: bool = True) -> None:
        self._config = config
        self.rotary = rotary
        self.relayed = False
        self._remember = remember
        self._made: dict[Any, tuple[dict[str, Any] | None, dict[str, Any], Any]] = {}
        self._shifted: dict[int, dict[str, Any]] = {}
        self._shifted_of: Mapping[str, Any] = {}

    def shift(self, kept: Sequence[Kept | None], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Shift the positions of layers that are given the same things, for all that they hold at once.

        Args:
            kept: what groups of layers hold; alive until the step ends.
            args: positional arguments of each layer.
            kwargs: keyword arguments of each layer.
        """
        moved = {id(k): k.shift for k in kept if k is not None and k.shift is not None}
        if len(moved) < 2 or not args:
            return
        positions = kwargs["position_ids"] - torch.stack([s.to(args[0].device) for s in moved.values()])
        tables = self.rotary.steps(args[0], positions, kwargs)
        if tables is not None:
            self._shifted_of = kwargs
            for k, position, found in zip(moved, positions, tables, strict=True):
                self._shifted[k] = {"position_ids": position, **found}

    def arguments(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A layer's arguments, or None if they are right as they are.

        Layers that hold the same tokens and get the same things share the work.
        """
        kept = kv.kept_of(cache)
        if kept is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if not self._remember or not args:
            cut, _ = self._arguments(layer, hidden, kwargs, cache, kept)
            return None if cut is None else (args, {**kwargs, **cut})
        key = (id(kept), type(cache), hidden.device, *map(id, kwargs.values()))
        made = self._made.get(key)
        if made is None:
            cut, served = self._arguments(layer, hidden, kwargs, cache, kept)
            made = self._made[key] = (cut, served, (kept, *kwargs.values()))  # what is held keeps the key's ids unique
        self.rotary.serve(layer, made[1])
        if made[0] is None:
            return None
        kwargs.update(made[0])
        return args, kwargs

    def _arguments(
        self, layer: int, hidden: Tensor, kwargs: dict[str, Any], cache: Any, kept: Kept
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """The keyword arguments that change, and the rotary calls that made some of them."""
        name = next((n for n, value in kwargs.items() if is_mask(n, value)), "attention_mask")
        mask = kwargs.get(name)
        cut: dict[str, Any] = {}
        served: dict[str, Any] = {}
        if kept.shift is not None:
            for table, value in kwargs.items():
                served |= self.rotary.made(table, value)
            self.rotary.serve(layer, served)
            shifted = self._shifted.get(id(kept), {})
            # Some layers are given other tables, or none.
            if shifted and all(kwargs.get(name) is self._shifted_of[name] for name in shifted):
                cut.update(shifted)
            else:
                cut["position_ids"] = kwargs["position_ids"] - kept.shift.to(hidden.device)
                cut.update(self.rotary.step(layer, hidden, cut["position_ids"], kwargs))
        elif mask is None and kept.real is None:
            return None, served
        if mask is not None or kept.real is not None:
            cut[name] = self._cut(mask, kept, cache, hidden)
        return cut, served

    def _cut(self, mask: Any, kept: Kept, cache: Any, hidden: Tensor) -> Any:
        """The mask that fits what a cache holds; of a static buffer without asking the device how much that is."""
        if mask is not None and not is_flat(mask) and kv.is_fixed(cache):
            fixed = kept.fixed(cache.max_cache_len)
            return take_mask(mask, None, fixed.columns.to(hidden.device), fixed.seen.to(hidden.device))
        past, length = int(cache.get_seq_length()), hidden.shape[1]
        return kv.cut_mask(mask, cache, kept, hidden, self._config, past=past, length=length)
