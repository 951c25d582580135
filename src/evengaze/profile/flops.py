"""FLOPs counted while a call runs; what a schedule predicts of them is in `evengaze.profile.plan`."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs (two for a multiply-add) of all matrix products and attention kernels that a call runs."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
