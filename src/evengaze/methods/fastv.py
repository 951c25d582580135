"""FastV: rank once by the last prompt token's attention, early, and go on with the best.

Paper: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764). The paper speaks of the attention
"from all tokens"; the released code (`fast_v_attention_rank`, modeling_llama.py) reads the last row only, and so do we.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evengaze.methods.ranking import Ranking, content
from evengaze.methods.registry import register
from evengaze.methods.stages import OneStage
from evengaze.protocol import View


@register
@dataclass(frozen=True)
class FastV(OneStage):
    """Keep the visual tokens that the last prompt token attends to most in layer `layer - 1`.

        s_j = mean over heads of A[h, last, j],   A = attention of layer `layer - 1`

    Survivors keep their original positions; the selection is made once and decoding uses it unchanged.

    Attributes:
        keep: visual tokens to keep: a number, or a fraction in (0, 1].
        layer: first decoder layer that runs without the dropped tokens (0-based; the paper's K).
    """

    name: ClassVar[str] = "fastv"

    def score(self, view: View) -> Tensor:
        """Attention from the last prompt token."""
        return view.attention(view.last)

    def kept(self, view: View, ranking: Ranking, count: int) -> Sequence[int]:
        """The best `count`; the official code lowers it to the number of unpadded tokens, even to 0."""
        if self.mode == "official" and self.debiasing is not None:
            return [min(count, shown) for shown in content(self.debiasing, view, official=True)[1]]
        return super().kept(view, ranking, count)
