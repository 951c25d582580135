"""Baselines that every comparison needs: the dense model, random, regular, and pooled tokens."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evengaze.device import precise, upload
from evengaze.layout import VisualTokens
from evengaze.methods.base import Pruner
from evengaze.methods.registry import register
from evengaze.methods.stages import Grouping, OneStage
from evengaze.protocol import Merge, Selection, Source, Stage, View


@register
@dataclass(frozen=True)
class Dense(Pruner):
    """The unpruned model, under the same roof as the methods that it is compared with."""

    name: ClassVar[str] = "dense"

    def stages(self, layers: int) -> Sequence[Stage]:
        """None."""
        return []

    def score(self, view: View) -> Tensor:
        """All equal."""
        return torch.zeros(len(view.rows), len(view), device=view.hidden.device)

    def budget(self, stage: int, current: int, original: int) -> int:
        """All."""
        return current


@register
@dataclass(frozen=True)
class Random(OneStage):
    """Random tokens. The same prompt gets the same ones in every run, batch and place in the batch.

    Attributes:
        keep: visual tokens left: a number, or a fraction in (0, 1].
        layer: first layer that runs without the others; FastV's by default.
        seed: another seed, another draw.
    """

    seed: int = 0

    name: ClassVar[str] = "random"
    attention: ClassVar[Source] = None

    def score(self, view: View) -> Tensor:
        """Uniform noise, seeded by `seed` and by the embeddings of the question (table look-ups, hence exact)."""
        noise = torch.stack([self._draw(row, len(view.initial)) for row in self._questions(view)])
        drawn = upload(noise, view.hidden.device)
        if view.whole is None:
            return view.tokens.of_start(drawn)
        # Where pictures have budgets of their own, each has its own part of the draw.
        here = view.tokens.of_start(view.tokens.start.column("position"))
        return drawn.gather(1, torch.searchsorted(view.initial.position, here.contiguous()))

    def _draw(self, question: Tensor, count: int) -> Tensor:
        values = question.contiguous().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(values, self.seed & 0xFFFFFFFF))
        return torch.rand(count, generator=generator)

    @staticmethod
    def _questions(view: View) -> list[Tensor]:
        """(t, d) embeddings of each row's question, on the host: one copy for all rows."""
        states, real = view.question.float(), view.text.real
        if real is None:
            return list(states.cpu())
        whole = torch.cat([states, real[..., None].to(states)], 2).cpu()
        return [row[row[:, -1] > 0, :-1] for row in whole]


@register
@dataclass(frozen=True)
class Uniform(OneStage):
    """A regular lattice on each image or frame: bands of rows, each cut into equal segments, the middles of which stay.

    Attributes:
        keep: visual tokens left: a number, or a fraction in (0, 1].
        layer: first layer that runs without the others; FastV's by default.
    """

    name: ClassVar[str] = "uniform"
    attention: ClassVar[Source] = None

    def score(self, view: View) -> Tensor:
        """1 for the lattice, 0 for the rest."""
        count = self.count(view)

        def chosen(table: VisualTokens) -> Tensor:
            return torch.zeros(len(table)).index_fill(0, lattice(table, count)[1], 1.0)

        return upload(_by_table(view, chosen), view.hidden.device)


@register
@dataclass(frozen=True)
class Pool(Grouping):
    """Average pooling over the cells of the lattice of `Uniform`: a quarter of the tokens is 2 x 2 pooling."""

    name: ClassVar[str] = "pool"

    def group(self, view: View, count: int) -> Sequence[Selection]:
        """The mean of each cell, at the cell's middle. Pictures that get no cell leave rows of other lengths."""
        plans = [self._plan(table, count) for table in _distinct(view)]
        if len(plans) == 1:
            plans *= len(view.rows)
        alike: dict[int, list[int]] = {}
        for b, (_, merge) in enumerate(plans):
            alike.setdefault(len(merge.source), []).append(b)
        return [self._stacked([plans[b] for b in rows], rows, view.hidden.device) for rows in alike.values()]

    @staticmethod
    def _plan(table: VisualTokens, count: int) -> tuple[Tensor, Merge]:
        """The cells' middles and what is merged into them, on the host."""
        group, middle = lattice(table, count)
        source = (group >= 0).nonzero().flatten()
        size = torch.bincount(group[source])
        return middle.sort().values, Merge(source, middle[group[source]], 1 / size[group[source]])

    @staticmethod
    def _stacked(plans: Sequence[tuple[Tensor, Merge]], rows: Sequence[int], device: torch.device) -> Selection:
        def stack(values: Sequence[Tensor]) -> Tensor:
            return upload(torch.stack(list(values)), device)

        merge = Merge(*(stack([getattr(m, name) for _, m in plans]) for name in ("source", "target", "weight")))
        return Selection(stack([keep for keep, _ in plans]), merge, rows=tuple(rows))


def _distinct(view: View) -> list[VisualTokens]:
    """The candidates' tables on the host: one for each row, or a single one if all are alike."""
    tables = view.tokens.tables
    if tables is None:  # which tokens are left only the device knows
        return [view.tokens.row(b).to("cpu") for b in range(len(view.rows))]
    return [tables[0]] if view.tokens.start.alike else list(tables)


def _by_table(view: View, values: Callable[[VisualTokens], Tensor]) -> Tensor:
    """(rows, n) on the host: what a function says of each row's candidates."""
    found = [values(table) for table in _distinct(view)]
    return found[0].expand(len(view.rows), -1) if len(found) == 1 else torch.stack(found)


def lattice(tokens: VisualTokens, count: int) -> tuple[Tensor, Tensor]:
    """Divide the tokens of every image and frame into compact groups of nearly equal size, `count` in all.

    A picture is cut into bands of rows; a line that runs through the bands, back and forth, is cut into equal pieces.

    Args:
        tokens: n visual tokens in sequence order, on complete grids or not; on the host.
        count: at most n. Shared out by size; with fewer tokens than pictures, some pictures get none.

    Returns:
        (n,) group of each token, -1 in pictures that get none, and (count,) the middle token of each group.
    """
    picture = torch.stack([tokens.image, tokens.frame], 1)
    _, part, sizes = torch.unique_consecutive(picture, dim=0, return_inverse=True, return_counts=True)
    ends = sizes.cumsum(0) * count // len(tokens)
    shares = torch.diff(ends, prepend=ends.new_zeros(1))
    height, width = torch.tensor([i.grid for i in tokens.images])[tokens.image].unbind(1)
    row, column = tokens.cell // width, tokens.cell % width

    bands = (shares[part] * height / width).sqrt().round().long().clamp(min=1).minimum(height)
    band = row * bands // height
    along = torch.where(band % 2 == 0, column, width - 1 - column)
    tall, wide = int(height.max()), int(width.max())
    order = torch.argsort(((part * tall + band) * wide + along) * tall + row)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(tokens))
    place -= (sizes.cumsum(0) - sizes)[part]
    group = (ends - shares)[part] + place * shares[part] // sizes[part]
    group = torch.where(shares[part] > 0, group, -1)

    inside = (group >= 0).nonzero().flatten()
    cell = torch.stack([row, column], 1)[inside].to(precise("cpu"))
    members = group[inside]
    size = torch.bincount(members, minlength=count)[:, None]
    centre = torch.zeros(count, 2, dtype=precise("cpu")).index_add_(0, members, cell) / size
    distance = (cell - centre[members]).square().sum(1)
    by_distance = torch.sort(distance, stable=True).indices
    by_group = by_distance[torch.sort(members[by_distance], stable=True).indices]
    first = size.flatten().cumsum(0) - size.flatten()
    return group, inside[by_group[first]]
