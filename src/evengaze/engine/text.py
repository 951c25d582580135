"""Where the text of a call is that ranks its visual tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evengaze.candidates import Candidates
from evengaze.device import counting, upload
from evengaze.engine.question import Questions
from evengaze.engine.rows import Group
from evengaze.layout import VisualLayout
from evengaze.protocol import Picked, Words


class Text:
    """Where the text of a call is. What is text is known on the host, where it stands after a cut on the device.

    Args:
        layout: on the host, one table a row.
        real: (B, L) bool on the host; None without padding.
        length: L.
        asked: who ranks what; None if every row is one prompt that ends with the row, in text.
    """

    def __init__(self, layout: VisualLayout, real: Tensor | None, length: int, asked: Questions | None = None) -> None:
        self._layout, self._real, self._length, self._asked = layout, real, length, asked
        self._found: dict[int, tuple[Tensor, Tensor | None, bool]] = {}
        self._tail = self._behind_all() if real is None and asked is None else 0

    def words(self, group: Group, slots: Tensor | None, current: int, tokens: Candidates, question: int = 0) -> Words:
        """Where they are in a group's rows.

        Args:
            group: the rows.
            slots: (B, M) index into the call of each token of the current sequence; None while all are there.
            current: M.
            tokens: the candidates that are asked about.
            question: which of the rows' questions asks.
        """

        def place(index: Tensor) -> Tensor:
            moved = upload(index, group.device)
            if slots is None:
                return moved
            held = slots.to(group.device)[group.at(group.device)]
            here = torch.zeros(len(held), self._length, dtype=torch.long, device=group.device)
            here.scatter_(1, held, counting(current, group.device).expand_as(held))
            return here.gather(1, moved)

        ends = self._asked is None and self._real is None

        def last() -> Tensor:
            end = counting(current, group.device)[current - 1 :].expand(len(group.rows), 1)
            if ends:
                return end
            index = self._last(group.rows, question)
            return end if bool((index == self._length - 1).all()) else place(index)

        def text() -> Picked:
            if self._tail:  # none of it is ever dropped
                start = current - self._tail
                return Picked(counting(current, group.device)[start:].expand(len(group.rows), -1), run=start)
            index, real, mixed = self._behind(group.rows, question)
            at = place(index)
            flags = None if real is None else upload(real, group.device)
            if mixed:
                # Some text stands between visual tokens: it counts once all of these behind it are gone.
                behind = at > tokens.position[:, -1:]
                flags = behind if flags is None else flags & behind
                none = ~flags.any(1, keepdim=True)
                at, flags = torch.cat([at, last()], 1), torch.cat([flags, none], 1)
            return Picked(at, flags)

        return Words(last, text, current - 1 if ends else None)

    def _behind_all(self) -> int:
        """How many tokens of text are behind all visual ones; 0 if rows differ, or text stands between some."""
        found = {self._length - table.span[1] for table in self._layout.rows if len(table)}
        alone = all(table.span[1] - table.span[0] == len(table) for table in self._layout.rows)
        return found.pop() if alone and len(found) == 1 else 0

    def _last(self, rows: Sequence[int], question: int) -> Tensor:
        """(rows, 1) index into the call of the last token of each row's prompt."""
        if self._asked is not None:
            return torch.tensor([[self._asked[b][question].query] for b in rows])
        if self._real is None:
            return torch.full((len(rows), 1), self._length - 1)
        place = torch.arange(self._length)
        return torch.where(self._real[list(rows)], place, -1).amax(1, keepdim=True)

    def _behind(self, rows: Sequence[int], question: int) -> tuple[Tensor, Tensor | None, bool]:
        """Real tokens that are or may come behind all visual ones, which entries are no fillers, whether some may."""
        if question not in self._found:
            self._found[question] = self._search(question)
        index, real, mixed = self._found[question]
        return index[list(rows)], None if real is None else real[list(rows)], mixed

    def _search(self, question: int) -> tuple[Tensor, Tensor | None, bool]:
        """The same for all rows: they have the same number of entries, however they are divided into groups later."""
        pairs = [self._words(b, question) for b in range(len(self._layout.rows))]
        found, mixed = [index for index, _ in pairs], any(between for _, between in pairs)
        count = max(map(len, found))
        if all(len(index) == count for index in found):
            return torch.stack(found), None, mixed
        index = torch.full((len(found), count), self._length - 1)
        real = torch.zeros(len(found), count, dtype=torch.bool)
        for b, entry in enumerate(found):  # rows end together, as the text that is asked does
            index[b, count - len(entry) :] = entry
            real[b, count - len(entry) :] = True
        return index, real, mixed

    def _words(self, row: int, question: int) -> tuple[Tensor, bool]:
        """A row's text behind its first visual token, or its last token if there is none; whether some is between."""
        position = self._layout.rows[row].position
        if self._asked is not None:
            asked = self._asked[row][question : question + 1]
            if not asked:
                return position[:0], False
            last, text = position[asked[0].stop - 1], asked[0].text
            return (text if len(text) else torch.tensor([asked[0].query])), bool((text < last).any())
        if not len(position):
            return position, False
        other = torch.ones(self._length, dtype=torch.bool) if self._real is None else self._real[row].clone()
        first, end = self._layout.rows[row].span
        other[:first] = False
        other[position] = False
        text = other.nonzero()[:, 0]
        return (text if len(text) else self._last([row], question)[0]), end - first > len(position)
