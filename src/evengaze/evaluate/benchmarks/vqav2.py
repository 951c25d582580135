"""VQAv2: test-dev, which a server scores, and val, which can be scored here.

LLaVA `scripts/convert_vqav2_for_submission.py`; GT-Vision-Lab/VQA `vqaEval.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.base import Benchmark, unscored
from evengaze.evaluate.benchmarks.rows import question_rows
from evengaze.evaluate.benchmarks.submissions import write_normalised
from evengaze.evaluate.benchmarks.types import EVAL_ZIP, DataFile, Mode, OfficialError, Record, Score, ScoreOptions
from evengaze.evaluate.jsonl import Lines
from evengaze.evaluate.metrics.normalize import evalai_normalize
from evengaze.evaluate.metrics.soft_accuracy import vqa_accuracy, vqa_report
from evengaze.files import read_json

TEST_DEV = "llava_vqav2_mscoco_test-dev2015.jsonl"
TEST = "llava_vqav2_mscoco_test2015.jsonl"
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
SHORT_ANSWER = "Answer the question using a single word or phrase."
_VQA_SITE = "https://visualqa.org/download.html"


class VQAv2(Benchmark):
    """VQAv2 test-dev: answers are written for the server."""

    name = "vqav2"
    title = "VQAv2"
    split = "test-dev"
    size = 107394
    metric = "accuracy (%)"
    folders = ("vqav2",)
    files = (
        DataFile(TEST_DEV, EVAL_ZIP),
        DataFile(TEST, EVAL_ZIP, needed="score"),
        DataFile("test2015", "http://images.cocodataset.org/zips/test2015.zip", "dir", needed="run"),
    )
    server = "https://eval.ai/web/challenges/challenge-page/830"

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the test-dev questions."""
        images = self.path(data, "test2015")
        for key, row in question_rows(self, data, TEST_DEV).items():
            yield Record(key, row["question_id"], row["text"], images / row["image"])

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Check the predictions; only the server knows the answers."""
        keys = list(question_rows(self, data, TEST_DEV))
        return unscored(self, keys, self.join(keys, answers).problems)

    def write_submission(self, answers: Path, data: Path, out: Path) -> dict[str, Any]:
        """Write the server's JSON: every question of the whole test split, normalised, unanswered ones empty."""
        lines = self.read_answers(answers)
        problems = self.join(list(question_rows(self, data, TEST_DEV)), lines).problems
        written = write_normalised(out, lines, question_rows(self, data, TEST).values(), "question_id", default="")
        return {**written, "missing": problems.missing, "duplicate": problems.duplicate}


class VQAv2Val(Benchmark):
    """VQAv2 val, scored here as the server would score the submission."""

    name = "vqav2_val"
    title = "VQAv2 (val)"
    split = "val"
    size = 214354
    metric = "accuracy (%)"
    folders = ("vqav2",)
    files = (
        DataFile(VAL_QUESTIONS, _VQA_SITE, needed="run"),
        DataFile(VAL_ANNOTATIONS, _VQA_SITE, needed="score"),
        DataFile("val2014", "http://images.cocodataset.org/zips/val2014.zip", "dir", needed="run"),
    )
    quirks = ("it refuses a file in which a question is missing or unknown",)

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the val questions with LLaVA's short-answer prompt."""
        path, images = self.path(data, VAL_QUESTIONS), self.path(data, "val2014")
        rows = read_json(path, dict, self.source(VAL_QUESTIONS)).get("questions")
        if not isinstance(rows, list) or not rows or not {"question_id", "image_id", "question"} <= rows[0].keys():
            raise DataError(f"{path} has no list of questions under 'questions'. {self.source(VAL_QUESTIONS)}")
        for row in rows:
            image = images / f"COCO_val2014_{row['image_id']:012d}.jpg"
            yield Record(str(row["question_id"]), row["question_id"], f"{row['question']}\n{SHORT_ANSWER}", image)

    def _annotations(self, data: Path) -> dict[str, dict[str, Any]]:
        path = self.path(data, VAL_ANNOTATIONS)
        rows = read_json(path, dict, self.source(VAL_ANNOTATIONS)).get("annotations")
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{path} has no list under 'annotations'. {self.source(VAL_ANNOTATIONS)}")
        return {str(row["question_id"]): row for row in rows}

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score the questions that have a prediction."""
        annotations = self._annotations(data)
        joined = self.join(list(annotations), answers)
        texts = {key: joined.by_key[key]["text"] for key in annotations if key in joined.by_key}
        score = self._score("default", texts, annotations)
        score.problems = joined.problems
        return score

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score a complete submission; `vqa.py` asserts that the ids are those of the split."""
        annotations = self._annotations(data)
        texts = {self.answer_key(answer): answer["text"] for answer in answers.records}
        odd = texts.keys() ^ annotations.keys()
        if odd:
            raise OfficialError("AssertionError", f"question ids differ from the split's: {', '.join(sorted(odd)[:5])}")
        return self._score("official", {key: texts[key] for key in annotations}, annotations)

    def _score(self, mode: Mode, texts: dict[str, str], annotations: dict[str, dict[str, Any]]) -> Score:
        human = {key: [item["answer"] for item in annotations[key]["answers"]] for key in texts}
        answer_type = {key: annotations[key]["answer_type"] for key in texts}
        question_type = {key: annotations[key]["question_type"] for key in texts}
        reports, credits = {}, {}
        for name, text in (("submitted", evalai_normalize), ("raw", str)):
            credits[name] = {key: vqa_accuracy(text(texts[key]), human[key]) for key in texts}
            reports[name] = {**vqa_report(credits[name], answer_type, question_type), "per_record": credits[name]}
        return self.result(
            mode,
            reports["submitted"]["overall"],
            {**reports["submitted"], "raw_answers": reports["raw"]},
            n_records=len(annotations),
            per_record=credits["submitted"],
            notes=[
                "Answers are normalised as LLaVA's converter does before submission; 'raw_answers' are scored as they "
                "are, which loses capitalised answers wherever all annotators agree."
            ],
        )
