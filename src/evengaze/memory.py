"""What methods remember: from stage to stage of a prompt, from a call's encoding to its prefill, while attached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from evengaze.device import Rows, device_rows
from evengaze.errors import ConfigError

T = TypeVar("T")


class Store:
    """Values of methods, at most one of each class, found by their class."""

    def __init__(self) -> None:
        self._values: dict[type, Any] = {}

    def get(self, kind: type[T]) -> T | None:
        """The value of a class, None if there is none."""
        return self._values.get(kind)

    def put(self, value: object) -> None:
        """Keep a value, in place of an earlier one of its class."""
        self._values[type(value)] = value

    def clear(self) -> None:
        """Forget all of them."""
        self._values.clear()

    def join(self, other: Store) -> None:
        """Take over another store's values; two of one class become their sum."""
        for kind, value in other._values.items():
            mine = self._values.get(kind)
            self._values[kind] = value if mine is None else mine + value

    def copy(self) -> Store:
        """The same values in a store of their own."""
        store = Store()
        store._values = dict(self._values)
        return store


class Shared(Store):
    """What a method keeps for as long as it is attached, for the calls of all threads.

    Args:
        notes: gives the store of the running call, for what is found out while its pictures are encoded; it is the
            `View.notes` of the prefill that uses them.
        call: gives the store of the running call, which ends with it.
    """

    def __init__(self, notes: Callable[[], Store] = Store, call: Callable[[], Store] = Store) -> None:
        super().__init__()
        self.notes, self.call = notes, call


class Memory(Store):
    """What a method carries from stage to stage of one prompt.

    Values are dataclasses of tensors whose first axis are the view's rows (or have a `select` of their own).
    """

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[tuple[int, ...], Memory] = {}

    def update(self, other: Memory, *, leaving_out: type) -> None:
        """Remember what another memory of the same rows does, but for one class."""
        self._values.update({kind: value for kind, value in other._values.items() if kind is not leaving_out})

    def select(self, rows: Sequence[int], device: torch.device) -> Memory:
        """The memory of some of the rows; always the same one for the same rows."""
        key = tuple(rows)
        if key not in self._parts:
            for larger, memory in reversed(self._parts.items()):
                if set(key) < set(larger):  # these rows have had a memory of their own already
                    return memory.select([larger.index(b) for b in key], device)
            part = self._parts[key] = Memory()
            at = device_rows(rows, device)
            for value in self._values.values():
                part.put(value.select(rows) if hasattr(value, "select") else _indexed(value, at))
        return self._parts[key]


def _indexed(value: Any, rows: Rows) -> Any:
    if not is_dataclass(value) or isinstance(value, type):
        raise ConfigError(f"a method remembers dataclasses of tensors, one entry a row, not a {type(value).__name__}")
    tensors = {f.name: getattr(value, f.name) for f in fields(value)}
    return replace(value, **{k: v[rows] for k, v in tensors.items() if isinstance(v, Tensor)})
