"""Answer a benchmark's records with one pruner, so that nothing is lost when the run is killed at any moment.

Batches are cut from the dataset once and for all. A run that goes on after an interruption, and runs with another
number of processes or on Ray, answer the same batches, so that the merged answers are equal record for record.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from evengaze.debias import CurveWarning
from evengaze.errors import ConfigError, DataError, EvengazeError, LayoutError
from evengaze.evaluate.benchmarks import Benchmark, Record, Score, ScoreOptions
from evengaze.evaluate.fingerprint import describe_pruner, describe_records, digest, stamp, versions
from evengaze.evaluate.jsonl import Answer
from evengaze.evaluate.media import OFFICIAL_PICTURE, media_digest
from evengaze.evaluate.predictor import CALIBRATED_ON, OutOfMemory, Prediction, Predictor
from evengaze.evaluate.setting import DEFAULT, Setting
from evengaze.evaluate.shards import ANSWERS, ERRORS, locked, merge, read_shards, shard
from evengaze.methods import Pruner


@dataclass(frozen=True)
class Work:
    """One batch to answer.

    Attributes:
        job: index of the job that it belongs to.
        pruner: the method.
        template: the benchmark's conversation template.
        max_new_tokens: longest answer.
        batch: the records.
    """

    job: int
    pruner: Pruner
    template: str
    max_new_tokens: int
    batch: tuple[Record, ...]


HOPELESS = 16
"""So many records in a row on which the model raises, and no answer before them, mean that it can answer nothing."""
MANY = 256
"""So many mean that it cannot any more, as after an error of the accelerator."""
_MARK = 8
"""Digits of an answer's id that tell the picture's content."""
_UNSEEN = "0" * _MARK

Answered = list[Prediction] | str
"""The predictions of one batch, or why the model cannot do the job that it belongs to."""


class Backend(Protocol):
    """Who answers: this process (`LocalBackend`) or a pool of Ray actors."""

    def describe(self, template: str) -> dict[str, Any]:
        """What answers depend on besides method and data."""

    def geometry(self, records: Sequence[Record], template: str) -> tuple[int, int]:
        """Decoder layers, and the visual tokens of the first record that has a readable picture."""

    def answer(self, works: Iterable[Work]) -> Iterator[tuple[int, Answered]]:
        """Answer batches; with each answer goes the index of its job. They may come back in another order."""


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

    def answer(self, works: Iterable[Work]) -> Iterator[tuple[int, Answered]]:
        """See `Backend`."""
        for work in works:
            yield work.job, answer_work(self.predictor, work)


def answer_work(predictor: Predictor, work: Work) -> Answered:
    """Answer one batch; that the method does not fit the model is an answer, too.

    Whatever else the model or its processor raises is the fault of a record, or of a batch that memory does not hold:
    the batch is halved until the record is found, or until the parts fit, and the others are answered.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurveWarning)  # each result says it, once
            return predictor.answer(work.batch, work.pruner, template=work.template, max_new_tokens=work.max_new_tokens)
    except Exception as error:
        if isinstance(error, EvengazeError) and not isinstance(error, (LayoutError, OutOfMemory)):
            return str(error)
        if len(work.batch) == 1:
            reason = f"the model raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return [Prediction(work.batch[0], None, {}, reason, raised=True)]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the traceback, and with it what the batch took, is gone by now
    middle = len(work.batch) // 2
    halves = [answer_work(predictor, replace(work, batch=part)) for part in (work.batch[:middle], work.batch[middle:])]
    unfit = next((half for half in halves if isinstance(half, str)), None)
    return unfit if unfit is not None else [one for half in halves for one in half if not isinstance(one, str)]


@dataclass(frozen=True)
class Job:
    """One cell: a benchmark answered with one pruner.

    Attributes:
        benchmark: the benchmark.
        data: where its files are.
        pruner: the method, debiasing included.
        folder: where answers go.
        setting: how it is asked.
    """

    benchmark: Benchmark
    data: Path
    pruner: Pruner
    folder: Path
    setting: Setting = DEFAULT

    @property
    def max_new_tokens(self) -> int:
        """Longest answer in tokens."""
        return self.setting.max_new_tokens or self.benchmark.max_new_tokens

    def batches(self, records: Sequence[Record]) -> list[list[Record]]:
        """Cut the records into batches, which depend on nothing but them and the job."""
        return self.setting.batches(records)


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
        failed: the model cannot do the job.
    """

    job: Job
    fingerprint: dict[str, Any]
    answers: dict[str, Answer]
    errors: dict[str, Answer]
    waiting: int
    score: Score | None = None
    problem: str | None = None
    failed: bool = False

    @property
    def overlap(self) -> int:
        """Answers about pictures that the debias curve was calibrated on."""
        return sum(CALIBRATED_ON in answer["metadata"] for answer in self.answers.values())

    @property
    def converted(self) -> int:
        """Answers about pictures that the official conversion shows otherwise than viewers do."""
        return sum(OFFICIAL_PICTURE in answer["metadata"] for answer in self.answers.values())

    def means(self) -> dict[str, float]:
        """Mean visual tokens, average tokens and relative FLOPs over all answers with a picture."""
        rows = [a["metadata"] for a in self.answers.values() if "average_tokens" in a["metadata"]]
        names = ("visual_tokens", "average_tokens", "relative_flops")
        return {name: sum(row[name] for row in rows) / len(rows) for name in names} if rows else {}


def rank_and_world() -> tuple[int, int]:
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


def fingerprint_of(job: Job, records: Sequence[Record], backend: Backend) -> dict[str, Any]:
    """Everything that an answer depends on. Limit and shuffling are not part: they only choose records."""
    about = describe_records(records, job.benchmark.root(job.data))
    return {
        "benchmark": {"name": job.benchmark.name, "split": job.benchmark.split, **about},
        "model": backend.describe(job.benchmark.template),
        "pruner": describe_pruner(job.pruner),
        "generation": {"batch_size": job.setting.batch_size, "max_new_tokens": job.max_new_tokens, "do_sample": False},
        "versions": versions(),
    }


class _Session:
    """A job at work: its folder locked and checked, its shards open."""

    def __init__(self, job: Job, records: Sequence[Record], backend: Backend, rank: int, world: int) -> None:
        self.job, self.records, self._waits = job, records, world > 1
        self.failed: str | None = None
        self._raised = 0
        self._stack = ExitStack()
        try:
            self._stack.enter_context(locked(job.folder, rank))
            self.fingerprint = fingerprint_of(job, records, backend)
            self._answers = self._stack.enter_context(shard(job.folder, rank))
            self._errors = self._stack.enter_context(shard(job.folder, rank, "errors"))
            answered = read_shards(job.folder)
            stamp(job.folder, self.fingerprint, has_answers=bool(answered))
            self._identity = digest(self.fingerprint)
            _check(job.folder, answered, records, self._identity)
            self._done = set(answered)
            self._known = set(read_shards(job.folder, "errors"))
        except BaseException:
            self._stack.close()
            raise
        mine = job.batches(records)[rank::world]
        self.todo = [batch for batch in mine if any(record.key not in self._done for record in batch)]
        self.earlier = sum(map(len, mine)) - sum(map(len, self.todo))
        self.left = len(self.todo)

    def write(self, answered: Answered) -> int:
        """Put a batch on disk; returns its size."""
        self.left -= 1
        if isinstance(answered, str):
            self.failed = answered
            return 0
        model = self.fingerprint["model"]["name"]
        self._raised = self._raised + len(answered) if all(p.raised for p in answered) else 0
        if self._raised >= (MANY if self._done else HOPELESS):
            self.failed = f"{self._raised} records in a row failed; the last: {answered[-1].error}"
        good = [p for p in answered if p.text is not None and p.record.key not in self._done]
        bad = [p for p in answered if p.error is not None and p.record.key not in self._done | self._known]
        self._answers.append([_answer(self.job, p, model, self._identity) for p in good])
        self._errors.append([_error(p) for p in bad])
        self._done.update(p.record.key for p in good)
        self._known.update(p.record.key for p in bad)
        return len(answered)

    def finish(self, options: ScoreOptions | None) -> Outcome:
        """Merge; score if no other rank is at work any more."""
        self.close()
        answers, errors = merge(self.job.folder, [record.key for record in self.records])
        wanted = {record.key for batch in self.job.batches(self.records) for record in batch}
        outcome = Outcome(self.job, self.fingerprint, answers, errors, len(wanted - {*answers, *errors}))
        if self.failed is not None:
            outcome.failed, outcome.problem = True, self.failed
        elif outcome.waiting and self._waits:
            outcome.problem = f"{outcome.waiting} records are still with other processes; the last one to finish scores"
        elif not answers:
            outcome.problem = f"no record could be answered; see {self.job.folder / ERRORS}"
        else:
            try:
                outcome.score = self.job.benchmark.score(self.job.folder / ANSWERS, self.job.data, options=options)
            except EvengazeError as error:
                outcome.problem = f"answered, but not scored: {error}"
        return outcome

    def close(self) -> None:
        """Close the shards and let go of the folder."""
        self._stack.close()


def run_jobs(
    jobs: Sequence[tuple[Job, Sequence[Record]]],
    backend: Backend,
    *,
    options: ScoreOptions | None = None,
    advance: Callable[[int, int], None] = lambda job, count: None,
) -> Iterator[tuple[int, Outcome]]:
    """Answer what is not answered yet, merge, and score what all ranks are through with.

    Every folder is checked before the first answer. A job that the model cannot do is given up, the others go on.

    Args:
        jobs: cells with their benchmarks' records.
        backend: who answers.
        options: for the scorers.
        advance: told how many more records of which job are done; first of all those of earlier runs.

    Yields:
        Index and outcome of each job, as soon as it is through.

    Raises:
        DataError: a folder is in use or holds answers of another setting, the disk is full.
    """
    rank, world = rank_and_world()
    with ExitStack() as stack:
        sessions = []
        for job, records in jobs:
            sessions.append(_Session(job, records, backend, rank, world))
            stack.callback(sessions[-1].close)
        for index, session in enumerate(sessions):
            advance(index, session.earlier)
            if not session.left:
                yield index, session.finish(options)
        for index, answered in backend.answer(_works(sessions)):
            session = sessions[index]
            if session.failed is not None:
                continue
            advance(index, session.write(answered))
            if not session.left or session.failed is not None:
                yield index, session.finish(options)


def _works(sessions: Sequence[_Session]) -> Iterator[Work]:
    """All batches; those of a job that has failed meanwhile are left out."""
    for index, session in enumerate(sessions):
        job = session.job
        for batch in session.todo:
            if session.failed is None:
                yield Work(index, job.pruner, job.benchmark.template, job.max_new_tokens, tuple(batch))


def run(job: Job, backend: Backend) -> Outcome:
    """Run one job; see `run_jobs`. Warns (`CurveWarning`) if the debias curve was calibrated on the job's pictures.

    Raises:
        DataError: files of the benchmark are missing, or as `run_jobs`.
    """
    job.benchmark.require(job.data, "run")
    outcome = next(iter(run_jobs([(job, list(job.benchmark.records(job.data)))], backend)))[1]
    for note in overlap_notes(outcome):
        warnings.warn(note, CurveWarning, stacklevel=2)
    return outcome


def overlap_notes(outcome: Outcome) -> list[str]:
    """What to say if the debias curve was calibrated on pictures that were asked about."""
    if not outcome.overlap:
        return []
    return [
        f"{outcome.overlap} of {len(outcome.answers)} answers are about pictures that the debias curve was calibrated "
        "on: the score is too kind. Calibrate on other pictures."
    ]


def limit_notes(outcome: Outcome) -> list[str]:
    """What to say if more was answered earlier than is asked for now."""
    limit = outcome.job.setting.limit
    if limit is None or len(outcome.answers) <= limit:
        return []
    return [
        f"{len(outcome.answers)} answers are there from earlier runs, and all of them count, not only the {limit} that "
        "were asked for now. Give another out folder for a score of those."
    ]


def picture_notes(outcome: Outcome) -> list[str]:
    """What to say if the official conversion distorts pictures that were asked about."""
    if not outcome.converted:
        return []
    return [
        f"{outcome.converted} of {len(outcome.answers)} answers are about pictures that LLaVA's scripts convert "
        "otherwise than viewers do (16-bit, float, transparent, or turned by EXIF); with official prompts that "
        "conversion is kept."
    ]


def _check(folder: Path, answered: Mapping[str, Answer], records: Sequence[Record], identity: str) -> None:
    """Refuse answers that were given under another setting, or about other pictures, than those of now.

    Raises:
        DataError: there are such answers; whatever fingerprint.json says.
    """
    strange, other = [], []
    for record in records:
        line = answered.get(record.key)
        if line is None:
            continue
        found, wanted = str(line.get("answer_id")), _answer_id(identity, record)
        if found[:-_MARK] != wanted[:-_MARK]:
            strange.append(record)
        elif found[-_MARK:] != wanted[-_MARK:] and _UNSEEN not in (found[-_MARK:], wanted[-_MARK:]):
            other.append(record)
    if strange:
        raise DataError(
            f"{folder} holds {len(strange)} answers that do not belong to its fingerprint.json (the first to record "
            f"{strange[0].key!r}): they are those of another setting, or the file was replaced. Give another out "
            "folder."
        )
    if other:
        raise DataError(
            f"{folder} holds {len(other)} answers about pictures or videos whose content is another one now (the first "
            f"to record {other[0].key!r}). Restore the files, or give another out folder to answer anew."
        )


def _answer_id(identity: str, record: Record) -> str:
    """22 hex digits as LLaVA's ids: the setting and the record, then what the picture's file holds.

    They depend on nothing else, so that runs can be compared as files, and a resumed run can tell its own answers.
    """
    own = hashlib.sha256(f"{identity}\0{record.key}".encode("utf-8", "replace")).hexdigest()[: 22 - _MARK]
    return own + (media_digest(record) or _UNSEEN)[:_MARK]


def _answer(job: Job, prediction: Prediction, model: str, identity: str) -> Answer:
    record = prediction.record
    line = job.benchmark.answer_record(record, prediction.text or "", model, _answer_id(identity, record))
    return {**line, "metadata": {**line.get("metadata", {}), "key": record.key, **prediction.trace}}


def _error(prediction: Prediction) -> Answer:
    record = prediction.record
    return {"question_id": record.question_id, "error": prediction.error, "metadata": {"key": record.key}}
