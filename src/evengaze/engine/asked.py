"""Rows that hold several questions: samples packed into one row, or turns of a conversation with pictures of their own.

Each question ranks the visual tokens in front of it, with a budget for them alone, as if it were a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from evengaze.candidates import Candidates, Start
from evengaze.engine.rows import Group
from evengaze.memory import Memory
from evengaze.protocol import Merge, Pending, Selection, View, Words

Select = Callable[[View], Selection | Sequence[Selection]]


@dataclass(frozen=True)
class _Parts:
    """What is asked about in a row.

    Attributes:
        starts: the table of each question's visual tokens.
        memories: what the method remembers of each.
        sizes: how many candidates each has left.
    """

    starts: tuple[Start, ...]
    memories: tuple[Memory, ...]
    sizes: tuple[int, ...]


def select_asked(
    view: View, group: Group, words: Callable[[int, Candidates], Words], select: Select
) -> tuple[Selection, list[Pending]]:
    """Let a method select for each question of a row as if the others' visual tokens were not there.

    Args:
        view: the row.
        group: the same row.
        words: gives the text of a question, from its number and its candidates.
        select: the method's selection.

    Returns:
        One selection for the row, and the checks of its scores.
    """
    parts = group.memory.get(_Parts) or _begun(view, group)
    found, sizes = [], []
    places = pairwise(accumulate(parts.sizes, initial=0))
    for k, (here, question) in enumerate(zip(places, group.asked, strict=True)):
        tokens = view.tokens.part(slice(*here), parts.starts[k], question.start)
        own = replace(
            view,
            tokens=tokens,
            original=question.stop - question.start,
            pinned=int(question.pinned),
            memory=parts.memories[k],
            words=words(k, tokens),
        )
        chosen = select(own) if len(tokens) else Selection(tokens.position)
        chosen = chosen if isinstance(chosen, Selection) else chosen[0]  # of a single row
        sizes.append(chosen.survivors)
        found.append(_moved(chosen, here[0]))
    group.memory.put(replace(parts, sizes=tuple(sizes)))
    return _joined(found, parts.sizes), [s.pending for s in found if s.pending is not None]


def _begun(view: View, group: Group) -> _Parts:
    """The questions of a row at its first stage."""
    starts = tuple(view.tokens.start.part(q.start, q.stop) for q in group.asked)
    sizes = tuple(q.stop - q.start - q.pinned for q in group.asked)
    return _Parts(starts, tuple(Memory() for _ in starts), sizes)


def _moved(chosen: Selection, offset: int) -> Selection:
    """A question's selection, with the indices of the row's candidates."""
    merge = chosen.merge
    return replace(
        chosen,
        keep=chosen.keep + offset,
        recycled=None if chosen.recycled is None else chosen.recycled + offset,
        merge=None if merge is None else Merge(merge.source + offset, merge.target + offset, merge.weight),
    )


def _joined(found: Sequence[Selection], sizes: Sequence[int]) -> Selection:
    """Selections of all questions as one of the row. Scores are left out where a part was kept whole, unscored."""
    merges = [(s.merge.source, s.merge.target, s.merge.weight) for s in found if s.merge is not None]
    recycled = [s.recycled for s in found if s.recycled is not None]
    scored = all(s.raw is not None and s.scores is not None for s, size in zip(found, sizes, strict=True) if size)
    return Selection(
        keep=torch.cat([s.keep for s in found], 1),
        merge=Merge(*(torch.cat(column, 1) for column in zip(*merges, strict=True))) if merges else None,
        recycled=torch.cat(recycled, 1) if recycled else None,
        raw=torch.cat([s.raw for s in found if s.raw is not None], 1) if scored else None,
        scores=torch.cat([s.scores for s in found if s.scores is not None], 1) if scored else None,
    )
