"""The smallest useful method: copy this file, change `score`, and add a line to the registry in `__init__.py`.

It keeps the tokens with the largest hidden states, a signal that needs no attention at all. Where yours comes from
(paper, equation, upstream file) belongs here.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evengaze.methods import OneStage, View


@dataclass(frozen=True)
class Norm(OneStage):
    """Keep the visual tokens whose hidden states have the largest norm."""

    name: ClassVar[str] = "norm"
    attention = None  # "previous" or "own" to rank by attention

    def score(self, view: View) -> Tensor:
        """One number a token, larger means keep; `view.attention(view.last)` would be FastV's."""
        return view.features.float().square().sum(-1)
