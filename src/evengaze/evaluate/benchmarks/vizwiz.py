"""VizWiz: test, which a server scores, and val, which can be scored here.

LLaVA `scripts/convert_vizwiz_for_submission.py`; lmms-eval `tasks/vizwiz_vqa/utils.py` for val.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evengaze.evaluate.benchmarks.base import Benchmark, clean_or_stop, unscored
from evengaze.evaluate.benchmarks.rows import question_rows
from evengaze.evaluate.benchmarks.submissions import write_normalised
from evengaze.evaluate.benchmarks.types import EVAL_ZIP, DataFile, Mode, OfficialError, Record, Score, ScoreOptions
from evengaze.evaluate.jsonl import Lines
from evengaze.evaluate.metrics.soft_accuracy import evalai_accuracy
from evengaze.files import read_json

QUESTIONS = "llava_test.jsonl"
_SITE = "https://vizwiz.cs.colorado.edu/VizWiz_final"
_SUFFIX = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)


class VizWiz(Benchmark):
    """VizWiz test: answers are written for the server."""

    name = "vizwiz"
    title = "VizWiz"
    split = "test"
    size = 8000
    metric = "accuracy (%)"
    folders = ("vizwiz",)
    files = (
        DataFile(QUESTIONS, EVAL_ZIP),
        DataFile("test", f"{_SITE}/images/test.zip", "dir", needed="run"),
    )
    server = "https://eval.ai/web/challenges/challenge-page/2185"

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the test questions."""
        images = self.path(data, "test")
        for key, row in question_rows(self, data, QUESTIONS).items():
            yield Record(key, row["question_id"], row["text"], images / row["image"])

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Check the predictions; only the server knows the answers."""
        questions = {key: row["text"] for key, row in question_rows(self, data, QUESTIONS).items()}
        joined = self.join(list(questions), answers)
        score = unscored(self, list(questions), joined.problems)
        score.notes += self.check_prompts(joined, {key: text.split("\n")[0] for key, text in questions.items()})
        return score

    def write_submission(self, answers: Path, data: Path, out: Path) -> dict[str, Any]:
        """Write the server's JSON, in question order.

        Raises:
            OfficialError: A question has no prediction; the official converter refuses as well.
        """
        lines = self.read_answers(answers)
        wanted = question_rows(self, data, QUESTIONS)
        problems = self.join(list(wanted), lines).problems
        if problems.missing:
            raise OfficialError(
                "AssertionError",
                f"{answers} answers only {len(wanted) - len(problems.missing)} of {len(wanted)} questions; missing are "
                f"{', '.join(problems.missing[:5])}. Resume the run first.",
            )
        return {**write_normalised(out, lines, wanted.values(), "image"), "duplicate": problems.duplicate}


class VizWizVal(Benchmark):
    """VizWiz val: soft accuracy against ten answers, EvalAI's normaliser on both sides."""

    name = "vizwiz_val"
    title = "VizWiz (val)"
    split = "val"
    size = 4319
    metric = "accuracy (%)"
    folders = ("vizwiz",)
    files = (
        DataFile("val.json", f"{_SITE}/vqa_data/Annotations.zip"),
        DataFile("val", f"{_SITE}/images/val.zip", "dir", needed="run"),
    )
    quirks = ("it needs one prediction for every question",)

    def _rows(self, data: Path) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = read_json(self.path(data, "val.json"), list, self.source("val.json"))
        return rows

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the val questions in LLaVA's wording; the id is the position, as in its test file."""
        images = self.path(data, "val")
        for i, row in enumerate(self._rows(data)):
            yield Record(str(i), i, row["question"].capitalize() + _SUFFIX, images / row["image"])

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score the questions that have a prediction."""
        rows = self._rows(data)
        joined = self.join([str(i) for i in range(len(rows))], answers)
        notes = self.check_prompts(joined, {str(i): row["question"].capitalize() for i, row in enumerate(rows)})
        texts = {key: joined.by_key[key]["text"] for key in map(str, range(len(rows))) if key in joined.by_key}
        score = self._score("default", texts, rows)
        score.problems, score.notes = joined.problems, notes + score.notes
        return score

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score a complete answer file."""
        rows = self._rows(data)
        texts = {self.answer_key(answer): answer["text"] for answer in clean_or_stop(answers)}
        missing = [str(i) for i in range(len(rows)) if str(i) not in texts]
        if missing:
            raise OfficialError("AssertionError", f"no prediction for {', '.join(missing[:5])}")
        return self._score("official", {str(i): texts[str(i)] for i in range(len(rows))}, rows)

    def _score(self, mode: Mode, texts: dict[str, str], rows: list[dict[str, Any]]) -> Score:
        credit = {
            key: evalai_accuracy(text, [item["answer"] for item in rows[int(key)]["answers"]])
            for key, text in texts.items()
        }
        accuracy = sum(credit.values()) / len(credit)
        return self.result(
            mode,
            100 * accuracy,
            {"accuracy": accuracy},
            n_records=len(rows),
            per_record=credit,
            notes=["VizWiz's own evaluation code is not public; the rule is lmms-eval's."],
        )
