"""What a benchmark is: records to answer, predictions to score, and what the official scorer would have said.

The layouts are those people already have: LLaVA's `playground/data/eval` and Video-LLaVA's
`eval/GPT_Zero_Shot_QA`. Answers are JSON lines in LLaVA's record format (`model_vqa_loader.py`).
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from evengaze.errors import ConfigError, DataError, EvengazeError
from evengaze.evaluate.benchmarks.types import (
    DataFile,
    Joined,
    Mode,
    OfficialError,
    Problems,
    Record,
    Score,
    ScoreOptions,
)
from evengaze.evaluate.jsonl import Answer, Lines, read_answers
from evengaze.evaluate.judge import JudgeError
from evengaze.evaluate.metrics.forms import is_short

UNEXPECTED_SHARE = 0.05
"""With a larger share of answers in no expected form, a score is warned about."""


class Benchmark(ABC):
    """One benchmark. Subclasses name their files and say how records are read and predictions scored.

    Attributes:
        name: Name on the command line.
        title: Name in tables.
        split: Which split.
        metric: The headline number.
        folders: Folder below the layout's root, alternatives in order of preference.
        layout: "llava" or "video-llava".
        files: What is read.
        size: Records of the published split, where known.
        server: Where submissions are scored, or None when scoring is offline.
        max_new_tokens: As in the official inference script; decoding is greedy.
        template: Conversation template of the official inference script (see `evengaze.evaluate.conversation`).
        quirks: How the official scorer differs from the default mode.
        form: What answers are asked to be, in words; see `in_form`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    split: ClassVar[str]
    metric: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    files: ClassVar[tuple[DataFile, ...]]
    layout: ClassVar[Literal["llava", "video-llava"]] = "llava"
    server: ClassVar[str | None] = None
    max_new_tokens: ClassVar[int] = 128
    template: ClassVar[str] = "vicuna_v1"
    quirks: ClassVar[tuple[str, ...]] = ()
    form: ClassVar[str] = "a word or short phrase"
    size: ClassVar[int | None] = None

    # -- where the data is ---------------------------------------------------------------------------------------

    def root(self, data: Path) -> Path:
        """Find the benchmark's folder below `data`.

        `data` may be the folder that holds `playground/data/eval` (or `eval/GPT_Zero_Shot_QA`), any folder on
        the way down, or the benchmark's folder itself.

        Raises:
            DataError: There is no such folder.
        """
        if not data.is_dir():
            raise DataError(f"{data} is not a directory. Give as data the folder that holds {self.location}.")
        above = ("eval/GPT_Zero_Shot_QA", "GPT_Zero_Shot_QA", "") if self.layout == "video-llava" else LLAVA_ROOTS
        candidates = [data / part / folder for part in above for folder in self.folders]
        marks = [item.path for item in self.files if item.kind == "file" and item.needed != "optional"]
        stand_ins = [item.instead for item in self.files if item.instead]
        for candidate in [*candidates, data]:
            if any((candidate / mark).is_file() for mark in marks) or any((candidate / s).is_dir() for s in stand_ins):
                return candidate
        for candidate in candidates:
            if candidate.is_dir():
                return candidate
        raise DataError(
            f"{data} holds no data of {self.name}: none of {', '.join(str(c) for c in candidates[:2])}, ... exists. "
            f"Give as data the folder that holds {self.location} (`evengaze list benchmarks` says where to get it)."
        )

    @property
    def location(self) -> str:
        """Where the layout puts the benchmark's folder."""
        part = "eval/GPT_Zero_Shot_QA" if self.layout == "video-llava" else "playground/data/eval"
        return f"{part}/{self.folders[0]}"

    def path(self, data: Path, name: str) -> Path:
        """Return the path of one of `files`."""
        return self.root(data) / name

    def source(self, name: str) -> str:
        """Return where to get one of `files`, as a sentence."""
        return next((f"Get it from {item.source}" for item in self.files if item.path == name), "")

    def check(self, data: Path) -> list[str]:
        """Find out before the first answer whether answers can be scored.

        Returns:
            What to tell if they can be scored in part only.

        Raises:
            DataError: Files to answer or to score are missing or malformed.
        """
        self.require(data, "run")
        if self.server is None:
            self.require(data, "score")
        return []

    def missing_files(self, data: Path | None, use: Literal["run", "score"] | None = None) -> list[DataFile]:
        """List the files that are absent below `data` (all of them when `data` is None or has no such folder)."""
        wanted = [f for f in self.files if (f.needed != "optional" and use in (None, f.needed)) or f.needed == "both"]
        if data is None or not wanted:
            return wanted
        try:
            root = self.root(data)
        except DataError:
            return wanted
        return [f for f in wanted if not f.present(root, use)]

    def require(self, data: Path, use: Literal["run", "score"]) -> None:
        """Check that the files for a use are there.

        Raises:
            DataError: Names every missing file and where to get it.
        """
        root = self.root(data)
        absent = self.missing_files(data, use)
        if absent:
            listed = "; ".join(f"{root / item.path} (get it from {item.where})" for item in absent)
            raise DataError(f"{self.name} cannot {use}: missing {listed}")

    def missing_media(self, data: Path) -> list[str]:
        """Name the images or videos that records point to but that are not there (half a dataset)."""
        paths = [r.image if isinstance(r.image, Path) else r.video for r in self.records(data)]
        return sorted({str(path) for path in paths if path is not None and not path.is_file()})

    # -- answering -----------------------------------------------------------------------------------------------

    @abstractmethod
    def records(self, data: Path) -> Iterator[Record]:
        """Yield the questions in the order of the question file.

        Raises:
            DataError: A file is missing or malformed.
        """

    def answer_record(self, record: Record, text: str, model_id: str, answer_id: str | None = None) -> Answer:
        """Build the answer line for a record, in LLaVA's format and key order."""
        return {
            "question_id": record.question_id,
            "prompt": record.prompt,
            "text": text,
            "answer_id": answer_id or uuid.uuid4().hex[:22],
            "model_id": model_id,
            "metadata": {},
        }

    def answer_key(self, answer: Answer) -> str:
        """Return the key of the record that an answer line belongs to, before repeats are numbered."""
        return str(answer["question_id"])

    # -- scoring -------------------------------------------------------------------------------------------------

    @abstractmethod
    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score correctly: joined by key, problems named, nothing missing counted as wrong."""

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score as the official code does, quirks included; as by default where there is none to reproduce.

        Raises:
            OfficialError: Where the official code stops.
        """
        score = self.score_default(answers, data, options)
        score.mode = "official"
        return score

    def result(
        self,
        mode: Mode,
        value: float | None,
        metrics: dict[str, Any],
        *,
        n_records: int,
        per_record: dict[str, float],
        **more: Any,
    ) -> Score:
        """Return a score of this benchmark; what has credit counts as scored unless `more` says otherwise."""
        more = {"n_scored": len(per_record), **more}
        return Score(self.name, self.split, mode, self.metric, value, metrics, n_records, per_record=per_record, **more)

    def score(self, answers: Path, data: Path, mode: Mode = "default", options: ScoreOptions | None = None) -> Score:
        """Score a predictions file.

        Args:
            answers: JSON lines in LLaVA's record format (some benchmarks read their submission format as well).
            data: See `root`.
            mode: "default" is correct and says how the official number differs; "official" reproduces it.
            options: What only some benchmarks ask for.

        Raises:
            DataError: A file is missing or malformed, or the predictions belong to something else.
            OfficialError: In official mode, where the official code stops.
        """
        if mode not in ("default", "official"):
            raise ConfigError(f"mode must be default or official, not {mode!r}.")
        try:
            score = self._score_file(answers, data, mode, options or ScoreOptions())
            score.breakdown = self.breakdown(score.metrics)
            return score
        except EvengazeError:
            raise
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"the data of {self.name} below {data} has an entry that is not as expected ({error!r}): "
                f"{', '.join(item.path for item in self.files if item.needed in ('score', 'both'))}. Fetch it again."
            ) from error

    def _score_file(self, answers: Path, data: Path, mode: Mode, options: ScoreOptions) -> Score:
        lines = self.read_answers(answers)
        self._refuse_questions(lines, data)
        if mode == "official":
            score = self.score_official(lines, data, options)
            self._check_forms(score, lines, data, options)
            return score
        score = self.score_default(lines, data, options)
        self._check_forms(score, lines, data, options)
        if self.size is not None and score.n_records != self.size:
            score.notes.append(f"{self.name} has {score.n_records} records here, {self.size} as published.")
        self._compare(score, lambda: self.score_official(lines, data, options))
        return score

    def _refuse_questions(self, answers: Lines, data: Path) -> None:
        """Refuse a question file that was given as predictions; it has the same fields.

        Raises:
            DataError: More than half of the lines name a picture and repeat a question, or have no mark of an answer.
        """
        marks = ("prompt", "answer_id", "model_id", "pred", "prediction")
        bare = [a for a in answers.records if "image" in a and not any(mark in a for mark in marks)]
        if not bare or len(bare) * 2 <= len(answers.records):
            return
        try:
            asked = {str(record.question_id): record.prompt.strip() for record in self.records(data)}
        except DataError:  # scoring does not need the questions
            asked = {}
        known = [a for a in bare if str(a["question_id"]) in asked]
        if known and not any(str(a["text"]).strip() == asked[str(a["question_id"])] for a in known):
            return
        raise DataError(
            f"{answers.path} holds questions, not answers (its lines have image and text, but neither prompt nor "
            "answer_id). Give the file that the model's answers were written to."
        )

    def breakdown(self, metrics: dict[str, Any]) -> dict[str, float]:
        """The headline number by category, for tables; empty where there are none."""
        return {}

    def in_form(self, text: str) -> bool:
        """Whether an answer is what the benchmark asks for, right or wrong."""
        return is_short(text)

    def out_of_form(self, answers: Lines, data: Path, options: ScoreOptions) -> dict[str, str]:
        """Texts by key of the answers in none of the expected forms."""
        return {self.answer_key(a): a["text"] for a in answers.records if not self.in_form(a["text"])}

    def _check_forms(self, score: Score, answers: Lines, data: Path, options: ScoreOptions) -> None:
        """Note answers in no expected form, and warn when they are so many that the number says little."""
        odd, count = self.out_of_form(answers, data, options), len(answers.records)
        if not odd:
            return
        score.unexpected = list(odd)
        key, text = next(iter(odd.items()))
        said = (
            f"{len(odd)} of {count} answers ({len(odd) / count:.1%}) are in none of the expected forms ({self.form}), "
            f"e.g. {text[:60]!r} to {key}; the scorer reads something into them all the same."
        )
        (score.warnings if len(odd) > UNEXPECTED_SHARE * count else score.notes).append(said)

    def read_answers(self, answers: Path) -> Lines:
        """Read a predictions file."""
        return read_answers(answers)

    def _compare(self, score: Score, official: Callable[[], Score]) -> None:
        """Say what the official code makes of the same predictions."""
        try:
            other = official()
        except OfficialError as error:
            score.official = {"value": None, "error": error.official, "differs": True}
            score.notes.append(f"Official mode: {error}")
            return
        except JudgeError as error:
            score.official = {"value": None, "error": str(error), "differs": False}
            score.notes.append(f"The official number is not known: {error}")
            return
        same = score.value == other.value or (
            score.value is not None and other.value is not None and abs(score.value - other.value) < 1e-9
        )
        score.official = {"value": other.value, "error": None, "differs": not same}
        if not same:
            score.notes.append(
                f"The official scorer gives {other.value} instead of {score.value}. How it differs: "
                + ("; ".join(self.quirks) or "see docs/benchmarks.md")
            )

    def join(self, keys: Sequence[str], answers: Lines) -> Joined:
        """Join predictions to records by key; of several predictions for one record the last counts.

        Args:
            keys: Keys of all records, repeats numbered.
            answers: The predictions file.

        Raises:
            DataError: No prediction at all, or none that belongs to a record (another benchmark or split).
        """
        known = set(keys)
        repeats = {key.rpartition("#")[0] for key in keys if "#" in key}
        groups: dict[str, list[Answer]] = defaultdict(list)
        for answer in answers.records:
            groups[self.answer_key(answer)].append(answer)
        problems = Problems(malformed=[item.to_dict() for item in answers.malformed])
        by_key: dict[str, Answer] = {}
        for base, group in groups.items():
            if base not in known:
                problems.unknown += [base] * len(group)
                continue
            slots = [base]
            while base in repeats and f"{base}#{len(slots) + 1}" in known:
                slots.append(f"{base}#{len(slots) + 1}")
            if len(group) > len(slots):
                problems.duplicate.append(base)
            by_key.update(zip(slots, group[-len(slots) :], strict=False))
        problems.missing = [key for key in keys if key not in by_key]
        if not by_key:
            raise DataError(self._nothing_fits(keys, answers, problems))
        return Joined(by_key, problems)

    def _nothing_fits(self, keys: Sequence[str], answers: Lines, problems: Problems) -> str:
        if not answers.records:
            first = f" (line {answers.malformed[0].line}: {answers.malformed[0].reason})" if answers.malformed else ""
            return f"{answers.path} holds no prediction{first}. Give the file that the model's answers were written to."
        return (
            f"none of the {len(answers.records)} predictions in {answers.path} belongs to {self.name} {self.split}: "
            f"its ids are like {', '.join(problems.unknown[:3])}, the dataset's like {', '.join(keys[:3])}. "
            "These are the answers of another benchmark or split."
        )

    def check_prompts(self, joined: Joined, questions: dict[str, str]) -> list[str]:
        """Compare the prompts in the answer lines with the dataset's, where ids alone do not tell splits apart.

        Args:
            joined: Joined predictions.
            questions: Question text per key; a prompt fits when it contains the text.

        Returns:
            A note when some do not fit.

        Raises:
            DataError: More than half do not fit: these are predictions of another split.
        """
        checked = [key for key, answer in joined.by_key.items() if isinstance(answer.get("prompt"), str)]
        wrong = [key for key in checked if questions[key].strip() not in joined.by_key[key]["prompt"]]
        if len(wrong) * 2 > len(checked):
            raise DataError(
                f"{len(wrong)} of {len(checked)} predictions answer another question than {self.name} {self.split} "
                f"asks under their id (first: {wrong[0]}: {joined.by_key[wrong[0]]['prompt'][:60]!r}, dataset: "
                f"{questions[wrong[0]][:60]!r}). These are the answers of another split or dataset version."
            )
        return [f"{len(wrong)} prediction(s) have another prompt than the dataset: {_some(wrong)}"] if wrong else []

    # -- submission ----------------------------------------------------------------------------------------------

    def write_submission(self, answers: Path, data: Path, out: Path) -> dict[str, Any]:
        """Write the file that the benchmark's server or official evaluator takes.

        Args:
            answers: Predictions file.
            data: See `root`.
            out: File to write.

        Returns:
            What was written: `path`, counts, and the problems by name.

        Raises:
            ConfigError: The benchmark has no submission format.
            DataError: The predictions cannot be submitted.
        """
        raise ConfigError(f"{self.name} has no submission format: its predictions are scored from the answer file.")


LLAVA_ROOTS = ("playground/data/eval", "data/eval", "eval", "")


def _some(items: Sequence[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def clean_or_stop(answers: Lines) -> tuple[Answer, ...]:
    """Return all answers, as an official scorer that parses every line would need them.

    Raises:
        OfficialError: A line is not usable.
    """
    if answers.malformed:
        first = answers.malformed[0]
        official = "KeyError" if first.is_json else "JSONDecodeError"
        raise OfficialError(official, f"{answers.path} line {first.line}: {first.reason}")
    return answers.records


def unscored(benchmark: Benchmark, keys: Sequence[str], problems: Problems) -> Score:
    """Return the score of predictions that only a server can score."""
    return benchmark.result(
        "default",
        None,
        {"answered": len(keys) - len(problems.missing)},
        n_records=len(keys),
        per_record={},
        problems=problems,
        notes=[
            f"The answers of {benchmark.title} {benchmark.split} are not public: write the submission file with "
            f"`--submission FILE` and upload it to {benchmark.server}."
        ],
    )
