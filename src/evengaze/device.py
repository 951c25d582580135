"""Values of the host on a device, without waiting for what the device is doing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Rows = slice | Tensor
"""Which rows of a batch: a slice, or (rows,) indices on the device of what is indexed."""


def device_rows(rows: Sequence[int], device: torch.device) -> Rows:
    """Row numbers as an index: a slice where they have no gaps."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return upload(torch.tensor(rows), device)


@lru_cache(256)
def counting(length: int, device: torch.device) -> Tensor:
    """(length,) 0, 1, 2, ... on a device, made once. Not to be written to."""
    with torch.inference_mode(False):
        return torch.arange(length, device=device)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, without waiting for what the device is doing."""
    return values.to(device, non_blocking=True)


def precise(device: torch.device | str) -> torch.dtype:
    """float64 where the device has it; Apple's GPUs do not."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64
