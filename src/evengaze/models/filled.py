"""Which tokens the features of pictures fill: seen where the model decides it, else known by the placeholder's id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from evengaze.errors import LayoutError
from evengaze.layout import VisualLayout
from evengaze.models.base import Adapter, Call, EncoderCall
from evengaze.models.features import counts
from evengaze.models.pictures import Filling, Picture, fill

KINDS = ("image", "video")
_NAMES = ("{}_token_id", "{}_token_index", "{}_patch_id", "{}_patch_token_id", "{}_soft_token_id")


class Filled(Adapter):
    """A family that puts what its encoders return on placeholder tokens, one token each. What they show is left open:
    a family says it for each encoding (`shown`), or for all of a prompt together (`pictures`).

    Attributes:
        observed: whether to ask the model for the tokens, which means to wait for its device, though ids are there.
    """

    observed: ClassVar[bool] = False

    def layout(self, model: nn.Module, call: Call) -> VisualLayout | None:
        """What was encoded, in order, on the tokens that it fills."""
        calls = {kind: [e for e in call.encoded if e.kind == kind and not e.inner] for kind in KINDS}
        masks = _observed(model, call, calls) if self.observed or call.input_ids is None else {}
        masks = {**_by_id(model, call), **masks}
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
            fillings.append(Filling(mask, self.pictures(model, call, encoded, mask), f"of {kind}s"))
        return fill(call, _distinct(fillings))

    def pictures(self, model: nn.Module, call: Call, encoded: Sequence[EncoderCall], mask: Tensor) -> list[Picture]:
        """What the encodings of one kind show, in order.

        Args:
            model: the model.
            call: the call.
            encoded: the encodings.
            mask: (B, L) bool, the tokens that they fill.
        """
        return [picture for e in encoded for picture in self.shown(model.config, e)]

    def shown(self, config: Any, encoder: EncoderCall) -> list[Picture]:
        """What one encoding shows, where its arguments and the model's config say so."""
        raise NotImplementedError

    def visual_token_ids(self, model: nn.Module) -> tuple[int, ...]:
        """Under any of the names in use."""
        found = (placeholder(model.config, kind) for kind in KINDS)
        return tuple(dict.fromkeys(i for i in found if i is not None))


def placeholder(config: Any, kind: str) -> int | None:
    """Id of a kind's placeholder in a config."""
    found = (getattr(config, name.format(kind), None) for name in _NAMES)
    return next((i for i in found if isinstance(i, int)), None)


def _by_id(model: nn.Module, call: Call) -> dict[str, Tensor]:
    """(B, L) bool by kind: the tokens that its features fill, if its placeholders are all of them."""
    if call.input_ids is None:
        return {}
    ids, tokens = call.input_ids.cpu(), {kind: placeholder(model.config, kind) for kind in KINDS}
    return {kind: ids == token for kind, token in tokens.items() if token is not None}


def _observed(model: nn.Module, call: Call, calls: dict[str, list[EncoderCall]]) -> dict[str, Tensor]:
    """(B, L) bool by kind: the tokens that its features fill, as far as the model says so."""
    base = getattr(model, "base_model", model)
    found: dict[str, Tensor] = {}
    for placement in call.placed:
        given = placement.arguments
        order = ["image", "video" if callable(getattr(base, "get_video_features", None)) else "audio", "audio"]
        features = given.get("features")
        if features is not None:  # one kind a call
            rows = features.shape[:-1].numel()  # a multiple with beams
            kinds = [k for k in KINDS if calls[k] and k not in found and rows % filling(calls[k]) == 0][:1]
            if _is_audio(model, given):
                kinds = []
        elif any(given.get(f"{k}_features") is not None for k in ("image", "video", "audio")):
            kinds = [k if given.get(f"{k}_features") is not None else "" for k in order]
            if len(placement.masks) == 1:
                kinds = [k for k in kinds if k] or [""]
        else:
            kinds = order
        for kind, mask in zip(kinds, placement.masks, strict=False):
            if calls.get(kind):
                found[kind] = mask.cpu().bool()
    return found


def filling(encoded: Sequence[EncoderCall]) -> int:
    """How many tokens some encodings fill."""
    return sum(sum(counts(e)) for e in encoded)


def _as_videos(calls: dict[str, list[EncoderCall]], masks: dict[str, Tensor]) -> None:
    """Sort encodings, where the model encodes videos, too, as pictures: pictures first, as their placeholders allow."""
    there = {kind: int(mask.sum()) for kind, mask in masks.items()}
    if calls["video"] or not there.get("video"):
        return
    total = filling(calls["image"])
    if not total or sum(there.values()) % total:
        return
    left = there.get("image", 0) * total // sum(there.values())
    pictures = []
    for e in calls["image"]:
        left -= sum(counts(e))
        if left < 0:
            break
        pictures.append(e)
    calls["video"] = [replace(e, kind="video") for e in calls["image"][len(pictures) :]]
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
