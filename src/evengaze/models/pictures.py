"""From what a family knows about its pictures to the layout of a batch.

Every family answers two questions: which placeholder tokens does a picture put into a prompt (`Picture`), and which
picture comes next (the order of encoding). `assemble` does the rest for all of them: rows without pictures, several
pictures in a row, images and videos mixed, padding on either side, rows repeated for beams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evengaze.errors import LayoutError
from evengaze.layout import ImageInfo, VisualLayout, VisualTokens
from evengaze.models.base import Call


@dataclass(frozen=True)
class Picture:
    """The placeholder tokens of one image or video, in sequence order. All tensors have shape (n,).

    Attributes:
        views: the grids that it is shown on: one, except where a thumbnail and a detail view differ in size.
        view: index into `views`.
        frame: frame (or tile) of that view.
        cell: raster index in the grid; -1 for a token that is no candidate (class token, newline).
        x: raster index as a fraction in [0, 1).
        padding: share of the patch that is padding.
    """

    views: tuple[ImageInfo, ...]
    view: Tensor
    frame: Tensor
    cell: Tensor
    x: Tensor
    padding: Tensor

    def __len__(self) -> int:
        return int(self.cell.shape[0])

    @classmethod
    def plain(cls, info: ImageInfo, *, padding: Tensor | None = None, special: int = 0, tiled: bool = False) -> Picture:
        """Complete grids in raster order, one a frame.

        Args:
            info: grid and number of frames.
            padding: shares of padding of all cells, in order.
            special: leading tokens of each frame that are no candidates.
            tiled: the frames are tiles of one image: x runs through all of them instead of through each.
        """
        n, frames = info.cells, info.frames
        cell = torch.cat([torch.full((special,), -1), torch.arange(n)]).repeat(frames)
        frame = torch.arange(frames).repeat_interleave(n + special)
        x = (frame * n + cell).double() / (n * frames) if tiled else cell.double() / n
        share = torch.zeros(len(cell), dtype=torch.float64)
        if padding is not None:
            share[cell >= 0] = padding.flatten().double()
        return cls((info,), torch.zeros_like(cell), frame, cell, x, share)


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
    times = _repeats(ids, pictures)
    if times == 0:
        return None
    queues = {token: list(found) for token, found in pictures.items()}
    rows = []
    for b, row in enumerate(ids[::times]):
        placed: list[tuple[Tensor, Picture]] = []
        for token, queue in queues.items():
            position = (row == token).nonzero()[:, 0]
            start = 0
            while start < len(position):
                if not queue or start + len(queue[0]) > len(position):
                    raise LayoutError(
                        f"row {b} holds {len(position)} placeholder tokens of id {token}, which is no whole number of "
                        "pictures: placeholders of a picture must not be split between calls or rows"
                    )
                picture = queue.pop(0)
                placed.append((position[start : start + len(picture)], picture))
                start += len(picture)
        rows.append(_row(placed).to(call.device))
    return VisualLayout(tuple(r for r in rows for _ in range(times)))


def _repeats(ids: Tensor, pictures: Mapping[int, Sequence[Picture]]) -> int:
    """How often each sample's row is repeated (beams); 0 if there are no placeholders."""
    times = set()
    for token, found in pictures.items():
        there, encoded = int((ids == token).sum()), sum(len(p) for p in found)
        if there == 0:
            continue
        if encoded == 0 or there % encoded or len(ids) % (there // encoded):
            raise LayoutError(
                f"the call holds {there} placeholder tokens of id {token}, but the images encoded for it fill "
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
    placed.sort(key=lambda entry: int(entry[0][0]))
    images: list[ImageInfo] = []
    columns: list[tuple[Tensor, ...]] = []
    for position, p in placed:
        columns.append((position, p.view + len(images), p.frame, p.cell, p.x, p.padding))
        images.extend(p.views)
    position, image, frame, cell, x, padding = (torch.cat(c) for c in zip(*columns, strict=True))
    table = VisualTokens(position, image, frame, cell, x, padding, tuple(images))
    # Frames of a video may be interleaved with another picture's tokens only in sequence order.
    order = torch.argsort(position)
    return table.take(order[cell[order] >= 0])
