"""What one attention call received, and the softmax rows of it that a method asks for.

No n x n map is ever made: only the asked rows are multiplied, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evengaze.device import Rows, counting
from evengaze.errors import AttachError
from evengaze.models.base import ATTENTION_NAMES, attention_of
from evengaze.protocol import Picked

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
        batch: (B,) which of the call's rows these are, for masks that are functions of it; None: all, in order.
        samples: (B, Q) which sample of a packed row each token belongs to, where no mask says so; tokens see their own.
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
    batch: Tensor | None = None
    samples: Tensor | None = None

    def select(self, rows: Rows) -> AttentionStates:
        """The same of some rows, on its own device: a stage may be on another one than the layer that it reads."""
        rows = rows if isinstance(rows, slice) else rows.to(self.query.device)
        mask, batch = self.mask, self.batch
        if isinstance(mask, BlockMask):
            batch = torch.arange(len(self.query), device=self.query.device) if batch is None else batch
            batch = batch[rows]
        elif isinstance(mask, Tensor) and len(mask) == len(self.query):
            mask = mask[rows]
        samples = None if self.samples is None else self.samples[rows]
        return replace(self, query=self.query[rows], key=self.key[rows], mask=mask, batch=batch, samples=samples)

    def rows(self, queries: Tensor) -> Tensor:
        """Softmax rows of chosen queries.

        Args:
            queries: (B, r) indices into the call's Q queries.

        Returns:
            (B, H, r, K) float32 with K = past + Q.
        """
        return self._rows(Picked(queries.to(self.query.device)), self._keys())

    def received(self, queries: Picked, columns: Picked, reduce: Literal["mean", "sum"] = "mean") -> Tensor:
        """Attention that chosen tokens receive from chosen queries, averaged over heads and reduced over queries.

        Args:
            queries: r of the call's Q queries, of each row.
            columns: the n receiving tokens among the call's Q tokens.
            reduce: "mean" or "sum" over the queries.

        Returns:
            (B, n) float32. Memory is O(chunk x keys), never O(r x keys).
        """
        batch, heads, device = *self.query.shape[:2], self.query.device
        queries, columns = queries.to(device), columns.to(device)
        keys, count = self._keys(), queries.index.shape[1]
        chunk = max(1, _ELEMENTS // (batch * heads * keys.shape[2]))
        if count <= chunk and queries.real is None:
            one = self._sums(queries, columns, keys)
            return one if reduce == "sum" or count == 1 else one / count
        total = sum(self._sums(part, columns, keys) for part in queries.split(chunk))
        assert isinstance(total, Tensor)
        if reduce == "sum" or (queries.real is None and count == 1):
            return total
        return total / (count if queries.real is None else queries.real.sum(1, keepdim=True))

    def _sums(self, queries: Picked, columns: Picked, keys: Tensor) -> Tensor:
        """(B, n) what columns receive from some queries together, averaged over heads."""
        seen = self._rows(queries, keys).mean(1)  # of a token that is no query of a row, the softmax may be empty
        if columns.here is not None:
            seen = seen[:, :, self.past + columns.here.start : self.past + columns.here.stop]
        else:
            at = columns.index + self.past if self.past else columns.index
            seen = seen.gather(2, at[:, None].expand(-1, seen.shape[1], -1))
        if queries.real is not None:
            seen = seen.masked_fill(~queries.real[..., None], 0.0)
        return seen[:, 0] if seen.shape[1] == 1 else seen.sum(1)

    def _keys(self) -> Tensor:
        """(B, Hkv, K, D) float32 keys, without the unwritten rest of a static buffer."""
        return self.key[:, :, : self.past + self.query.shape[2]].float()

    def _rows(self, queries: Picked, key: Tensor) -> Tensor:
        """(B, H, r, K) softmax rows of some queries."""
        batch, heads, _, dim = self.query.shape
        count, keys = queries.index.shape[1], key.shape[2]
        if queries.here is not None:
            query = self.query[:, :, queries.here]
        else:
            query = self.query.gather(2, queries.index[:, None, :, None].expand(-1, heads, -1, dim))
        # Grouped-query attention: the heads that share a key are further query rows of it.
        query = query.float().reshape(batch, key.shape[1], -1, dim)
        logits = (query @ key.transpose(2, 3)).reshape(batch, heads, count, keys) * self.scaling
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        hidden = self._hidden(queries, keys)
        if hidden is not None:
            logits = logits.masked_fill(hidden, float("-inf"))
        if self.sinks is not None:  # GPT-OSS: part of the softmax, but no token receives it
            sink = self.sinks.float().reshape(1, -1, 1, 1).expand(batch, heads, count, 1)
            return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
        return torch.softmax(logits, -1)

    def _hidden(self, queries: Picked, keys: int) -> Tensor | None:
        """(B, 1 or H, r, keys) bool: which keys each query may not see; None if it may see all."""
        if self.mask is None and self.samples is None and self.window is None:
            if not self.causal or queries.run == keys - 1 - self.past:
                return None
            position = queries.index + self.past if self.past else queries.index
            return (counting(keys, position.device) > position[:, :, None])[:, None]
        allowed = self._allowed(queries, keys)
        return None if allowed is None else ~allowed

    def _allowed(self, picked: Picked, keys: int) -> Tensor | None:
        """(B, 1 or H, r, keys) bool: which keys each query may see; None if it may see all."""
        mask, queries = self.mask, picked.index
        device, batch = queries.device, len(queries)
        columns = counting(keys, device)
        if isinstance(mask, BlockMask):
            index = torch.arange(batch, device=device) if self.batch is None else self.batch.to(device)
            head = torch.zeros((), dtype=torch.long, device=device)
            return mask.mask_mod(index[:, None, None], head, queries[:, :, None], columns)[:, None]
        if isinstance(mask, Tensor) and mask.dim() == 4:
            part = mask[:, :, :, :keys].expand(batch, -1, -1, -1)
            if picked.here is not None:
                part = part[:, :, picked.here]
            else:
                part = part.gather(2, queries[:, None, :, None].expand(-1, part.shape[1], -1, keys))
            # What is hidden holds the lowest number or minus infinity, perhaps with small terms added.
            return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        seen: Tensor | None = None
        if self.causal:
            position = (queries + self.past)[:, :, None]
            seen = columns <= position
            if self.window is not None:
                seen = seen & (columns > position - self.window)
            if self.samples is not None:
                samples = self.samples.to(device)
                seen = seen & (samples.gather(1, queries)[:, :, None] == samples[:, None])
        if isinstance(mask, Tensor):
            real = mask[:, None, :keys].bool()
            seen = real if seen is None else seen & real
        return None if seen is None else seen[:, None]


def attention_module(layer: nn.Module) -> nn.Module:
    """The self-attention module of a decoder or encoder layer.

    Raises:
        AttachError: none of the usual names holds a module with a config.
    """
    found = attention_of(layer)
    if found is not None:
        return found
    raise AttachError(
        f"{type(layer).__name__} has no self-attention module with a `config` (looked for "
        f"{', '.join(ATTENTION_NAMES)}), so its queries and keys cannot be read."
    )


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
        "A custom kernel or a patched forward replaces it (use the stock module with 'sdpa', 'eager' or flash), or it "
        "was compiled after the pruner was attached (attach it afterwards)."
    )
