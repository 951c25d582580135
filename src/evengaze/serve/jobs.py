"""A request on its way: what the model is to do, and what it has said so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING, Any

from evengaze.methods import Pruner
from evengaze.serve.errors import ApiError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Delta:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer is complete.

    Attributes:
        text: all of it.
        finish: "stop" or "length".
        prompt_tokens: of the prompt, visual tokens before pruning included.
        completion_tokens: of the answer.
        info: our figures: tokens, KV bytes, seconds.
    """

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    info: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """There is no answer; `error` says why."""

    error: ApiError


Event = Delta | Done | Failed


@dataclass(eq=False)
class Job:
    """One request, ready for the model.

    Attributes:
        prompt: with the model's image markers.
        images: RGB, in the prompt's order.
        pruner: its method.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        top_p: share of probability that is sampled from.
        seed: for sampling; None samples anew each time.
        stops: strings at which the answer ends.
        stream: whether `Delta` events are wanted.
        tell: called with each event, in the worker's thread.
        seconds: time limit.
        arrived: when, by `time.monotonic`.
        gone: set when nobody waits for the answer any more.
    """

    prompt: str
    images: list[Image]
    pruner: Pruner
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stream: bool = False
    tell: Callable[[Event], None] = lambda event: None
    seconds: float = 120.0
    arrived: float = field(default_factory=monotonic)
    gone: bool = False

    @property
    def over(self) -> bool:
        """Whether going on is of no use."""
        return self.gone or monotonic() > self.arrived + self.seconds

    @cached_property
    def key(self) -> object:
        """Jobs of equal keys can share a batch. What was given a seed shares with none: others would change it."""
        if self.temperature > 0 and self.seed is not None:
            return object()
        sampling = (self.temperature, self.top_p if self.temperature > 0 else 1.0)
        return json.dumps(self.pruner.to_dict(), sort_keys=True), bool(self.images), sampling

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of the model's `generate`."""
        if self.temperature == 0:
            return {}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
