"""What is left of the sequence of a call, and how to cut things that have one entry a token to that.

Indices are into the call's L tokens ("slots") unless they are said to be into the current sequence of M tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evengaze.device import counting
from evengaze.engine.kept import Kept
from evengaze.engine.masks import take
from evengaze.engine.rotary import Rotary
from evengaze.engine.rows import Group


@dataclass(kw_only=True)
class Left:
    """What is left of a call's sequence.

    Attributes:
        inputs: (B, L, d) states that enter layer 0.
        past: logical length of what the cache held before.
        real: (B, L) bool, False for batch padding; None if no row is padded.
        padded: the same on the host; None if no row is padded.
        rotary: where survivors are renumbered; None where they keep their positions.
        samples: (B, L) number of the sample that each token of a packed row belongs to; None without packed rows.
        slots: (B, M) slot of each token of the current sequence; None while all are there.
        filled: (B, M) bool, False for fillers of rows that kept fewer tokens than others; None without fillers.
        groups: what is left of the rows, by number of visual tokens.
    """

    inputs: Tensor
    past: int
    real: Tensor | None = None
    padded: Tensor | None = None
    rotary: Rotary | None = None
    samples: Tensor | None = None
    slots: Tensor | None = None
    filled: Tensor | None = None
    groups: list[Group] = field(default_factory=list)
    _memo: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """L."""
        return self.inputs.shape[1]

    @property
    def batch(self) -> int:
        """B."""
        return self.inputs.shape[0]

    def reality(self, device: torch.device) -> Tensor:
        """(B, L) bool, False for batch padding, on a device."""
        if self.real is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=device)
        return self.real.to(device)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """`slots`, spelt out if nothing has been dropped, and `filled`, on a device."""
        if self.slots is None:
            return counting(self.length, device).expand(self.batch, -1), None
        return self.slots.to(device), None if self.filled is None else self.filled.to(device)

    def _once(self, key: Any, held: Any, make: Callable[[], Any]) -> Any:
        """`make()`, remembered: layers share arguments. `held` stays alive, so that the ids in a key stay unique."""
        if key not in self._memo:
            self._memo[key] = (held, make())
        return self._memo[key][1]

    def _positions(self, before: Kept | None, name: str, value: Any, hidden: Tensor) -> Any:
        if self.rotary is not None and self.rotary.renumbers:
            make = functools.partial(self._renumbered, self.rotary, before, hidden.device)
            positions = self._once(("positions", id(before), hidden.device), before, make)
            if name == "position_ids":
                return positions
            table = self.rotary.retable(value, hidden, positions)
            if table is not None:
                return table
        return tree(value, self.slots, self.length, -1 if name == "position_ids" else -2)

    def _renumbered(self, rotary: Rotary, before: Kept | None, device: torch.device) -> Tensor:
        """(B, M) positions without gaps, counted from each row's first token."""
        if self.real is None and self.filled is None and self.samples is None:
            start = rotary.positions(self.batch, device)[:, :1]
            if before is not None and before.shift is not None:
                start = start - before.shift.to(device)
            return counting(self.on(device)[0].shape[1], device) + start
        there = self._there(device).long()
        if self.samples is not None:  # each sample begins anew
            held, ahead = self._samples(device), there.cumsum(1) - there
            begins = torch.searchsorted(self.samples.to(device).contiguous(), held)
            first = rotary.positions(self.batch, device).gather(1, begins)
            start = torch.full_like(self.samples.to(device), self.length).scatter_reduce(1, held, ahead, "amin")
            return ahead - start.gather(1, held) + first
        start = rotary.first_position(self.reality(device))
        if before is not None and before.shift is not None:
            start = start - before.shift.to(device)
        return (there.cumsum(1) - 1).clamp(min=0) + start

    def _samples(self, device: torch.device) -> Tensor:
        """(B, M) the sample of each token of the current sequence."""
        assert self.samples is not None
        return self.samples.to(device).gather(1, self.on(device)[0])

    def _lengths(self, name: str, value: Any, device: torch.device) -> Any:
        """What flash attention is told about packed samples, as they are now."""
        counts = torch.bincount(self._samples(device)[0][self._there(device)[0]])
        if name.startswith("max_length_"):
            return counts.max().to(value) if isinstance(value, Tensor) else int(counts.max())
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(value)

    def _there(self, device: torch.device) -> Tensor:
        """(B, M) bool: neither batch padding nor a filler."""
        slots, filled = self.on(device)
        there = self.reality(device).gather(1, slots)
        return there if filled is None else there & filled

    def _alive(self, device: torch.device) -> Tensor | None:
        """The (B, M) bool mask of a layer with a state, False where it must read nothing; None if it reads everything.

        Behind a stage, batch padding is left only in rows that are shorter than the longest, in place of fillers.
        """
        padding = self.padded is not None and (not self.groups or any(any(group.spare) for group in self.groups))
        return self._there(device) if padding or self.filled is not None else None

    def restored(self, states: Tensor) -> Tensor:
        """(B, L, d) states at their places in the call, zeros where tokens were dropped, from those that are left."""
        slots, filled = self.on(states.device)
        if filled is not None:
            states = states.masked_fill(~filled[..., None], 0.0)
        full = states.new_zeros(states.shape[0], self.length, states.shape[2])
        return full.scatter_(1, slots[..., None].expand_as(states), states)

    def ignore(self, labels: Tensor, index: int) -> None:
        """Write `index` over the (B, L) labels that a dropped token would have to predict: those right behind one."""
        slots, filled = self.on(labels.device)
        there = torch.ones_like(slots, dtype=torch.bool) if filled is None else filled
        gone = torch.ones_like(labels, dtype=torch.bool).scatter(1, slots, ~there)
        labels[:, 1:][gone[:, :-1]] = index


def tree(value: Any, slots: Tensor | None, length: int, dim: int) -> Any:
    """Cut every tensor of a nest of tuples and dicts along its sequence axis: `dim`, or the last one of a matrix."""
    if isinstance(value, (tuple, list)):
        return type(value)(tree(v, slots, length, dim) for v in value)
    if isinstance(value, dict):
        return {k: tree(v, slots, length, dim) for k, v in value.items()}
    if not isinstance(value, Tensor) or slots is None or value.dim() < 2:
        return value
    dim = -1 if value.dim() == 2 else dim
    if value.shape[dim] != length or value.shape[dim - 1] not in (1, slots.shape[0]):
        return value
    return take(value, slots, dim)
