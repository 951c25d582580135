"""MM-Vet (LLaVA `convert_mmvet_for_eval.py`; yuweihao/MM-Vet `mm-vet_evaluator.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.base import clean_or_stop
from evengaze.evaluate.benchmarks.judged import JudgedBenchmark
from evengaze.evaluate.benchmarks.rows import question_rows
from evengaze.evaluate.benchmarks.types import EVAL_ZIP, DataFile, Mode, OfficialError, Record, Score, ScoreOptions
from evengaze.evaluate.jsonl import Lines
from evengaze.evaluate.judge import judge_all, silent
from evengaze.evaluate.metrics import mmvet
from evengaze.evaluate.metrics.forms import is_something
from evengaze.evaluate.metrics.open_match import with_alternatives
from evengaze.files import read_json, write_whole

QUESTIONS = "llava-mm-vet.jsonl"
ANNOTATIONS = "mm-vet.json"
_ZIP = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"

Grades = dict[str, dict[str, list[Any]]]
"""Upstream's grade file: per item the lists `model`, `content` and `score`, one entry a run."""


class MMVet(JudgedBenchmark):
    """MM-Vet: open questions, graded from 0 to 1 by a judge."""

    name = "mmvet"
    title = "MM-Vet"
    split = "v1"
    size = 218
    metric = "judged score (%)"
    folders = ("mm-vet", "mmvet")
    files: ClassVar[tuple[DataFile, ...]] = (
        DataFile(QUESTIONS, EVAL_ZIP, needed="run"),
        DataFile(ANNOTATIONS, _ZIP, needed="score"),
        DataFile("images", _ZIP, "dir", needed="run"),
    )
    max_new_tokens = 1024
    judge_prompt = mmvet.PROMPT
    official_judge = mmvet.OFFICIAL_JUDGE
    form = "any text"
    quirks = (
        "it grades 0 when no reply can be read, ignoring the last one, and takes 'nan' for a grade",
        "it stops at a question without a prediction",
    )

    def in_form(self, text: str) -> bool:
        """Whether there is an answer at all."""
        return is_something(text)

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the questions; they carry no format instruction."""
        images = self.path(data, "images")
        for key, row in question_rows(self, data, QUESTIONS).items():
            yield Record(key, row["question_id"], row["text"], images / row["image"])

    def _items(self, data: Path) -> dict[str, dict[str, Any]]:
        """Return the annotations by key (`v1_7` is question 7)."""
        path = self.path(data, ANNOTATIONS)
        rows = read_json(path, dict, self.source(ANNOTATIONS))
        for name, row in rows.items():
            if not name.startswith("v1_") or not {"question", "answer", "capability"} <= row.keys():
                raise DataError(
                    f"{path}: {name} is no MM-Vet v1 item with question, answer and capability. "
                    f"{self.source(ANNOTATIONS)}"
                )
        return {name.removeprefix("v1_"): row for name, row in rows.items()}

    def breakdown(self, metrics: dict[str, Any]) -> dict[str, float]:
        """See `Benchmark.breakdown`."""
        return dict(metrics.get("capabilities", {}))

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Grade the questions that have a prediction."""
        items = self._items(data)
        joined = self.join(list(items), answers)
        texts = {key: joined.by_key[key]["text"] for key in items if key in joined.by_key}
        notes = self.check_prompts(joined, {key: row["question"] for key, row in items.items()})
        grades, errors = self._grades(texts, items, options, official=False)
        score = self._score("default", grades, items, options, set(grades))
        joined.problems.errors = errors
        score.problems = joined.problems
        score.notes = notes + score.notes
        self.add_offline(score, {key: (text, items[key]["answer"]) for key, text in texts.items()}, with_alternatives)
        return score

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Grade every question as upstream."""
        items = self._items(data)
        found = {str(answer["question_id"]): answer["text"] for answer in clean_or_stop(answers)}
        missing = [key for key in items if key not in found]
        if missing:
            raise OfficialError(f"KeyError: 'v1_{missing[0]}'", f"{len(missing)} questions have no prediction")
        texts = {key: found[key] for key in items}
        grades, errors = self._grades(texts, items, options, official=True)
        score = self._score("official", grades, items, options, set(items))
        score.problems.errors = errors
        self.add_offline(score, {key: (text, items[key]["answer"]) for key, text in texts.items()}, with_alternatives)
        return score

    def _grades(
        self, texts: dict[str, str], items: dict[str, dict[str, Any]], options: ScoreOptions, official: bool
    ) -> tuple[Grades, list[dict[str, str]]]:
        """Return grades by key, from the judge or a grade file."""
        if options.judged is not None:
            read = read_json(options.judged, dict, "Give the evaluator's ...-grade-<n>runs.json.")
            found = {name.removeprefix("v1_"): _recorded(row, name, options.judged) for name, row in read.items()}
            return self.take_judged(found, texts, options.judged)
        judge = options.judge
        if judge is None:
            return {}, []

        def grade(key: str) -> dict[str, list[Any]]:
            message = mmvet.build_question(items[key]["question"], items[key]["answer"], texts[key])
            runs = [mmvet.grade(judge, message, f"run {i + 1}", official) for i in range(options.runs)]
            return {name: [run[name] for run in runs] for name in ("model", "content", "score")}

        return judge_all(list(texts), grade, options.workers, options.say or silent)

    def _score(
        self, mode: Mode, grades: Grades, items: dict[str, dict[str, Any]], options: ScoreOptions, over: set[str]
    ) -> Score:
        metrics: dict[str, Any] = {}
        value, per_record = None, {}
        if grades:
            scores = {key: [float(grade) for grade in row["score"]] for key, row in grades.items()}
            metrics = mmvet.aggregate(scores, {key: row["capability"] for key, row in items.items() if key in over})
            value = sum(metrics["total_unrounded_per_run"]) / len(metrics["total_unrounded_per_run"])
            per_record = {key: sum(runs) / len(runs) for key, runs in scores.items()}
            metrics["grades"] = {f"v1_{key}": row for key, row in grades.items()}
        models = (name for row in grades.values() for name in row["model"])
        return self.judged_result(
            mode, options, models, value=value, metrics=metrics, n_records=len(items), per_record=per_record
        )

    def write_submission(self, answers: Path, data: Path, out: Path) -> dict[str, Any]:
        """Write the JSON that the official evaluator takes."""
        found = {f"v1_{a['question_id']}": a["text"] for a in clean_or_stop(self.read_answers(answers))}
        write_whole(out, json.dumps(found, indent=2))
        return {"path": str(out), "total_results": len(found)}


def _recorded(row: Any, name: str, path: Path) -> dict[str, list[Any]]:
    """One item of a grade file.

    Raises:
        DataError: It is none.
    """
    try:
        good = all(isinstance(row[part], list) and row[part] for part in ("model", "content", "score"))
        good = good and all(0 <= float(score) <= 1 for score in row["score"])
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise DataError(
            f"{path}: {name} is no item of the evaluator's ...-grade-<n>runs.json (lists model, content and score, "
            f"each from 0 to 1), but {str(row)[:80]}. Judge again."
        )
    return dict(row)
