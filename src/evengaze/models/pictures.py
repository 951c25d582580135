"""From what a family knows about its pictures to the layout of a batch.

Every family answers two questions: which placeholder tokens does a picture put into a prompt (`Picture`), and which
picture comes next (the order of encoding). `assemble` does the rest for all of them: rows without pictures, several
pictures in a row, images and videos mixed, padding on either side, rows repeated for beams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from evengaze.errors import LayoutError
from evengaze.layout import ImageInfo, VisualLayout, VisualTokens
from evengaze.models.base import Call

NO_CANDIDATE = -1
"""Stands in place of a cell for tokens that show no patch: class tokens, newlines."""


@dataclass(frozen=True)
class Panel:
    """Part of a picture that is shown on one grid: all of it, a thumbnail, a detail view, or equal tiles or frames.

    Attributes:
        info: the grid and the number of frames (or tiles).
        cell: (n,) raster index of each placeholder token in its frame, or `NO_CANDIDATE`.
        padding: (candidates,) share of padding of each cell in order; None: no padding.
        special: how many tokens that are no candidates lead each grid, if all are complete and in raster order.

    The cells that `plain` gives are shared by all panels of that size: replaced if need be, never written to.
    """

    info: ImageInfo
    cell: Tensor
    padding: Tensor | None = None
    special: int | None = None

    @property
    def remembered(self) -> bool:
        """Whether the cells are those of `plain`, and not put in their place."""
        return self.special is not None and self.cell is _raster(self.info.cells, self.info.frames, self.special)

    @classmethod
    def plain(cls, info: ImageInfo, padding: Tensor | None = None, *, special: int = 0) -> Panel:
        """Complete grids in raster order, each behind `special` tokens that are no candidates."""
        return cls(info, _raster(info.cells, info.frames, special), padding, special)


@lru_cache(256)
def _raster(cells: int, frames: int, special: int) -> Tensor:
    """The cells of complete grids, not to be written to."""
    with torch.inference_mode(False), torch.device("cpu"):
        frame = torch.cat([torch.full((special,), NO_CANDIDATE), torch.arange(cells)])
        return frame.repeat(frames)


@dataclass(frozen=True)
class Picture:
    """The placeholder tokens of one image or video, in sequence order. All tensors have shape (n,).

    Attributes:
        images: the grids that it is shown on: one, except where a thumbnail and a detail view differ in size.
        image: index into `images`.
        frame: frame (or tile) of that grid.
        cell: raster index in the grid, or `NO_CANDIDATE`.
        x: raster index as a fraction in [0, 1).
        padding: share of the patch that is padding.
    """

    images: tuple[ImageInfo, ...]
    image: Tensor
    frame: Tensor
    cell: Tensor
    x: Tensor
    padding: Tensor

    def __len__(self) -> int:
        return int(self.cell.shape[0])

    @cached_property
    def whole(self) -> bool:
        """Whether all tokens are candidates."""
        return not bool((self.cell == NO_CANDIDATE).any())

    @classmethod
    def video(cls, view: Panel) -> Picture:
        """Frames that are pictures of their own: x starts again in each."""
        if view.remembered:
            return _plain(view, video=True)
        return cls._of([view], x=view.cell.double() / view.info.cells)

    @classmethod
    def still(cls, *views: Panel) -> Picture:
        """One image. If it is shown in several views or tiles, x runs through all of them in sequence order."""
        if len(views) == 1 and views[0].remembered:
            return _plain(views[0], video=False)
        return cls._still(views)

    @classmethod
    def _still(cls, views: Sequence[Panel]) -> Picture:
        rank = torch.cat([(v.cell != NO_CANDIDATE).double().cumsum(0) for v in views])
        total = sum(float(v.info.cells * v.info.frames) for v in views)
        ahead = torch.cat([torch.full((len(v.cell),), o) for v, o in zip(views, _offsets(views), strict=True)])
        return cls._of(views, x=(ahead + rank - 1) / total)

    @classmethod
    def _of(cls, views: Sequence[Panel], x: Tensor) -> Picture:
        image = torch.cat([torch.full((len(v.cell),), k) for k, v in enumerate(views)])
        cell = torch.cat([v.cell for v in views])
        frame = torch.cat([((v.cell == 0).cumsum(0) - 1).clamp(min=0) for v in views])
        padding = torch.zeros(len(cell), dtype=torch.float64)
        shares = [
            torch.zeros(v.info.cells * v.info.frames, dtype=torch.float64) if v.padding is None else v.padding.flatten()
            for v in views
        ]
        padding[cell != NO_CANDIDATE] = torch.cat(shares).double()
        return cls(tuple(v.info for v in views), image, frame, cell, x, padding)


def _plain(view: Panel, *, video: bool) -> Picture:
    """A picture of complete grids: all but its padding is remembered, and not to be written to."""
    assert view.special is not None
    grids = _grids(view.info.cells, view.info.frames, view.special, video)
    padding = grids.padding
    if view.padding is not None:
        padding = grids.padding.clone()
        padding[grids.cell != NO_CANDIDATE] = view.padding.flatten().double()
    picture = Picture((view.info,), grids.image, grids.frame, grids.cell, grids.x, padding)
    picture.__dict__["whole"] = view.special == 0
    return picture


@lru_cache(256)
def _grids(cells: int, frames: int, special: int, video: bool) -> Picture:
    """Complete grids without padding."""
    info = ImageInfo((1, cells), frames)
    with torch.inference_mode(False), torch.device("cpu"):
        view = Panel(info, _raster(cells, frames, special))
        return Picture._of([view], view.cell.double() / cells) if video else Picture._still([view])


def _offsets(views: Sequence[Panel]) -> list[float]:
    """Candidates ahead of each view."""
    ahead, out = 0.0, []
    for v in views:
        out.append(ahead)
        ahead += v.info.cells * v.info.frames
    return out


def repeats(mask: Tensor, encoded: int) -> int:
    """How often each sample stands in the rows (B, L) of filled tokens, if what was encoded fills `encoded`: beams."""
    return max(1, int(mask.sum()) // max(1, encoded))


def spans(there: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every unbroken run of True in a row (L,)."""
    edge = torch.nn.functional.pad(there.int(), (1, 1)).diff()
    return list(zip((edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist(), strict=True))


@dataclass(frozen=True)
class Filling:
    """Which tokens the encoded pictures of one kind fill.

    Attributes:
        mask: (B, L) bool, on the CPU.
        pictures: those pictures, in order.
        token: how messages call their placeholder.
    """

    mask: Tensor
    pictures: Sequence[Picture]
    token: str

    @property
    def encoded(self) -> int:
        """How many tokens the pictures have."""
        return sum(len(p) for p in self.pictures)

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """The positions of the tokens in each row."""
        return tuple(torch.split(self.mask.nonzero()[:, 1], self.mask.sum(1).tolist()))


def assemble(call: Call, pictures: Mapping[int, Sequence[Picture]]) -> VisualLayout | None:
    """Hand out the pictures, in order, to the placeholder tokens of the rows.

    Args:
        call: the call; its `input_ids` hold the placeholders.
        pictures: placeholder id -> the pictures that were encoded for it.

    Returns:
        The layout on the call's device, or None if the call holds no placeholders.

    Raises:
        LayoutError: placeholders and pictures do not match.
    """
    if call.input_ids is None:
        if any(pictures.values()):
            raise LayoutError("images were encoded but the model was called with inputs_embeds: give a layout by hand")
        return None
    ids = call.input_ids.cpu()
    return fill(call, [Filling(ids == token, found, f"of id {token}") for token, found in pictures.items()])


def fill(call: Call, fillings: Sequence[Filling]) -> VisualLayout | None:
    """`assemble` where it is known which tokens are filled; arguments, result and errors likewise."""
    times = _repeats(fillings)
    if times == 0:
        return None
    queues = [list(f.pictures) for f in fillings]
    rows = []
    for b in range(0, len(fillings[0].mask), times):
        placed: list[tuple[Tensor, Picture]] = []
        for f, queue in zip(fillings, queues, strict=True):
            position = f.rows[b]
            start = 0
            while start < len(position):
                if not queue or start + len(queue[0]) > len(position):
                    raise LayoutError(
                        f"row {b // times} holds {len(position)} placeholder tokens {f.token}, which is no whole "
                        "number of pictures: the placeholders of a picture must not be cut off or split between calls"
                    )
                picture = queue.pop(0)
                placed.append((position[start : start + len(picture)], picture))
                start += len(picture)
        rows.append(_row(placed).to(call.device))
    return VisualLayout(tuple(r for r in rows for _ in range(times)))


def _repeats(fillings: Sequence[Filling]) -> int:
    """How often each sample's row is repeated (beams); 0 if there are no placeholders."""
    times = set()
    for f in fillings:
        there, encoded = sum(map(len, f.rows)), f.encoded
        if there == 0:
            continue
        if encoded == 0 or there % encoded or len(f.mask) % (there // encoded):
            raise LayoutError(
                f"the call holds {there} placeholder tokens {f.token}, but the images encoded for it fill "
                f"{encoded}. Attach the pruner before the images are encoded, and use the model's own processor."
            )
        times.add(there // encoded)
    if len(times) > 1:
        raise LayoutError(f"images and videos disagree on how often rows are repeated: {sorted(times)}")
    return times.pop() if times else 0


def _row(placed: list[tuple[Tensor, Picture]]) -> VisualTokens:
    """The table of one row from its pictures and where their tokens are."""
    if not placed:
        return VisualTokens.empty()
    if len(placed) == 1 and placed[0][1].whole:
        position, p = placed[0]
        # Other calls have these, too.
        image, frame, cell, x, padding = (c.clone() for c in (p.image, p.frame, p.cell, p.x, p.padding))
        return VisualTokens(position, image, frame, cell, x, padding, p.images)
    placed.sort(key=lambda entry: int(entry[0][0]))
    images: list[ImageInfo] = []
    columns: list[tuple[Tensor, ...]] = []
    for position, p in placed:
        columns.append((position, p.image + len(images) if images else p.image, p.frame, p.cell, p.x, p.padding))
        images.extend(p.images)
    position, image, frame, cell, x, padding = (torch.cat(c) for c in zip(*columns, strict=True))
    table = VisualTokens(position, image, frame, cell, x, padding, tuple(images))
    return table if all(p.whole for _, p in placed) else table.take((cell != NO_CANDIDATE).nonzero()[:, 0])
