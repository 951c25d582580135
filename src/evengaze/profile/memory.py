"""Memory of a call: the peak of its own allocations, the bytes in a key/value cache, and how many rows fit."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MEMORY = Path("/proc/meminfo")


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes that a call held at once beyond what was held before it (weights are not counted).

    Args:
        call: is run once.
        device: whose memory to watch.
    """
    device = torch.device(device)
    gc.collect()  # what is freed in between was allocated in between
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes lines of its own to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    inner: Any = profile.profiler
    changes = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a transformers cache holds."""
    parts = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in parts)


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that a device still has for this process; None where that is not known.

    Of a GPU what nobody uses and what torch keeps for later; of a processor what Linux calls available.
    """
    device = torch.device(device)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type == "cpu" and _MEMORY.exists():
        for line in _MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def row_bytes(peaks: Mapping[int, int], kept: int) -> int:
    """Bytes that one more row of a batch takes.

    Args:
        peaks: most bytes that a prefill held at once, by batch size. What all batches need alike is left out if there
            are two of them.
        kept: bytes of one row's keys and values at the end of an answer, which may be more.
    """
    sizes = sorted(peaks)
    small, large = sizes[0], sizes[-1]
    if small == large:
        grown = peaks[large] / large
    else:
        grown = (peaks[large] - peaks[small]) / (large - small)
    return max(1, round(grown), kept)
