"""What is left of the rows of a batch, stage by stage.

Rows with the same number of visual tokens form a `Group`: they are cut together, as one tensor. How many tokens leave
is known on the host; which ones is known on the device only, and nobody asks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from evengaze.errors import ConfigError
from evengaze.layout import Candidates, Rows, VisualLayout, device_rows, upload
from evengaze.protocol import Memory, Picked, Selection, Words


@dataclass(frozen=True)
class Group:
    """Rows with the same number n of visual tokens. Indices are into the current sequence.

    Attributes:
        rows: their numbers in the batch.
        tokens: what is left of their visual tokens; n may be 0.
        rest: (rows, R) indices of all other tokens: in every row the real ones, then batch padding, then fillers.
        real: number of real tokens among a row's `rest`.
        spare: number of batch paddings among it.
        original: number of visual tokens at the start.
        memory: what the method remembers of these rows.
    """

    rows: tuple[int, ...]
    tokens: Candidates
    rest: Tensor
    real: tuple[int, ...]
    spare: tuple[int, ...]
    original: int
    memory: Memory = field(default_factory=Memory)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.rest.device

    def at(self, device: torch.device) -> Rows:
        """The rows as an index."""
        return device_rows(self.rows, device)

    def needs(self, survivors: int) -> int:
        """Length of the longest row, fillers left out, if so many visual tokens are left."""
        return max(self.real) + survivors

    def select(self, rows: Sequence[int]) -> Group:
        """Some of the rows, counted within the group."""
        if len(rows) == len(self.rows):
            return self
        return Group(
            rows=tuple(self.rows[b] for b in rows),
            tokens=self.tokens.select(rows),
            rest=self.rest[device_rows(rows, self.device)],
            real=tuple(self.real[b] for b in rows),
            spare=tuple(self.spare[b] for b in rows),
            original=self.original,
            memory=self.memory.select(rows, self.device),
        )

    def to(self, device: torch.device) -> Group:
        """The same on another device, where a model is spread over several."""
        if device == self.device:
            return self
        start = replace(self.tokens.start, device=device, _columns={})
        origin = None if self.tokens.origin is None else self.tokens.origin.to(device)
        tokens = Candidates(self.tokens.position.to(device), start, origin)
        return replace(self, tokens=tokens, rest=self.rest.to(device))


_FAR = 1 << 40
"""Farther than any sequence is long."""


@dataclass(frozen=True)
class Decision:
    """What was decided for some rows of the batch at a stage."""

    rows: tuple[int, ...]
    selection: Selection


def groups(layout: VisualLayout, real: Tensor | None, length: int, device: torch.device) -> list[Group]:
    """The rows of a batch before anything was dropped.

    Args:
        layout: on the host, one table a row.
        real: (B, L) bool on the host, False for batch padding; None without padding.
        length: L.
        device: where the indices are wanted.
    """
    members: dict[int, list[int]] = {}
    for b, table in enumerate(layout.rows):
        members.setdefault(len(table), []).append(b)
    return [_group(count, rows, layout, real, length, device) for count, rows in members.items()]


def _group(
    count: int, rows: list[int], layout: VisualLayout, real: Tensor | None, length: int, device: torch.device
) -> Group:
    others = torch.ones(len(rows), length, dtype=torch.bool)
    position = torch.stack([layout.rows[b].position for b in rows])
    if count:
        others.scatter_(1, position, False)
    rest = others.nonzero()[:, 1].view(len(rows), length - count)
    here, spare = [length - count] * len(rows), [0] * len(rows)
    if real is not None:
        flags = real[rows].gather(1, rest)
        here, rest = flags.sum(1).tolist(), rest.gather(1, (~flags).int().argsort(dim=1, stable=True))
        spare = [length - count - n for n in here]
    whole = upload(torch.cat([position, rest], 1), device)  # one copy for both
    tokens = Candidates.of([layout.rows[b] for b in rows], device)
    tokens = replace(tokens, position=whole[:, :count])
    return Group(tuple(rows), tokens, whole[:, count:], tuple(here), tuple(spare), count)


def decided(group: Group, found: Selection | Sequence[Selection]) -> list[Decision]:
    """A method's answer for a group, by rows of the batch.

    Raises:
        ConfigError: the answer leaves rows out or has some twice.
    """
    parts = [found] if isinstance(found, Selection) else list(found)
    every = tuple(range(len(group.rows)))
    within = [every if part.rows is None else part.rows for part in parts]
    if sorted(b for rows in within for b in rows) != list(every):
        raise ConfigError(f"a method selected for rows {within} of a view that has rows {list(every)}")
    return [
        Decision(tuple(group.rows[b] for b in rows), part)
        for rows, part in sorted(zip(within, parts, strict=True), key=lambda pair: pair[0])
    ]


def split(every: Sequence[Group], decisions: Sequence[Decision]) -> Iterator[tuple[Group, Selection | None]]:
    """Groups whose rows share a decision; None for rows without visual tokens."""
    chosen = {row: number for number, decision in enumerate(decisions) for row in decision.rows}
    for group in every:
        parts: dict[int, list[int]] = {}
        for b, row in enumerate(group.rows):
            parts.setdefault(chosen.get(row, -1), []).append(b)
        for number, rows in parts.items():
            yield group.select(rows), None if number < 0 else decisions[number].selection


@dataclass(frozen=True)
class Cut:
    """How a sequence of M tokens becomes one of M'.

    Attributes:
        index: (B, M') which tokens survive, ascending.
        source: (B, M') whose states stand in their places: others, where recycled tokens move.
        filled: (B, M') bool, False for fillers of rows that are shorter than others; None without fillers.
        groups: what is left, with the indices of the new sequence.
        survivors: for each group the selection and the (rows, m) candidates that survive, in the order in which they
            stand afterwards; None for groups without visual tokens.
    """

    index: Tensor
    source: Tensor
    filled: Tensor | None
    groups: list[Group]
    survivors: list[tuple[Selection, Tensor] | None]


def cut(parts: Sequence[tuple[Group, Selection | None]], batch: int, *, moves: bool, front: bool = False) -> Cut:
    """Plan a stage.

    Short rows are filled up with batch padding, which is masked anyway; then with dropped tokens, which must be. They
    stand where they were, or in `front`: a recurrent layer's state decays at fillers, unless nothing is in it yet.

    Args:
        parts: groups with what was selected of them.
        batch: number of rows.
        moves: whether recycled tokens move behind the kept ones of their picture.
        front: whether padding and fillers move to the front.
    """
    size = max(group.needs(0 if chosen is None else chosen.survivors) for group, chosen in parts)
    device = parts[0][0].device
    rows: list[int] = []
    wanted, sources, flags, keys = [], [], [], []
    survivors: list[tuple[Selection, Tensor] | None] = []
    moved = any(moves and chosen is not None and chosen.recycled is not None for _, chosen in parts)
    for group, chosen in parts:
        order = None if chosen is None else _order(group, chosen, moves)
        survivors.append(None if chosen is None or order is None else (chosen, order))
        here = group.rest[:, :0] if order is None else group.tokens.position.gather(1, order)
        rest = _rest(group, order, size - here.shape[1])
        places = here.sort(1).values if moved and chosen is not None and chosen.recycled is not None else here
        wanted.append(torch.cat([rest, places], 1))
        if moved:
            sources.append(torch.cat([rest, here], 1))
        flags.append(_flags(group, size, here.shape[1]))
        if front:
            keys.append(wanted[-1] - upload(_idle(group, size - here.shape[1], size), device) * _FAR)
        rows += group.rows
    back = None
    if rows != list(range(batch)):
        back = upload(torch.tensor(rows).argsort(), device)
    index, order = _joined(keys or wanted, back).sort(1)
    if front:
        index = _joined(wanted, back).gather(1, order)
    source = _joined(sources, back).gather(1, order) if moved else index
    filled = None
    if any(flag is not None for flag in flags):
        whole = torch.cat([
            torch.ones(len(group.rows), size, dtype=torch.bool) if flag is None else flag
            for flag, (group, _) in zip(flags, parts, strict=True)
        ])  # fmt: skip
        filled = _joined([upload(whole, device)], back).gather(1, order)
    # Where each of the wanted tokens stands in the new sequence.
    place = torch.empty_like(order).scatter_(1, order, torch.arange(size, device=device).expand_as(order))
    return Cut(index, source, filled, list(_moved(parts, survivors, place, size)), survivors)


def _joined(parts: list[Tensor], back: Tensor | None) -> Tensor:
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole if back is None else whole[back]


def _order(group: Group, chosen: Selection, moves: bool) -> Tensor:
    """(rows, m) surviving candidates in the order in which they stand afterwards.

    Recycled tokens stand behind the kept ones of their picture (text may follow it) if positions are renumbered; else
    every token stays at its own.
    """
    if chosen.recycled is None:
        return chosen.keep
    every = torch.cat([chosen.keep, chosen.recycled], 1)
    if not moves:
        return every.sort(1).values
    if all(len(images) == 1 and images[0].frames == 1 for images in group.tokens.images):
        return every
    frames = max(image.frames for images in group.tokens.images for image in images)
    picture = (group.tokens.image * frames + group.tokens.frame).gather(1, every)
    return every.gather(1, torch.sort(picture, dim=1, stable=True).indices)


def _rest(group: Group, order: Tensor | None, count: int) -> Tensor:
    """(rows, count) the first of a group's other tokens; behind them, if there are too few, dropped candidates."""
    short = count - group.rest.shape[1]
    if short <= 0:
        return group.rest[:, :count]
    position = group.tokens.position
    kept = torch.zeros_like(position) if order is None else torch.zeros_like(position).scatter(1, order, 1)
    dropped = position.gather(1, kept.argsort(dim=1, stable=True))[:, :short]
    return torch.cat([group.rest, dropped], 1)


def _flags(group: Group, size: int, visual: int) -> Tensor | None:
    """(rows, size) bool on the host, False for fillers, in the order other tokens, candidates; None without any."""
    count = size - visual
    usable = [real + spare for real, spare in zip(group.real, group.spare, strict=True)]
    if min(usable) >= count:
        return None
    rest = torch.arange(count) < torch.tensor(usable)[:, None]
    return torch.cat([rest, torch.ones(len(usable), visual, dtype=torch.bool)], 1)


def _idle(group: Group, rest: int, size: int) -> Tensor:
    """(rows, size) 1 for batch padding and fillers, on the host, in the order other tokens, candidates."""
    place, real = torch.arange(size), torch.tensor(group.real)[:, None]
    return ((place >= real) & (place < rest)).long()


def _moved(
    parts: Sequence[tuple[Group, Selection | None]],
    survivors: Sequence[tuple[Selection, Tensor] | None],
    place: Tensor,
    size: int,
) -> Iterator[Group]:
    for (group, _), left in zip(parts, survivors, strict=True):
        here = place[group.at(place.device)]
        visual = 0 if left is None else left[1].shape[1]
        count = size - visual
        tokens = group.tokens if left is None else group.tokens.take(left[1])
        yield replace(
            group,
            tokens=replace(tokens, position=here[:, count:]),
            rest=here[:, :count],
            spare=tuple(min(s, count - r) for r, s in zip(group.real, group.spare, strict=True)),
        )


class Text:
    """Where the text of a call is. What is text is known on the host, where it stands after a cut on the device.

    Args:
        layout: on the host, one table a row.
        real: (B, L) bool on the host; None without padding.
        length: L.
    """

    def __init__(self, layout: VisualLayout, real: Tensor | None, length: int) -> None:
        self._layout, self._real, self._length = layout, real, length
        self._found: tuple[Tensor, Tensor | None, bool] | None = None

    def words(self, group: Group, slots: Tensor | None, current: int) -> Words:
        """Where they are in a group's rows.

        Args:
            group: the rows.
            slots: (B, M) index into the call of each token of the current sequence; None while all are there.
            current: M.
        """

        def place(index: Tensor) -> Tensor:
            moved = upload(index, group.device)
            if slots is None:
                return moved
            held = slots.to(group.device)[group.at(group.device)]
            here = torch.zeros(len(held), self._length, dtype=torch.long, device=group.device)
            here.scatter_(1, held, torch.arange(current, device=group.device).expand_as(held))
            return here.gather(1, moved)

        def last() -> Tensor:
            index = self._last(group.rows)
            if bool((index == self._length - 1).all()):
                return torch.full((len(group.rows), 1), current - 1, device=group.device)
            return place(index)

        def text() -> Picked:
            index, real, mixed = self._behind(group.rows)
            at = place(index)
            flags = None if real is None else upload(real, group.device)
            if mixed:
                # Some text stands between visual tokens: it counts once all of these behind it are gone.
                behind = at > group.tokens.position[:, -1:]
                flags = behind if flags is None else flags & behind
                none = ~flags.any(1, keepdim=True)
                at, flags = torch.cat([at, last()], 1), torch.cat([flags, none], 1)
            return Picked(at, flags)

        return Words(last, text)

    def _last(self, rows: Sequence[int]) -> Tensor:
        """(rows, 1) index into the call of each row's last real token."""
        if self._real is None:
            return torch.full((len(rows), 1), self._length - 1)
        place = torch.arange(self._length)
        return torch.where(self._real[list(rows)], place, -1).amax(1, keepdim=True)

    def _behind(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None, bool]:
        """Real tokens that are or may come behind all visual ones, which entries are no fillers, whether some may."""
        if self._found is None:
            self._found = self._search()
        index, real, mixed = self._found
        return index[list(rows)], None if real is None else real[list(rows)], mixed

    def _search(self) -> tuple[Tensor, Tensor | None, bool]:
        """The same for all rows: they have the same number of entries, however they are divided into groups later."""
        found, mixed = [], False
        for b, table in enumerate(self._layout.rows):
            other = torch.ones(self._length, dtype=torch.bool) if self._real is None else self._real[b].clone()
            if len(table):
                first, end = int(table.position[0]), int(table.position[-1])
                mixed |= end - first + 1 > len(table)
                other[:first] = False
                other[table.position] = False
            else:
                other[:] = False
            found.append(other.nonzero()[:, 0])
        if not mixed:
            last = self._last(range(len(found)))
            found = [index if len(index) else last[b] for b, index in enumerate(found)]
        count = max(map(len, found))
        if all(len(index) == count for index in found):
            return torch.stack(found), None, mixed
        index = torch.full((len(found), count), self._length - 1)
        real = torch.zeros(len(found), count, dtype=torch.bool)
        for b, entry in enumerate(found):  # rows end together, as the text that is asked does
            index[b, count - len(entry) :] = entry
            real[b, count - len(entry) :] = True
        return index, real, mixed
