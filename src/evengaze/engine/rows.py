"""What is left of the rows of a batch, stage by stage.

Rows with the same number of visual tokens form a `Group`: they are cut together, as one tensor. How many tokens leave
is known on the host; which ones is known on the device only, and nobody asks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from evengaze.candidates import Candidates, Start
from evengaze.device import Rows, counting, device_rows, upload
from evengaze.engine.question import Question, Questions
from evengaze.errors import ConfigError
from evengaze.layout import VisualLayout
from evengaze.memory import Memory
from evengaze.protocol import Selection


@dataclass(frozen=True)
class Group:
    """Rows with the same number n of visual tokens. Indices are into the current sequence.

    Attributes:
        rows: their numbers in the batch.
        tokens: what is left of their visual tokens; n may be 0.
        others: (rows, R) indices of all other tokens: in every row the real ones, then batch padding, then fillers.
            None if the visual tokens stand at `start` and behind it in every row, and there is no padding.
        real: number of real tokens among a row's `rest`.
        spare: number of batch paddings among it.
        original: number of visual tokens at the start.
        memory: what the method remembers of these rows.
        asked: the questions of the only row, if it has several; their visual tokens have budgets of their own.
        pins: visual tokens that are no candidates, as the prompt's last token is never dropped: they are among `rest`.
        pinned: (rows, pins) where they are there.
        start: see `others`.
    """

    rows: tuple[int, ...]
    tokens: Candidates
    others: Tensor | None
    real: tuple[int, ...]
    spare: tuple[int, ...]
    original: int
    memory: Memory = field(default_factory=Memory)
    asked: tuple[Question, ...] = ()
    pins: tuple[int, ...] = ()
    pinned: Tensor | None = None
    start: int = 0

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.tokens.position.device

    @property
    def rest(self) -> Tensor:
        """`others`, spelt out."""
        if self.others is not None:
            return self.others
        place = counting(self.real[0] + len(self.tokens), self.device)
        return torch.cat([place[: self.start], place[self.start + len(self.tokens) :]]).expand(len(self.rows), -1)

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
            others=None if self.others is None else self.others[device_rows(rows, self.device)],
            real=tuple(self.real[b] for b in rows),
            spare=tuple(self.spare[b] for b in rows),
            original=self.original,
            memory=self.memory.select(rows, self.device),
            asked=self.asked,
            pins=self.pins,
            pinned=None if self.pinned is None else self.pinned[device_rows(rows, self.device)],
            start=self.start,
        )

    def to(self, device: torch.device) -> Group:
        """The same on another device, where a model is spread over several."""
        if device == self.device:
            return self
        start = replace(self.tokens.start, device=device, _columns={})
        origin = None if self.tokens.origin is None else self.tokens.origin.to(device)
        position, run = self.tokens.position.to(device), self.tokens.run
        tokens = Candidates(position, start, origin, None if run is None else (position, run))
        pinned = None if self.pinned is None else self.pinned.to(device)
        others = None if self.others is None else self.others.to(device)
        return replace(self, tokens=tokens, others=others, pinned=pinned)

    @property
    def pin_places(self) -> Tensor | None:
        """(rows, pins) indices of the pinned tokens in the current sequence."""
        return None if self.pinned is None else self.rest.gather(1, self.pinned)


_FAR = 1 << 40
"""Farther than any sequence is long."""


@dataclass(frozen=True)
class Decision:
    """What was decided for some rows of the batch at a stage."""

    rows: tuple[int, ...]
    selection: Selection


def groups(
    layout: VisualLayout, real: Tensor | None, length: int, device: torch.device, asked: Questions | None = None
) -> list[Group]:
    """The rows of a batch before anything was dropped.

    Args:
        layout: on the host, one table a row.
        real: (B, L) bool on the host, False for batch padding; None without padding.
        length: L.
        device: where the indices are wanted.
        asked: who ranks what; None if every row is one prompt that ends with the row, in text.
    """
    members: dict[tuple[int, tuple[int, ...], int], list[int]] = {}
    for b, table in enumerate(layout.rows):
        questions = () if asked is None else asked[b]
        pins = tuple(q.stop - 1 for q in questions if q.pinned)
        members.setdefault((len(table), pins, b if len(questions) > 1 else -1), []).append(b)
    found = []
    for (count, pins, several), rows in members.items():
        group = _group(count, pins, rows, layout, real, length, device)
        found.append(group if asked is None or several < 0 else replace(group, asked=asked[several]))
    return found


def _group(
    total: int,
    pins: tuple[int, ...],
    rows: list[int],
    layout: VisualLayout,
    real: Tensor | None,
    length: int,
    device: torch.device,
) -> Group:
    start, stop = layout.rows[rows[0]].span
    tables = tuple(layout.rows[b] for b in rows)
    if real is None and not pins and 0 < total == stop - start and all(t.span == (start, stop) for t in tables):
        position = counting(length, device)[start:stop].expand(len(rows), -1)
        here, spare = (length - total,) * len(rows), (0,) * len(rows)
        tokens = Candidates(position, Start(tables, device), standing=(position, start))
        return Group(tuple(rows), tokens, None, here, spare, total, start=start)
    others = torch.ones(len(rows), length, dtype=torch.bool)
    position = torch.stack([layout.rows[b].position for b in rows])
    kept, count = position[:, list(pins)], total - len(pins)
    free = torch.tensor([k for k in range(total) if k not in pins], dtype=torch.long)
    position = position[:, free]
    if count:
        others.scatter_(1, position, False)
    rest = others.nonzero()[:, 1].view(len(rows), length - count)
    reals, spares = [length - count] * len(rows), [0] * len(rows)
    if real is not None:
        flags = real[rows].gather(1, rest)
        reals, rest = flags.sum(1).tolist(), rest.gather(1, (~flags).int().argsort(dim=1, stable=True))
        spares = [length - count - n for n in reals]
    whole = upload(torch.cat([position, rest], 1), device)  # one copy for both
    tokens = Candidates(whole[:, :count], Start(tables, device))
    group = Group(tuple(rows), tokens, whole[:, count:], tuple(reals), tuple(spares), total)
    if not pins:
        return group
    tokens = replace(tokens, origin=upload(free, device).expand(len(rows), -1))
    pinned = (rest[:, None] == kept[:, :, None]).int().argmax(2)
    return replace(group, tokens=tokens, pins=pins, pinned=upload(pinned, device))


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
    first, only = parts[0]
    if len(parts) == 1 and only is not None and first.others is None and len(first.rows) == batch and not front:
        return _cut_run(first, only, moves)
    size = max(group.needs(0 if chosen is None else chosen.survivors) for group, chosen in parts)
    device = first.device
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
        if front:  # what is idle sorts before everything else, and keeps its order
            keys.append(wanted[-1] - upload(_idle(group, size - here.shape[1], size), device) * _FAR)
        rows += group.rows
    back = None  # groups come in the order of their first rows; most batches are one group
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


def _cut_run(group: Group, chosen: Selection, moves: bool) -> Cut:
    """The plan for rows whose visual tokens stand together, at the same place: so do those that are left of them."""
    order, start, rows = _order(group, chosen, moves), group.start, len(group.rows)
    whole = counting(group.real[0] + len(group.tokens), group.device)
    head, tail = whole[:start].expand(rows, -1), whole[start + len(group.tokens) :].expand(rows, -1)
    source = index = torch.cat([head, order + start, tail], 1)
    if moves and chosen.recycled is not None:
        index = torch.cat([head, order.sort(1).values + start, tail], 1)
    position = whole[start : start + order.shape[1]].expand(rows, -1)
    origin = order if group.tokens.origin is None else group.tokens.origin.gather(1, order)
    after = replace(group, tokens=Candidates(position, group.tokens.start, origin, (position, start)))
    return Cut(index, source, None, [after], [(chosen, order)])


def _joined(parts: list[Tensor], back: Tensor | None) -> Tensor:
    """(B, size) of the (rows, size) of all groups; `back` (B,) brings them into the batch's order, if they are not."""
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
    """The groups in the new sequence; `place` (B, size) says where each wanted token stands in it."""
    for (group, _), left in zip(parts, survivors, strict=True):
        here = place[group.at(place.device)]
        visual = 0 if left is None else left[1].shape[1]
        count = size - visual
        tokens = group.tokens if left is None else group.tokens.take(left[1])
        yield replace(
            group,
            tokens=replace(tokens, position=here[:, count:]),
            others=here[:, :count],
            spare=tuple(min(s, count - r) for r, s in zip(group.real, group.spare, strict=True)),
        )
