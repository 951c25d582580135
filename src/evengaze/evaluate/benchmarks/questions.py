"""One's own questions, and those of the embedded model: pictures, questions and answers in one folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.base import Benchmark
from evengaze.evaluate.benchmarks.rows import question_rows, refuse_repeats
from evengaze.evaluate.benchmarks.types import DataFile, Record, Score, ScoreOptions
from evengaze.evaluate.jsonl import Lines, read_jsonl, require_clean
from evengaze.evaluate.metrics.normalize import evalai_normalize

QUESTIONS, ANSWERS, IMAGES = "questions.jsonl", "answers.jsonl", "images"
_SOURCE = "your own data; `evengaze.demo.write_dataset(DIR)` writes the embedded model's"


class Questions(Benchmark):
    """Any questions with known short answers: the share whose normalised answer is one of the accepted ones.

    `questions.jsonl` is a question file in LLaVA's format; `answers.jsonl` holds `{"question_id", "answer"}`,
    the answer being a string or a list of accepted ones. A `category` in the question file gives a breakdown.
    """

    name = "questions"
    title = "Questions"
    split = "all"
    metric = "accuracy (%)"
    folders = ("questions",)
    files = (
        DataFile(QUESTIONS, _SOURCE),
        DataFile(ANSWERS, _SOURCE, needed="score"),
        DataFile(IMAGES, _SOURCE, "dir", needed="run"),
    )

    def check(self, data: Path) -> list[str]:
        """See `Benchmark.check`; without answers the dense model's are what others are compared with."""
        self.require(data, "run")
        if not self.path(data, ANSWERS).is_file():
            return [
                f"{self.path(data, ANSWERS)} is missing: no accuracy, but every method's answers are compared with the "
                "dense model's"
            ]
        truth, asked = self._truth(data), question_rows(self, data, QUESTIONS)
        without = [key for key in asked if key not in truth]
        if len(without) == len(asked):
            raise DataError(f"{self.path(data, ANSWERS)} answers none of the questions (ids like {without[0]})")
        return [f"{len(without)} questions have no answer in {ANSWERS} (first: {without[0]})"] if without else []

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the questions of the question file; one without an image is a text-only question.

        Raises:
            DataError: A row is malformed, or two have the same id.
        """
        images = self.path(data, IMAGES)
        refuse_repeats(self.path(data, QUESTIONS), question_rows(self, data, QUESTIONS).values())
        for key, row in question_rows(self, data, QUESTIONS).items():
            yield Record(key, row["question_id"], row["text"], images / row["image"] if row["image"] else None)

    def _truth(self, data: Path) -> dict[str, set[str]]:
        path = self.path(data, ANSWERS)
        found: dict[str, set[str]] = {}
        for row in require_clean(read_jsonl(path, ("question_id", "answer"), self.source(ANSWERS))):
            accepted = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            if not accepted or not all(isinstance(answer, str) for answer in accepted):
                raise DataError(f"{path}: the answer to {row['question_id']} must be a string or a list of strings")
            key, words = str(row["question_id"]), {evalai_normalize(answer) for answer in accepted}
            if found.setdefault(key, words) != words:
                raise DataError(
                    f"{path} answers question {key} twice, and differently. Put all that is right in one list."
                )
        return found

    def breakdown(self, metrics: dict[str, Any]) -> dict[str, float]:
        """See `Benchmark.breakdown`."""
        found = metrics["categories"]
        return {name: 100 * part["accuracy"] for name, part in found.items()} if len(found) > 1 else {}

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score every question that has a prediction."""
        truth = self._truth(data)
        rows = question_rows(self, data, QUESTIONS)
        joined = self.join(list(truth), answers)
        texts = {key: str(row["text"]) for key, row in rows.items()}
        notes = self.check_prompts(joined, {key: texts.get(key, "") for key in truth})
        credit = {
            key: float(evalai_normalize(str(answer["text"])) in truth[key]) for key, answer in joined.by_key.items()
        }
        groups: dict[str, list[float]] = defaultdict(list)
        for key, value in credit.items():
            groups[str(rows.get(key, {}).get("category", "all"))].append(value)
        accuracy = sum(credit.values()) / len(credit)
        metrics: dict[str, Any] = {
            "accuracy": accuracy,
            "categories": {
                name: {"accuracy": sum(values) / len(values), "samples": len(values)}
                for name, values in sorted(groups.items())
            },
        }
        return self.result(
            "default",
            100 * accuracy,
            metrics,
            n_records=len(truth),
            problems=joined.problems,
            per_record=credit,
            notes=notes,
        )
