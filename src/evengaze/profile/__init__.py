"""What pruning saves on a given machine: FLOPs, time and memory, each relative to the unpruned model."""

from evengaze.profile.flops import count_flops
from evengaze.profile.latency import Timing, clock_selection, interleave
from evengaze.profile.memory import cache_bytes, peak_bytes
from evengaze.profile.plan import FlopRatio, predict

__all__ = [
    "FlopRatio",
    "Timing",
    "cache_bytes",
    "clock_selection",
    "count_flops",
    "interleave",
    "peak_bytes",
    "predict",
]
