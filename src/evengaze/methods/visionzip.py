"""VisionZip: keep the patches that the vision tower's class token looks at.

Paper: Yang et al., "VisionZip" (arXiv 2412.04467), section 3.2, the dominant tokens. Written from the paper's formulas.
The paper also merges the others into a few contextual tokens before the projector; that part is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from evengaze.memory import Shared
from evengaze.methods._tower import Patches, watch
from evengaze.methods.registry import register
from evengaze.methods.stages import OneStage
from evengaze.protocol import Source, View

if TYPE_CHECKING:
    from evengaze.models.base import Adapter


@register
@dataclass(frozen=True)
class VisionZip(OneStage):
    """Rank by the tower's own attention, in the layer whose output becomes the features.

        s_j = mean over heads of A[h, class token, j], or of A[h, i, j] over all patches i without a class token

    Attributes:
        keep: visual tokens to keep: a number, or a fraction in (0, 1].
        layer: decoder layer before which the others leave.
    """

    layer: int = 0

    name: ClassVar[str] = "visionzip"
    attention: ClassVar[Source] = None  # of the decoder

    @property
    def in_tower(self) -> bool:
        """It reads the tower's attention."""
        return True

    def prepare(self, model: nn.Module, adapter: Adapter | None, shared: Shared) -> Callable[[], None]:
        """Listen to the tower."""
        return watch(model, adapter, shared)

    def score(self, view: View) -> Tensor:
        """Attention received in the tower."""
        return Patches.of(view)
