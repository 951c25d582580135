"""Decoders that add features of inner tower layers to the visual tokens behind their first layers ("deepstack")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

METHOD = "_deepstack_process"
"""Of transformers' Qwen3-VL text models (`modeling_qwen3_vl.py`) and of the families that were made from them."""


def shorten_deepstack(decoder: Any, surviving: Callable[[], Tensor | None]) -> Callable[[], None]:
    """Give a decoder's deepstack step the features of those visual tokens that are still there.

    The decoder adds them by a mask over the whole prompt, between two layers, where no hook sees it; the method is
    shadowed on this one instance.

    Args:
        decoder: the module with the layers; one without such a step is left alone.
        surviving: as in `Adapter.prepare`.

    Returns:
        A function that undoes it.
    """
    if getattr(decoder, METHOD, None) is None:
        return lambda: None
    setattr(decoder, METHOD, _Shortened(decoder, surviving))

    def undo() -> None:
        decoder.__dict__.pop(METHOD, None)

    return undo


class _Shortened:
    """The step of one decoder; a copy of the decoder has its own."""

    def __init__(self, decoder: Any, surviving: Callable[[], Tensor | None]) -> None:
        self._decoder, self._original, self._surviving = decoder, getattr(decoder, METHOD), surviving

    def __call__(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        # A mask of the states' length fits as it is.
        kept = self._surviving() if hidden_states.shape[1] != visual_pos_masks.shape[1] else None
        visual_pos_masks, visual_embeds = _left(visual_pos_masks, visual_embeds, kept)
        added: Tensor = self._original(hidden_states, visual_pos_masks, visual_embeds)
        return added

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._decoder, METHOD)


def shorten_arguments(decoder: Any, surviving: Callable[[], Tensor | None]) -> Callable[[], None]:
    """The same for a decoder that adds them inside of its forward: Granite 4 Vision's (`modeling_granite4_vision.py`).

    All that it does with them is to ask for a layer's features and to move the mask to a device. It is given stand-ins
    that answer as of then. Arguments, result as of `shorten_deepstack`.
    """
    handle = decoder.register_forward_pre_hook(_Exchange(surviving), with_kwargs=True)

    def undo() -> None:
        handle.remove()

    return undo


class _Exchange:
    """The hook on one decoder; a copy of the decoder has none."""

    def __init__(self, surviving: Callable[[], Tensor | None]) -> None:
        self._surviving = surviving

    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask, features = kwargs.get("vision_mask"), kwargs.get("deepstack_features")
        if mask is None or not features:
            return None
        layers = _Layers(features, mask, self._surviving)
        return args, {**kwargs, "vision_mask": _Mask(mask, self._surviving), "deepstack_features": layers}

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return lambda *_: None


class _Layers(dict[int, Tensor]):
    """Features by layer, of those visual tokens that are left when a layer's are asked for."""

    def __init__(self, features: dict[int, Tensor], mask: Tensor, surviving: Callable[[], Tensor | None]) -> None:
        super().__init__(features)
        self._mask, self._surviving = mask, surviving

    def __getitem__(self, layer: int) -> Tensor:
        return _left(self._mask[..., 0], super().__getitem__(layer), self._surviving())[1]


class _Mask:
    """The mask (B, L, 1) of visual tokens, of those tokens that are left when it is moved to a device."""

    def __init__(self, mask: Tensor, surviving: Callable[[], Tensor | None]) -> None:
        self._mask, self._surviving = mask, surviving

    def to(self, device: Any) -> Tensor:
        """(B, M, 1) bool."""
        kept, mask = self._surviving(), self._mask[..., 0]
        return (mask if kept is None else mask.gather(1, kept.to(mask.device)))[..., None].to(device)


def _left(mask: Tensor, features: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is left, with the tokens `kept` (B, M), of a mask (B, L) and the features of its True entries."""
    if kept is None:
        return mask, features
    kept = kept.to(mask.device)
    # Features of all rows lie in one tensor, in the order of the mask's True entries.
    rank = (mask.flatten().cumsum(0) - 1).view_as(mask).gather(1, kept)
    mask = mask.gather(1, kept)
    return mask, features[rank[mask].to(features.device)]
