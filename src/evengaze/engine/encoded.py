"""What the model's encoders were given since the last call, what they made of it, and which tokens it filled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

from torch import Tensor

from evengaze.engine.intercept import intercept
from evengaze.models.base import EncoderCall, Placement

Kind = Literal["image", "video"]


class Encoded:
    """Watches `get_image_features`, `get_video_features` and `get_placeholder_mask` of a model.

    Attributes:
        calls: encodings, in the order in which they ended.
        placed: placements, in order.
    """

    def __init__(self) -> None:
        self.calls: list[EncoderCall] = []
        self.placed: list[Placement] = []
        self._depth = 0

    def watch(self, base: Any) -> Iterator[Callable[[], None]]:
        """Start watching; yields what undoes it."""
        for kind in ("image", "video"):
            if callable(getattr(base, f"get_{kind}_features", None)):
                done = functools.partial(self._encoded, kind)
                yield intercept(base, f"get_{kind}_features", self._enter, self._leave, done)
        if callable(getattr(base, "get_placeholder_mask", None)):
            yield intercept(base, "get_placeholder_mask", returned=self._placed)

    def clear(self) -> None:
        """Forget what was seen."""
        self.calls.clear()
        self.placed.clear()

    def _enter(self, arguments: dict[str, Any]) -> None:
        self._depth += 1

    def _leave(self) -> None:
        self._depth -= 1

    def _encoded(self, kind: Kind, arguments: dict[str, Any], result: Any) -> None:
        self.calls.append(EncoderCall(kind, arguments, result, inner=self._depth > 1))

    def _placed(self, arguments: dict[str, Any], result: Any) -> None:
        found = result if isinstance(result, (tuple, list)) else (result,)
        masks = [m for m in found if isinstance(m, Tensor)]
        masks = [m[..., 0] if m.dim() == 3 else m for m in masks]
        if masks and masks[0].shape[-1] > 1:  # one token is a decoding step
            self.placed.append(Placement(arguments, tuple(masks)))
