"""The plain data of a benchmark: its records, its files, and the score of one predictions file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evengaze.errors import DataError
from evengaze.evaluate.jsonl import Answer

if TYPE_CHECKING:
    from evengaze.evaluate.judge import Judge

Mode = Literal["default", "official"]
EVAL_ZIP = "LLaVA's eval.zip: https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy/view"


class OfficialError(DataError):
    """The official scorer or converter stops at this input.

    Attributes:
        official: What it stops with, e.g. `"KeyError: 77"`.
    """

    def __init__(self, official: str, message: str) -> None:
        super().__init__(f"the official code stops with {official}: {message}")
        self.official = official


@dataclass(frozen=True)
class Record:
    """One question for the model.

    Attributes:
        key: Unique within the benchmark; answers are joined and runs resumed by it.
        question_id: The id as the question file has it (its type is kept in the answer file).
        prompt: The whole user text, without image marker.
        image: Image file, encoded image bytes, or None for a text-only question.
        video: Video file (which may not exist), or None.
        metadata: What the answer record must carry besides (MMBench's options), and the like.
    """

    key: str
    question_id: int | str
    prompt: str
    image: Path | bytes | None = None
    video: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataFile:
    """A file or directory that a benchmark reads.

    Attributes:
        path: Relative to the benchmark's folder.
        source: Where to get it.
        kind: "file" or "dir".
        needed: "run" (to answer), "score" or "both"; "optional" files add detail when present.
        instead: A directory that does in its place for scoring, or "".
    """

    path: str
    source: str
    kind: Literal["file", "dir"] = "file"
    needed: Literal["run", "score", "both", "optional"] = "both"
    instead: str = ""

    @property
    def where(self) -> str:
        """Where to get it, and what does in its place."""
        return self.source + (f"; for scoring the folder {self.instead} does as well" if self.instead else "")

    def present(self, root: Path, use: str | None = None) -> bool:
        """Whether it, or for scoring what stands in for it, is below a folder."""
        if use == "score" and self.instead and (root / self.instead).is_dir():
            return True
        return (root / self.path).is_dir() if self.kind == "dir" else (root / self.path).is_file()


@dataclass
class Problems:
    """Predictions that could not be scored, or not only once; each named.

    Attributes:
        missing: Keys of records without a prediction.
        duplicate: Keys with more than one prediction (the last one counts).
        unknown: Keys of predictions that belong to no record.
        malformed: Lines that are no prediction: line number, reason, excerpt.
        errors: Items that could not be judged: key and reason.
    """

    missing: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    malformed: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Return how many of each."""
        return {name: len(items) for name, items in asdict(self).items()}


@dataclass
class Score:
    """The result of scoring one predictions file; `to_dict` is plain JSON.

    Attributes:
        benchmark: Name of the benchmark.
        split: Its split.
        mode: "default" or "official".
        metric: Name of the headline number.
        value: The headline number in the unit of the published tables (percent; MME: points), or None when only a
            server, or a judge that was not given, can say.
        metrics: Every other number and breakdown.
        n_records: Questions in the dataset.
        n_scored: Questions that count in `value`.
        problems: Missing, duplicate, unknown and malformed predictions, failed judgements.
        per_record: Credit per scored record (0 to 1), for paired comparisons.
        offline: Alternatives to a judge, by name; never to be mixed with judged numbers.
        judge: What judged: model, base URL, prompt.
        notes: What a reader must know, and how the official number differs.
        warnings: Why the number should not be trusted.
        unexpected: Keys of answers in none of the forms that the benchmark asks for; the scorer has read something into
            them all the same.
        breakdown: The headline number, or what it is made of, by category.
        official: In default mode: what the official code makes of the same file (`value` or `error`, `differs`).
    """

    benchmark: str
    split: str
    mode: Mode
    metric: str
    value: float | None
    metrics: dict[str, Any]
    n_records: int
    n_scored: int
    problems: Problems = field(default_factory=Problems)
    per_record: dict[str, float] = field(default_factory=dict)
    offline: dict[str, float] = field(default_factory=dict)
    judge: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    breakdown: dict[str, float] = field(default_factory=dict)
    official: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        """Whether every record was scored and nothing in the file was left out."""
        return self.n_scored == self.n_records and not any(
            (self.problems.missing, self.problems.unknown, self.problems.malformed, self.problems.errors)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "complete": self.complete, "counts": self.problems.counts()}


@dataclass(frozen=True)
class ScoreOptions:
    """What only some benchmarks ask for.

    Attributes:
        rule: MMBench: how a letter is read from an answer ("letter", "vlmevalkit" or "lmms-eval").
        consistency: GQA: also compute consistency over entailed questions.
        judge: MM-Vet and video: asks a model; None scores offline only.
        judged: MM-Vet and video: file (or folder) of judgements made before, in the official format.
        cache: MM-Vet and video: JSON-lines file that keeps the judge's replies.
        runs: MM-Vet: how often each answer is judged.
        workers: MM-Vet and video: calls to the judge at a time.
        say: MM-Vet and video: told, in a line now and then, how far judging is.
    """

    rule: str | None = None
    consistency: bool = False
    judge: Judge | None = None
    judged: Path | None = None
    cache: Path | None = None
    runs: int = 1
    workers: int = 8
    say: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Joined:
    """Predictions joined to records by key.

    Attributes:
        by_key: The prediction that counts, for each record that has one.
        problems: What does not fit.
    """

    by_key: dict[str, Answer]
    problems: Problems
