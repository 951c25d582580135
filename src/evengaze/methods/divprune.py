"""DivPrune: keep the tokens that differ most from each other; attention plays no part.

Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning" (arXiv 2503.02175), equations 2-4 and algorithm 1:
the max-min diversity problem, solved greedily. Written from the paper's formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evengaze.methods.registry import register
from evengaze.methods.stages import OneStage
from evengaze.protocol import Source, View, take_states

_CHUNK = 256
_MATRIX = 1 << 24
"""Distances held at once: beyond that they are computed anew for each pick, as n x n is too much for videos."""


@register
@dataclass(frozen=True)
class DivPrune(OneStage):
    """Greedily pick the token whose nearest picked token is farthest away, by cosine distance.

    The first pick is the token that is farthest from its nearest neighbour.

    Attributes:
        keep: visual tokens to keep: a number, or a fraction in (0, 1].
        layer: where they are dropped; 0 is before the decoder, as in the paper.
    """

    layer: int = 0

    name: ClassVar[str] = "divprune"
    attention: ClassVar[Source] = None

    def score(self, view: View) -> Tensor:
        """Picked tokens by order of picking, the first highest; 0 for the others."""
        count = min(len(view), self.count(view))
        picks = farthest(normalize(view.features.float(), dim=-1), count)
        rank = torch.arange(count, 0, -1, dtype=torch.float32, device=picks.device).expand_as(picks)
        return torch.zeros(len(picks), len(view), device=picks.device).scatter_(1, picks, rank)


def farthest(unit: Tensor, count: int) -> Tensor:
    """The greedy max-min choice: `count` of n unit vectors in each row, in the order in which they are picked.

    A pick takes three operations on (rows, n), whatever the width: what was picked is at distance minus infinity.

    Args:
        unit: (rows, n, d).
        count: at least 1.

    Returns:
        (rows, count) indices.
    """
    rows, n, _ = unit.shape
    if rows * n * n <= _MATRIX:
        distance = 1 - unit @ unit.transpose(1, 2)
        diagonal = distance.diagonal(dim1=1, dim2=2)
        diagonal.fill_(float("inf"))  # a token is not its own neighbour
        nearest = distance.amin(2)
        diagonal.fill_(float("-inf"))
        return _greedy(nearest, count, lambda pick: distance.gather(1, pick[..., None].expand(-1, -1, n))[:, 0])
    nearest = torch.cat([_nearest(unit, start) for start in range(0, n, _CHUNK)], 1)

    def away(pick: Tensor) -> Tensor:
        one = take_states(unit, pick)
        return (1 - (unit @ one.transpose(1, 2))[..., 0]).scatter_(1, pick, float("-inf"))

    return _greedy(nearest, count, away)


def _greedy(nearest: Tensor, count: int, away: Callable[[Tensor], Tensor]) -> Tensor:
    """(rows, count) picks; `away` gives the (rows, n) distances from (rows, 1) picks."""
    picks = [nearest.argmax(1, keepdim=True)]
    nearest = away(picks[0])
    for _ in range(count - 1):
        pick = nearest.argmax(1, keepdim=True)
        picks.append(pick)
        nearest = torch.minimum(nearest, away(pick))
    return torch.cat(picks, 1)


def _nearest(unit: Tensor, start: int) -> Tensor:
    """(rows, chunk) distance of each token of a chunk to its nearest other token."""
    distance = 1 - unit[:, start : start + _CHUNK] @ unit.transpose(1, 2)
    index = torch.arange(distance.shape[1], device=unit.device)
    distance[:, index, index + start] = float("inf")
    return distance.amin(2)
