"""GQA testdev-balanced (LLaVA `scripts/convert_gqa_for_eval.py`; GQA `eval.py` as LLaVA changed it)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.base import Benchmark, clean_or_stop
from evengaze.evaluate.benchmarks.rows import question_rows
from evengaze.evaluate.benchmarks.types import EVAL_ZIP, DataFile, OfficialError, Record, Score, ScoreOptions
from evengaze.evaluate.jsonl import Lines
from evengaze.evaluate.metrics import gqa
from evengaze.files import read_json, write_whole

QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
ANNOTATIONS = "data/testdev_balanced_questions.json"
CHOICES = "data/testdev_balanced_choices.json"
_SITE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"


class GQA(Benchmark):
    """GQA: exact match over the balanced test-dev questions."""

    name = "gqa"
    title = "GQA"
    split = "testdev-balanced"
    size = 12578
    metric = "accuracy (%)"
    folders = ("gqa",)
    files = (
        DataFile(QUESTIONS, EVAL_ZIP, needed="run"),
        DataFile(ANNOTATIONS, _SITE, needed="score"),
        DataFile("data/images", _SITE, "dir", needed="run"),
        DataFile(CHOICES, "https://cs.stanford.edu/people/dorarad/gqa/evaluate.html", needed="optional"),
    )
    quirks = (
        "it refuses a file in which a balanced question has no prediction",
        "it prints validity and plausibility as 0 without a choices file",
    )

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the questions of the question file."""
        images = self.path(data, "data/images")
        for key, row in question_rows(self, data, QUESTIONS).items():
            yield Record(key, row["question_id"], row["text"], images / row["image"])

    def _load(self, data: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        questions: dict[str, Any] = read_json(self.path(data, ANNOTATIONS), dict, self.source(ANNOTATIONS))
        choices = self.path(data, CHOICES)
        return questions, (read_json(choices, dict) if choices.is_file() else None)

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score the balanced questions that have a prediction."""
        questions, choices = self._load(data)
        joined = self.join(list(questions), answers)
        if not options.consistency:
            joined.problems.missing = [key for key in joined.problems.missing if questions[key]["isBalanced"]]
        predictions = {key: gqa.clean_prediction(answer["text"]) for key, answer in joined.by_key.items()}
        if not any(questions[key]["isBalanced"] for key in predictions):
            raise DataError(f"{answers.path} answers no balanced question of {self.path(data, ANNOTATIONS)}.")
        score = self._score(questions, predictions, choices, options)
        score.problems = joined.problems
        if choices is None:
            for name in ("validity", "plausibility"):
                score.metrics[name] = None
        return score

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score as `eval.py` does on the converted predictions."""
        questions, choices = self._load(data)
        predictions = {str(a["question_id"]): gqa.clean_prediction(a["text"]) for a in clean_or_stop(answers)}
        for key, question in questions.items():
            if key not in predictions and (options.consistency or question["isBalanced"]):
                raise OfficialError("Exception: missing predictions", f"there is none for question {key}")
        score = self._score(questions, predictions, choices, options)
        if score.metrics["distribution"] is None:
            raise OfficialError("ZeroDivisionError: float division by zero", "no question has a global group")
        score.mode = "official"
        return score

    def _score(
        self,
        questions: dict[str, Any],
        predictions: dict[str, str],
        choices: dict[str, Any] | None,
        options: ScoreOptions,
    ) -> Score:
        try:
            metrics = gqa.evaluate(questions, predictions, choices, options.consistency)
        except ZeroDivisionError:
            without = {key: {**question, "groups": {"global": ""}} for key, question in questions.items()}
            metrics = {**gqa.evaluate(without, predictions, choices, options.consistency), "distribution": None}
        balanced = [key for key, question in questions.items() if question["isBalanced"]]
        scored = {k: float(predictions[k] == questions[k]["answer"]) for k in balanced if k in predictions}
        return self.result(
            "default",
            metrics["accuracy"],
            metrics,
            n_records=len(balanced),
            per_record=scored,
        )

    def write_submission(self, answers: Path, data: Path, out: Path) -> dict[str, Any]:
        """Write `testdev_balanced_predictions.json` for the official `eval.py` (repeated predictions are kept)."""
        lines = self.read_answers(answers)
        rows = [
            {"questionId": answer["question_id"], "prediction": gqa.clean_prediction(answer["text"])}
            for answer in clean_or_stop(lines)
        ]
        write_whole(out, json.dumps(rows))
        return {"path": str(out), "total_results": len(rows)}
