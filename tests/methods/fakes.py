"""Views without a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evengaze.candidates import Candidates
from evengaze.layout import VisualLayout
from evengaze.protocol import Picked, Selection, View, Words


class FakeAttention:
    """Random softmax rows (heads, L, L) behind the interface of `AttentionStates`."""

    def __init__(self, length: int, heads: int = 2, seed: int = 0) -> None:
        logits = torch.randn(heads, length, length, generator=torch.Generator().manual_seed(seed))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        self.map = torch.softmax(logits.masked_fill(~causal, float("-inf")), -1)

    def received(self, queries: Picked, columns: Picked, reduce: str = "mean") -> Tensor:
        found = []
        for b in range(len(columns.index)):
            picked = queries.index[b] if queries.real is None else queries.index[b][queries.real[b]]
            rows = self.map.mean(0)[picked][:, columns.index[b]]
            found.append(rows.mean(0) if reduce == "mean" else rows.sum(0))
        return torch.stack(found)

    def select(self, rows: Any) -> FakeAttention:
        return self


def view(
    grid: tuple[int, int] = (4, 4),
    *,
    before: int = 3,
    after: int = 5,
    dim: int = 8,
    stage: int = 0,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    real: Tensor | None = None,
    **changes: Any,
) -> View:
    """A single row: one image between `before` and `after` text tokens."""
    count = grid[0] * grid[1]
    spans, sizes = [(before, before + count)], [size] if size else None
    layout = VisualLayout.from_spans(spans, grid, image_sizes=sizes)
    tokens = Candidates.of(layout.rows, torch.device("cpu"))
    length = before + count + after
    hidden = torch.randn(length, dim, generator=torch.Generator().manual_seed(seed + 1))[None]
    real = torch.ones(length, dtype=torch.bool) if real is None else real
    values: dict[str, Any] = {
        "stage": stage,
        "tokens": tokens,
        "original": count,
        "hidden": hidden,
        "embeddings": hidden,
        "layout": layout,
        "sources": ["previous"] * (stage + 1),
        "words": Words.among(real[None], tokens.position),
        "states": FakeAttention(length, seed=seed),
    }
    return View(**{**values, **changes})


def select(pruner: Any, v: View) -> Selection:
    """What a method selects from a single row, without the leading axis."""
    (found,) = pruner.select(v)
    merge = None if found.merge is None else found.merge.row(0)

    def first(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[0]

    return Selection(found.keep[0], merge, first(found.recycled), first(found.raw), first(found.scores))


def every_row(pruner: Any, v: View) -> list[Selection]:
    """What a method selects from each row of a view, without the leading axis."""
    found: dict[int, Selection] = {}
    for chosen in pruner.select(v):
        for k, b in enumerate(chosen.rows or range(len(v.rows))):
            merge = None if chosen.merge is None else chosen.merge.row(k)
            found[b] = Selection(chosen.keep[k], merge, None if chosen.recycled is None else chosen.recycled[k])
    return [found[b] for b in range(len(v.rows))]
