"""The same answers from a pool of Ray actors, on one machine or many (extra `evengaze[ray]`).

Ray only answers; this process alone writes. So the files are those of a run in one process, record for record, and a
worker or node that dies costs time but no answer: Ray starts its actors anew elsewhere and gives them its batches.
Every node must see the model and the data under the same paths.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from evengaze.cluster import connect, last_line
from evengaze.errors import ConfigError, DataError, EvengazeError
from evengaze.evaluate.benchmarks.types import Record
from evengaze.evaluate.predictor import Predictor
from evengaze.evaluate.runner import Answered, Work, answer_work
from evengaze.evaluate.spec import ModelSpec

MAX_BLOCKS = 4096
"""More batches than this are handed out several at a time, which keeps Ray's bookkeeping small."""


class Answerer:
    """What each actor runs."""

    def __init__(self, spec: ModelSpec, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.predictor = Predictor.load(spec)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer one batch; pickled, as Ray's tables hold no objects of ours."""
        work: Work = pickle.loads(row["work"])
        answered = pickle.dumps(answer_work(self.predictor, work))
        return {"job": work.job, "answered": answered, "process": os.getpid()}


class RayBackend:
    """Answers on Ray; see `evengaze.evaluate.runner.Backend`.

    Attributes:
        spec: the model.
        actors: copies of it.
        gpus: GPUs a copy; may be a fraction.
        cpus: CPUs a copy.
        processes: ids, each on its own node, of the processes that have answered.
    """

    def __init__(
        self, spec: ModelSpec, address: str = "local", *, actors: int = 1, gpus: float | None = None, cpus: float = 1
    ) -> None:
        """Connect to a cluster.

        Args:
            spec: the model.
            address: "local" starts Ray on this machine, "auto" finds a running cluster, else the cluster's address.
            actors: copies of the model.
            gpus: GPUs a copy; None takes one if the cluster has any.
            cpus: CPUs a copy.

        Raises:
            ConfigError: Ray is not installed, there is no cluster at the address, it is too small, or no machine can
                have so many actors, GPUs or CPUs.
        """
        for what, value, least in (("actors", actors, 1), ("gpus", gpus or 0.0, 0.0), ("cpus", cpus, 1e-3)):
            if not least <= value < math.inf:
                raise ConfigError(f"ray_{what} {value:g}: give {'1 or more' if what == 'actors' else 'more than 0'}")
        self.spec, self.actors, self.cpus = spec, actors, cpus
        self.gpus = connect(address, gpus=gpus, cpus=cpus)
        self.processes: set[int] = set()
        self._described: dict[str, dict[str, Any]] = {}

    @property
    def _threads(self) -> int:
        return max(1, int(self.cpus))

    def describe(self, template: str) -> dict[str, Any]:
        """See `Backend`; a worker says it, as this machine may not even have the model."""
        if template not in self._described:
            self._described[template] = self._ask((), template)[0]
        return self._described[template]

    def geometry(self, records: Sequence[Record], template: str) -> tuple[int, int]:
        """See `Backend`."""
        first = tuple(record for record in records if record.image is not None or record.video is not None)[:32]
        self._described[template], found = self._ask(first, template)
        if found is None:
            raise DataError("none of the first pictures can be read by Ray's workers: do they see the data folder?")
        return found

    def _ask(self, records: Sequence[Record], template: str) -> tuple[dict[str, Any], tuple[int, int] | None]:
        import ray

        task = ray.remote(num_gpus=self.gpus, num_cpus=self.cpus, max_retries=3)(_probe)
        try:
            answer = ray.get(task.remote(self.spec, self._threads, records, template))
        except ray.exceptions.RayError as error:
            raise DataError(f"Ray's workers cannot load the model ({last_line(error)})") from error
        if isinstance(answer, str):
            raise DataError(answer)
        return answer  # type: ignore[no-any-return]

    def answer(self, works: Iterable[Work]) -> Iterator[tuple[int, Answered]]:
        """See `Backend`."""
        rows = [{"work": pickle.dumps(work)} for work in works]
        if not rows:
            return
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours shows answers, not blocks
        table = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
            Answerer,
            fn_constructor_args=(self.spec, self._threads),
            compute=ray.data.ActorPoolStrategy(size=min(self.actors, len(rows))),
            num_gpus=self.gpus or None,
            num_cpus=None if self.gpus else self.cpus,
        )
        try:
            for row in table.iter_rows():
                self.processes.add(int(row["process"]))
                yield int(row["job"]), pickle.loads(row["answered"])
        except ray.exceptions.RayError as error:
            raise DataError(
                f"Ray gave up ({last_line(error)}). All answers up to here are on disk; give the same command again "
                "to go on."
            ) from error


def _probe(spec: ModelSpec, threads: int, records: Sequence[Record], template: str) -> Any:
    """Describe the model, and measure the first readable picture; an error comes back as text."""
    try:
        predictor = Answerer(spec, threads).predictor
    except EvengazeError as error:
        return str(error)
    try:
        return predictor.describe(template), predictor.geometry(records, template)
    except DataError:
        return predictor.describe(template), None
