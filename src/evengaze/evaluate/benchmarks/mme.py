"""MME (`convert_answer_to_mme.py` of LLaVA's eval.zip; BradyFU `eval_tool/calculation.py`)."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evengaze.errors import DataError
from evengaze.evaluate.benchmarks.base import Benchmark, clean_or_stop
from evengaze.evaluate.benchmarks.rows import number_repeats, read_rows
from evengaze.evaluate.benchmarks.types import (
    EVAL_ZIP,
    DataFile,
    Mode,
    OfficialError,
    Problems,
    Record,
    Score,
    ScoreOptions,
)
from evengaze.evaluate.jsonl import Answer, Lines
from evengaze.evaluate.metrics.mme import COGNITION, PERCEPTION, parse_result_file, read_label, subtask_metrics, totals
from evengaze.files import read_bytes, write_whole

QUESTIONS = "llava_mme.jsonl"
TREE = "MME_Benchmark_release_version"
RESULTS = "eval_tool/Your_Results"
_REPO = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
_FORMAT = "Answer the question using a single word or phrase."
_YES_NO = " Please answer yes or no."

Truth = dict[tuple[str, str, str], str]
"""Answer by subtask, text file and question."""


class MME(Benchmark):
    """MME: perception total over ten subtasks; cognition over four beside it."""

    name = "mme"
    title = "MME"
    split = "test"
    size = 2374
    metric = "perception (of 2000)"
    folders = ("MME", "mme")
    files = (
        DataFile(QUESTIONS, EVAL_ZIP, needed="run"),
        DataFile(TREE, _REPO, "dir", instead=RESULTS),
    )
    form = "yes or no"
    quirks = (
        "it takes consecutive lines for the two questions of an image",
        "a tab or newline in an answer, an odd number of answers or an absent subtask stops it",
    )

    def in_form(self, text: str) -> bool:
        """Whether the official scorer finds yes or no."""
        return read_label(text) != "other"

    def records(self, data: Path) -> Iterator[Record]:
        """Yield the questions; two consecutive ones ask about one image."""
        rows = read_rows(self.path(data, QUESTIONS), EVAL_ZIP)
        images = self.path(data, TREE)
        for key, row in zip(number_repeats(_key(r["question_id"], r["text"]) for r in rows), rows, strict=True):
            yield Record(key, row["question_id"], row["text"], images / row["image"])

    def answer_key(self, answer: Answer) -> str:
        """Return subtask, image and question."""
        return _key(str(answer["question_id"]), str(answer.get("prompt", "")))

    # -- ground truth --------------------------------------------------------------------------------------------

    def truth(self, data: Path) -> Truth:
        """Read the question texts and answers, from the benchmark's tree or else from the evaluation tool's files.

        Raises:
            DataError: Neither is there, or a line is malformed.
        """
        self.require(data, "score")
        tree = self.path(data, TREE)
        return self._tree_truth(tree) if tree.is_dir() else self._tool_truth(self.path(data, RESULTS))

    def _tree_truth(self, tree: Path) -> Truth:
        found: Truth = {}
        for folder in sorted(path for path in tree.iterdir() if path.is_dir()):
            inner = folder / "questions_answers_YN"
            for path in sorted((inner if inner.is_dir() else folder).glob("*.txt")):
                for number, line in enumerate(_lines(path), 1):
                    parts = line.strip().split("\t")
                    if parts == [""]:
                        continue
                    if len(parts) != 2:
                        raise DataError(
                            f"{path} line {number} has {len(parts)} tab-separated columns, question and answer were "
                            f"expected. Get it from {_REPO}"
                        )
                    _add(found, (folder.name, path.name, parts[0]), parts[1], path)
        if not found:
            raise DataError(f"{tree} holds no question (<subtask>/*.txt). Get it from {_REPO}")
        return found

    def _tool_truth(self, folder: Path) -> Truth:
        found: Truth = {}
        for path in sorted(folder.glob("*.txt")):
            for line in _lines(path):
                parts = line.rstrip("\n").split("\t")
                if len(parts) >= 3:
                    _add(found, (path.stem, f"{parts[0].split('.')[0]}.txt", parts[1]), parts[2], path)
        if not found:
            raise DataError(f"{folder} holds no <subtask>.txt with image, question and answer. Get it from {_REPO}")
        return found

    # -- scoring -------------------------------------------------------------------------------------------------

    def read_answers(self, answers: Path) -> Lines:
        """Read an answer file, or a folder of `<subtask>.txt` result files as the evaluation tool takes it."""
        if not answers.is_dir():
            return super().read_answers(answers)
        return Lines(answers, ())

    def breakdown(self, metrics: dict[str, Any]) -> dict[str, float]:
        """See `Benchmark.breakdown`."""
        return {name: part["score"] for name, part in metrics["subtasks"].items()}

    def score_default(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Score by image and question, whatever the order of the answers."""
        if answers.path.is_dir():
            return self._score("default", self._result_files(answers.path), Problems(), 0, {})
        truth = self.truth(data)
        keys = {_joined(*name): name for name in truth}
        joined = self.join(list(keys), answers)
        images: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)
        for key, (subtask, file, question) in keys.items():
            true = truth[subtask, file, question].lower()
            label = read_label(joined.by_key[key]["text"]) if key in joined.by_key else ""
            images[subtask, file].append((key, label, true))
        subtasks: dict[str, Any] = {}
        groups: dict[str, list[list[tuple[str, str]]]] = defaultdict(list)
        answered: dict[str, list[bool]] = defaultdict(list)
        credit: dict[str, float] = {}
        for (subtask, _), rows in images.items():
            present = [(label, true) for _, label, true in rows if label]
            answered[subtask] += [label == true for label, true in present]
            if len(present) == len(rows):
                groups[subtask].append(present)
            credit |= {key: float(label == true) for key, label, true in rows if label}
        for subtask, complete in groups.items():
            metrics = subtask_metrics(complete)
            acc = sum(answered[subtask]) / len(answered[subtask])
            subtasks[subtask] = {**metrics, "acc": acc, "score": 100 * acc + 100 * metrics["acc_plus"]}
            subtasks[subtask]["n_questions"] = len(answered[subtask])
        score = self._score("default", subtasks, joined.problems, len(keys), credit)
        if joined.problems.missing:
            score.notes.append("acc is over the answered questions, acc+ over the images with both questions answered.")
        return score

    def score_official(self, answers: Lines, data: Path, options: ScoreOptions) -> Score:
        """Convert and calculate as upstream."""
        if answers.path.is_dir():
            return self._score("official", self._result_files(answers.path), Problems(), 0, {})
        texts = self.convert(answers, data)
        return self._score("official", self._calculate(texts), Problems(), len(self.truth(data)), {})

    def convert(self, answers: Lines, data: Path) -> dict[str, str]:
        """Return the evaluation tool's result files by subtask, as `convert_answer_to_mme.py` writes them.

        Raises:
            OfficialError: An answer's question is unknown.
        """
        truth = self.truth(data)
        texts: dict[str, list[str]] = defaultdict(list)
        for answer in clean_or_stop(answers):
            subtask, file, question = _names(str(answer["question_id"]), str(answer.get("prompt", "")))
            if (subtask, file, question) not in truth:
                question = question.replace(_YES_NO, f" {_YES_NO}")
            name = (subtask, file, question)
            if name not in truth:
                raise OfficialError(f"KeyError: {name}", "the benchmark has no such question")
            texts[subtask].append("\t".join((file, question, truth[name], answer["text"])))
        return {subtask: "".join(f"{line}\n" for line in lines) for subtask, lines in texts.items()}

    def _calculate(self, texts: dict[str, str]) -> dict[str, Any]:
        subtasks = {}
        for subtask in (*PERCEPTION, *COGNITION):
            if subtask not in texts:
                raise OfficialError("FileNotFoundError", f"there is no {subtask}.txt")
            try:
                subtasks[subtask] = subtask_metrics(parse_result_file(texts[subtask]))
            except (ValueError, AssertionError) as error:
                official = f"{type(error).__name__}: {error}".removesuffix(": ")
                raise OfficialError(
                    official, f"the {subtask} answers do not pair up or hold a tab or newline"
                ) from None
        return subtasks

    def _result_files(self, folder: Path) -> dict[str, Any]:
        return self._calculate({path.stem: "".join(_lines(path)) for path in sorted(folder.glob("*.txt"))})

    def _score(
        self, mode: Mode, subtasks: dict[str, Any], problems: Problems, n_records: int, credit: dict[str, float]
    ) -> Score:
        sums = totals(subtasks)
        absent = [name for name in (*PERCEPTION, *COGNITION) if name not in subtasks]
        n_scored = sum(item["n_questions"] for item in subtasks.values())
        return self.result(
            mode,
            sums["perception"]["total"],
            {**sums, "subtasks": subtasks},
            n_records=n_records or n_scored,
            n_scored=n_scored,
            problems=problems,
            per_record=credit,
            notes=[f"No total over subtasks without a scorable image: {', '.join(absent)}."] if absent else [],
        )

    def write_submission(self, answers: Path, data: Path, out: Path) -> dict[str, Any]:
        """Write a folder of `<subtask>.txt` files for the evaluation tool."""
        texts = self.convert(self.read_answers(answers), data)
        for subtask, text in texts.items():
            write_whole(out / f"{subtask}.txt", text)
        return {"path": str(out), "subtasks": sorted(texts)}


def _add(found: Truth, name: tuple[str, str, str], answer: str, path: Path) -> None:
    if found.setdefault(name, answer).lower() != answer.lower():
        raise DataError(f"{path} answers {name[2]!r} with {found[name]!r} and with {answer!r}. Get it from {_REPO}")


def _lines(path: Path) -> list[str]:
    try:
        return io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=None).readlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text. Get it from {_REPO}") from None


def _names(question_id: str, prompt: str) -> tuple[str, str, str]:
    """Return subtask, text file and question of an answer, as `convert_answer_to_mme.py` derives them."""
    file = question_id.split("/")[-1].split(".")[0] + ".txt"
    question = prompt.replace(_FORMAT, "").strip() if _FORMAT in prompt else prompt
    if "Please answer yes or no." not in question:
        question += _YES_NO
    return question_id.split("/")[0], file, question


def _key(question_id: str, prompt: str) -> str:
    return _joined(*_names(question_id, prompt))


def _joined(subtask: str, file: str, question: str) -> str:
    """The key of a question, whatever it says of how to answer."""
    return f"{subtask}/{Path(file).stem}|{question.replace(_YES_NO, '').strip()}"
