"""The smallest useful method: copy this file anywhere, change `score`, and put `@register` above `@dataclass`.

`evengaze run --plugin FILE.py --method norm:keep=64`, or `FILE:Norm:keep=64`, uses it from the command line. In this
package, the module's name also goes into the list in `registry.py`.

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
