"""`Kept`: which tokens of a sequence a pruned cache layer holds.

A sequence is counted in *logical* tokens: those that it has, whether a layer stores them or not. Lengths are Python
numbers; where they must be read from a device (only to crop), they are read once for all layers that share a `Kept`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Where the pictures of a call stand, of which tokens were dropped.

    Attributes:
        rows: for each row of the call, the (n,) indices of its visual tokens in it and the picture of each.
        past: logical length before the call.
        merged: whether tokens were merged, perhaps across pictures: they are one then.
    """

    rows: tuple[tuple[Tensor, Tensor], ...]
    past: int
    merged: bool

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First and last logical index of every picture, read from the device when first asked for."""
        ends: dict[tuple[int, int], tuple[int, int]] = {}
        for b, (positions, pictures) in enumerate(self.rows):
            for position, picture in zip(positions.tolist(), pictures.tolist(), strict=True):
                key, at = (b, 0 if self.merged else picture), position + self.past
                first, last = ends.get(key, (at, at))
                ends[key] = (min(first, at), max(last, at))
        return list(ends.values())


@dataclass(frozen=True, eq=False)
class Fixed:
    """A pruned static buffer for graphs: tensors whose shapes are those of the buffer, whatever was kept.

    Entries that are not written yet lie behind the current position, where masks are False anyway.

    Attributes:
        columns: (B, size) the logical index of each entry, which is its column in a mask of the whole sequence.
        seen: (B, size) bool, False for fillers and for what lies behind the end.
        shift: (B, 1) how far positions were moved down; None where they were not.
    """

    columns: Tensor
    seen: Tensor
    shift: Tensor | None


@dataclass(frozen=True, eq=False)
class Kept:
    """The entries that a pruned cache layer holds.

    Attributes:
        slots: (B, M) logical index of each entry up to `end`, ascending (but for fillers that stand in front); later
            entries are `end`, `end + 1`, ...
        real: (B, M) bool, False for fillers of rows that kept fewer tokens than others; None if there are none.
        end: logical length of the sequence when this was recorded.
        lost: (B, end) bool, the real tokens that were dropped, for methods that renumber; None otherwise.
        pictures: where the pictures stand of which tokens were dropped; also of rows that have left the batch since.
    """

    slots: Tensor
    real: Tensor | None
    end: int
    lost: Tensor | None = None
    pictures: tuple[Pictures, ...] = ()
    _memo: dict[str, tuple[Any, Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_memo", {})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": {}}

    @cached_property
    def shift(self) -> Tensor | None:
        """(B, 1) how far positions were moved down, for methods that renumber; None otherwise."""
        return None if self.lost is None else self.lost.sum(1, keepdim=True)

    @property
    def count(self) -> int:
        """M."""
        return self.slots.shape[1]

    @property
    def everything(self) -> bool:
        """Whether nothing is missing."""
        return self.count == self.end and self.real is None

    def reality(self) -> Tensor:
        """`real` as a tensor."""
        return torch.ones_like(self.slots, dtype=torch.bool) if self.real is None else self.real

    def fixed(self, size: int) -> Fixed:
        """What compiled decoding needs to know of it, for a buffer of `size` entries."""

        def make() -> Fixed:
            tail = torch.arange(self.end, self.end + size - self.count, device=self.slots.device)
            rows = len(self.slots)
            columns = torch.cat([self.slots, tail.clamp(max=size - 1).expand(rows, -1)], 1)
            seen = torch.cat([self.reality(), (tail < size).expand(rows, -1)], 1)
            return Fixed(columns, seen, self.shift)

        return self._once("fixed", size, make)

    def select(self, rows: Tensor) -> Kept:
        """The same for other batch rows (beams)."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows.to(t.device)]

        def make() -> Kept:
            slots = self.slots[rows.to(self.slots.device)]
            return Kept(slots, pick(self.real), self.end, pick(self.lost), self.pictures)

        return self._once("select", rows, make)

    def repeat(self, times: int) -> Kept:
        """The same with every batch row `times` times."""
        rows = torch.arange(self.slots.shape[0]).repeat_interleave(times)
        return self._once("repeat", times, lambda: self.select(rows))

    def before(self, length: int) -> Kept:
        """What is left of it when the sequence is cut to its first `length` tokens, fewer than `end`.

        The entries that stay are among the first ones in every row; what does not belong becomes a filler.
        """
        return self._once("before", length, lambda: self._before(length))

    def _before(self, length: int) -> Kept:
        inside = self.slots < length
        place = torch.arange(1, self.count + 1, device=inside.device)
        count = int((inside.any(0) * place).max()) if self.count else 0
        real = inside[:, :count] & self.reality()[:, :count]
        return Kept(
            slots=self.slots[:, :count].clamp(max=length - 1),
            real=None if bool(real.all()) else real,
            end=length,
            lost=None if self.lost is None else self.lost[:, :length],
            pictures=self.pictures,
        )

    def split(self, length: int) -> tuple[int, int] | None:
        """First and last index of the picture that cutting to the first `length` tokens would go through, if any."""
        if length >= self.end:
            return None
        spans = (span for call in self.pictures if call.past < length for span in call.spans)
        return next((span for span in spans if span[0] < length <= span[1]), None)

    def whole_from(self, length: int) -> bool:
        """Whether nothing is missing of the sequence behind its first `length` tokens."""
        behind = (self.slots >= length) & self.reality()
        return length >= self.end or bool((behind.sum(1) == self.end - length).all())

    def without_shift(self, like: Kept | None) -> Kept:
        """The same for a layer that has run at positions of its own: those that `like` knows of."""
        if like is None or like.lost is None or self.lost is None:
            return replace(self, lost=None)
        return replace(self, lost=torch.nn.functional.pad(like.lost, (0, self.end - like.end)))

    def _once(self, name: str, key: Any, make: Callable[[], _T]) -> _T:
        """`make()`, remembered for the last key: layers share what they keep, and what becomes of it."""
        found = self._memo.get(name)
        if found is None or not (found[0] is key or (isinstance(key, int) and found[0] == key)):
            found = self._memo[name] = (key, make())
        made: _T = found[1]
        return made


def entries(old: Kept | None, past: int, slots: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logical index of everything a cache layer was ever given, the new tokens included.

    Args:
        old: what the layer remembered before this call.
        past: logical length before the new tokens.
        slots: (B, M) logical indices of the new tokens.
        real: (B, M) bool, or None if all are real.

    Returns:
        (B, K) indices and (B, K) bool or None.
    """
    if past == 0:
        return slots, real
    start = 0 if old is None else old.end
    between = torch.arange(start, past, device=slots.device).expand(slots.shape[0], -1)
    parts = [between, slots] if old is None else [old.slots.to(slots.device), between, slots]
    if real is None and (old is None or old.real is None):
        return torch.cat(parts, 1), None
    flags = [torch.ones_like(p, dtype=torch.bool) for p in parts]
    if old is not None:
        flags[0] = old.reality().to(slots.device)
    if real is not None:
        flags[-1] = real
    return torch.cat(parts, 1), torch.cat(flags, 1)


def missing(old: Kept | None, past: int, real: Tensor, slots: Tensor, there: Tensor) -> Tensor:
    """(B, past + L) bool: the real tokens of a sequence that a layer does not get to see.

    Args:
        old: what the layer remembered before this call.
        past: logical length before the new tokens.
        real: (B, L) bool, which of the new tokens are no padding.
        slots: (B, M) the new tokens that are left.
        there: (B, M) bool, False for padding and fillers among them.
    """
    new = real & ~torch.zeros_like(real).scatter(1, slots, there)
    head = new.new_zeros(new.shape[0], past)
    if old is not None and old.lost is not None:
        head[:, : old.end] = old.lost.to(new.device)
    return torch.cat([head, new], 1)
