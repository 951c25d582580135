"""The state of running calls: one object a call, one stack of them a thread.

A handle is shared by all threads that use its model, and calls may run inside of others (a streamer or a logits
processor that asks the model something). So nothing that belongs to a call is kept on the handle or on a module.

What ends a call may be a BaseException, for which torch runs no hooks. A call therefore remembers the frame of the
module call that it belongs to: once that frame is on its thread's stack no more, the call is over.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from evengaze.engine.decode import Steps
from evengaze.engine.encoded import Encoded, Encoding
from evengaze.engine.generation import Request
from evengaze.engine.prefill import Prefill, Selections
from evengaze.engine.rotary import Rotary
from evengaze.layout import VisualLayout
from evengaze.memory import Store

_FROZEN = 8
"""Generations without a cache that may take turns inside one `generate` (contrastive decoding runs two)."""


@dataclass(frozen=True)
class Frozen:
    """What a call without a cache decided, for the longer calls of the same generation that follow it."""

    inputs: Tensor
    layout: VisualLayout
    selections: list[Selections]

    def continued_by(self, inputs: Tensor) -> bool:
        """Whether a call repeats the recorded one with further tokens behind it."""
        batch, length = self.inputs.shape[:2]
        if inputs.shape[0] != batch or inputs.shape[1] <= length:
            return False
        return torch.equal(self.inputs, inputs[:, :length])


class Call:
    """One call of `generate`, of the model, or (at the bottom of the stack) whatever a thread does outside of them.

    Attributes:
        outer: the call in which this one runs; None at the bottom.
        frame: of the module call; None for `generate`, which ends by itself, and at the bottom.
        generate: whether this is a call of `generate`.
        generating: whether `generate` itself made this call of the model.
        repeating: whether it did, or the loop that it was given (`custom_generate`): without a cache, such calls repeat
            what the first of them chose.
        encoded: what the encoders did for the next prompt.
        ids: (B, L) the running forward's token ids, on their way to the decoder.
        mask: (B, L) its padding mask, likewise.
        pictured: whether it is given pictures: placeholder ids are text in a call that is not.
        labels: (B, L) its labels, which the loss reads behind the decoder.
        ignored: the label that the loss skips.
        keep: its `logits_to_keep`.
        decoding: whether the decoder runs.
        entered: whether the decoder has run, or runs.
        idle: whether its layers are none of a pruner's business.
        cache: the decoder's key-value cache.
        nested: whether another call's decoder runs below this one.
        run: the prefill, None if the call holds no visual tokens.
        size: rows and tokens that enter the decoder.
        lent: what layers received whose keys later layers attend to; None where nothing was changed.
        rotary: the calls of the decoder's rotary modules.
        steps: fits what layers receive to their caches, in calls without a prefill.
        frozen: prefills without a cache, newest first; of a `generate`.
        request: what a `generate` was asked for.
        own: what a method keeps for the call.
        ending: what is to be done when the decoder has been left.
    """

    __slots__ = (
        "__weakref__",
        "cache",
        "decoding",
        "encoded",
        "ending",
        "entered",
        "frame",
        "frozen",
        "generate",
        "generating",
        "idle",
        "ids",
        "ignored",
        "keep",
        "labels",
        "lent",
        "mask",
        "nested",
        "outer",
        "own",
        "pictured",
        "repeating",
        "request",
        "rotary",
        "run",
        "size",
        "steps",
    )

    def __init__(self, outer: Call | None, frame: FrameType | None = None, *, generate: bool = False) -> None:
        self.outer, self.frame, self.generate = outer, frame, generate
        # What a streamer or a loop of one's own asks inside of a `generate` is a call like any other.
        caller = _generation_above(frame) if outer is not None and outer.generate and frame is not None else None
        loop = outer is not None and outer.request is not None and outer.request.loop
        self.generating = caller is not None and caller[1]
        self.repeating = caller is not None and (caller[1] or (caller[0] == "generate" and loop))
        self.encoded = Encoded()
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.labels: Tensor | None = None
        self.ignored = -100
        self.pictured = False
        self.request: Request | None = None
        self.keep: Any = None
        self.decoding = self.entered = False
        self.idle = False
        self.cache: Any = None
        self.nested: bool = outer is not None and (outer.decoding or outer.nested)
        self.run: Prefill | None = None
        self.size = (0, 0)
        self.lent: dict[int, dict[str, Any] | None] = {}
        self.steps: Steps | None = None
        self.rotary: Rotary | None = None
        self.frozen: list[Frozen] = []
        self.own = Store()
        self.ending: list[Callable[[], None]] = []

    @property
    def outermost(self) -> Call | None:
        """The outermost call that it is a part of, perhaps itself; None at the bottom."""
        call = self
        while call.outer is not None and call.outer.outer is not None:
            call = call.outer
        return None if call.outer is None else call

    def drafted(self, length: int) -> int:
        """How many of the running forward's last tokens a draft has put behind the prompt."""
        request = self.outer.request if self.outer is not None and self.generating else None
        prompt = None if request is None else request.drafted_from
        return 0 if prompt is None else max(0, length - prompt)

    @property
    def drafting(self) -> bool:
        """Whether another model's `generate` lets this one draft for it: it gets the prompt without its pictures."""
        return (
            self.generating and self.outer is not None and self.outer.request is not None and self.outer.request.drafts
        )

    def begin(self, size: tuple[int, int], cache: Any, rotary: Rotary, steps: Steps) -> None:
        """The decoder is entered: nothing of an earlier call of it is left."""
        self._forget()
        self.decoding = self.entered = True
        self.size, self.cache, self.rotary, self.steps = size, cache, rotary, steps

    def end(self) -> Prefill | None:
        """The decoder has been left; returns the prefill, which the call keeps no longer."""
        run, self.steps, self.rotary = self.run, None, None
        self.decoding, self.idle, self.cache = False, False, None
        self._forget()
        return run

    def _forget(self) -> None:
        self.run = None
        self.lent.clear()
        for end in self.ending:
            end()
        self.ending.clear()

    def freeze(self, frozen: Frozen) -> None:
        """Remember a prefill for the calls of the same `generate` that repeat it."""
        if self.outer is not None and self.repeating:
            others = [f for f in self.outer.frozen if not torch.equal(f.inputs, frozen.inputs)]
            self.outer.frozen = [frozen, *others][:_FROZEN]

    def continued(self, inputs: Tensor) -> Frozen | None:
        """The recorded prefill that (B, L, d) `inputs` go on with."""
        recorded: Iterable[Frozen] = self.outer.frozen if self.outer is not None and self.repeating else ()
        return next((frozen for frozen in recorded if frozen.continued_by(inputs)), None)


class Calls(threading.local):
    """The running calls of one handle; every thread sees its own.

    Attributes:
        top: the innermost call.
    """

    def __init__(self) -> None:
        self.top = Call(None)

    def clear(self) -> None:
        """Forget this thread's calls, which are over."""
        self.top = Call(None)

    def alive(self) -> Call:
        """The innermost call that still runs; calls that an exception ended are dropped."""
        call = self.top
        while call.frame is not None and not _runs(call.frame):
            assert call.outer is not None  # the bottom has no frame
            self.top = call = call.outer
        return call

    def enter(self, frame: FrameType, *, inherit: bool, known: Sequence[Encoding] | None = None) -> Call:
        """A module call begins.

        Args:
            frame: the module call's.
            inherit: whether it may use what was encoded outside of it.
            known: the encodings whose features it is given, if they are known.
        """
        outer = self.alive()
        call = Call(outer, frame)
        if known is not None:
            call.encoded = Encoded(known)
        elif inherit:
            call.encoded = outer.encoded
            if outer.generate:  # it encodes once; features that were moved to another device are not known again
                outer.encoded.repeat()
        elif outer.outer is None:
            outer.encoded.clear()
        self.top = call
        return call

    @contextmanager
    def generate(self, request: Request) -> Iterator[None]:
        """A call of `generate`, from beginning to end."""
        outer = self.alive()
        if outer.outer is None:
            outer.encoded.clear()
        self.top = Call(outer, generate=True)
        self.top.request = request
        try:
            yield
        finally:
            self.top = outer

    def leave(self, frame: FrameType) -> Call | None:
        """A module call ends; returns it, None if it never began."""
        call = self.top
        while call.frame is not frame:
            if call.frame is None or _runs(call.frame):
                return None
            assert call.outer is not None
            call = call.outer
        assert call.outer is not None
        self.top, call.frame = call.outer, None
        return call


def module_frame() -> FrameType:
    """The frame of the module call whose hook asks; the same for its hooks before and behind, and after an error."""
    frame = sys._getframe(2)
    while frame.f_code.co_name != "_call_impl" and frame.f_back is not None:  # torch runs hooks in functions of its own
        frame = frame.f_back
    return frame


def _generation_above(frame: FrameType) -> tuple[str, bool] | None:
    """The function of transformers' generation from which a module call comes, and whether it made the call itself."""
    at, itself = frame.f_back, True
    while at is not None:
        module = at.f_globals.get("__name__", "")
        if module.startswith("transformers.generation."):
            return at.f_code.co_name, itself
        itself = itself and module.startswith(("torch.", "evengaze.engine."))
        at = at.f_back
    return None


def _runs(frame: FrameType) -> bool:
    """Whether a frame is still executed: it cannot be cleared then. (Walking this thread's stack takes far longer.)"""
    try:
        frame.clear()
    except RuntimeError:
        return True
    return False
