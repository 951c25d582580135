"""iLLaVA: drop the least attended tokens and recycle them into the weakest survivor.

Paper: Hu et al., "iLLaVA: An Image is Worth Fewer Than 1/3 Input Tokens" (arXiv 2412.06263); code: modeling_qwen2.py
(`forward_illava`) and siglip_encoder.py. Written for any decoder and for CLIP and SigLIP towers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from evengaze.device import precise
from evengaze.errors import ConfigError
from evengaze.memory import Shared
from evengaze.methods._tower import Patches, shorten
from evengaze.methods.ranking import Ranking
from evengaze.methods.registry import register
from evengaze.methods.stages import OneStage, check_layers
from evengaze.protocol import Merge, Selection, Stage, View, resolve_keep, top

if TYPE_CHECKING:
    from evengaze.models.base import Adapter


@register
@dataclass(frozen=True)
class ILLaVA(OneStage):
    """Rank by the last prompt token's attention in layer `layer - 1`; the worst survivor takes in the dropped tokens.

        h_target <- sum_m c_m h_m / sum_m c_m,  c = 1 for the target, 2 for the best dropped one, ... r + 1 for the last

    The weights grow towards the *least* attended tokens. A comment in the release says the opposite, but this is what
    both of its stages compute and what its published results were made with.

    The vision stage does the same inside the tower, after the attention of each layer in `vision_layers`, by the
    attention that patches receive from all queries. It is off unless layers are given.

    Attributes:
        keep: of the tokens that reach `layer`, those that stay: a number, or a fraction in (0, 1].
        layer: the first decoder layer that runs without the others (the release: 8 for images, 2 for videos).
        vision_layers: encoder layers in which patches leave (the release: (5, 6, 7, 8) for images).
        vision_drop: patches of each picture (image or frame) that leave in each of them: a number, or a fraction in
            (0, 1) of those that are there.
    """

    keep: float = 0.7
    vision_layers: tuple[int, ...] = ()
    vision_drop: float = 0.15

    name: ClassVar[str] = "illava"
    counts_rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        drop = self.vision_drop
        if not drop > 0 or (drop > 1 and not float(drop).is_integer()):
            raise ConfigError(f"vision_drop={drop!r} must be a number of patches or a fraction in (0, 1)")
        if self.vision_layers:
            check_layers(self.vision_layers, name="vision_layers")

    def stages(self, layers: int) -> Sequence[Stage]:
        """One, ranked by the layer before it; before that, where the tower dropped patches, these leave."""
        tower = [Stage(0, None)] if self.vision_layers else []
        return [*tower, *super().stages(layers)]

    @property
    def in_tower(self) -> bool:
        """Only if patches leave there."""
        return bool(self.vision_layers)

    def prepare(self, model: nn.Module, adapter: Adapter | None, shared: Shared) -> Callable[[], None]:
        """Shorten the vision tower, if asked to."""
        if not self.vision_layers:
            return super().prepare(model, adapter, shared)
        return shorten(model, adapter, shared, self.vision_layers, self.recycle_patches)

    def score(self, view: View) -> Tensor:
        """Attention from the last prompt token; 1 for the tower's survivors."""
        if self._in_tower(view.stage):
            return Patches.of(view)
        return view.attention(view.last)

    def budget(self, stage: int, current: int, original: int) -> int:
        """What is left when the dropped share has been rounded, as the release does.

        In the tower this is for one picture. It drops from each picture alone, so that a `Schedule` of the tokens of
        several pictures counts the drop once (and rounds once); the engine keeps what the tower did.
        """
        if self._in_tower(stage):
            for _ in self.vision_layers:
                current -= self._patches_dropped(current)
            return current
        if isinstance(self.keep, float) and self.keep <= 1:
            return max(1, current - round(current * (1 - self.keep)))
        return resolve_keep(self.keep, current)

    def _select(self, view: View) -> Sequence[Selection]:
        if not self._in_tower(view.stage):
            return super()._select(view)
        left, full = Patches.left(view)
        return [Selection(top(Patches.of(view), len(view) * left // full))]

    def choose(self, view: View, ranking: Ranking, count: int) -> Selection:
        """Keep the best and recycle the rest; padding is neither kept nor recycled."""
        return recycle(ranking.masked, count, ranking.valid[0])

    def recycle_patches(self, score: Tensor) -> Selection:
        """What becomes of (images, n) patches in one of `vision_layers`."""
        return recycle(score, score.shape[1] - self._patches_dropped(score.shape[1]), score.shape[1])

    def _patches_dropped(self, current: int) -> int:
        drop = round(self.vision_drop * current) if self.vision_drop < 1 else int(self.vision_drop)
        return min(drop, current - 1)

    def _in_tower(self, stage: int) -> bool:
        return bool(self.vision_layers) and stage == 0


def recycle(score: Tensor, count: int, allowed: int) -> Selection:
    """Keep the `count` best of each row; the last becomes the rank-weighted mean of itself and the rest.

    Args:
        score: (rows, n), minus infinity for candidates that take no part.
        count: how many to keep.
        allowed: how many take part.
    """
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :allowed]
    keep = order[:, :count].sort(1).values
    merged = order[:, max(0, count - 1) :]
    if merged.shape[1] < 2:
        return Selection(keep)
    parts = merged.shape[1]
    weight = torch.arange(1, parts + 1, dtype=precise(score.device), device=score.device) / (parts * (parts + 1) // 2)
    return Selection(keep, Merge(merged, merged[:, :1].expand_as(merged), weight.expand_as(merged)))
