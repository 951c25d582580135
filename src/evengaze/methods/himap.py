"""HiMAP: text looks for the picture early, the picture looks at itself later.

Paper: Yin et al., "Lifting the Veil on Visual Information Flow in MLLMs" (arXiv 2503.13108); code: himap.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from evengaze.methods.base import Pruner, Stage, View, check_layers, per_stage, resolve_keep

if TYPE_CHECKING:
    from typing_extensions import Self

    from evengaze.debias import Debias


@dataclass(frozen=True)
class HiMAP(Pruner):
    """Two stages, ranked by the layer before each; survivors keep their original positions.

        stage 1: s_j = sum over text tokens t of mean over heads of A[h, t, j]
        stage 2: s_j = sum over surviving visual tokens i of mean over heads of A[h, i, j]

    Stage 2 favours early tokens (causality: they are seen by more rows), the opposite of the trend that debiasing
    removes, and is not language-to-vision: debiasing never touches it.

    Attributes:
        keep: tokens left after each stage, numbers or fractions of the original number; a single value is the first
            stage's, and the second keeps a quarter of it (the published 288 and 72). One entry: stage 1 only.
        layers: the stage layers.
    """

    keep: float | tuple[float, ...] = (288, 72)
    layers: tuple[int, ...] = (2, 8)

    name: ClassVar[str] = "himap"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers, reads_previous=True)
        object.__setattr__(self, "keep", per_stage(self.keep, len(self.layers), 0.25))

    def stages(self, layers: int) -> Sequence[Stage]:
        """Ranked by the layer before each."""
        check_layers(self.layers, layers, reads_previous=True)
        return [Stage(layer, "previous") for layer in self.layers]

    def language_to_vision(self, stage: int) -> bool:
        """Only the first stage ranks by text."""
        return stage == 0

    def score(self, view: View) -> Tensor:
        """Attention from the text, later from the visual tokens that are left."""
        return view.attention(view.text if view.stage == 0 else view.tokens.position, "sum")

    def budget(self, stage: int, current: int, original: int) -> int:
        """The stage's `keep`."""
        assert isinstance(self.keep, tuple)
        return resolve_keep(self.keep[stage], original)

    def with_keep(self, tokens: int, visual: int) -> Self:
        """`tokens` after the first stage, the second in proportion."""
        assert isinstance(self.keep, tuple)
        shares = [resolve_keep(keep, visual) / resolve_keep(self.keep[0], visual) for keep in self.keep]
        return self.replace(keep=tuple(max(1, round(tokens * share)) for share in shares))

    def debiased(self, debias: Debias, score: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """The official patch stores the trend's weights in float16, whatever the model computes in."""
        if self.mode == "corrected":
            return super().debiased(debias, score, view)
        valid = debias.valid(view.tokens, official=True).to(score.device)
        weight = debias.weight(view.tokens, score).to(score.device, torch.float16)
        return score * valid * weight, torch.ones_like(valid)
