"""POPE on COCO: is an object in the image? (LLaVA `llava/eval/eval_pope.py`; AoiDragon/POPE)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.base import Benchmark, clean_or_stop
from evengaze.evaluate.benchmarks.rows import QuestionRow, read_rows
from evengaze.evaluate.benchmarks.types import EVAL_ZIP, DataFile, Mode, OfficialError, Record, Score, ScoreOptions
from evengaze.evaluate.jsonl import Lines, read_jsonl, require_clean
from evengaze.evaluate.metrics.forms import is_yes_or_no
from evengaze.evaluate.metrics.pope import Confusion, text_to_label

QUESTIONS = "llava_pope_test.jsonl"
CATEGORIES = ("adversarial", "popular", "random")
_ORDER, _APART = ("adversarial", "random", "popular"), 10_000_000
"""Order of the categories in LLaVA's question file, and how far their ids are apart."""
_LABELS_AT = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
# Two label files of the same questions differ in spelling at most in a few rows; with more than this share of rows out
# of line they are different selections, and a row's position says nothing.
_ALIGNED = 0.9


class POPE(Benchmark):
    """POPE: mean F1 over the adversarial, popular and random splits."""

    name = "pope"
    title = "POPE"
    split = "coco"
    size = 8910
    metric = "mean F1 (%)"
    folders = ("pope",)
    files = (
        DataFile(QUESTIONS, EVAL_ZIP, needed="run"),
        *(DataFile(f"coco/coco_pope_{name}.json", _LABELS_AT, needed="score") for name in CATEGORIES),
        DataFile("val2014", "http://images.cocodataset.org/zips/val2014.zip", "dir", needed="run"),
    )
    form = "yes or no"
    quirks = (
        "it pairs answers and labels by position, so that missing, repeated or reordered answers shift labels",
        "the yes ratio also counts answers that no label was paired with",
        "it divides by zero when a split has no answer or no yes",
    )

    def _questions(self, data: Path, answers: Lines | None = None) -> tuple[QuestionRow, ...]:
        """The question file's rows; without it, for scoring, those of the label files under LLaVA's ids."""
        path = self.path(data, QUESTIONS)
        if answers is not None and not path.is_file():
            return self._labelled_questions(data, answers)
        return read_rows(path, EVAL_ZIP, ("question_id", "image", "text", "category"))

    def _labelled_questions(self, data: Path, answers: Lines) -> tuple[QuestionRow, ...]:
        """LLaVA's ids are the label files', plus ten million for each category; the answers' prompts must agree."""
        labels, rows = self._labels(data), []
        prompts = {str(answer["question_id"]): answer.get("prompt") for answer in answers.records}
        for number, category in enumerate(_ORDER):
            given = fit = 0
            for label in labels[category]:
                own = label.get("question_id")
                if not isinstance(own, int):
                    raise DataError(self._no_questions(data, f"the {category} labels have no numbers as ids"))
                row = {**label, "question_id": number * _APART + own, "category": category}
                rows.append(row)
                prompt = prompts.get(str(row["question_id"]))
                given += isinstance(prompt, str)
                fit += isinstance(prompt, str) and _question(label["text"]) in prompt
            if fit < _ALIGNED * given or not given:
                raise DataError(
                    self._no_questions(
                        data, f"only {fit} prompts of {given} {category} answers are the labels' questions"
                    )
                )
        return tuple(rows)

    def _no_questions(self, data: Path, reason: str) -> str:
        return f"{self.path(data, QUESTIONS)} is missing, and {reason}. Get it from {EVAL_ZIP}"

    def in_form(self, text: str) -> bool:
        """Whether it begins with yes or no."""
        return is_yes_or_no(text)

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the questions of the question file."""
        images = self.path(data, "val2014")
        for row in self._questions(data):
            metadata = {"category": row["category"]}
            yield Record(
                str(row["question_id"]), row["question_id"], row["text"], images / row["image"], metadata=metadata
            )

    def _labels(self, data: Path) -> dict[str, tuple[QuestionRow, ...]]:
        """Read the label files by category, in the order in which `os.listdir` gives them."""
        self.require(data, "score")
        folder = self.path(data, "coco")
        labels = {}
        for name in os.listdir(folder):  # noqa: PTH208 - its order decides where the official script stops
            if name.startswith("coco_pope_") and name.endswith(".json"):
                lines = read_jsonl(folder / name, ("image", "text", "label"), f"Get it from {_LABELS_AT}")
                labels[name[len("coco_pope_") : -len(".json")]] = require_clean(lines)
        return labels

    def breakdown(self, metrics: dict[str, Any]) -> dict[str, float]:
        """See `Benchmark.breakdown`."""
        return {name: 100 * part["f1"] for name, part in metrics["categories"].items()}

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Join answers by question id and labels by image and question."""
        questions, labels = self._questions(data, answers), self._labels(data)
        joined = self.join([str(row["question_id"]) for row in questions], answers)
        notes = self.check_prompts(joined, {str(row["question_id"]): _question(row["text"]) for row in questions})
        by_category: dict[str, list[QuestionRow]] = defaultdict(list)
        for row in questions:
            by_category[row["category"]].append(row)
        metrics: dict[str, dict[str, float]] = {}
        credit: dict[str, float] = {}
        for category, rows in by_category.items():
            truth, note = align(rows, labels.get(category, ()), category)
            notes += note
            keys = [str(r["question_id"]) for r in rows if str(r["question_id"]) in joined.by_key]
            keys = [key for key in keys if key in truth]
            predicted = [text_to_label(joined.by_key[key]["text"]) for key in keys]
            if not keys:
                notes.append(f"The {category} split has no scorable answer and is left out of the means.")
                continue
            confusion = Confusion.count(predicted, [truth[key] for key in keys])
            metrics[category] = _numbers(confusion) | confusion.guarded_metrics()
            credit |= {key: float(label == truth[key]) for key, label in zip(keys, predicted, strict=True)}
        if not metrics:
            raise DataError(
                f"no label in {self.path(data, 'coco')} fits a question of {self.path(data, QUESTIONS)}. Get the "
                f"labels from {_LABELS_AT}"
            )
        score = self._score("default", metrics, len(questions), credit, notes)
        score.problems = joined.problems
        return score

    def confusions(self, answers: Lines, data: Path) -> dict[str, Confusion]:
        """Count per category with the official pairing: by position, in answer-file order.

        Raises:
            OfficialError: An answer's id is no question.
        """
        category_of = {row["question_id"]: row["category"] for row in self._questions(data, answers)}
        by_category: dict[str, list[str]] = defaultdict(list)
        for answer in clean_or_stop(answers):
            if answer["question_id"] not in category_of:
                raise OfficialError(
                    f"KeyError: {answer['question_id']!r}", f"it is no question of {self.path(data, QUESTIONS)}"
                )
            by_category[category_of[answer["question_id"]]].append(text_to_label(answer["text"]))
        return {
            category: Confusion.count(by_category[category], [row["label"] for row in rows])
            for category, rows in self._labels(data).items()
        }

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score with labels paired by position."""
        metrics: dict[str, dict[str, float]] = {}
        for category, confusion in self.confusions(answers, data).items():
            try:
                metrics[category] = _numbers(confusion) | confusion.metrics()
            except ZeroDivisionError:
                # The script divides by the number of answers first (integers), then by counts made floats.
                kind = "float division by zero" if confusion.answers else "division by zero"
                raise OfficialError(
                    f"ZeroDivisionError: {kind}",
                    f"{category} has {confusion.answers} answers, {confusion.yes} of them yes",
                ) from None
        return self._score("official", metrics, len(self._questions(data, answers)), {}, [])

    def _score(
        self,
        mode: Mode,
        metrics: dict[str, dict[str, float]],
        n_records: int,
        credit: dict[str, float],
        notes: list[str],
    ) -> Score:
        means = {f"mean_{name}": sum(m[name] for m in metrics.values()) / len(metrics) for name in ("f1", "accuracy")}
        return self.result(
            mode,
            100 * means["mean_f1"],
            {**means, "categories": metrics},
            n_records=n_records,
            n_scored=int(sum(m["TP"] + m["FP"] + m["TN"] + m["FN"] for m in metrics.values())),
            per_record=credit,
            notes=notes,
        )


def _numbers(confusion: Confusion) -> dict[str, float]:
    return {
        "samples": confusion.answers,
        "TP": confusion.tp,
        "FP": confusion.fp,
        "TN": confusion.tn,
        "FN": confusion.fn,
    }


def _question(text: str) -> str:
    return text.split("\n")[0].strip()


def align(
    questions: Sequence[QuestionRow], labels: Sequence[QuestionRow], category: str
) -> tuple[dict[str, str], list[str]]:
    """Find the label of every question by image and wording.

    LLaVA's question file fits the label files of one old POPE commit; with today's the random split has other rows and
    some questions are spelled differently, so position alone is not to be trusted.

    Args:
        questions: Rows of the question file, one category.
        labels: Rows of the label file of that category.
        category: Its name, for the notes.

    Returns:
        Label per key, and notes when the two files do not line up.
    """

    def same(row: QuestionRow, label: QuestionRow) -> bool:
        return bool(row["image"] == label["image"] and _question(row["text"]) == _question(label["text"]))

    in_line = [i < len(labels) and same(row, labels[i]) for i, row in enumerate(questions)]
    options: dict[tuple[str, str], set[str]] = defaultdict(set)
    for label in labels:
        options[label["image"], _question(label["text"])].add(label["label"])
    nearly = len(labels) == len(questions) and sum(in_line) >= _ALIGNED * len(questions)
    truth: dict[str, str] = {}
    torn = [f"{image}: {text}" for (image, text), found in options.items() if len(found) > 1]
    respelled = looked_up = lost = 0
    for i, row in enumerate(questions):
        key, found = str(row["question_id"]), options.get((row["image"], _question(row["text"])), set())
        if in_line[i]:
            truth[key] = labels[i]["label"]
        elif len(found) == 1:
            truth[key] = next(iter(found))
            looked_up += 1
        elif nearly and row["image"] == labels[i]["image"]:
            truth[key] = labels[i]["label"]
            respelled += 1
        else:
            lost += 1
    notes = (
        [f"The {category} labels say both yes and no to {', '.join(torn[:3])} ({len(torn)} in all)."] if torn else []
    )
    if not (respelled or looked_up or lost):
        return truth, notes
    return truth, [
        *notes,
        f"Labels and questions of the {category} split do not line up ({len(labels)} labels, {len(questions)} "
        f"questions): {looked_up} labels were found by image and question, {respelled} by position with another "
        f"spelling, {lost} not at all (not scored). The official scorer would pair them by position; the fitting "
        f"labels are at {_LABELS_AT}",
    ]
