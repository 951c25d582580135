"""iLLaVA: drop the least attended tokens and recycle them into the weakest survivor.

Paper: Hu et al., "iLLaVA: An Image is Worth Fewer Than 1/3 Input Tokens" (arXiv 2412.06263); code: modeling_qwen2.py
(`forward_illava`) and siglip_encoder.py. Written for any decoder and for CLIP and SigLIP towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from evengaze.methods.base import Merge, Pruner, Selection, Stage, View, check_keep, check_layer, resolve_keep

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ILLaVA(Pruner):
    """Rank by the last prompt token's attention in layer `layer - 1`; the worst survivor takes in the dropped tokens.

        h_target <- sum_m c_m h_m / sum_m c_m,  c = 1 for the target, 2 for the best dropped one, ... r + 1 for the last

    The weights grow towards the *least* attended tokens. A comment in the release says the opposite, but this is what
    both of its stages compute and what its published results were made with.

    Attributes:
        keep: visual tokens left: a number, or a fraction in (0, 1].
        layer: the first layer that runs without the dropped tokens (the release: 8 for images, 2 for videos).
    """

    keep: float = 0.7
    layer: int = 2

    name: ClassVar[str] = "illava"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_layer(self.layer, reads_previous=True)

    def stages(self, layers: int) -> Sequence[Stage]:
        """One, ranked by the layer before it."""
        check_layer(self.layer, layers)
        return [Stage(self.layer, "previous")]

    def score(self, view: View) -> Tensor:
        """Attention from the last prompt token."""
        return view.attention(view.last)

    def budget(self, stage: int, current: int, original: int) -> int:
        """What is left when the dropped share has been rounded, as the release does."""
        if isinstance(self.keep, float) and self.keep <= 1:
            return max(1, original - round(original * (1 - self.keep)))
        return resolve_keep(self.keep, original)

    def with_keep(self, tokens: int, visual: int) -> Self:
        """The same stage with another `keep`."""
        return self.replace(keep=tokens)

    def choose(self, view: View, count: int) -> Selection:
        """Keep the best and recycle the rest; padding is neither kept nor recycled."""
        score, allowed = self.ranked(view)
        return recycle(score, allowed, count)


def recycle(score: Tensor, allowed: Tensor, count: int) -> Selection:
    """Keep the `count` best allowed candidates; the last becomes the rank-weighted mean of itself and the rest."""
    order = torch.sort(score.masked_fill(~allowed, float("-inf")), descending=True, stable=True).indices
    order = order[: int(allowed.sum())]
    keep, merged = order[:count], order[count - 1 :]
    if len(merged) < 2:
        return Selection(keep.sort().values)
    weight = torch.arange(1, len(merged) + 1, dtype=torch.float64, device=score.device)
    merge = Merge(merged, merged[:1].expand(len(merged)), weight / weight.sum())
    return Selection(keep.sort().values, merge)
