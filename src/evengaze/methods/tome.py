"""ToMe: merge similar tokens, here before the decoder instead of inside the vision tower.

Paper: Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461), section 3, bipartite soft matching.
Written from the paper's description.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from evengaze.methods.registry import register
from evengaze.methods.stages import Grouping
from evengaze.protocol import Merge, Selection, View


@register
@dataclass(frozen=True)
class ToMe(Grouping):
    """Repeat: split the tokens alternately into A and B, link each of A to its most similar of B, merge the closest.

    Every pass merges at most half of the tokens. Means are weighted by the number of tokens that went into them, as in
    the paper, so the result is the plain mean of each group.
    """

    name: ClassVar[str] = "tome"

    def choose(self, view: View, count: int) -> Selection:
        """Group by repeated bipartite matching; a group stands at the place of its last target."""
        features = view.features.float()
        group = torch.arange(len(view), device=features.device)  # the token at whose place each token ends up
        alive = group.clone()
        while len(alive) > count:
            size = torch.bincount(group, minlength=len(view)).clamp(min=1)
            mean = torch.zeros_like(features).index_add_(0, group, features) / size[:, None]
            unit = normalize(mean[alive], dim=-1)
            similarity, partner = (unit[0::2] @ unit[1::2].T).max(-1)
            merges = min(len(alive) - count, len(alive) // 2)
            order = torch.sort(similarity, descending=True, stable=True).indices[:merges]
            gone, into = alive[0::2][order], alive[1::2][partner[order]]
            moved = torch.arange(len(view), device=group.device).index_put((gone,), into)
            group = moved[group]
            alive = alive[~torch.isin(alive, gone)]
        size = torch.bincount(group, minlength=len(view))
        source = torch.arange(len(view), device=group.device)
        return Selection(keep=alive, merge=Merge(source, group, 1 / size[group]))
