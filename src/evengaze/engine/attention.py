"""What one attention call received, and the softmax rows of it that a method asks for.

No n x n map is ever made: only the asked rows are multiplied, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evengaze.errors import AttachError

_ELEMENTS = 1 << 24
"""Scores held at once while rows are reduced; bounds the memory of methods with many query rows."""


@dataclass(frozen=True)
class AttentionStates:
    """What an attention function received in one call.

    Attributes:
        query: (B, H, Q, D) after rotary embedding and any query norm.
        key: (B, Hkv, K, D) likewise, the cache's entries first. A static cache hands over its whole buffer.
        mask: what the call was given: None, a 4-D bool or additive mask, a 2-D padding mask, or a flex BlockMask.
        scaling: factor on the logits.
        softcap: logits become `softcap * tanh(logits / softcap)` if set.
        sinks: (H,) learned extra logits that take part in the softmax, if the model has them.
        window: sliding-window length, where the mask does not already say so.
        past: cached entries in front of query 0.
        causal: whether a missing mask means causal attention (False in vision towers).
    """

    query: Tensor
    key: Tensor
    mask: Any
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None
    past: int = 0
    causal: bool = True

    def rows(self, row: int, queries: Tensor) -> Tensor:
        """Softmax rows of chosen queries of one batch row.

        Args:
            row: batch row.
            queries: (r,) indices into the call's Q queries.

        Returns:
            (H, r, K) float32 with K = past + Q.
        """
        return self._rows(row, queries.to(self.query.device), self._keys(row))

    def _keys(self, row: int) -> Tensor:
        """(Hkv, K, D) float32 keys of one batch row."""
        return self.key[row, :, : self.past + self.query.shape[2]].float()

    def _rows(self, row: int, queries: Tensor, key: Tensor) -> Tensor:
        heads, _, dim = self.query.shape[1:]
        keys = key.shape[1]
        query = self.query[row].index_select(1, queries).float()
        # Grouped-query attention: the heads that share a key are further query rows of it.
        logits = query.reshape(key.shape[0], -1, dim) @ key.transpose(1, 2)
        logits = logits.reshape(heads, len(queries), keys) * self.scaling
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        allowed = self._allowed(row, queries, keys)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        if self.sinks is not None:
            sink = self.sinks.float().reshape(-1, 1, 1).expand(heads, len(queries), 1)
            return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
        return torch.softmax(logits, -1)

    def received(self, row: int, queries: Tensor, columns: Tensor, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """Attention that chosen tokens receive from chosen queries, averaged over heads and reduced over queries.

        Args:
            row: batch row.
            queries: (r,) indices into the call's Q queries.
            columns: (n,) indices of the receiving tokens among the call's Q tokens.
            reduce: "mean" or "sum" over the queries.

        Returns:
            (n,) float32. Memory is O(chunk x keys), never O(r x keys).
        """
        heads, keys = self.query.shape[1], self.past + self.query.shape[2]
        chunk = max(1, _ELEMENTS // (heads * keys))
        device, key = self.query.device, self._keys(row)
        queries, columns = queries.to(device), columns.to(device) + self.past
        total = torch.zeros(len(columns), dtype=torch.float32, device=device)
        for part in torch.split(queries, chunk):
            total += self._rows(row, part, key).mean(0)[:, columns].sum(0)
        return total / len(queries) if reduce == "mean" else total

    def _allowed(self, row: int, queries: Tensor, keys: int) -> Tensor | None:
        """(1 or H, r, keys) bool: which keys each query may see; None if it may see all."""
        mask, device = self.mask, queries.device
        columns = torch.arange(keys, device=device)
        if isinstance(mask, BlockMask):
            index = torch.full((), row, device=device)
            head = torch.zeros((), dtype=torch.long, device=device)
            return mask.mask_mod(index, head, queries[:, None], columns[None])[None]
        if isinstance(mask, Tensor) and mask.dim() == 4:
            part = mask[row if mask.shape[0] > 1 else 0, :, :, :keys].index_select(1, queries)
            return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        seen = torch.ones(len(queries), keys, dtype=torch.bool, device=device)
        if self.causal:
            position = (queries + self.past)[:, None]
            seen = columns <= position
            if self.window is not None:
                seen &= columns > position - self.window
        if isinstance(mask, Tensor):
            seen = seen & mask[row, :keys].bool()
        elif not self.causal:
            return None
        return seen[None]


def attention_module(layer: nn.Module) -> nn.Module:
    """The self-attention module of a decoder or encoder layer.

    Raises:
        AttachError: none of the usual names holds a module with a config.
    """
    found = _attention_module(layer)
    if found is not None:
        return found
    raise AttachError(
        f"{type(layer).__name__} has no self-attention module with a `config` (looked for self_attn, attention, attn, "
        "self_attention), so its queries and keys cannot be read."
    )


def _attention_module(layer: nn.Module) -> nn.Module | None:
    for name in ("self_attn", "attention", "attn", "self_attention", "mixer"):
        module = getattr(layer, name, None)
        anything = name == "mixer" and not hasattr(module, "num_key_value_groups")
        if isinstance(module, nn.Module) and hasattr(module, "config") and not anything:
            return module
    return None


def attending(layers: Sequence[nn.Module]) -> tuple[int, ...]:
    """Which of a decoder's layers have attention; the others (linear attention, convolution, Mamba) have a state that
    runs through the sequence, or look at single tokens only."""
    return tuple(i for i, layer in enumerate(layers) if _attention_module(layer) is not None)


def implementation_of(module: nn.Module) -> str:
    """Name of a module's attention implementation.

    Raises:
        AttachError: it is not one of transformers' attention interface, which is where queries and keys are read.
    """
    config: Any = module.config
    name = config._attn_implementation or "eager"
    if name != "eager" and name not in ALL_ATTENTION_FUNCTIONS:
        raise AttachError(
            f"attention implementation {name!r} is not registered with transformers' AttentionInterface, so queries "
            "and keys are hidden. Load the model with attn_implementation='sdpa' or 'eager'."
        )
    return str(name)


def hidden_attention(module: nn.Module) -> AttachError:
    """The error for a module whose attention does not go through the interface."""
    return AttachError(
        f"{type(module).__name__} did not call transformers' attention interface, so its queries and keys are hidden. "
        "A custom kernel or a patched forward replaces it; use the stock module with 'sdpa', 'eager' or flash."
    )
