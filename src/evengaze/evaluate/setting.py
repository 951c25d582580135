"""How much is asked and how: what all cells of a grid, and single jobs, share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from evengaze.errors import ConfigError
from evengaze.parameters import coerce

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """How a benchmark's questions are asked.

    Attributes:
        limit: answer only this many records.
        shuffle_seed: draw the limited records at random; None takes the first ones.
        batch_size: records a generate call.
        max_new_tokens: longest answer; None takes the benchmark's official number.
    """

    limit: int | None = None
    shuffle_seed: int | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        coerce(self)
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")

    def count(self, records: int) -> int:
        """How many of so many records are asked."""
        return min(records, self.limit or records)

    def batches(self, records: Sequence[T]) -> list[list[T]]:
        """Cut records into batches, which depend on nothing but them and the setting."""
        order = list(records)
        if self.shuffle_seed is not None:
            Random(self.shuffle_seed).shuffle(order)
        order = order[: self.limit]
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]


DEFAULT = Setting()
"""One pass over everything, as in the official scripts."""
