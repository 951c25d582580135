"""VisionZip: keep the patches that the vision tower's class token looks at.

Paper: Yang et al., "VisionZip" (arXiv 2412.04467), section 3.2, the dominant tokens. Written from the paper's formulas.
The paper also merges the others into a few contextual tokens before the projector; that part is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from evengaze.methods.base import Pruner, Stage, View, check_keep, check_layer, resolve_keep
from evengaze.methods.vision import watch

if TYPE_CHECKING:
    from typing_extensions import Self

    from evengaze.models.base import Adapter


@dataclass(frozen=True)
class VisionZip(Pruner):
    """Rank by the tower's own attention, in the layer whose output becomes the features.

        s_j = mean over heads of A[h, class token, j], or of A[h, i, j] over all patches i without a class token

    Attributes:
        keep: visual tokens to keep: a number, or a fraction in (0, 1].
        layer: decoder layer before which the others leave.
    """

    keep: float = 128
    layer: int = 0

    name: ClassVar[str] = "visionzip"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_layer(self.layer)

    def stages(self, layers: int) -> Sequence[Stage]:
        """One, without the decoder's attention."""
        check_layer(self.layer, layers)
        return [Stage(self.layer, None)]

    def language_to_vision(self, stage: int) -> bool:
        """Text takes no part."""
        return False

    def prepare(self, model: nn.Module, adapter: Adapter | None, shared: dict[str, Any]) -> Callable[[], None]:
        """Listen to the tower."""
        return watch(model, adapter, shared)

    def score(self, view: View) -> Tensor:
        """Attention received in the tower."""
        scores: Tensor = view.shared["patches"].of(view)
        return scores

    def budget(self, stage: int, current: int, original: int) -> int:
        """`keep`, as a number of tokens."""
        return resolve_keep(self.keep, original)

    def with_keep(self, tokens: int, visual: int) -> Self:
        """The same with another `keep`."""
        return self.replace(keep=tokens)
