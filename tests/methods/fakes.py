"""Views without a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evengaze.layout import VisualLayout
from evengaze.protocol import View


class FakeAttention:
    """Random softmax rows (heads, L, L) behind the interface of `AttentionStates`."""

    def __init__(self, length: int, heads: int = 2, seed: int = 0) -> None:
        logits = torch.randn(heads, length, length, generator=torch.Generator().manual_seed(seed))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        self.map = torch.softmax(logits.masked_fill(~causal, float("-inf")), -1)

    def received(self, row: int, queries: Tensor, columns: Tensor, reduce: str = "mean") -> Tensor:
        rows = self.map.mean(0)[queries][:, columns]
        return rows.mean(0) if reduce == "mean" else rows.sum(0)


def view(
    grid: tuple[int, int] = (4, 4),
    *,
    before: int = 3,
    after: int = 5,
    dim: int = 8,
    stage: int = 0,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    **changes: Any,
) -> View:
    """One image between `before` and `after` text tokens."""
    count = grid[0] * grid[1]
    spans, sizes = [(before, before + count)], [size] if size else None
    tokens = VisualLayout.from_spans(spans, grid, image_sizes=sizes).rows[0]
    length = before + count + after
    hidden = torch.randn(length, dim, generator=torch.Generator().manual_seed(seed + 1))
    values: dict[str, Any] = {
        "stage": stage,
        "tokens": tokens,
        "original": count,
        "hidden": hidden,
        "embeddings": hidden,
        "initial": tokens,
        "sources": ["previous"] * (stage + 1),
        "real": torch.ones(length, dtype=torch.bool),
        "states": FakeAttention(length, seed=seed),
    }
    return View(**{**values, **changes})
