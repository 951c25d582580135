"""What stages decided, and a row's trace made of it when somebody looks: copying every choice would cost each call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from evengaze.candidates import Candidates
from evengaze.protocol import Selection
from evengaze.trace import RowTrace


@dataclass(frozen=True)
class Decided:
    """What a stage decided for rows with the same number of candidates.

    Attributes:
        rows: their numbers in the batch.
        before: the candidates.
        selection: of them.
        after: what went on.
        pins: visual tokens that were no candidates: prompts that end in the picture keep their last token.
        places: (rows, pins) their indices in the sequence that went on.
    """

    rows: tuple[int, ...]
    before: Candidates
    selection: Selection
    after: Candidates
    pins: tuple[int, ...] = ()
    places: Tensor | None = None

    def row(self, index: int) -> RowTrace:
        """The trace of one of the rows, counted within these."""
        chosen = self.selection
        origin = self._origin(self.before, index)
        found = RowTrace(
            candidates=origin,
            kept=origin[chosen.keep[index]],
            recycled=None if chosen.recycled is None else origin[chosen.recycled[index]],
            merge=None if chosen.merge is None else chosen.merge.row(index),
            raw=None if chosen.raw is None else chosen.raw[index],
            scores=None if chosen.scores is None else chosen.scores[index],
            tokens=self._origin(self.after, index),
            place=self.after.position[index],
        )
        return found if self.places is None else self._with_pins(found, self.places[index])

    def _with_pins(self, found: RowTrace, places: Tensor) -> RowTrace:
        """The pinned tokens behind the candidates, with the best of their scores."""
        pins = torch.tensor(self.pins, device=found.kept.device)

        def scored(values: Tensor | None) -> Tensor | None:
            return None if values is None else torch.cat([values, values.max().expand(len(pins))])

        assert found.tokens is not None and found.place is not None
        place, order = torch.cat([found.place, places]).sort()
        return replace(
            found,
            candidates=torch.cat([found.candidates, pins]),
            kept=torch.cat([found.kept, pins]).sort().values,
            raw=scored(found.raw),
            scores=scored(found.scores),
            tokens=torch.cat([found.tokens, pins])[order],
            place=place,
        )

    @staticmethod
    def _origin(tokens: Candidates, index: int) -> Tensor:
        if tokens.origin is None:
            return torch.arange(len(tokens), device=tokens.position.device)
        return tokens.origin[index]


class RowTraces(Sequence[RowTrace]):
    """The rows of a stage, taken from what was decided for all of them together when they are looked at.

    Args:
        batch: number of rows.
        decided: what was decided; rows in none of it hold no visual tokens.
    """

    def __init__(self, batch: int, decided: Sequence[Decided]) -> None:
        self._where = {row: (entry, k) for entry in decided for k, row in enumerate(entry.rows)}
        self._batch = batch

    def __len__(self) -> int:
        return self._batch

    @overload
    def __getitem__(self, row: int) -> RowTrace: ...

    @overload
    def __getitem__(self, row: slice) -> list[RowTrace]: ...

    def __getitem__(self, row: int | slice) -> RowTrace | list[RowTrace]:
        if isinstance(row, slice):
            return [self[b] for b in range(self._batch)[row]]
        row = range(self._batch)[row]
        if row not in self._where:
            return RowTrace.empty()
        entry, index = self._where[row]
        return entry.row(index)
