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
from evengaze.protocol import Merge, Selection, View, take_states


@register
@dataclass(frozen=True)
class ToMe(Grouping):
    """Repeat: split the tokens alternately into A and B, link each of A to its most similar of B, merge the closest.

    Every pass merges at most half of the tokens. Means are weighted by the number of tokens that went into them, as in
    the paper, so the result is the plain mean of each group.
    """

    name: ClassVar[str] = "tome"

    def group(self, view: View, count: int) -> Selection:
        """Group by repeated bipartite matching; a group stands at the place of its last target."""
        sums = view.features.float()  # of the groups that are left, whose tokens are `alive`
        rows, n = sums.shape[:2]
        every = torch.arange(n, device=sums.device).expand(rows, -1)
        size = torch.ones(rows, n, 1, device=sums.device)
        group, alive = every, every  # the token at whose place each token ends up
        while alive.shape[1] > count:
            unit = normalize(sums / size, dim=-1)
            similarity, partner = (unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
            merges = min(alive.shape[1] - count, alive.shape[1] // 2)
            order = torch.sort(similarity, dim=1, descending=True, stable=True).indices
            gone, stay = order[:, :merges], order[:, merges:]
            partner = partner.gather(1, gone)
            moved = torch.scatter(every, 1, alive[:, 0::2].gather(1, gone), alive[:, 1::2].gather(1, partner))
            group = moved.gather(1, group)
            into = torch.zeros(rows, unit[:, 1::2].shape[1], merges, device=sums.device)
            into.scatter_(1, partner[:, None], 1.0)
            left = torch.cat([2 * stay, every[:, 1 : alive.shape[1] : 2]], 1).sort(1).values
            for x in (sums, size):  # adding up by a product gives the same every time
                x[:, 1::2] += into @ take_states(x[:, 0::2], gone)
            sums, size = take_states(sums, left), take_states(size, left)
            alive = alive.gather(1, left)
        members = torch.zeros(rows, n, device=sums.device).scatter_(1, alive, size[..., 0])
        return Selection(keep=alive, merge=Merge(every, group, 1 / members.gather(1, group)))
