"""Cutting tensors and attention masks to the tokens that are left. `B` rows, `M` tokens kept of `L`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def take(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather along a sequence axis whose preceding axis is the batch.

    Args:
        tensor: (..., B or 1, L, ...).
        index: (B, M).
        dim: the sequence axis, at least 1 when counted from the front.

    Returns:
        (..., B, M, ...).
    """
    dim = dim % tensor.dim()
    index = index.to(tensor.device)
    if index.shape[0] == tensor.shape[dim - 1] == 1:
        return tensor.index_select(dim, index[0])
    shape = list(tensor.shape)
    shape[dim - 1], shape[dim] = index.shape
    if tensor.shape[dim - 1] != index.shape[0]:
        whole = list(shape)
        whole[dim] = tensor.shape[dim]
        tensor = tensor.expand(whole)
    view = [1] * tensor.dim()
    view[dim - 1 : dim + 1] = index.shape
    return tensor.gather(dim, index.view(view).expand(shape))


def mask_columns(mask: Any) -> int:
    """Number of keys that a mask covers."""
    return int(mask.seq_lengths[1] if isinstance(mask, BlockMask) else mask.shape[-1])


def is_flat(mask: Any) -> bool:
    """Whether a mask is a 2-D padding mask, as flash attention takes it, without queries of its own."""
    return isinstance(mask, Tensor) and mask.dim() == 2


def real_tokens(mask: Any, states: Tensor, past: int) -> Tensor | None:
    """(B, L) bool: which tokens of a call are no padding; None if there is no mask.

    Args:
        mask: 2-D (B, past + L), 4-D bool or additive, or a mapping with one of these for each layer type.
        states: (B, L, ...) what enters the decoder.
        past: number of tokens in the cache.
    """
    batch, length = states.shape[:2]
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -length:].bool().to(states.device)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask[:, 0, -1, past : past + length]  # the last query sees every real token
        seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        return seen.expand(batch, -1).to(states.device)
    return None


def read_prompt(ids: Tensor | None, real: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A call's token ids and which of its tokens are no padding, on the host: one copy, for which the host waits.

    Args:
        ids: (B, L) or None.
        real: (B, L) bool, or None if no mask came in.

    Returns:
        Both on the host; the second is None if all tokens are real.
    """
    if ids is None or real is None or ids.shape != real.shape or ids.device != real.device:
        ids, real = None if ids is None else ids.cpu(), None if real is None else real.cpu()
    else:
        read = torch.stack([ids.long(), real.long()]).cpu()
        ids, real = read[0], read[1].bool()
    return ids, None if real is None or bool(real.all()) else real


def take_mask(mask: Any, rows: Tensor | None, columns: Tensor, real: Tensor | None) -> Any:
    """Cut an attention mask to the given queries and keys.

    Args:
        mask: 2-D (B, keys) padding mask, 4-D bool or additive mask, or a flex BlockMask.
        rows: (B, Q) queries to keep, or None for all.
        columns: (B, K) keys to keep.
        real: (B, K) bool, False for entries that nobody may attend to; None if all may.
    """
    if isinstance(mask, BlockMask):
        return _take_block_mask(mask, rows, columns, real)
    columns = columns.to(mask.device)
    real = None if real is None else real.to(mask.device)
    if mask.dim() == 2:
        part = mask.gather(1, columns)
        return part if real is None else (part.bool() & real).to(part.dtype)
    batch = columns.shape[0]
    part = mask.expand(batch, -1, -1, -1)
    if rows is not None:
        index = rows.to(mask.device)[:, None, :, None]
        part = part.gather(2, index.expand(-1, part.shape[1], -1, part.shape[3]))
    part = part.gather(3, columns[:, None, None].expand(-1, part.shape[1], part.shape[2], -1))
    if real is None:
        return part
    visible = real[:, None, None]
    return part & visible if part.dtype == torch.bool else part.masked_fill(~visible, torch.finfo(part.dtype).min)


def _take_block_mask(mask: BlockMask, rows: Tensor | None, columns: Tensor, real: Tensor | None) -> BlockMask:
    """`take_mask` of a flex BlockMask, which is a function of indices and has no entries to gather."""
    batch, keys = columns.shape
    if rows is None:
        rows = torch.arange(mask.seq_lengths[0], device=columns.device).expand(batch, -1)
    index = torch.arange(batch, device=columns.device)[:, None, None]
    head = torch.zeros((), dtype=torch.long, device=columns.device)
    # One captured dense tensor: nested gathers in a mask_mod break inductor's CPU template.
    dense = mask.mask_mod(index, head, rows[:, :, None], columns[:, None, :]).expand(batch, rows.shape[1], keys)
    dense = (dense if real is None else dense & real[:, None]).contiguous()

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return dense[b, q, k]

    return create_block_mask(visible, B=batch, H=None, Q_LEN=rows.shape[1], KV_LEN=keys, device=str(columns.device))


def causal_mask(real: Tensor, queries: int, implementation: str, dtype: torch.dtype) -> Tensor:
    """A mask where none came in, but some entries are fillers.

    Args:
        real: (B, K) bool.
        queries: number of queries; they are the last entries.
        implementation: attention implementation, which decides the mask's form.
        dtype: of an additive mask.
    """
    if "flash" in implementation:  # whose kernels are causal by themselves
        return real
    keys = real.shape[1]
    index = torch.arange(keys, device=real.device)
    visible = (index[None] <= index[keys - queries :, None])[None, None] & real[:, None, None]
    if implementation == "eager":
        zero = torch.zeros((), dtype=dtype, device=real.device)
        return torch.where(visible, zero, torch.finfo(dtype).min)
    return visible
