"""What the model's encoders were given since the last call, what they made of it, and which tokens it filled."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor
from transformers.utils import ModelOutput

from evengaze.engine.intercept import intercept
from evengaze.models.base import EncoderCall, Placement
from evengaze.protocol import Store

Kind = Literal["image", "video"]


class Encoded:
    """What the encoders did for one prompt.

    Attributes:
        calls: encodings, in the order in which they ended.
        placed: placements, in order.
        notes: what methods noted meanwhile.
        depth: encodings that run, one inside of the other.
    """

    def __init__(self) -> None:
        self.calls: list[EncoderCall] = []
        self.placed: list[Placement] = []
        self.notes = Store()
        self.depth = 0

    def clear(self) -> None:
        """Forget what was seen."""
        self.calls.clear()
        self.placed.clear()
        self.notes.clear()

    @contextmanager
    def encoding(self, kind: Kind, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """Around an encoding; the value receives its result."""
        self.depth += 1
        try:
            yield lambda result: self.calls.append(
                EncoderCall(kind, arguments, _as_it_is(result), inner=self.depth > 1)
            )
        finally:
            self.depth -= 1

    @contextmanager
    def placing(self, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """Around a placement; the value receives its result."""

        def placed(result: Any) -> None:
            found = result if isinstance(result, (tuple, list)) else (result,)
            masks = [m for m in found if isinstance(m, Tensor)]
            masks = [m[..., 0] if m.dim() == 3 else m for m in masks]
            if masks and masks[0].shape[-1] > 1:  # one token is a decoding step
                self.placed.append(Placement(arguments, tuple(masks)))

        yield placed


def _as_it_is(result: Any) -> Any:
    """An encoder's result as it is now: with beams, `generate` writes repeated features into it later."""
    return copy.copy(result) if isinstance(result, (ModelOutput, list)) else result


def watch(base: Any, current: Callable[[], Encoded]) -> Iterator[Callable[[], None]]:
    """Watch `get_image_features`, `get_video_features` and `get_placeholder_mask` of a model; yields what undoes it.

    Args:
        base: the model that has them.
        current: gives the record of the running call.
    """

    def encoding(kind: Kind, arguments: dict[str, Any]) -> Any:
        return current().encoding(kind, arguments)

    def placing(arguments: dict[str, Any]) -> Any:
        return current().placing(arguments)

    for kind in ("image", "video"):
        if callable(getattr(base, f"get_{kind}_features", None)):
            yield intercept(base, f"get_{kind}_features", functools.partial(encoding, kind))
    if callable(getattr(base, "get_placeholder_mask", None)):
        yield intercept(base, "get_placeholder_mask", placing)
