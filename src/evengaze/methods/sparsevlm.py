"""SparseVLM: the text tokens that care most about the picture rate it; what they leave is recycled into a few clusters.

Paper: Zhang et al., "SparseVLM" (arXiv 2410.04417), sections 3.2-3.4; code: branch v1.5, `score.py` and `cluster.py`.
The clustering is DPC-kNN (Rodriguez and Laio 2014, in the form of TCFormer, arXiv 2204.08680).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from evengaze.device import counting
from evengaze.errors import ConfigError
from evengaze.methods.base import Pruner
from evengaze.methods.ranking import Ranking, places
from evengaze.methods.registry import register
from evengaze.methods.stages import check_layers, default_layers, per_stage
from evengaze.protocol import (
    Merge,
    Picked,
    Positions,
    Selection,
    Stage,
    View,
    resolve_keep,
    take_states,
)

if TYPE_CHECKING:
    from typing import Self

TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
"""Tokens kept at each stage for the published average budgets, for 576 visual tokens and 32 layers."""
_LAYERS, _VISUAL = (2, 6, 15), 576


@register
@dataclass(frozen=True)
class SparseVLM(Pruner):
    """Each stage layer ranks with its own attention and hands on its output without the dropped tokens.

        raters = { t : m_t > mean m },  m_t = mean over visual tokens v of softmax over text t of <v, t>   (embeddings)
        s_j    = mean over raters t and heads h of A[h, t, j]

    Of the P dropped tokens the best int(0.3 P) + 1 = M are clustered by density peaks into M // 10 + 1 means, which
    follow the kept tokens. Everything is renumbered without gaps.

    Attributes:
        keep: an average budget, as a number of tokens or a fraction (the published table if there is one, else one
            derived for 32 layers and three stages, see `derive_table`; fewer stages use its first entries, so that the
            average is higher; `schedule.solve_for_budget` fits any depth), or the tokens kept at each stage, one entry
            a stage.
        layers: the layers that rank; None takes (2, 6, 15), scaled to the decoder's depth in corrected mode.
    """

    keep: float | tuple[float, ...] = 128
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "sparsevlm"
    positions: ClassVar[Positions] = "renumbered"
    counts_rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = _LAYERS if self.layers is None else self.layers
        check_layers(layers)
        per_stage(self.keep, len(layers), 1.0)
        if not isinstance(self.keep, tuple) and len(layers) > len(_LAYERS):
            raise ConfigError(
                f"keep={self.keep} is an average over three stages, but layers={self.layers} are more. "
                "Give the tokens kept at each stage, or let schedule.solve_for_budget find them."
            )

    def stages(self, layers: int) -> Sequence[Stage]:
        """Layer l ranks while it runs, and layer l + 1 is the first without the dropped tokens."""
        chosen = self.layers or default_layers(self, _LAYERS, layers, first=0, behind=1)
        if max(chosen) + 1 >= layers:
            raise ConfigError(
                f"layers={chosen}: tokens leave behind a layer that ranks, and what is behind layer {max(chosen)} is "
                f"outside the model, whose decoder has layers 0 to {layers - 1}"
            )
        return [Stage(layer + 1, "previous") for layer in chosen]

    def budget(self, stage: int, current: int, original: int) -> int:
        """The table's entry. The official code always drops at least one token."""
        kept = resolve_keep(self._table(original)[stage], original)
        return min(kept, current - 1) if self.mode == "official" else kept

    def _table(self, original: int) -> tuple[float, ...]:
        if isinstance(self.keep, tuple):
            return self.keep
        share = isinstance(self.keep, float) and self.keep <= 1
        average = resolve_keep(self.keep, original) if share else int(self.keep)
        if average in TABLES and (original == _VISUAL or self.mode == "official"):
            return TABLES[average]
        return derive_table(average, original)

    def size_after(self, stage: int, current: int, original: int) -> int:
        """Survivors and clusters."""
        kept = self.budget(stage, current, original)
        return current if kept >= current else kept + recycling(current - kept)[1]

    def with_keep(self, tokens: int, visual: int) -> Self:
        """A table that halves at each stage, and falls more slowly if it begins with over half of the tokens."""
        ratio = max(0.5, tokens / visual)
        return self.replace(keep=tuple(max(1, int(tokens * ratio**i)) for i in range(len(self.layers or _LAYERS))))

    def select(self, view: View) -> Sequence[Selection]:
        """Choose the raters before anything is dropped, then as usual."""
        if view.memory.get(Raters) is None:
            text = view.text
            chosen = raters(take_states(view.embeddings, view.initial.position), view.question, text.real)
            view.memory.put(Raters(chosen.to(view.hidden.device)))
        return super().select(view)

    def score(self, view: View) -> Tensor:
        """Attention from the raters."""
        chosen = view.memory.get(Raters)
        assert chosen is not None
        return view.attention(chosen.among(view.text))

    def choose(self, view: View, ranking: Ranking, count: int) -> Selection:
        """Keep the best, recycle some of the rest. Padding is neither kept nor recycled."""
        order = torch.sort(ranking.masked, dim=1, descending=True, stable=True).indices
        keep = order[:, :count].sort(1).values
        dropped = ranking.valid[0] - count
        if dropped == 0:
            return Selection(keep)
        members, clusters = recycling(dropped)
        recycled = order[:, count : count + members]
        if self.mode == "official" and ranking.score is not ranking.raw:
            # The official patch debiases the ranking only, so that padding comes back through the clusters.
            worth = ranking.raw.scatter(1, keep, float("-inf"))
            recycled = torch.sort(worth, dim=1, descending=True, stable=True).indices[:, :members]
        states = take_states(view.hidden, view.tokens.position.gather(1, recycled))
        centre, label, _ = density_peaks(states.float(), clusters, self.density_noise(view, members))
        target = recycled.gather(1, centre)
        size = (label[:, :, None] == label[:, None]).sum(2, dtype=torch.float32)
        if self.mode == "official":  # against empty clusters, of which there are none
            size = size + 1e-6
        return Selection(keep, Merge(recycled, target.gather(1, label), size.reciprocal()), recycled=target)

    def density_noise(self, view: View, count: int) -> Tensor | None:
        """(count,) added to the densities. The official code draws 1e-6 U[0, 1); left out here, to be reproducible."""
        return torch.zeros(count, device=view.hidden.device) if self.mode == "official" else None


@dataclass(frozen=True)
class Raters:
    """The text tokens that rate, (rows, t) bool over the text behind all visual tokens at the start."""

    chosen: Tensor

    def among(self, text: Picked) -> Picked:
        """Where they are now."""
        return Picked(text.index[:, : self.chosen.shape[1]], self.chosen)


def relevance(visual: Tensor, text: Tensor, real: Tensor | None = None) -> Tensor:
    """(rows, t) share of the visual tokens' similarity that each text token gets.

    Args:
        visual: (rows, n, d) embeddings.
        text: (rows, t, d) embeddings.
        real: (rows, t) bool, False for entries that are no text; None if all are.
    """
    similar = visual.float() @ text.float().transpose(1, 2)
    if real is not None:
        similar = similar.masked_fill(~real[:, None], float("-inf"))
    return torch.softmax(similar, dim=-1).mean(1)


def raters(visual: Tensor, text: Tensor, real: Tensor | None = None) -> Tensor:
    """(rows, t) bool: text tokens of above-average `relevance`; all of them if there are none (a single text token)."""
    share = relevance(visual, text, real)
    if real is None:
        chosen = share > share.mean(1, keepdim=True)
        return chosen | ~chosen.any(1, keepdim=True)
    chosen = real & (share > share.sum(1, keepdim=True) / real.sum(1, keepdim=True))
    return chosen | (real & ~chosen.any(1, keepdim=True))


def recycling(dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are recycled, and into how many clusters."""
    members = min(int(0.3 * dropped) + 1, dropped)
    return members, members // 10 + 1


def density_peaks(x: Tensor, clusters: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster by density peaks, in each row: centres are dense, and far from anything denser.

        rho_a = exp(-mean of the k smallest D_ab^2), k = `clusters`;  delta_a = min { D_ab : b denser than a } or max D

    Args:
        x: (rows, m, d) float32.
        clusters: number of centres, the largest rho * delta.
        noise: (m,) added to rho, with ties left as the official code leaves them; None breaks ties by index.

    Returns:
        (rows, clusters) centres, best first, (rows, m) the cluster of each token, and (rows, m) rho * delta.
    """
    m = x.shape[1]
    distance = torch.cdist(x, x) / x.shape[2] ** 0.5
    nearest = distance.topk(min(clusters, m), largest=False).values
    density = torch.exp(-nearest.square().mean(-1))
    if noise is None:
        place = places(density)
        denser = place[:, None] < place[:, :, None]
    else:
        density = density + noise
        denser = density[:, None] > density[:, :, None]
    farthest = distance.amax((1, 2), keepdim=True)
    separation = torch.where(denser, distance, farthest).amin(-1)
    score = density * separation
    best = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :clusters]
    centre = best if noise is None else score.topk(clusters).indices  # which orders ties in a way of its own
    label = distance.gather(2, centre[:, None].expand(-1, m, -1)).argmin(-1)
    label = label.scatter(1, centre, counting(centre.shape[1], x.device).expand_as(centre))
    return centre, label, score


@lru_cache
def derive_table(average: int, visual: int) -> tuple[float, ...]:
    """Tokens kept at each stage so that about `average` tokens enter a layer, as `SparseVLM.with_keep` spreads them.

    Made for 32 layers and the published stage layers; `schedule.solve_for_budget` makes one for any model. An average
    of at least `visual` keeps everything.

    The layers up to the first stage see all visual tokens, so a small average of a large prompt is out of reach (128 of
    2880, for instance), or leaves next to nothing behind that stage. Then `average` tokens are left behind the first
    stage instead, and half as many behind each later one, so that more than `average` enter a layer: with more than
    the 576 tokens of the published tables, wherever the average would leave fewer than that.
    """
    from evengaze.schedule import solve_for_budget

    if average >= visual:
        return (visual,) * len(_LAYERS)
    method = SparseVLM(layers=_LAYERS)
    least = method.with_keep(average, visual)
    try:
        solved = solve_for_budget(method, average, layers=32, visual=visual)
    except ConfigError:
        solved = least
    table, floor = solved.keep, least.keep
    assert isinstance(table, tuple) and isinstance(floor, tuple)
    return floor if visual > _VISUAL and table[0] < floor[0] else table
