"""The thread that owns the model: it takes requests that can share a batch, and answers them together."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from evengaze.errors import EvengazeError, out_of_memory
from evengaze.evaluate.predictor import Predictor
from evengaze.methods import spec
from evengaze.serve.attached import MULTIPLE, Attached
from evengaze.serve.errors import ApiError, broken, closing, late
from evengaze.serve.jobs import Failed, Job
from evengaze.serve.metrics import Metrics
from evengaze.serve.rows import Row, Watch
from evengaze.serve.settings import Limits

if TYPE_CHECKING:
    from evengaze.engine.session import Handle
    from evengaze.trace import Trace

_log = logging.getLogger(__name__)
_LONG = 1 << 30
"""Tokens of a model whose config sets no limit."""


class _ApartError(Exception):
    """A processor takes some jobs' prompts one by one, but not together.

    Attributes:
        jobs: those jobs.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__(f"{len(jobs)} prompts cannot be encoded together")
        self.jobs = jobs


class Worker:
    """Answers jobs in the order in which they came, each with those behind it that can share its batch.

    Attributes:
        predictor: the model.
        metrics: where it counts.
    """

    def __init__(self, predictor: Predictor, limits: Limits, metrics: Metrics, graphs: bool = False) -> None:
        self.predictor, self.metrics = predictor, metrics
        self._attached, self._multiple = Attached(graphs), MULTIPLE if graphs else None
        self._limits = limits
        self._waiting: deque[Job] = deque()
        self._ready = threading.Condition()
        self._stopped = False
        ends = predictor.model.generation_config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        metrics.watch_queue(lambda: len(self._waiting))
        self._thread = threading.Thread(target=self._work, name="evengaze-model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are being answered."""
        return self._thread.is_alive() and not self._stopped

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer."""
        config = self.predictor.model.config.get_text_config()
        return self._limits.context or int(getattr(config, "max_position_embeddings", None) or _LONG)

    def submit(self, job: Job) -> None:
        """Queue a job."""
        with self._ready:
            if self._stopped:
                job.tell(Failed(closing()))
                return
            self._waiting.append(job)
            self._ready.notify()

    def drop(self, job: Job) -> None:
        """Nobody waits for a job any more: it leaves the queue, or its row of the running batch ends."""
        job.gone = True
        with self._ready:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Stop after the batch that is running; what waits is told so."""
        with self._ready:
            self._stopped = True
            waiting, self._waiting = list(self._waiting), deque()
            self._ready.notify()
        for job in waiting:
            job.tell(Failed(closing()))
        self._thread.join(timeout=self._limits.seconds)

    # -- which jobs ---------------------------------------------------------------------------------------------------
    def _work(self) -> None:
        while jobs := self._next():
            for job in jobs:
                self.metrics.queued.observe(monotonic() - job.arrived)
            self.metrics.batch.observe(len(jobs))
            self.metrics.running.set(len(jobs))
            try:
                self._answer(jobs)
            finally:
                self.metrics.running.set(0)
                jobs.clear()  # a waiting thread keeps no picture alive
        self._attached.close()

    def _next(self) -> list[Job]:
        """The next batch; empty when there will be none."""
        with self._ready:
            while not self._stopped:
                self._expire()
                if not self._waiting:
                    self._ready.wait()
                    continue
                first = self._waiting[0]
                jobs = [job for job in self._waiting if job.key == first.key][: self._limits.batch]
                left = first.arrived + self._limits.wait - monotonic()
                if len(jobs) < self._limits.batch and left > 0:
                    self._ready.wait(left)
                    continue
                for job in jobs:
                    self._waiting.remove(job)
                return jobs
            return []

    def _expire(self) -> None:
        for job in [job for job in self._waiting if job.over]:
            self._waiting.remove(job)
            job.tell(Failed(late(job.seconds)))

    # -- answering ----------------------------------------------------------------------------------------------------
    def _answer(self, jobs: Sequence[Job]) -> None:
        """Answer jobs of equal keys. A job that fails by itself does not take the others with it."""
        try:
            jobs, inputs = self._encoded(jobs)
            if jobs:
                self._generate(jobs, inputs)
        except _ApartError as error:
            self._in_halves(error.jobs)
        except EvengazeError as error:
            self._halved(jobs, ApiError(400, str(error), code="invalid_request"))
        except Exception as error:
            if out_of_memory(error):
                self._halved(jobs, ApiError(503, "the model's memory ran out; ask for less", code="out_of_memory"))
                return
            _log.exception("a batch of %d failed", len(jobs))
            self._halved(jobs, broken())

    def _halved(self, jobs: Sequence[Job], error: ApiError) -> None:
        """Try again in smaller batches; what fails alone fails. Streams that have begun cannot begin again."""
        if len(jobs) == 1 or any(job.stream for job in jobs):
            self._fail(jobs, error)
        else:
            self._in_halves(jobs)

    def _in_halves(self, jobs: Sequence[Job]) -> None:
        half = len(jobs) // 2
        self._answer(jobs[:half])
        self._answer(jobs[half:])

    def _fail(self, jobs: Sequence[Job], error: ApiError) -> None:
        for job in jobs:
            job.tell(Failed(error))

    def _encoded(self, jobs: Sequence[Job]) -> tuple[Sequence[Job], Any]:
        """Jobs whose prompts fit the model, and what `generate` takes for them; the others are told why not.

        Raises:
            _ApartError: they fit one by one, but not together.
        """
        try:
            inputs = self._inputs(jobs)
        except (ValueError, IndexError, TypeError, RuntimeError) as error:  # whatever a processor stumbles over
            if len(jobs) > 1:
                fit = self._each(jobs)
                if len(fit) == len(jobs):
                    raise _ApartError(fit) from error
                return self._encoded(fit)
            _log.info("a prompt cannot be encoded", exc_info=True)
            self._fail(jobs, ApiError(400, f"the model's processor refuses the prompt: {error}", param="messages"))
            return [], None
        lengths = inputs["attention_mask"].sum(1).tolist()
        kept = []
        for job, length in zip(jobs, lengths, strict=True):
            if length + job.max_new_tokens <= self.context:
                kept.append(job)
                continue
            text = (
                f"the prompt has {int(length)} tokens, and {job.max_new_tokens} are asked for; together at most "
                f"{self.context} fit"
            )
            job.tell(Failed(ApiError(400, text, param="messages", code="context_length_exceeded")))
        if len(kept) == len(jobs):
            return jobs, inputs
        return (kept, self._inputs(kept)) if kept else ([], None)

    def _each(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of the jobs that can be encoded; the others are told why not."""
        return [job for one in jobs for job in self._encoded([one])[0]]

    def _inputs(self, jobs: Sequence[Job]) -> Any:
        pictures = {"images": [job.images for job in jobs]} if jobs[0].images else {}
        return self.predictor.inputs([job.prompt for job in jobs], pictures, multiple=self._multiple)

    def _generate(self, jobs: Sequence[Job], inputs: Any) -> None:
        tokenizer = self.predictor.processor.tokenizer

        def decode(tokens: Sequence[int]) -> str:
            return str(tokenizer.decode(tokens, skip_special_tokens=True))

        rows = [Row(job, decode, self._ends) for job in jobs]
        lengths = [int(n) for n in inputs["attention_mask"].sum(1).tolist()]
        batch = _Batch(self.predictor, self.metrics, rows, lengths)
        with _seeded(jobs[0].seed if jobs[0].sampling else None):
            self.predictor.complete(
                inputs,
                self._attached.of(batch.pruner),
                attached=batch.attached,
                max_new_tokens=max(job.max_new_tokens for job in jobs),
                stopping_criteria=StoppingCriteriaList([Watch(rows, batch.begun, batch.ended)]),
                **jobs[0].sampling,
            )


class _Batch:
    """Tells each job of a batch when its answer is complete, and counts."""

    def __init__(self, predictor: Predictor, metrics: Metrics, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        self._predictor, self._metrics, self._rows, self._lengths = predictor, metrics, rows, lengths
        self.pruner = rows[0].job.pruner
        self._handle: Handle | None = None
        self._trace: Trace | None = None
        self._common: dict[str, Any] = {}

    def attached(self, handle: Handle) -> None:
        """The prefill is about to begin."""
        self._handle = handle

    def begun(self, seconds: float) -> None:
        """The prefill is done."""
        trace = self._trace = None if self._handle is None else self._handle.trace
        count = len(self._rows)
        self._metrics.observe_prefill(self.pruner.name, trace, count, seconds)
        self._common = {
            "method": spec(self.pruner),
            "debiased": self.pruner.debiasing is not None,
            "batch": count,
            "prefill_seconds": round(seconds, 6),
        }
        if trace is not None:
            for name in ("kv_bytes", "kv_bytes_unpruned"):
                self._common[name] = sum(getattr(trace, name)) // count

    def ended(self, index: int) -> None:
        """A row is complete."""
        row, length = self._rows[index], self._lengths[index]
        if row.finish is None:  # its time was over, or its client is gone
            row.job.tell(Failed(late(row.job.seconds)))
            return
        self._metrics.prompt.inc(length)
        self._metrics.completion.inc(row.count)
        self._metrics.answer.labels(self.pruner.name).observe(monotonic() - row.job.arrived)
        row.complete(length, {**self._common, **self._predictor.figures(self._trace, index, length)})


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Sampling that another call with the same seed repeats, and that leaves the generators as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
