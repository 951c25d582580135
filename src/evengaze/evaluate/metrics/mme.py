"""MME: accuracy and accuracy+ over 14 subtasks (BradyFU `eval_tool/calculation.py`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_label(text: str) -> str:
    """Read "yes", "no" or "other" from an answer: the whole of it, else its first four characters."""
    answer = text.lower()
    if answer in ("yes", "no"):
        return answer
    start = answer[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def subtask_metrics(images: Sequence[Sequence[tuple[str, str]]]) -> dict[str, Any]:
    """Score one subtask.

    Args:
        images: Per image the (prediction label, true label) of its questions.

    Returns:
        `acc`, `acc_plus` (share of images with every question right), `score` = 100 (acc + acc+), `other`
        (answers that are neither yes nor no; they count as wrong), `n_questions`.
    """
    pairs = [pair for image in images for pair in image]
    acc = sum(predicted == true for predicted, true in pairs) / len(pairs)
    acc_plus = sum(all(predicted == true for predicted, true in image) for image in images) / len(images)
    return {
        "acc": acc,
        "acc_plus": acc_plus,
        "score": acc * 100 + acc_plus * 100,
        "other": sum(predicted == "other" for predicted, _ in pairs),
        "n_questions": len(pairs),
    }


def parse_result_file(text: str) -> list[list[tuple[str, str]]]:
    """Read a result file as `calculation.py` does: consecutive pairs of lines, four tab-separated columns each.

    Args:
        text: `file<TAB>question<TAB>truth<TAB>answer` lines.

    Returns:
        Per pair of lines the (prediction label, true label) of both.

    Raises:
        ValueError: A line has not exactly four columns.
        AssertionError: The number of lines is odd, or a truth is neither yes nor no.
    """
    lines = io.StringIO(text, newline=None).readlines()
    images = []
    for start in range(0, len(lines), 2):
        pair = lines[start : start + 2]
        if len(pair) != 2:
            raise AssertionError("")
        image = []
        for line in pair:
            columns = line.split("\t")
            if len(columns) != 4:
                problem = "too many" if len(columns) > 4 else "not enough"
                got = "" if len(columns) > 4 else f", got {len(columns)}"
                raise ValueError(f"{problem} values to unpack (expected 4{got})")
            truth, answer = columns[2:]
            if truth.lower() not in ("yes", "no"):
                raise AssertionError("")
            image.append((read_label(answer), truth.lower()))
        images.append(image)
    return images


def totals(subtasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sum subtask scores into perception (at most 2000) and cognition (at most 800).

    Args:
        subtasks: `subtask_metrics` by name.

    Returns:
        `perception` and `cognition` with `total` (None when a subtask is absent) and `subtasks`.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        scores = {member: subtasks[member]["score"] for member in members if member in subtasks}
        total: float | None = sum(scores.values()) if len(scores) == len(members) else None
        result[name] = {"total": total, "subtasks": scores}
    return result
