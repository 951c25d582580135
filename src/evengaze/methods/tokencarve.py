"""TokenCarve: rank by attention and by information contribution together, then merge the weaker half into the better.

Paper: Tan et al., "TokenCarve" (arXiv 2503.10501); code: modeling_llama.py of the release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from evengaze.device import precise
from evengaze.errors import ConfigError
from evengaze.methods.ranking import Ranking, places
from evengaze.methods.registry import register
from evengaze.methods.stages import OneStage
from evengaze.protocol import Merge, Selection, Stage, View, take_states, top


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
    counts_rest: ClassVar[bool] = True

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

    def choose(self, view: View, ranking: Ranking, count: int) -> Selection:
        """Rank, split, merge. Padding takes no part in any of it, the decomposition included."""
        allowed = None
        if ranking.allowed is not None:  # as many in every row
            allowed = top(ranking.allowed.float(), ranking.valid[0])
        found = self.rate(view, ranking, allowed)
        passed = min(int(1.5 * count), found.rank.shape[1])
        best = torch.sort(found.rank, dim=1, descending=True, stable=True).indices[:, :passed]
        merges = max(0, passed - count)
        if merges == 0:
            return Selection(_of(allowed, best).sort(1).values)
        split = passed // 2
        better, worse = best[:, :split], best[:, split:]
        closeness, partner = self.pairs(found.features, better, worse)
        order = torch.sort(closeness, dim=1, descending=True, stable=True).indices
        merged = worse.gather(1, order[:, :merges])
        into = better.gather(1, partner.gather(1, order[:, :merges]))
        keep = torch.cat([better, worse.gather(1, order[:, merges:])], 1)

        # A target is a member of its own mean; a better token that is none is its own mean.
        size = torch.ones_like(found.rank).scatter_add_(1, into, torch.ones_like(into, dtype=torch.float32))
        source, target = torch.cat([better, merged], 1), torch.cat([better, into], 1)
        merge = Merge(_of(allowed, source), _of(allowed, target), size.gather(1, target).reciprocal())
        return Selection(_of(allowed, keep).sort(1).values, merge)

    def rate(self, view: View, ranking: Ranking, allowed: Tensor | None) -> Rated:
        """Rank what may be chosen: (rows, m) indices, None for all."""
        position = view.tokens.position if allowed is None else view.tokens.position.gather(1, allowed)
        score = ranking.score if allowed is None else ranking.score.gather(1, allowed)
        features = take_states(view.hidden, position).float()
        value = contribution(features, exact=self.mode == "official")
        points = (score.shape[1] - places(torch.stack([score, value]))).float()
        rank = self.balance * points[0] + (1 - self.balance) * points[1]
        return Rated(features, value, rank)

    def pairs(self, features: Tensor, better: Tensor, worse: Tensor) -> tuple[Tensor, Tensor]:
        """The cosine of each worse token with its most similar better one, and which one that is."""
        unit = torch.nn.functional.normalize(features, dim=-1)
        closeness, partner = (take_states(unit, worse) @ take_states(unit, better).transpose(1, 2)).max(-1)
        return closeness, partner


@dataclass(frozen=True)
class Rated:
    """Tokens that may be chosen: (rows, m, d) features, (rows, m) information contribution and rank."""

    features: Tensor
    contribution: Tensor
    rank: Tensor


def _of(allowed: Tensor | None, index: Tensor) -> Tensor:
    return index if allowed is None else allowed.gather(1, index)


def contribution(features: Tensor, *, exact: bool = False) -> Tensor:
    """L1 norms of the rows of U diag(sigma), X = U diag(sigma) V^T, of (..., n, d) features.

    As U diag(sigma) = X V, an eigendecomposition of the smaller Gram matrix gives the same, at a fraction of the cost
    of the full SVD of the release. Squaring the condition number is harmless in float64.

    Args:
        features: (..., n, d).
        exact: use the singular value decomposition in float32, as the release does.

    Returns:
        (..., n) float32.
    """
    if exact:
        u, sigma, _ = torch.linalg.svd(features.float(), full_matrices=False)
        scaled: Tensor = u * sigma[..., None, :]
        return scaled.abs().sum(-1)
    x = features.to(precise(features.device))
    if x.shape[-2] <= x.shape[-1]:
        squares, u = torch.linalg.eigh(x @ x.mT)
        scaled = u * squares.clamp(min=0).sqrt()[..., None, :]
    else:
        scaled = x @ torch.linalg.eigh(x.mT @ x)[1]
    return scaled.abs().sum(-1).float()
