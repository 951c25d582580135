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
        kept = self._surviving()
        # A mask of the states' length fits as it is.
        if kept is not None and hidden_states.shape[1] != visual_pos_masks.shape[1]:
            kept = kept.to(visual_pos_masks.device)
            # Features of all rows lie in one tensor, in the order of the mask's True entries.
            rank = (visual_pos_masks.flatten().cumsum(0) - 1).view_as(visual_pos_masks).gather(1, kept)
            visual_pos_masks = visual_pos_masks.gather(1, kept)
            visual_embeds = visual_embeds[rank[visual_pos_masks].to(visual_embeds.device)]
        added: Tensor = self._original(hidden_states, visual_pos_masks, visual_embeds)
        return added

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._decoder, METHOD)
