"""FastV: rank once by the last prompt token's attention, early, and go on with the best.

Paper: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764). The paper speaks of the attention
"from all tokens"; the released code (`fast_v_attention_rank`, modeling_llama.py) reads the last row only, and so do we.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from evengaze.methods.base import Pruner, Selection, Stage, View, check_keep, check_layer, resolve_keep

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class FastV(Pruner):
    """Keep the visual tokens that the last prompt token attends to most in layer `layer - 1`.

        s_j = mean over heads of A[h, last, j],   A = attention of layer `layer - 1`

    Survivors keep their original positions; the selection is made once and decoding uses it unchanged.

    Attributes:
        keep: visual tokens to keep: a number, or a fraction in (0, 1].
        layer: first decoder layer that runs without the dropped tokens (0-based; the paper's K).
    """

    keep: float = 128
    layer: int = 2

    name: ClassVar[str] = "fastv"

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
        """`keep`, as a number of tokens."""
        return resolve_keep(self.keep, original)

    def with_keep(self, tokens: int, visual: int) -> Self:
        """The same stage with another `keep`."""
        return self.replace(keep=tokens)

    def choose(self, view: View, count: int) -> Selection:
        """The best `count`; the official code lowers it to the number of unpadded tokens, even to 0."""
        if self.mode == "official" and self.debias is not None:
            count = min(count, int(self.debias.valid(view.tokens, official=True).sum()))
        return super().choose(view, count)
