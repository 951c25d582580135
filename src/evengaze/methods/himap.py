"""HiMAP: text looks for the picture early, the picture looks at itself later.

Paper: Yin et al., "Lifting the Veil on Visual Information Flow in MLLMs" (arXiv 2503.13108); code: himap.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from evengaze.methods.ranking import Allowed, content, every, weights
from evengaze.methods.registry import register
from evengaze.methods.stages import ManyStages
from evengaze.protocol import View

if TYPE_CHECKING:
    from evengaze.debias import Debias


@register
@dataclass(frozen=True)
class HiMAP(ManyStages):
    """Two stages, ranked by the layer before each; survivors keep their original positions.

        stage 1: s_j = sum over text tokens t of mean over heads of A[h, t, j]
        stage 2: s_j = sum over surviving visual tokens i of mean over heads of A[h, i, j]

    Stage 2 favours early tokens (causality: they are seen by more rows), the opposite of the trend that debiasing
    removes, and is not language-to-vision: debiasing never touches it.

    Attributes:
        keep: tokens left after each stage, numbers or fractions of the original number; a single value is the first
            stage's, and the second keeps a quarter of it (the published 288 and 72).
        layers: the stage layers; None takes (2, 8), scaled to the decoder's depth. A single one gives stage 1 only.
    """

    keep: float | tuple[float, ...] = (288, 72)

    name: ClassVar[str] = "himap"
    published: ClassVar[tuple[int, ...]] = (2, 8)
    shrink: ClassVar[float] = 0.25

    def language_to_vision(self, stage: int) -> bool:
        """Only the first stage ranks by text."""
        return stage == 0

    def score(self, view: View) -> Tensor:
        """Attention from the text, later from the visual tokens that are left."""
        return view.attention(view.text if view.stage == 0 else view.tokens.position, "sum")

    def debiased(self, debias: Debias, raw: Tensor, view: View) -> tuple[Tensor, Allowed]:
        """The official patch stores the trend's weights in float16, whatever the model computes in."""
        if self.mode == "corrected":
            return super().debiased(debias, raw, view)
        shown, _ = content(debias, view, official=True)
        weight = weights(debias, view, raw, torch.float16)
        score = raw if shown is None else raw * shown
        return score if weight is None else score * weight, every(view)
