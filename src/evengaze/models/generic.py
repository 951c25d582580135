"""One adapter for every family that puts the features of pictures on placeholder tokens, one token each.

Nothing of a family is known beforehand; each rule has one place:

1. which tokens are filled: seen where the model decides it, else known by the placeholder's id (`filled`);
2. what a picture fills: what its encoder returned (`features`);
3. its grid: from the encoder's arguments, else a square, else a line of tokens in order (`grids`);
4. its padding: from pixels, or pixel masks, where they are at hand (`border`).

The first two are all that exact pruning needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from evengaze.errors import UnsupportedModelError
from evengaze.layout import VisualLayout
from evengaze.models.base import Call, EncoderCall, find_decoder
from evengaze.models.deepstack import shorten_deepstack
from evengaze.models.features import encoded_pictures
from evengaze.models.filled import Filled, filling, placeholder
from evengaze.models.pictures import Picture, repeats
from evengaze.models.refusals import why_not_videos


class Generic(Filled):
    """Any model whose config names a placeholder and that has `get_image_features`."""

    name = "generic"
    model_types: ClassVar[tuple[str, ...]] = ()
    observed: ClassVar[bool] = True
    padding = (
        "border of the mean colour where pixels are (pictures, 3, height, width), and `pixel_attention_mask`; else none"
    )
    limits: ClassVar[tuple[str, ...]] = (
        "geometry is inferred: where the encoder is told no grid, a picture is taken as a square, else as one line",
        "each tile or view of a picture counts as a frame or as a picture of its own",
    )

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """As of all families, if the decoder gets the tokens of the prompt."""
        refusal = why_not_videos(model) if any(e.kind == "video" for e in call.encoded) else None
        if refusal is not None:
            raise UnsupportedModelError(f"{type(model).__name__} cannot be pruned with {refusal}.")
        return super().layout(model, call)

    def pictures(self, model: nn.Module, call: Call, encoded: Sequence[EncoderCall], mask: Tensor) -> list[Picture]:
        """Inferred from what the encoders were given and returned."""
        once = mask[:: repeats(mask, filling(encoded))]
        return [picture for e in encoded for picture in encoded_pictures(e, once)]

    def prepare(self, model: nn.Module, surviving: Callable[[], Tensor | None]) -> Callable[[], None]:
        """Deepstack features are shortened where the decoder adds them."""
        return shorten_deepstack(self.decoder(model), surviving)


def generic_for(model: nn.Module) -> Generic | None:
    """The generic adapter, if a model has what it needs.

    Raises:
        UnsupportedModelError: it has, but no decoder layers are found.
    """
    config: Any = model.config
    base = getattr(model, "base_model", model)
    if not callable(getattr(base, "get_image_features", None)) or getattr(config, "is_encoder_decoder", False):
        return None
    if placeholder(config, "image") is None and not callable(getattr(base, "get_placeholder_mask", None)):
        return None
    find_decoder(model)
    return Generic()
