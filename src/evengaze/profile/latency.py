"""Time of calls relative to each other. Interleaved, so that a machine that slows down slows all of them down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import comb
from statistics import median
from time import perf_counter, process_time
from typing import TypeVar

import torch

from evengaze.methods import Pruner, Selection, View

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Times of one call, one entry a round.

    Attributes:
        seconds: wall time.
        cpu: processor time of all threads together. On a processor that other programs use as well it is the steadier
            of the two; for work on an accelerator it says nothing.
    """

    seconds: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def median(self) -> float:
        """Typical wall time."""
        return median(self.seconds)

    @property
    def best(self) -> float:
        """Shortest wall time: the one that other work on the machine disturbed least."""
        return min(self.seconds)

    def ratio(self, reference: Timing) -> float:
        """Median over rounds of this call's wall time relative to the reference's in the same round."""
        return median(a / b for a, b in zip(self.seconds, reference.seconds, strict=True))

    def interval(self, reference: Timing) -> tuple[float, float]:
        """Interval of `ratio` at a confidence of 95 % or the most that so few rounds allow (5: 94 %, 3: 75 %).

        Of a median, between order statistics: it assumes nothing about how times are distributed.
        """
        ratios = sorted(a / b for a, b in zip(self.seconds, reference.seconds, strict=True))
        count = len(ratios)
        tails = [sum(comb(count, j) for j in range(k)) / 2.0**count for k in range(1, count // 2 + 1)]
        cut = max((k for k, tail in enumerate(tails) if tail <= 0.025), default=0)
        return ratios[cut], ratios[count - 1 - cut]

    def cpu_ratio(self, reference: Timing) -> float:
        """The same in processor time."""
        return median(a / b for a, b in zip(self.cpu, reference.cpu, strict=True))


def take_turns(calls: Mapping[str, Callable[[], T]], *, rounds: int, warmup: int = 0) -> dict[str, list[T]]:
    """Run several calls in turns, each round in another order, and collect what they return.

    Args:
        calls: what to run, by name.
        rounds: rounds that count.
        warmup: rounds before them that do not.
    """
    names, found = list(calls), {name: list[T]() for name in calls}
    for turn in range(-warmup, rounds):
        shift = turn % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            result = calls[name]()
            if turn >= 0:
                found[name].append(result)
    return found


def interleave(calls: Mapping[str, Callable[[], object]], *, rounds: int = 5, warmup: int = 1) -> dict[str, Timing]:
    """Time several calls in turns, each round in another order.

    Args:
        calls: what to time, by name.
        rounds: timed rounds.
        warmup: rounds before them that are not timed.
    """
    found = take_turns({name: partial(_timed, call) for name, call in calls.items()}, rounds=rounds, warmup=warmup)
    return {name: Timing(tuple(w for w, _ in times), tuple(c for _, c in times)) for name, times in found.items()}


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time of a call."""
    synchronize()
    wall, cpu = perf_counter(), process_time()
    call()
    synchronize()
    return perf_counter() - wall, process_time() - cpu


@contextmanager
def clock_selection(pruner: Pruner) -> Iterator[list[float]]:
    """Time what a method does at its stages: scoring, debiasing and choosing, one entry for each stage.

    The instance's own `select` is shadowed, as the class may be in use elsewhere.
    """
    found: list[float] = []
    select = pruner.select

    def timed(view: View) -> Sequence[Selection]:
        synchronize()
        start = perf_counter()
        selection = select(view)
        synchronize()
        found.append(perf_counter() - start)
        return selection

    object.__setattr__(pruner, "select", timed)  # methods are frozen dataclasses
    try:
        yield found
    finally:
        object.__delattr__(pruner, "select")


def synchronize() -> None:
    """Wait until the accelerators that are in use have finished what was asked of them."""
    if torch.cuda.is_available():
        used = [i for i in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(i)]
        for device in used or [torch.cuda.current_device()]:
            torch.cuda.synchronize(device)
