"""ScienceQA test, image questions (LLaVA `model_vqa_science.py`, `eval_science_qa.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.base import Benchmark, clean_or_stop
from evengaze.evaluate.benchmarks.rows import number_repeats
from evengaze.evaluate.benchmarks.types import EVAL_ZIP, DataFile, Mode, OfficialError, Record, Score, ScoreOptions
from evengaze.evaluate.jsonl import Answer, Lines
from evengaze.evaluate.metrics.scienceqa import FAILED, LETTERS, option_index, parse_answer
from evengaze.files import read_json

QUESTIONS = "llava_test_CQM-A.json"
_INSTRUCTION = "Answer with the option's letter from the given choices directly."
_REPO = "https://github.com/lupantech/ScienceQA (data/scienceqa)"


class ScienceQA(Benchmark):
    """ScienceQA: accuracy on the questions that have an image; all questions are run, as LLaVA does."""

    name = "scienceqa"
    title = "SQA-IMG"
    split = "test"
    size = 2017
    metric = "IMG accuracy (%)"
    folders = ("scienceqa",)
    files = (
        DataFile(QUESTIONS, EVAL_ZIP, needed="run"),
        DataFile("problems.json", _REPO, needed="score"),
        DataFile("pid_splits.json", _REPO, needed="score"),
        DataFile("images/test", _REPO, "dir", needed="run"),
    )
    max_new_tokens = 1024
    form = "an option's letter"
    quirks = (
        "it counts a missing prediction as wrong in the total and drops it from the image questions",
        "it takes a question for an image question when the prediction's prompt says so, not the dataset",
    )

    def in_form(self, text: str) -> bool:
        """Whether a letter can be read."""
        return parse_answer(text) != FAILED

    def records(self, data: Path) -> Iterator[Record]:
        """Yield all test questions; those without an image are text only."""
        path, images = self.path(data, QUESTIONS), self.path(data, "images/test")
        rows = read_json(path, list, self.source(QUESTIONS))
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or "id" not in row or not row.get("conversations"):
                raise DataError(f"{path}: entry {i} has no id or conversations. {self.source(QUESTIONS)}")
        for key, row in zip(number_repeats(str(row["id"]) for row in rows), rows, strict=True):
            text = row["conversations"][0]["value"].replace("<image>", "").strip()
            image = images / row["image"] if "image" in row else None
            yield Record(key, row["id"], f"{text}\n{_INSTRUCTION}", image)

    def answer_record(self, record: Record, text: str, model_id: str, answer_id: str | None = None) -> Answer:
        """Build the answer line; the official scorer reads from the prompt whether there was an image."""
        answer = super().answer_record(record, text, model_id, answer_id)
        if record.image is not None:
            answer["prompt"] = f"<image>\n{record.prompt}"
        return answer

    def _problems(self, data: Path) -> dict[str, dict[str, Any]]:
        """Return the test problems by id, in split order."""
        problems = read_json(self.path(data, "problems.json"), dict, self.source("problems.json"))
        path = self.path(data, "pid_splits.json")
        ids = read_json(path, dict, self.source("pid_splits.json")).get("test")
        if not isinstance(ids, list) or not ids:
            raise DataError(f"{path} has no list under 'test'. {self.source('pid_splits.json')}")
        absent = [key for key in ids if key not in problems]
        if absent:
            raise DataError(
                f"{self.path(data, 'problems.json')} lacks {len(absent)} of {len(ids)} test problems of {path} (first: "
                f"{absent[0]}); the files do not belong together. {self.source('problems.json')}"
            )
        return {key: problems[key] for key in ids}

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score the problems that have a prediction; the dataset says which have an image."""
        problems = self._problems(data)
        joined = self.join(list(problems), answers)
        analysis = self._analyse({k: problems[k] for k in problems if k in joined.by_key}, joined.by_key)
        for item in analysis:
            item["is_multimodal"] = bool(problems[item["question_id"]].get("image"))
        images = [key for key, problem in problems.items() if problem.get("image")]
        score = self._score("default", analysis, len(images))
        joined.problems.missing = [key for key in joined.problems.missing if problems[key].get("image")]
        score.problems = joined.problems
        text_only = len(problems) - len(images) - sum(not item["is_multimodal"] for item in analysis)
        if text_only:
            score.notes.append(f"{text_only} text-only questions have no prediction; 'acc' is over the answered ones.")
        return score

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score all problems of the split."""
        found = {str(answer["question_id"]): answer for answer in clean_or_stop(answers)}
        problems = self._problems(data)
        analysis = self._analyse(problems, found)
        if not any(item["is_multimodal"] for item in analysis):
            raise OfficialError("ZeroDivisionError: division by zero", "no prediction's prompt contains <image>")
        images = sum(bool(problem.get("image")) for problem in problems.values())
        return self._score("official", analysis, images)

    def _analyse(self, problems: dict[str, dict[str, Any]], found: dict[str, Answer]) -> list[dict[str, Any]]:
        """Read every answer; the entries are those of the official `_output.jsonl`, plus the option index."""
        items = []
        for key, problem in problems.items():
            answer = found.get(key, {"text": FAILED, "prompt": "Unknown"})
            prompt = str(answer.get("prompt", ""))
            letter = parse_answer(answer["text"])
            items.append(
                {
                    "question_id": key,
                    "parsed_ans": letter,
                    "ground_truth": LETTERS[problem["answer"]],
                    "question": prompt,
                    "pred": answer["text"],
                    "is_multimodal": "<image>" in prompt,
                    "index": option_index(letter, len(problem["choices"])),
                }
            )
        return items

    def _score(self, mode: Mode, analysis: list[dict[str, Any]], n_records: int) -> Score:
        right = {item["question_id"]: item["index"] == LETTERS.index(item["ground_truth"]) for item in analysis}
        images = {item["question_id"] for item in analysis if item["is_multimodal"]}
        img_correct = sum(right[key] for key in images)
        if not images:
            raise DataError(f"no image question of {self.name} has a prediction; give the whole test split's.")
        correct, count = sum(right.values()), len(right)
        img_acc = img_correct / len(images) * 100
        return self.result(
            mode,
            img_acc,
            {
                "acc": correct / count * 100,
                "correct": correct,
                "count": count,
                "img_acc": img_acc,
                "img_correct": img_correct,
                "img_total": len(images),
                "unreadable": sum(item["parsed_ans"] == FAILED for item in analysis),
            },
            n_records=n_records,
            n_scored=len(images),
            per_record={key: float(value) for key, value in right.items() if key in images},
        )
