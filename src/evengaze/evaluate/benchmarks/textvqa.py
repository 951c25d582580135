"""TextVQA validation 0.5.1 with OCR tokens in the prompt (LLaVA `llava/eval/eval_textvqa.py`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.base import Benchmark, clean_or_stop
from evengaze.evaluate.benchmarks.rows import number_repeats, read_rows
from evengaze.evaluate.benchmarks.types import EVAL_ZIP, DataFile, Mode, OfficialError, Record, Score, ScoreOptions
from evengaze.evaluate.jsonl import Answer, Lines
from evengaze.evaluate.metrics.soft_accuracy import evalai_accuracy
from evengaze.files import read_json

QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
N_ANSWERS = 10


def question_of(prompt: str) -> str | None:
    """Recover the lower-cased question from any of the prompt layouts LLaVA used; None when it is no such layout."""
    if prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return match.group(1).lower() if match else None
    lines = prompt.split("\n")
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


class TextVQA(Benchmark):
    """TextVQA: soft accuracy against ten answers, EvalAI's normaliser on both sides."""

    name = "textvqa"
    title = "TextVQA"
    split = "val"
    size = 5000
    metric = "accuracy (%)"
    folders = ("textvqa",)
    files = (
        DataFile(QUESTIONS, EVAL_ZIP, needed="run"),
        DataFile(ANNOTATIONS, f"https://dl.fbaipublicfiles.com/textvqa/data/{ANNOTATIONS}", needed="score"),
        DataFile(
            "train_images", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "dir", needed="run"
        ),
    )
    quirks = (
        "it averages over the lines of the answer file, so that a repeated prediction counts twice",
        "it stops at a prompt that it cannot parse and at a question that has no annotation",
    )

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the questions of the question file."""
        path = self.path(data, QUESTIONS)
        rows = read_rows(path, self.source(QUESTIONS))
        images = self.path(data, "train_images")
        for key, row in zip(number_repeats(self._key(r["question_id"], r["text"]) for r in rows), rows, strict=True):
            yield Record(key, row["question_id"], row["text"], images / row["image"])

    def answer_key(self, answer: Answer) -> str:
        """Return image id and question: an image has several questions."""
        return self._key(answer["question_id"], str(answer.get("prompt", "")))

    @staticmethod
    def _key(image_id: object, prompt: str) -> str:
        question = question_of(prompt)
        return f"{image_id}|{prompt if question is None else question}"

    def _annotations(self, data: Path) -> dict[str, list[str]]:
        """Return the ten answers per key; of two annotations for one image and question the last counts."""
        path = self.path(data, ANNOTATIONS)
        entries = read_json(path, dict, self.source(ANNOTATIONS)).get("data")
        if not isinstance(entries, list) or not entries:
            raise DataError(f"{path} has no list under 'data'. {self.source(ANNOTATIONS)}")
        found: dict[str, list[str]] = {}
        for entry in entries:
            try:
                found[f"{entry['image_id']}|{entry['question'].lower()}"] = entry["answers"]
            except (KeyError, TypeError, AttributeError):
                raise DataError(
                    f"{path}: an entry lacks image_id, question or answers (the test annotations have no answers): "
                    f"{str(entry)[:80]}. {self.source(ANNOTATIONS)}"
                ) from None
        return found

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score every annotated question that has a prediction."""
        annotations = self._annotations(data)
        joined = self.join(list(annotations), answers)
        credit = {
            key: evalai_accuracy(joined.by_key[key]["text"], human)
            for key, human in annotations.items()
            if key in joined.by_key
        }
        return self._score("default", credit, len(annotations), {"problems": joined.problems})

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Average over the lines of the answer file."""
        annotations = self._annotations(data)
        credits = []
        for answer in clean_or_stop(answers):
            question = question_of(str(answer.get("prompt", "")))
            if question is None:
                raise OfficialError("AssertionError", f"no question in the prompt {str(answer.get('prompt'))[:80]!r}")
            human = annotations.get(f"{answer['question_id']}|{question}")
            if human is None:
                key = (answer["question_id"], question)
                raise OfficialError(f"KeyError: {key}", "the image has no such question")
            if len(human) != N_ANSWERS:
                raise OfficialError("AssertionError", f"{len(human)} instead of {N_ANSWERS} human answers")
            credits.append((self.answer_key(answer), evalai_accuracy(answer["text"], human)))
        if not credits:
            raise OfficialError("ZeroDivisionError: division by zero", f"{answers.path} has no prediction")
        keys = number_repeats(key for key, _ in credits)
        per_record = {key: value for key, (_, value) in zip(keys, credits, strict=True)}
        return self._score("official", per_record, len(annotations), {})

    def _score(self, mode: Mode, credit: dict[str, float], n_records: int, extra: dict[str, Any]) -> Score:
        accuracy = sum(credit.values()) / len(credit)
        return self.result(
            mode,
            100 * accuracy,
            {"accuracy": accuracy, "samples": len(credit)},
            n_records=n_records,
            per_record=credit,
            **extra,
        )
