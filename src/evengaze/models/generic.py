"""One adapter for every family that puts the features of pictures on placeholder tokens, one token each.

Nothing of a family is known beforehand. Which tokens are filled is seen where the model decides it
(`get_placeholder_mask`), else known by the placeholder's id; how many each picture fills is what its encoder returned.
That is all that exact pruning needs. The geometry is inferred: grids from the encoder's arguments, else a square, else
a line of tokens in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from evengaze.errors import LayoutError
from evengaze.layout import VisualLayout
from evengaze.models.base import Adapter, Call, EncoderCall, find_decoder
from evengaze.models.deepstack import shorten_deepstack
from evengaze.models.features import counts, encoded_pictures
from evengaze.models.pictures import Filling, Picture, fill

KINDS = ("image", "video")
_NAMES = ("{}_token_id", "{}_token_index", "{}_patch_id", "{}_patch_token_id", "{}_soft_token_id")


class Generic(Adapter):
    """Any model whose config names a placeholder and that has `get_image_features`."""

    name = "generic"
    model_types: ClassVar[tuple[str, ...]] = ()
    padding = (
        "border of the mean colour where pixels are (pictures, 3, height, width), and `pixel_attention_mask`; else none"
    )
    limits: ClassVar[tuple[str, ...]] = (
        "geometry is inferred: where the encoder is told no grid, a picture is taken as a square, else as one line",
        "each tile or view of a picture counts as a frame or as a picture of its own",
    )

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """Pictures from what the encoders returned, on the tokens that the model fills."""
        calls = {kind: [e for e in call.encoded if e.kind == kind and not e.inner] for kind in KINDS}
        masks = _masks(model, call, calls)
        _as_videos(calls, masks)
        fillings = []
        for kind, encoded in calls.items():
            mask = masks.get(kind)
            if mask is None:
                if encoded:
                    raise LayoutError(
                        f"{_type(model)}: {kind}s were encoded, but it is not known which tokens they fill: the model "
                        "was called with inputs_embeds, or its config names no placeholder. Give a layout by hand: "
                        "pruner(model, layout=VisualLayout.from_spans(spans, grid))."
                    )
                continue
            pictures = self.pictures(model, encoded, mask)
            fillings.append(Filling(mask, pictures, f"of {kind}s"))
        return fill(call, _distinct(fillings))

    def pictures(self, model: nn.Module, encoded: Sequence[EncoderCall], mask: Tensor) -> list[Picture]:
        """What the encodings of one kind show, in order.

        Args:
            model: the model.
            encoded: the encodings.
            mask: (B, L) bool, the tokens that they fill.
        """
        return [picture for call in encoded for picture in encoded_pictures(call, mask)]

    def prepare(self, model: nn.Module, surviving: Callable[[], Tensor | None]) -> Callable[[], None]:
        """Deepstack features are shortened where the decoder adds them."""
        return shorten_deepstack(self.decoder(model), surviving)

    def visual_token_ids(self, model: nn.Module) -> tuple[int, ...]:
        """Under any of the names in use."""
        found = (placeholder(model.config, kind) for kind in KINDS)
        return tuple(dict.fromkeys(i for i in found if i is not None))


def placeholder(config: Any, kind: str) -> int | None:
    """Id of a kind's placeholder in a config."""
    found = (getattr(config, name.format(kind), None) for name in _NAMES)
    return next((i for i in found if isinstance(i, int)), None)


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


def _masks(model: nn.Module, call: Call, calls: dict[str, list[EncoderCall]]) -> dict[str, Tensor]:
    """(B, L) bool by kind: the tokens that its features fill; from the model itself, else by id."""
    base = getattr(model, "base_model", model)
    sizes = {kind: sum(sum(counts(e)) for e in encoded) for kind, encoded in calls.items() if encoded}
    found: dict[str, Tensor] = {}
    for placement in call.placed:
        given = placement.arguments
        order = ["image", "video" if callable(getattr(base, "get_video_features", None)) else "audio", "audio"]
        features = given.get("features")
        if features is not None:  # one kind a call
            rows = features.shape[:-1].numel()
            kinds = [k for k in sizes if k not in found and sizes[k] == rows][:1]
            if _is_audio(model, given):
                kinds = []
        elif any(given.get(f"{k}_features") is not None for k in ("image", "video", "audio")):
            kinds = [k if given.get(f"{k}_features") is not None else "" for k in order]
            if len(placement.masks) == 1:
                kinds = [k for k in kinds if k] or [""]
        else:
            kinds = order
        for kind, mask in zip(kinds, placement.masks, strict=False):
            if kind in sizes:
                found[kind] = mask.cpu().bool()
    for kind in KINDS:
        token = placeholder(model.config, kind)
        if kind not in found and call.input_ids is not None and token is not None:
            found[kind] = call.input_ids.cpu() == token
    return found


def _as_videos(calls: dict[str, list[EncoderCall]], masks: dict[str, Tensor]) -> None:
    """Sort encodings, where the model encodes videos, too, as pictures: pictures first, as their placeholders allow."""
    there = {kind: int(mask.sum()) for kind, mask in masks.items()}
    encoded = calls["image"]
    total = sum(sum(counts(e)) for e in encoded)
    if calls["video"] or not there.get("video") or not total or sum(there.values()) % total:
        return
    left = there.get("image", 0) * total // sum(there.values())
    pictures = []
    for e in encoded:
        left -= sum(counts(e))
        if left < 0:
            break
        pictures.append(e)
    calls["video"] = [replace(e, kind="video") for e in encoded[len(pictures) :]]
    calls["image"] = pictures


def _is_audio(model: nn.Module, arguments: dict[str, Any]) -> bool:
    token = arguments.get("token_id", arguments.get("placeholder_token_id"))
    return token is not None and token == placeholder(model.config, "audio")


def _distinct(fillings: list[Filling]) -> list[Filling]:
    """Without kinds that have nothing, where another kind stands on the same placeholder (videos of GLM-4V)."""
    return [
        f
        for f in fillings
        if f.pictures or not any(g.pictures and bool((g.mask & f.mask).any()) for g in fillings if g is not f)
    ]


def _type(model: nn.Module) -> str:
    return str(getattr(model.config, "model_type", type(model).__name__))
