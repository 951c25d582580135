"""Where the visual tokens of a call are, and what each of them shows.

A `VisualTokens` table describes one row of a batch: for every visual token its position in the sequence, its image and
frame, its cell in that frame's grid and the share of the cell that is padding. A `VisualLayout` holds one table a row.
Adapters (`evengaze.models`) make layouts for known model families; `VisualLayout.from_spans` makes them by hand.

Layouts are made and kept on the host. What is left of them while a model prunes is on its device
(`evengaze.candidates`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from evengaze.device import precise
from evengaze.errors import LayoutError

Span = tuple[int, int]


@dataclass(frozen=True)
class ImageInfo:
    """One image or video of a prompt.

    Attributes:
        grid: rows and columns of visual tokens in one frame (`(24, 24)` for LLaVA-1.5).
        frames: number of frames; 1 for an image.
        size: (width, height) in pixels of the picture before it was padded or resized, where it is known.
        part: 0, or the number of a further view of the picture of the entry before (the detail view behind a
            thumbnail).
    """

    grid: tuple[int, int]
    frames: int = 1
    size: tuple[int, int] | None = None
    part: int = 0

    @property
    def cells(self) -> int:
        """Visual tokens in one frame's grid."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one row, in sequence order. All tensors have shape (n,).

    Attributes:
        position: index in the sequence that the decoder receives (padding of the batch counted in).
        image: which image of the row (an index into `images`).
        frame: which frame of that image; 0 for still images.
        cell: raster index in the frame's grid, row-major.
        x: raster index as a fraction in [0, 1): `cell / cells` of the frame. Trend curves are functions of it.
        padding: share of the token's patch that is padding, in [0, 1].
        images: one entry for each image of the row.
    """

    position: Tensor
    image: Tensor
    frame: Tensor
    cell: Tensor
    x: Tensor
    padding: Tensor
    images: tuple[ImageInfo, ...] = ()

    def __len__(self) -> int:
        return int(self.position.shape[0])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        images = [[list(i.grid), i.frames, None if i.size is None else list(i.size), i.part] for i in self.images]
        return {"images": images, **{name: getattr(self, name).tolist() for name in COLUMNS}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisualTokens:
        """The inverse of `to_dict`; a KeyError, TypeError, ValueError or IndexError if it is none."""
        images = tuple(
            ImageInfo((g[0], g[1]), frames, None if size is None else (size[0], size[1]), part)
            for g, frames, size, part in values["images"]
        )
        kinds = {name: torch.long if name in _INDICES else torch.float64 for name in COLUMNS}
        columns = {name: torch.tensor(values[name], dtype=kind) for name, kind in kinds.items()}
        return cls(**columns, images=images)

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> VisualTokens:
        """The table of a row without images."""
        index = torch.zeros(0, dtype=torch.long, device=device)
        real = torch.zeros(0, dtype=precise(device), device=device)
        return cls(index, index, index, index, real, real)

    @classmethod
    def build(
        cls,
        position: Tensor,
        images: Sequence[ImageInfo],
        *,
        padding: Tensor | None = None,
        image: Tensor | None = None,
        frame: Tensor | None = None,
        cell: Tensor | None = None,
        x: Tensor | None = None,
    ) -> VisualTokens:
        """Fill in what is not given, assuming that each image's grid is complete and in raster order.

        Args:
            position: (n,) sequence indices, ascending.
            images: the row's images in order of appearance.
            padding: (n,) share of padding of each patch; 0 everywhere if left out.
            image: (n,) image of each token.
            frame: (n,) frame of each token.
            cell: (n,) raster index of each token.
            x: (n,) fraction of the raster; `cell / cells` if left out.

        Raises:
            LayoutError: the number of tokens is not that of the complete grids.
        """
        device = position.device
        if image is None or frame is None or cell is None:
            expected = sum(i.cells * i.frames for i in images)
            if expected != position.shape[0]:
                grids = ", ".join(f"{i.frames} x {i.grid[0]} x {i.grid[1]}" for i in images) or "none"
                raise LayoutError(
                    f"{position.shape[0]} visual tokens do not fill the image grids ({grids}: {expected} tokens). "
                    "Give the grid that the vision tower and projector really produce."
                )
            image = torch.cat([torch.full((i.cells * i.frames,), k) for k, i in enumerate(images)])
            frame = torch.cat([torch.arange(i.frames).repeat_interleave(i.cells) for i in images])
            cell = torch.cat([torch.arange(i.cells).repeat(i.frames) for i in images])
            image, frame, cell = image.to(device), frame.to(device), cell.to(device)
        if x is None:
            cells = torch.tensor([float(i.cells) for i in images], dtype=torch.float64)
            x = cell.cpu().double() / cells[image.cpu()]
        if padding is None:
            padding = torch.zeros(position.shape[0])
        x, padding = (values.to(device, precise(device)) for values in (x, padding))
        return cls(position, image, frame, cell, x, padding, tuple(images))

    @cached_property
    def span(self) -> tuple[int, int]:
        """The index of the first token, and the first index behind the last one; read once."""
        return (int(self.position[0]), int(self.position[-1]) + 1) if len(self) else (0, 0)

    def take(self, index: Tensor) -> VisualTokens:
        """The tokens at `index` (m,), in that order."""
        return replace(self, **{k: getattr(self, k)[index] for k in COLUMNS})

    def counts(self) -> list[list[int]]:
        """Tokens of each frame (or tile) of each picture, as `schedule.Schedule` takes them."""
        pictures: list[list[int]] = []
        for number, info in enumerate(self.images):
            if info.part == 0:
                pictures.append([])
            frames = torch.bincount(self.frame[self.image == number], minlength=info.frames)
            pictures[-1] += [tokens for tokens in frames.tolist() if tokens]
        return pictures

    def to(self, device: torch.device | str) -> VisualTokens:
        """The same table on another device."""
        if self.position.device == torch.device(device) and self.x.dtype == self.padding.dtype == precise(device):
            return self
        indices = {k: getattr(self, k).to(device) for k in _INDICES}
        shares = {k: getattr(self, k).to(device, precise(device)) for k in SHARES}
        return replace(self, **indices, **shares)

    def same_as(self, other: VisualTokens) -> bool:
        """Whether two tables on the host hold the same pictures, wherever in the sequence they are."""
        return self is other or (
            self.images == other.images
            and len(self) == len(other)
            and all(torch.equal(getattr(self, k), getattr(other, k)) for k in COLUMNS[1:])
        )


_INDICES = ("position", "image", "frame", "cell")
SHARES = ("x", "padding")
COLUMNS = _INDICES + SHARES


@dataclass(frozen=True)
class VisualLayout:
    """The visual tokens of every row of a batch; rows without images hold an empty table."""

    rows: tuple[VisualTokens, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        """Visual tokens in all rows together."""
        return sum(len(r) for r in self.rows)

    def expand(self, batch: int) -> VisualLayout:
        """Repeat every row for beams or `num_return_sequences`.

        Raises:
            LayoutError: `batch` is not a multiple of the number of rows.
        """
        if batch == len(self.rows):
            return self
        if not self.rows or batch % len(self.rows):
            raise LayoutError(
                f"the layout has {len(self.rows)} rows, the call has {batch}; give one entry for each row"
            )
        times = batch // len(self.rows)
        return VisualLayout(tuple(r for r in self.rows for _ in range(times)))

    @classmethod
    def from_spans(
        cls,
        spans: Sequence[Span | Sequence[Span] | None],
        grid: tuple[int, int] | Sequence[tuple[int, int]],
        *,
        padding: Sequence[Tensor | Sequence[float] | None] | None = None,
        image_sizes: Sequence[tuple[int, int] | Sequence[tuple[int, int]] | None] | None = None,
    ) -> VisualLayout:
        """Say by hand where the visual tokens are.

        Args:
            spans: one entry a row: `(start, stop)` (half-open), a list of such pairs (several images), or None (no
                image). Indices count the padding of the batch.
            grid: rows and columns of every image's tokens, or one grid for each image of a row. A span of several
                times `rows * columns` tokens is read as a video of that many frames.
            padding: one entry a row: the padding share in [0, 1] of each of its visual tokens, or None.
            image_sizes: one entry a row: the (width, height) of its picture, or a list of them. They are taken as
                pictures that were padded to a square around their centre, as LLaVA-1.5 does, and the padding shares
                follow from them unless `padding` is given.

        Raises:
            LayoutError: spans overlap, are empty or out of order, or do not fill the grid; or there is no entry a row.
        """
        for name, given in (("padding", padding), ("image_sizes", image_sizes)):
            if given is not None and len(given) != len(spans):
                raise LayoutError(f"{name} has {len(given)} entries for {len(spans)} rows; give one entry for each row")
        rows = []
        for b, entry in enumerate(spans):
            pairs = _pairs(entry)
            sizes = _pairs(image_sizes[b]) if image_sizes is not None else []
            if sizes and len(sizes) != len(pairs):
                raise LayoutError(f"row {b} has {len(pairs)} images but {len(sizes)} image sizes")
            if not pairs:
                rows.append(VisualTokens.empty())
                continue
            grids: list[Any] = [grid] * len(pairs) if len(grid) and isinstance(grid[0], Integral) else list(grid)
            if len(grids) != len(pairs):
                raise LayoutError(f"row {b} has {len(pairs)} images but {len(grids)} grids")
            images, end = [], 0
            for k, ((start, stop), g) in enumerate(zip(pairs, grids, strict=True)):
                height, width = int(g[0]), int(g[1])
                if height < 1 or width < 1:
                    raise LayoutError(f"row {b}: a grid has at least one row and one column, not {g}")
                frames, rest = divmod(stop - start, height * width)
                if start < end or stop <= start:
                    raise LayoutError(f"row {b}: span ({start}, {stop}) is empty, negative or overlaps the one before")
                if rest:
                    raise LayoutError(f"row {b}: span ({start}, {stop}) of {stop - start} tokens is no multiple of {g}")
                images.append(ImageInfo((height, width), frames, sizes[k] if sizes else None))
                end = stop
            position = torch.cat([torch.arange(a, z) for a, z in pairs])
            share = None
            if padding is not None and padding[b] is not None:
                share = torch.as_tensor(padding[b], dtype=torch.float64)
                if share.shape != position.shape:
                    raise LayoutError(f"row {b}: {len(share)} padding shares for {len(position)} visual tokens")
            elif sizes:
                share = torch.cat([square_padding(i.size, i.grid).flatten().repeat(i.frames) for i in images])  # type: ignore[arg-type]
            rows.append(VisualTokens.build(position, images, padding=share))
        return cls(tuple(rows))


def _pairs(entry: Span | Sequence[Span] | None) -> list[Span]:
    """`(a, b)`, `[(a, b), ...]` or None as a list of pairs."""
    if entry is None or len(entry) == 0:
        return []
    first: Any = entry[0]
    if isinstance(first, Integral):  # numpy's numbers, too
        a, b = entry
        return [(int(a), int(b))]  # type: ignore[arg-type]
    return [(int(a), int(b)) for a, b in entry]  # type: ignore[misc]


def square_padding(size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Share of padding in each patch when a picture is centred on a square and resized to the grid.

    The geometry is that of LLaVA's `expand2square` with a real-valued offset, as in `generate_pad_mask` of the
    attention-debiasing patches (arXiv 2508.17807): only the shorter side is padded, equally on both ends.

    Args:
        size: (width, height) of the picture in pixels.
        grid: rows and columns of patches.

    Returns:
        (rows, columns) float64 in [0, 1].
    """
    width, height = size
    side = max(width, height)
    return 1 - _covered(height / side, grid[0])[:, None] * _covered(width / side, grid[1])[None, :]


def _covered(share: float, cells: int) -> Tensor:
    """Part of each of `cells` equal intervals of [0, 1] that the centred interval of length `share` covers."""
    edge = torch.arange(cells + 1, dtype=torch.float64)
    margin = (1 - share) / 2 * cells
    return (edge[1:].clamp(max=cells - margin) - edge[:-1].clamp(min=margin)).clamp(0, 1)
