"""PyramidDrop: drop in several steps, each ranked by the layer that is about to run.

Paper: Xing et al., "PyramidDrop" (arXiv 2410.17247), section 3; code: `pdrop_rank_drop` in modeling_llama_pdrop.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from evengaze.methods.base import Positions, Pruner, Stage, View, check_layers, per_stage, resolve_keep, scale_layers

if TYPE_CHECKING:
    from typing_extensions import Self


_LAYERS = (2, 10, 20)


@dataclass(frozen=True)
class PyramidDrop(Pruner):
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
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "pyramiddrop"
    positions: ClassVar[Positions] = "renumbered"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            check_layers(self.layers)
        object.__setattr__(self, "keep", per_stage(self.keep, len(self.layers or _LAYERS), 0.5))

    def stages(self, layers: int) -> Sequence[Stage]:
        """Ranked by the stage layer's own queries and keys."""
        chosen = self.layers or scale_layers(_LAYERS, layers)
        check_layers(chosen, layers)
        return [Stage(layer, "own") for layer in chosen]

    def score(self, view: View) -> Tensor:
        """Attention from the last prompt token."""
        return view.attention(view.last)

    def budget(self, stage: int, current: int, original: int) -> int:
        """A share of the original tokens, rounded down."""
        assert isinstance(self.keep, tuple)
        keep = self.keep[stage]
        return max(1, int(keep * original)) if isinstance(keep, float) and keep <= 1 else resolve_keep(keep, original)

    def with_keep(self, tokens: int, visual: int) -> Self:
        """`tokens` after the first stage, the others in proportion."""
        assert isinstance(self.keep, tuple)
        shares = [resolve_keep(keep, visual) / resolve_keep(self.keep[0], visual) for keep in self.keep]
        return self.replace(keep=tuple(max(1, round(tokens * share)) for share in shares))
