"""TokenCarve: rank by attention and by information contribution together, then merge the weaker half into the better.

Paper: Tan et al., "TokenCarve" (arXiv 2503.10501); code: modeling_llama.py of the release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from evengaze.errors import ConfigError
from evengaze.layout import precise
from evengaze.methods.registry import register
from evengaze.methods.stages import OneStage
from evengaze.protocol import Merge, Selection, Stage, View


@register
@dataclass(frozen=True)
class TokenCarve(OneStage):
    """One stage that reaches back: the caches of the layers below lose the dropped tokens as well.

    Of n tokens, M = 1.5 `keep` pass the ranking

        rank_j = balance (n - place of j by attention) + (1 - balance) (n - place of j by contribution)

    where attention is the last prompt token's, and contribution is the L1 norm of row j of U diag(sigma), X = U
    diag(sigma) V^T the features. The worse half of the M finds its most similar token (cosine) in the better half, and
    the M - `keep` closest pairs are merged into plain means.

    Attributes:
        keep: visual tokens left: a number, or a fraction in (0, 1].
        layer: the first layer that runs without the others.
        balance: weight of attention against information contribution; 0 and 1 rank by one of them alone.
    """

    keep: float = 64
    balance: float = 0.5

    name: ClassVar[str] = "tokencarve"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.balance <= 1:
            raise ConfigError(f"balance={self.balance!r} must be a number in [0, 1]")

    def stages(self, layers: int) -> Sequence[Stage]:
        """One, which reaches back."""
        return [replace(stage, trims_below=True) for stage in super().stages(layers)]

    def score(self, view: View) -> Tensor:
        """Attention from the last prompt token; the contribution enters in `choose`."""
        return view.attention(view.last)

    def choose(self, view: View, count: int) -> Selection:
        """Rank, split, merge. Padding takes no part in any of it, the decomposition included."""
        attention, allowed = self.ranked(view)
        candidates = allowed.nonzero().flatten()
        features = view.features[candidates].float()
        value = contribution(features, exact=self.mode == "official")
        rank = self.balance * _points(attention[candidates]) + (1 - self.balance) * _points(value)
        view.memory.update(contribution=value, rank_sum=rank)

        passed = min(int(1.5 * count), len(candidates))
        best = torch.sort(rank, descending=True, stable=True).indices[:passed]
        better, worse = best[: passed // 2], best[passed // 2 :]
        unit = torch.nn.functional.normalize(features, dim=-1)
        merges = max(0, passed - count)
        if merges == 0:
            return Selection(keep=candidates[best].sort().values)
        closeness, partner = (unit[worse] @ unit[better].T).max(-1)
        view.memory.update(better=better, worse=worse, closeness=closeness, partner=partner)
        order = torch.sort(closeness, descending=True, stable=True).indices
        merged, into = worse[order[:merges]], better[partner[order[:merges]]]
        keep = torch.cat([better, worse[order[merges:]]])

        size = torch.bincount(into, minlength=len(candidates))
        own = size.nonzero().flatten()  # a target is a member of its own mean
        size, source, target = size + 1, torch.cat([own, merged]), torch.cat([own, into])
        merge = Merge(candidates[source], candidates[target], 1 / size[target])
        return Selection(keep=candidates[keep].sort().values, merge=merge)


def _points(score: Tensor) -> Tensor:
    """n for the best down to 1 for the worst; ties by index."""
    order = torch.sort(score, descending=True, stable=True).indices
    points = torch.empty(len(score), dtype=torch.float32, device=score.device)
    points[order] = torch.arange(len(score), 0, -1, dtype=torch.float32, device=score.device)
    return points


def contribution(features: Tensor, *, exact: bool = False) -> Tensor:
    """L1 norms of the rows of U diag(sigma), X = U diag(sigma) V^T, of (n, d) features.

    As U diag(sigma) = X V, an eigendecomposition of the smaller Gram matrix gives the same, at a fraction of the cost
    of the full SVD of the release. Squaring the condition number is harmless in float64.

    Args:
        features: (n, d).
        exact: use the singular value decomposition in float32, as the release does.

    Returns:
        (n,) float32.
    """
    if exact:
        u, sigma, _ = torch.linalg.svd(features.float(), full_matrices=False)
        scaled: Tensor = u * sigma
        return scaled.abs().sum(-1)
    x = features.to(precise(features.device))
    if x.shape[0] <= x.shape[1]:
        squares, u = torch.linalg.eigh(x @ x.T)
        scaled = u * squares.clamp(min=0).sqrt()
    else:
        scaled = x @ torch.linalg.eigh(x.T @ x)[1]
    return scaled.abs().sum(-1).float()
