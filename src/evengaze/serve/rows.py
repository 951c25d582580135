"""Answers while they grow: one row of a batch each, ended by its own limit, stop strings, or its client's leaving."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from evengaze.serve.jobs import Delta, Done, Job

_INCOMPLETE = "\ufffd"
"""What a decoder shows for the first bytes of a character whose others are still to come."""


class Row:
    """The answer to one job.

    Attributes:
        job: the job.
        finish: "stop" or "length" once it is complete; None before.
        count: tokens of the answer.
    """

    def __init__(self, job: Job, decode: Callable[[Sequence[int]], str], ends: Collection[int]) -> None:
        self.job = job
        self.finish: str | None = None
        self._decode, self._ends = decode, ends
        self._tokens: list[int] = []
        self._sent = ""
        self._hold = max((len(stop) - 1 for stop in job.stops), default=0)

    @property
    def count(self) -> int:
        """Tokens of the answer."""
        return len(self._tokens)

    def feed(self, token: int) -> bool:
        """Take the next token in; True if none is wanted after it, or nobody waits any more."""
        if self.job.over:
            return True
        if token in self._ends:
            self.finish = "stop"
            return True
        self._tokens.append(token)
        if self.job.stream or self.job.stops:
            text = self._decode(self._tokens)
            if self._cut(text) is not None:
                self.finish = "stop"
                return True
            if self.job.stream:
                self._send(text.lstrip())
        if self.count >= self.job.max_new_tokens:
            self.finish = "length"
        return self.finish is not None

    def text(self) -> str:
        """The answer so far, stripped."""
        text = self._decode(self._tokens)
        cut = self._cut(text)
        return (text if cut is None else text[:cut]).strip()

    def complete(self, prompt_tokens: int, info: Mapping[str, Any]) -> None:
        """Tell the job that its answer is there."""
        text = self.text()
        if self.job.stream and len(text) > len(self._sent):
            self.job.tell(Delta(text[len(self._sent) :]))
        self.job.tell(Done(text, self.finish or "stop", prompt_tokens, self.count, info))

    def _cut(self, text: str) -> int | None:
        """Where the first of the stop strings is."""
        found = [at for stop in self.job.stops if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def _send(self, text: str) -> None:
        """Send what cannot change any more: no space at the end, no half a character, no beginning of a stop string."""
        safe = text[: len(text) - self._hold].rstrip(_INCOMPLETE).rstrip() if len(text) > self._hold else ""
        if len(safe) > len(self._sent):
            self.job.tell(Delta(safe[len(self._sent) :]))
            self._sent = safe


class Watch(StoppingCriteria):  # type: ignore[misc]
    """Looks at each step of `generate`: hands every row its token, and says which rows are complete.

    Attributes:
        rows: one for each row of the batch.
        begun: called once with the seconds until the first token.
        ended: called with the index of each row that is complete, as soon as it is.
    """

    def __init__(self, rows: Sequence[Row], begun: Callable[[float], None], ended: Callable[[int], None]) -> None:
        self.rows, self._begun, self._ended = rows, begun, ended
        self._open = set(range(len(rows)))
        self._start: float | None = perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) bool: rows that need no more tokens."""
        tokens = input_ids[:, -1].tolist()
        if self._start is not None:
            self._begun(perf_counter() - self._start)
            self._start = None
        for index in sorted(self._open):
            if self.rows[index].feed(tokens[index]):
                self._open.remove(index)
                self._ended(index)
        return torch.tensor([index not in self._open for index in range(len(tokens))], device=input_ids.device)
