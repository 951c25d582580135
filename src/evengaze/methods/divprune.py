"""DivPrune: keep the tokens that differ most from each other; attention plays no part.

Paper: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning" (arXiv 2503.02175), equations 2-4 and algorithm 1:
the max-min diversity problem, solved greedily. Written from the paper's formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evengaze.methods.registry import register
from evengaze.methods.stages import OneStage
from evengaze.protocol import Source, View

_CHUNK = 256


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
        count = min(len(view), self.budget(view.stage, len(view), view.original))
        unit = normalize(view.features.float(), dim=-1)
        nearest = torch.cat([_nearest(unit, start) for start in range(0, len(unit), _CHUNK)])
        score = torch.zeros(len(unit), device=unit.device)
        for place in range(count):
            pick = nearest.argmax()
            score[pick] = count - place
            distance = 1 - unit @ unit[pick]
            nearest = distance if place == 0 else torch.minimum(nearest, distance)
            nearest = nearest.masked_fill(score > 0, float("-inf"))
        return score


def _nearest(unit: Tensor, start: int) -> Tensor:
    """Distance of each token of a chunk to its nearest other token; in chunks, as n x n is too much for videos."""
    distance = 1 - unit[start : start + _CHUNK] @ unit.T
    index = torch.arange(len(distance), device=unit.device)
    distance[index, index + start] = float("inf")
    return distance.min(-1).values
