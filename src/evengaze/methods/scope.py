"""Budgets of their own for every picture or frame of a prompt, whatever the method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, Self

import torch
from torch import Tensor

from evengaze.candidates import Candidates, Start
from evengaze.device import device_rows
from evengaze.errors import LayoutError
from evengaze.layout import VisualTokens
from evengaze.memory import Memory
from evengaze.protocol import Merge, Pending, Selection, View

Select = Callable[[View], Sequence[Selection]]


@dataclass(frozen=True)
class _Parts:
    """The pictures or frames of some rows.

    Attributes:
        starts: the tables of each part, of all rows; None where rows are divided in different ways.
        sizes: how many tokens each part has left, row by row.
        originals: how many it had at the start.
        memories: what the method remembers of each part.
        device: of the rows.
    """

    starts: tuple[Start, ...] | None
    sizes: tuple[tuple[int, ...], ...]
    originals: tuple[tuple[int, ...], ...]
    memories: tuple[Memory, ...]
    device: torch.device

    def select(self, rows: Sequence[int]) -> Self:
        """The same of some rows."""
        return replace(
            self,
            starts=None if self.starts is None else tuple(start.select(rows) for start in self.starts),
            sizes=tuple(self.sizes[b] for b in rows),
            originals=tuple(self.originals[b] for b in rows),
            memories=tuple(memory.select(rows, self.device) for memory in self.memories),
        )


def select_parts(view: View, scope: Literal["image", "frame"], select: Select) -> list[Selection]:
    """Let a method select from each part of a row as if the others' visual tokens were no candidates.

    Args:
        view: the rows.
        scope: what a part is: all views of a picture, a whole video, or one frame (or tile) of either.
        select: the method's selection.

    Returns:
        Selections for the rows. Scores are those of all parts in a row; where a part was kept whole, so that nothing
        was scored, they are left out.

    Raises:
        LayoutError: the tokens of a picture or frame do not stand together.
    """
    if view.memory.get(_Parts) is None:
        originals = tuple(_sizes(table, scope) for table in view.initial.start.tables)
        sizes = tuple((*row[:-1], row[-1] - view.pinned) for row in originals)
        view.memory.put(_Parts(None, sizes, originals, (), view.hidden.device))
    parts = view.memory.get(_Parts)
    assert parts is not None
    alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for b, key in enumerate(zip(parts.originals, parts.sizes, strict=True)):
        alike.setdefault(key, []).append(b)
    found = []
    for rows in alike.values():
        for chosen in _divided(view.select(rows), select):
            within = range(len(rows)) if chosen.rows is None else chosen.rows
            found.append(replace(chosen, rows=tuple(rows[b] for b in within)))
    return found


def _divided(view: View, select: Select) -> list[Selection]:
    """Selections for rows that are divided in the same way."""
    parts = view.memory.get(_Parts)
    assert parts is not None
    if parts.starts is None:
        parts = _begun(view, parts)
    answers: list[Sequence[Selection]] = []
    offset = first = 0
    for k, (size, original) in enumerate(zip(parts.sizes[0], parts.originals[0], strict=True)):
        one = slice(offset, offset + size)
        origin = view.tokens.origin
        memory = parts.memories[k]
        memory.update(view.memory, leaving_out=_Parts)
        answers.append(
            select(
                replace(
                    view,
                    tokens=Candidates(
                        view.tokens.position[:, one],
                        parts.starts[k] if parts.starts is not None else view.tokens.start,
                        None if origin is None else origin[:, one] - first,
                    ),
                    whole=view.initial,
                    original=original,
                    pinned=view.pinned if k == len(parts.sizes[0]) - 1 else 0,
                    memory=memory,
                )
            )
            if size
            else [Selection(view.tokens.position[:, :0])]
        )
        offset, first = offset + size, first + original
    return _put_together(view, parts, answers)


def _begun(view: View, parts: _Parts) -> _Parts:
    edges = list(accumulate(parts.originals[0], initial=0))
    starts = []
    for begin, end in pairwise(edges):
        index = torch.arange(begin, end)
        starts.append(Start(tuple(t.take(index) for t in view.initial.start.tables), view.hidden.device))
    parts = replace(parts, starts=tuple(starts), memories=tuple(Memory() for _ in starts))
    view.memory.put(parts)
    return parts


def _put_together(view: View, parts: _Parts, answers: list[Sequence[Selection]]) -> list[Selection]:
    """One selection for all rows that got the same selection in each of their parts, and what that leaves of these."""
    where: list[list[tuple[int, int]]] = [[] for _ in view.rows]  # for each row and part: which selection, which row
    for answer in answers:
        for number, chosen in enumerate(answer):
            for index, row in enumerate(chosen.rows or range(len(view.rows))):
                where[row].append((number, index))
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, places in enumerate(where):
        alike.setdefault(tuple(number for number, _ in places), []).append(row)
    sizes = [tuple(a[n].survivors for a, (n, _) in zip(answers, places, strict=True)) for places in where]
    view.memory.put(replace(parts, sizes=tuple(sizes)))
    offsets = list(accumulate(parts.sizes[0], initial=0))[:-1]
    found = []
    for numbers, rows in alike.items():
        picked = [
            _rows(answer[number], [where[row][k][1] for row in rows])
            for k, (answer, number) in enumerate(zip(answers, numbers, strict=True))
        ]
        found.append(replace(_joined(picked, offsets, parts.sizes[0]), rows=tuple(rows)))
    return found


def _rows(chosen: Selection, rows: list[int]) -> Selection:
    at = device_rows(rows, chosen.keep.device)
    merge = chosen.merge
    return Selection(
        chosen.keep[at],
        None if merge is None else Merge(merge.source[at], merge.target[at], merge.weight[at]),
        None if chosen.recycled is None else chosen.recycled[at],
        None if chosen.raw is None else chosen.raw[at],
        None if chosen.scores is None else chosen.scores[at],
        pending=chosen.pending,
    )


def _joined(chosen: list[Selection], offsets: list[int], sizes: tuple[int, ...]) -> Selection:
    """Selections of all parts as one of the whole rows."""
    merges = [
        (s.merge.source + o, s.merge.target + o, s.merge.weight)
        for s, o in zip(chosen, offsets, strict=True)
        if s.merge is not None
    ]
    recycled = [s.recycled + o for s, o in zip(chosen, offsets, strict=True) if s.recycled is not None]
    scored = all(s.raw is not None or not size for s, size in zip(chosen, sizes, strict=True))
    return Selection(
        keep=torch.cat([s.keep + o for s, o in zip(chosen, offsets, strict=True)], 1),
        merge=Merge(*(torch.cat(column, 1) for column in zip(*merges, strict=True))) if merges else None,
        recycled=torch.cat(recycled, 1) if recycled else None,
        raw=torch.cat([s.raw for s in chosen if s.raw is not None], 1) if scored else None,
        scores=torch.cat([s.scores for s in chosen if s.scores is not None], 1) if scored else None,
        pending=_Checks.of([s.pending for s in chosen if s.pending is not None]),
    )


class _Checks(Pending):
    """The checks of several parts' scores as one."""

    def __init__(self, parts: Sequence[Pending]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, parts: Sequence[Pending]) -> Pending | None:
        """None of none."""
        return cls(parts) if parts else None

    @property
    def known(self) -> bool:
        """Whether looking at none of them means waiting."""
        return all(part.known for part in self._parts)

    def check(self) -> None:
        """Look at all of them."""
        for part in self._parts:
            part.check()


def _sizes(tokens: VisualTokens, scope: Literal["image", "frame"]) -> tuple[int, ...]:
    """How many tokens each part of a row has, in sequence order."""
    part = _part_of(tokens, scope)
    if bool((part.diff() < 0).any()):
        raise LayoutError(f"scope={scope!r} needs the visual tokens of a picture to stand together, in order")
    return tuple(torch.unique_consecutive(part, return_counts=True)[1].tolist())


def _part_of(tokens: VisualTokens, scope: Literal["image", "frame"]) -> Tensor:
    """(n,) number of the part that each token belongs to, in sequence order."""
    picture = torch.tensor([image.part == 0 for image in tokens.images]).cumsum(0)
    part = picture[tokens.image]
    if scope == "frame" and len(tokens):
        # Views of a picture are frames of their own.
        frames = max(image.frames for image in tokens.images)
        part = tokens.image * frames + tokens.frame
    return part
