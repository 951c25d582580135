"""Decoding into caches that an earlier call pruned: every layer's mask and positions, cut to what it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evengaze.compat import is_mask
from evengaze.engine import cache as kv
from evengaze.engine.kept import Kept
from evengaze.engine.masks import is_flat, mask_columns, take_mask
from evengaze.engine.rotary import Rotary


class Steps:
    """Fits the arguments of layers to their caches, in a call that prunes nothing itself.

    Args:
        implementation: the decoder's attention implementation.
        rotary: the call's.
        remember: whether masks are remembered for further layers; of one call only.
    """

    def __init__(self, implementation: str, rotary: Rotary, *, remember: bool = True) -> None:
        self._implementation = implementation
        self._rotary = rotary
        self._remember = remember
        self._memo: dict[Any, tuple[Any, Any]] = {}

    def arguments(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A layer's arguments, or None if they are right as they are."""
        kept = kv.kept_of(cache)
        if kept is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        name = next((n for n, value in kwargs.items() if is_mask(n, value)), "attention_mask")
        mask = kwargs.get(name)
        cut = dict(kwargs)
        if kept.shift is not None:
            if not torch.compiler.is_compiling():  # a compiled step follows a prefill or step that was not
                for table, value in kwargs.items():
                    self._rotary.serve(layer, table, value)
            cut["position_ids"] = kwargs["position_ids"] - kept.shift.to(hidden.device)
            cut.update(self._rotary.step(layer, hidden, cut["position_ids"]))
        elif mask is None and kept.real is None:
            return None
        if mask is not None or kept.real is not None:
            cut[name] = self._mask(mask, kept, cache, hidden)
        return args, cut

    def _mask(self, mask: Any, kept: Kept, cache: Any, hidden: Tensor) -> Any:
        if not self._remember or torch.compiler.is_compiling():
            return self._cut(mask, kept, cache, hidden)
        # One gather for each step and kept set, not for each layer.
        key = (id(mask), id(kept), type(cache), kv.stored(cache), hidden.device)
        if key not in self._memo:
            self._memo[key] = ((mask, kept), self._cut(mask, kept, cache, hidden))
        return self._memo[key][1]

    def _cut(self, mask: Any, kept: Kept, cache: Any, hidden: Tensor) -> Any:
        if mask is not None and not is_flat(mask) and kv.is_fixed(cache):
            columns, real = kv.fixed_columns(cache, kept, mask_columns(mask))
            return take_mask(mask, None, columns.to(hidden.device), real.to(hidden.device))
        past, length = int(cache.get_seq_length()), hidden.shape[1]
        return kv.cut_mask(mask, cache, kept, hidden, self._implementation, past=past, length=length)
