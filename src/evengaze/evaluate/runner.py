"""Answer a benchmark's records with one pruner, so that nothing is lost when the run is killed at any moment.

Batches are cut from the dataset once and for all. A run that goes on after an interruption, and runs with another
number of processes or on Ray, answer the same batches, so that the merged answers are equal record for record.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from evengaze.errors import ConfigError, EvengazeError
from evengaze.evaluate.benchmarks import Benchmark, Record, Score, ScoreOptions
from evengaze.evaluate.files import Answer
from evengaze.evaluate.fingerprint import describe_pruner, describe_records, digest, stamp, versions
from evengaze.evaluate.predictor import Prediction, Predictor
from evengaze.evaluate.shards import ANSWERS, locked, merge, read_shards, shard
from evengaze.methods import Pruner


class Backend(Protocol):
    """Who answers: this process (`LocalBackend`) or a pool of Ray actors."""

    def describe(self, template: str) -> dict[str, Any]:
        """What answers depend on besides method and data."""

    def geometry(self, records: Sequence[Record], template: str) -> tuple[int, int]:
        """Decoder layers, and the visual tokens of the first record that has a readable picture."""

    def answer(
        self, batches: Iterable[Sequence[Record]], pruner: Pruner, template: str, max_new_tokens: int
    ) -> Iterator[list[Prediction]]:
        """Answer batches; they may come back in another order."""


class LocalBackend:
    """Answers in this process."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def describe(self, template: str) -> dict[str, Any]:
        """See `Backend`."""
        return self.predictor.describe(template)

    def geometry(self, records: Sequence[Record], template: str) -> tuple[int, int]:
        """See `Backend`."""
        return self.predictor.geometry(records, template)

    def answer(
        self, batches: Iterable[Sequence[Record]], pruner: Pruner, template: str, max_new_tokens: int
    ) -> Iterator[list[Prediction]]:
        """See `Backend`."""
        for batch in batches:
            yield self.predictor.answer(batch, pruner, template=template, max_new_tokens=max_new_tokens)


@dataclass(frozen=True)
class Job:
    """One cell: a benchmark answered with one pruner.

    Attributes:
        benchmark: the benchmark.
        data: where its files are.
        pruner: the method, debiasing included.
        folder: where answers go.
        limit: answer only this many records.
        shuffle_seed: draw the limited records at random; None takes the first ones.
        batch_size: records a generate call.
        max_new_tokens: None takes the benchmark's official number.
    """

    benchmark: Benchmark
    data: Path
    pruner: Pruner
    folder: Path
    limit: int | None = None
    shuffle_seed: int | None = None
    batch_size: int = 8
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")

    @property
    def tokens(self) -> int:
        """Longest answer in tokens."""
        return self.max_new_tokens or self.benchmark.max_new_tokens


@dataclass
class Outcome:
    """What a run left on disk.

    Attributes:
        job: the cell.
        fingerprint: what the answers depend on.
        answers: answers by key, in the dataset's order.
        errors: records without an answer, by key.
        waiting: records of this job that neither have an answer nor an error (other ranks are still at them).
        score: the score; None if not all ranks have finished or scoring failed.
        problem: why there is no score.
    """

    job: Job
    fingerprint: dict[str, Any]
    answers: dict[str, Answer]
    errors: dict[str, Answer]
    waiting: int
    score: Score | None = None
    problem: str | None = None
    notes: list[str] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """Mean visual tokens, average tokens and relative FLOPs over all answers with a picture."""
        rows = [a["metadata"] for a in self.answers.values() if "average_tokens" in a["metadata"]]
        names = ("visual_tokens", "average_tokens", "relative_flops")
        return {name: sum(row[name] for row in rows) / len(rows) for name in names} if rows else {}


def place() -> tuple[int, int]:
    """Rank and world size as torchrun and accelerate launch set them; 0 and 1 in a process of its own.

    Raises:
        ConfigError: they are no such pair of numbers.
    """
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise ConfigError(
            f"RANK={os.environ.get('RANK')} and WORLD_SIZE={os.environ.get('WORLD_SIZE')} are no rank and world size. "
            "Unset them, or start with torchrun or accelerate launch."
        )
    return rank, world


def batches_of(records: Sequence[Record], job: Job) -> list[list[Record]]:
    """Cut the records of a job into its batches, which depend on nothing but the job."""
    order = list(records)
    if job.shuffle_seed is not None:
        random.Random(job.shuffle_seed).shuffle(order)
    order = order[: job.limit]
    return [order[start : start + job.batch_size] for start in range(0, len(order), job.batch_size)]


def fingerprint_of(job: Job, records: Sequence[Record], backend: Backend) -> dict[str, Any]:
    """Everything that an answer depends on. Limit and shuffling are not part: they only choose records."""
    return {
        "benchmark": {"name": job.benchmark.name, "split": job.benchmark.split, **describe_records(records)},
        "model": backend.describe(job.benchmark.template),
        "pruner": describe_pruner(job.pruner),
        "generation": {"batch_size": job.batch_size, "max_new_tokens": job.tokens, "do_sample": False},
        "versions": versions(),
    }


def run(
    job: Job,
    backend: Backend,
    *,
    records: Sequence[Record] | None = None,
    options: ScoreOptions | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Answer what is not answered yet, merge, and score when all ranks are through.

    Args:
        job: the cell.
        backend: who answers.
        records: the benchmark's records, if they have been read already.
        options: for the scorer.
        advance: told how many more records are done; first of all those of earlier runs.

    Raises:
        DataError: files are missing, the folder is in use or holds answers of another setting, the disk is full.
        ConfigError: the method does not fit the model, or memory ran out.
    """
    benchmark = job.benchmark
    if records is None:
        benchmark.require(job.data, "run")
        records = list(benchmark.records(job.data))
    rank, world = place()
    with locked(job.folder, rank):
        fingerprint = fingerprint_of(job, records, backend)
        stamp(job.folder, fingerprint)
        with shard(job.folder, rank) as answers, shard(job.folder, rank, "errors") as errors:
            done = set(read_shards(job.folder))
            known = set(read_shards(job.folder, "errors"))
            mine = batches_of(records, job)[rank::world]
            todo = [batch for batch in mine if any(record.key not in done for record in batch)]
            advance(sum(len(batch) for batch in mine) - sum(len(batch) for batch in todo))
            identity = digest(fingerprint)
            for predictions in backend.answer(todo, job.pruner, benchmark.template, job.tokens):
                good = [p for p in predictions if p.text is not None and p.record.key not in done]
                answers.append([_answer(job, p, fingerprint["model"]["name"], identity) for p in good])
                bad = [p for p in predictions if p.error is not None and p.record.key not in {*done, *known}]
                errors.append([_error(p) for p in bad])
                advance(len(predictions))
    return _finish(job, records, fingerprint, options, waits=world > 1)


def _finish(
    job: Job, records: Sequence[Record], fingerprint: dict[str, Any], options: ScoreOptions | None, waits: bool
) -> Outcome:
    answers, errors = merge(job.folder, [record.key for record in records])
    wanted = {record.key for batch in batches_of(records, job) for record in batch}
    waiting = len(wanted - {*answers, *errors})
    outcome = Outcome(job, fingerprint, answers, errors, waiting)
    if waiting and waits:
        outcome.problem = f"{waiting} records are still with other processes; the last one to finish scores"
        return outcome
    if not answers:
        outcome.problem = f"no record could be answered; see {job.folder / 'errors.jsonl'}"
        return outcome
    try:
        outcome.score = job.benchmark.score(job.folder / ANSWERS, job.data, options=options)
    except EvengazeError as error:
        outcome.problem = f"answered, but not scored: {error}"
    return outcome


def _answer(job: Job, prediction: Prediction, model: str, identity: str) -> Answer:
    """The answer line. Its id depends on the setting and the record only, so that runs can be compared as files."""
    record = prediction.record
    short = hashlib.sha256(f"{identity}\0{record.key}".encode()).hexdigest()[:22]
    line = job.benchmark.answer_record(record, prediction.text or "", model, short)
    return {**line, "metadata": {**line.get("metadata", {}), "key": record.key, **prediction.trace}}


def _error(prediction: Prediction) -> Answer:
    record = prediction.record
    return {"question_id": record.question_id, "error": prediction.error, "metadata": {"key": record.key}}
