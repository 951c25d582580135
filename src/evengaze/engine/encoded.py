"""What the model's encoders were given since the last call, what they made of it, and which tokens it filled.

Pictures are encoded once, but their features may enter the decoder many times: every step of a generation without a
cache, a loop of one's own that passes `mm_encoder_outputs`. What is known of features therefore lives as long as they.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers.utils import ModelOutput

from evengaze.engine.intercept import intercept
from evengaze.memory import Store
from evengaze.models.base import EncoderCall, Placement

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Encoding:
    """One call of an encoder.

    Attributes:
        calls: the calls inside of it, in the order in which they ended; itself last.
        notes: what methods noted meanwhile.
    """

    calls: tuple[EncoderCall, ...]
    notes: Store


class Features:
    """What is known of the results of encoders, by any thread, for as long as somebody holds them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], Encoding]] = {}

    def note(self, result: Any, encoding: Encoding) -> None:
        """Know a result again. Only outputs that are passed on whole, as `mm_encoder_outputs` are, can be known."""
        if isinstance(result, ModelOutput):
            key = id(result)
            self._known[key] = (weakref.ref(result, lambda _: self._known.pop(key, None)), encoding)

    def of(self, outputs: Any) -> list[Encoding] | None:
        """The encodings whose results a call is given by kind; None if it is given none, or others."""
        given = [o for o in outputs.values() if o is not None] if isinstance(outputs, Mapping) else []
        found = [self._known.get(id(output)) for output in given]
        known = [f[1] for f, output in zip(found, given, strict=True) if f is not None and f[0]() is output]
        return known if known and len(known) == len(given) else None

    def clear(self) -> None:
        """Forget all of them."""
        self._known.clear()


class Encoded:
    """What the encoders did for one prompt.

    Args:
        done: encodings that are known already.

    Attributes:
        done: encodings, in order.
        placed: placements, in order.
    """

    def __init__(self, done: Sequence[Encoding] = ()) -> None:
        self.done = list(done)
        self.placed: list[Placement] = []
        self._open: list[list[EncoderCall]] = []
        self._notes = Store()
        self._taken: list[Encoding] = []

    @property
    def calls(self) -> tuple[EncoderCall, ...]:
        """All encoder calls, in the order in which they ended."""
        return tuple(call for encoding in self.done for call in encoding.calls)

    @property
    def notes(self) -> Store:
        """Where methods note things now: of the encoding that runs, or else of none."""
        return self._notes

    def noted(self) -> Store:
        """What methods noted, of all encodings."""
        notes = self._notes.copy()
        for encoding in self.done:
            notes.join(encoding.notes)
        return notes

    def take(self) -> None:
        """A prompt has used it: what follows is for the next one."""
        taken = self.done
        self.clear()
        self._taken = taken

    def repeat(self) -> None:
        """The next prompt uses what the last one has, if nothing was encoded for it."""
        if not self.done:
            self.done = list(self._taken)

    def clear(self) -> None:
        """Forget what was seen."""
        self.done, self._taken = [], []
        self.placed.clear()
        self._notes = Store()

    @contextmanager
    def encoding(self, kind: Kind, arguments: dict[str, Any], features: Features) -> Iterator[Callable[[Any], None]]:
        """Around an encoding; the value receives its result."""
        inner, outside = bool(self._open), self._notes
        if inner:  # some families encode a video through their function for images
            calls = self._open[-1]
        else:
            calls, self._notes = [], Store()
        self._open.append(calls)

        def ended(result: Any) -> None:
            calls.append(EncoderCall(kind, arguments, _as_it_is(result), inner=inner))
            if not inner:
                encoding = Encoding(tuple(calls), self._notes)
                self.done.append(encoding)
                features.note(result, encoding)

        try:
            yield ended
        finally:
            self._open.pop()
            if not inner:
                self._notes = outside

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


def watch(base: Any, current: Callable[[], Encoded], features: Features) -> Iterator[Callable[[], None]]:
    """Watch `get_image_features`, `get_video_features` and `get_placeholder_mask` of a model; yields what undoes it.

    Args:
        base: the model that has them.
        current: gives the record of the running call.
        features: of the attachment.
    """

    def encoding(kind: Kind, arguments: dict[str, Any]) -> Any:
        return current().encoding(kind, arguments, features)

    def placing(arguments: dict[str, Any]) -> Any:
        return current().placing(arguments)

    for kind in ("image", "video"):
        if callable(getattr(base, f"get_{kind}_features", None)):
            yield intercept(base, f"get_{kind}_features", functools.partial(encoding, kind))
    if callable(getattr(base, "get_placeholder_mask", None)):
        yield intercept(base, "get_placeholder_mask", placing)
