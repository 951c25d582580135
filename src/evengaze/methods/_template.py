"""The smallest useful method: copy this file, change `score`, and add a line to the registry in `__init__.py`.

It keeps the tokens with the largest hidden states, a signal that needs no attention at all. Where yours comes from
(paper, equation, upstream file) belongs here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evengaze.methods.base import Pruner, Stage, View, check_keep, check_layer, resolve_keep


@dataclass(frozen=True)
class Norm(Pruner):
    """Keep the visual tokens whose hidden states have the largest norm.

    Attributes:
        keep: visual tokens to keep: a number, or a fraction in (0, 1].
        layer: first decoder layer that runs without the others.
    """

    keep: float = 128
    layer: int = 2

    name: ClassVar[str] = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_layer(self.layer)

    def stages(self, layers: int) -> Sequence[Stage]:
        """Before which layers tokens leave, and whose attention `score` reads there: "previous", "own" or none."""
        check_layer(self.layer, layers)
        return [Stage(self.layer, attention=None)]

    def score(self, view: View) -> Tensor:
        """One number a token, larger means keep; `view.attention(view.last)` would be FastV's."""
        return view.features.float().square().sum(-1)

    def budget(self, stage: int, current: int, original: int) -> int:
        """How many of `current` tokens stay, of `original` at the start."""
        return resolve_keep(self.keep, original)
