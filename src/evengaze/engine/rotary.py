"""Rotary tables at other positions, for methods that renumber the tokens that are left.

Families build their tables differently. Instead of knowing how, the calls that a forward makes to its rotary modules
are kept while it runs, and the very call that made a layer's table is repeated with other positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Call:
    """One call, without the hidden states that it was made with: they must not outlive it."""

    module: nn.Module
    positions: Tensor
    named: bool
    rest: tuple[Any, ...]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
        named = "position_ids" in kwargs
        # Tensors beside the positions are states, which the repeated call is given anew.
        options = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}
        return cls(module, kwargs["position_ids"] if named else args[1], named, args[2:], options)

    @property
    def each_by_itself(self) -> bool:
        """Whether a position's entry depends on that position alone, not on the largest of the call."""
        kinds = getattr(self.module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, Mapping) else {kinds}
        return kinds <= {"default", "linear", "llama3", "yarn"}

    def at(self, hidden: Tensor, positions: Tensor) -> Any:
        """What the call returns for (B, M) positions; of (B, M, d) states only type and device matter.

        The module's forward is called, not the module: its hook would take this for a call of the model's.
        """
        if self.named:
            return self.module.forward(hidden, position_ids=positions, **self.options)
        return self.module.forward(hidden, positions, *self.rest, **self.options)


Served = dict[int, dict[str, _Call]]
"""By layer and name of an argument, the rotary call that makes it. Known from an earlier call of the model."""


class Rotary:
    """The rotary calls of one call of a decoder.

    A family whose rotary positions have several axes (multimodal rotary embeddings) has no renumbering: its tokens keep
    their original positions.
    """

    def __init__(self, served: Served) -> None:
        self._seen: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []
        self._known: list[tuple[Any, _Call]] = []
        self._layers = served

    def observe(self, *call: Any) -> None:
        """A forward hook for rotary modules."""
        self._seen.append(call)

    @property
    def _calls(self) -> list[tuple[Any, _Call]]:
        """What each of them returned, and the call."""
        for module, args, kwargs, out in self._seen[len(self._known) :]:
            self._known.append((out, _Call.of(module, args, kwargs)))
        return self._known

    @cached_property
    def renumbers(self) -> bool:
        """Whether the running forward has one-dimensional positions; asked when all its calls have been made."""
        calls = self._calls
        return bool(calls) and all(call.positions.dim() == 2 for _, call in calls)

    def positions(self, batch: int, device: torch.device) -> Tensor:
        """(B, L) positions of the running forward's tokens."""
        return self._calls[0][1].positions.to(device).expand(batch, -1)

    def first_position(self, real: Tensor) -> Tensor:
        """(B, 1) position of each row's first real token; `real` is (B, L) bool."""
        positions = self.positions(real.shape[0], real.device)
        return positions.gather(1, real.int().argmax(1, keepdim=True))

    def made(self, name: str, table: Any) -> dict[str, _Call]:
        """The observed call that made an argument `name`, by that name; nothing if none did."""
        return next(({name: call} for out, call in self._calls if out is table), {})

    def serve(self, layer: int, calls: dict[str, _Call]) -> None:
        """Note which calls make a layer's arguments, for `step`."""
        if calls:
            self._layers[layer] = calls

    def served(self, layer: int) -> dict[str, _Call]:
        """The calls that make a layer's arguments, as far as they are known."""
        return self._layers.get(layer, {})

    def retable(self, table: Any, hidden: Tensor, positions: Tensor) -> Any:
        """What an observed call returned, for other positions (B, M); None if no call returned it."""
        call = next((c for out, c in self._calls if out is table), None)
        return None if call is None else call.at(hidden, positions)

    def step(self, layer: int, hidden: Tensor, positions: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """The same arguments of a layer for a decoding step, those that it is given: some layers have no positions."""
        calls = {name: call for name, call in self.served(layer).items() if given.get(name) is not None}
        return {name: call.at(hidden, positions) for name, call in calls.items()}

    def steps(self, hidden: Tensor, positions: Tensor, given: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """The same for (k, B, 1) positions of layers that are given the same things, k times, from one call each.

        Returns:
            None if that is not the same as k calls, or not known to be.
        """
        calls = {name: call for name, table in given.items() for call in self.made(name, table).values()}
        if not calls or not all(call.each_by_itself for call in calls.values()):
            return None
        whole = positions.flatten(0, 1)
        tables = {name: _apart(call.at(hidden, whole), positions.shape[:2]) for name, call in calls.items()}
        return [{name: table[k] for name, table in tables.items()} for k in range(len(positions))]


def _apart(table: Any, shape: tuple[int, ...]) -> Sequence[Any]:
    """A table of k times B rows as k tables of B rows."""
    if isinstance(table, Tensor):
        return list(table.view(*shape, *table.shape[1:]))
    return [type(table)(parts) for parts in zip(*(_apart(part, shape) for part in table), strict=True)]
