"""The visual tokens that are left while a model prunes: what layouts say of them, on the device, rows together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from evengaze.device import device_rows, precise, upload
from evengaze.layout import COLUMNS, SHARES, ImageInfo, VisualTokens


@dataclass(frozen=True)
class Start:
    """The tables of some rows of a batch before anything was dropped, the same number of tokens in each.

    Attributes:
        tables: one a row, on the host.
        device: where the columns are asked for.
    """

    tables: tuple[VisualTokens, ...]
    device: torch.device
    _columns: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def column(self, name: str) -> Tensor:
        """(rows, n) values of a column of the tables, on the device."""
        if name not in self._columns:
            kind = precise(self.device) if name in SHARES else torch.long
            values = torch.stack([getattr(table, name) for table in self.tables])
            self._columns[name] = upload(values.to(kind), self.device)
        return self._columns[name]

    @cached_property
    def alike(self) -> bool:
        """Whether all rows hold the same pictures."""
        return all(table.same_as(self.tables[0]) for table in self.tables[1:])

    def select(self, rows: Sequence[int]) -> Start:
        """Some of the rows."""
        return Start(tuple(self.tables[b] for b in rows), self.device)

    def part(self, start: int, stop: int) -> Start:
        """Some of each row's tokens."""
        index = torch.arange(start, stop)
        return Start(tuple(table.take(index) for table in self.tables), self.device)


@dataclass(frozen=True)
class Candidates:
    """The visual tokens that are left in some rows of a batch, the same number n in each.

    Attributes:
        position: (rows, n) index in the current sequence, ascending.
        start: the tables that they were taken from.
        origin: (rows, n) which of the tables' tokens they are; None: all of them.
        standing: the positions and the first of them, if in every row they are that and what follows without a gap.
    """

    position: Tensor
    start: Start
    origin: Tensor | None = None
    standing: tuple[Tensor, int] | None = None

    def __len__(self) -> int:
        return int(self.position.shape[1])

    @classmethod
    def of(cls, tables: Sequence[VisualTokens], device: torch.device) -> Candidates:
        """All tokens of tables of equal length."""
        start = Start(tuple(tables), device)
        return cls(start.column("position"), start)

    @property
    def run(self) -> int | None:
        """Where they stand in every row, one right behind the other; None if they do not, or only the device knows."""
        return self.standing[1] if self.standing is not None and self.standing[0] is self.position else None

    @property
    def image(self) -> Tensor:
        """(rows, n) which image of the row each token is from."""
        return self.column("image")

    @property
    def frame(self) -> Tensor:
        """(rows, n) which frame of that image."""
        return self.column("frame")

    @property
    def cell(self) -> Tensor:
        """(rows, n) raster index in the frame's grid."""
        return self.column("cell")

    @property
    def x(self) -> Tensor:
        """(rows, n) raster index as a fraction in [0, 1)."""
        return self.column("x")

    @property
    def padding(self) -> Tensor:
        """(rows, n) share of the token's patch that is padding."""
        return self.column("padding")

    @property
    def images(self) -> tuple[tuple[ImageInfo, ...], ...]:
        """The images of each row."""
        return tuple(table.images for table in self.start.tables)

    @property
    def tables(self) -> tuple[VisualTokens, ...] | None:
        """The tables on the host, row by row, while nothing has been dropped; None afterwards."""
        return self.start.tables if self.origin is None else None

    def column(self, name: str) -> Tensor:
        """(rows, n) a column of `VisualTokens`."""
        return self.position if name == "position" else self.of_start(self.start.column(name))

    def of_start(self, values: Tensor) -> Tensor:
        """(rows, n) what (rows, tokens at the start) values say of the tokens that are left."""
        return values if self.origin is None else values.gather(1, self.origin)

    def take(self, index: Tensor) -> Candidates:
        """The tokens at `index` (rows, m)."""
        origin = index if self.origin is None else self.origin.gather(1, index)
        return Candidates(self.position.gather(1, index), self.start, origin)

    def part(self, here: slice, start: Start, first: int) -> Candidates:
        """Some of the tokens, with a table of their own, `start`, which begins at token `first` of the tables."""
        origin = None if self.origin is None else self.origin[:, here] - first
        position, run = self.position[:, here], self.run
        standing = None if run is None or here.step not in (None, 1) else (position, run + here.indices(len(self))[0])
        return Candidates(position, start, origin, standing)

    def select(self, rows: Sequence[int]) -> Candidates:
        """Some of the rows."""
        at = device_rows(rows, self.position.device)
        origin = None if self.origin is None else self.origin[at]
        position, run = self.position[at], self.run
        return Candidates(position, self.start.select(rows), origin, None if run is None else (position, run))

    def row(self, row: int) -> VisualTokens:
        """The table of one row, on the device."""
        columns = {name: self.column(name)[row] for name in COLUMNS}
        return VisualTokens(**columns, images=self.start.tables[row].images)
