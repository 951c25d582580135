"""PyramidDrop: drop in several steps, each ranked by the layer that is about to run.

Paper: Xing et al., "PyramidDrop" (arXiv 2410.17247), section 3; code: `pdrop_rank_drop` in modeling_llama_pdrop.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evengaze.methods.registry import register
from evengaze.methods.stages import ManyStages
from evengaze.protocol import Positions, Source, View


@register
@dataclass(frozen=True)
class PyramidDrop(ManyStages):
    """Before each stage layer r, keep the tokens to which the last prompt token is about to attend most there.

        s_j = mean over heads of softmax(q_last K^T)_j,   q, K those of layer r on the tokens not dropped yet

    Budgets are shares of the original number of tokens. Survivors, text included, are renumbered without gaps.

    Attributes:
        keep: tokens left after each stage: fractions of the original number (rounded down), or numbers; a single value
            is the first stage's, later ones keep half each (the paper's lambda = 0.5).
        layers: the stage layers; None takes (2, 10, 20), scaled to the decoder's depth. These defaults are those of the
            debiasing study, 128 tokens on average; the paper's are (0.5, 0.25, 0.125) at (8, 16, 24), 270 on average.
    """

    keep: float | tuple[float, ...] = (0.32, 0.16, 0.08)

    name: ClassVar[str] = "pyramiddrop"
    positions: ClassVar[Positions] = "renumbered"
    attention: ClassVar[Source] = "own"
    published: ClassVar[tuple[int, ...]] = (2, 10, 20)
    shrink: ClassVar[float] = 0.5

    def score(self, view: View) -> Tensor:
        """Attention from the last prompt token."""
        return view.attention(view.last)

    def budget(self, stage: int, current: int, original: int) -> int:
        """A share of the original tokens, rounded down."""
        keep = self.budgets[stage]
        if isinstance(keep, float) and keep <= 1:
            return max(1, int(keep * original))
        return super().budget(stage, current, original)
