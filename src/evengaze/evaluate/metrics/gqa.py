"""GQA: accuracy and its breakdowns, validity, plausibility, consistency, distribution (GQA `eval.py`)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

Question = Mapping[str, Any]
# Steps that only read out the answer do not count as reasoning.
_FINAL_STEPS = ("exist", "query: name", "choose name")


def clean_prediction(text: str) -> str:
    """Bring a model's answer to GQA's form (LLaVA `convert_gqa_for_eval.py`): no final periods, lower case."""
    return text.rstrip(".").lower()


def count_steps(question: Question) -> int:
    """Count reasoning steps of a question's functional program."""
    steps = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(final in step for final in _FINAL_STEPS) for step in steps)


def _percent(values: Iterable[float]) -> float:
    items = list(values)
    return 100 * (sum(items) / len(items)) if items else 0


def _in_group(answer: str, group: list[str], question: Question) -> bool:
    """Whether an answer is among the listed ones; "...Common" questions ask for the name of an attribute."""
    listed = ["color", "material", "shape"] if "Common" in question["types"]["detailed"] else group
    return answer in listed


def distribution(questions: Iterable[Question], predictions: Iterable[str]) -> float:
    """Chi-square distance of predicted and true answers within each global group, weighted by group size, over 100.

    Raises:
        ZeroDivisionError: No question has a global group.
    """
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for question, prediction in zip(questions, predictions, strict=True):
        group = question["groups"]["global"]
        if group is not None:
            gold[group][question["answer"]] += 1
            predicted[group][prediction] += 1
    total = weighted = 0.0
    for group, counts in gold.items():
        chi_square = sum((predicted[group][answer] - n) ** 2 / n for answer, n in counts.items())
        weighted += chi_square * counts.total()
        total += counts.total()
    return weighted / total / 100


def consistency(questions: Mapping[str, Question], predictions: Mapping[str, str], ids: Iterable[str]) -> float:
    """Mean accuracy on the questions that a rightly answered question entails, in percent.

    Args:
        questions: All questions by id.
        predictions: Predictions by id; entailed questions without one are left out.
        ids: The balanced questions to start from.
    """
    scores = []
    for key in ids:
        if predictions[key] != questions[key]["answer"]:
            continue
        entailed = [other for other in questions[key]["entailed"] if other != key and other in predictions]
        if entailed:
            right = [predictions[other] == questions[other]["answer"] for other in entailed]
            scores.append(sum(right) / len(right))
    return _percent(scores)


def evaluate(
    questions: Mapping[str, Question],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, list[str]]] | None = None,
    with_consistency: bool = False,
) -> dict[str, Any]:
    """Compute every number of GQA's `eval.py` that needs no attention maps.

    Args:
        questions: `<tier>_questions.json`.
        predictions: Cleaned predictions by question id. Balanced questions without one are left out.
        choices: `<tier>_choices.json`, or None: then validity and plausibility are 0, as upstream prints them.
        with_consistency: Compute consistency (0 otherwise, as upstream).

    Returns:
        Upstream's names: accuracy, binary, open, validity, plausibility, consistency, distribution, and
        `accuracyPer{StructuralType,SemanticType,Length,Steps}` with accuracy and count each.

    Raises:
        ZeroDivisionError: No question has a global group.
    """
    ids = [key for key, question in questions.items() if question["isBalanced"] and key in predictions]
    right = {key: float(predictions[key] == questions[key]["answer"]) for key in ids}
    tables: dict[str, dict[str, list[float]]] = {
        name: defaultdict(list)
        for name in (
            "",
            "accuracyPerStructuralType",
            "accuracyPerSemanticType",
            "accuracyPerLength",
            "accuracyPerSteps",
        )
    }
    for key in ids:
        question = questions[key]
        structural = question["types"]["structural"]
        kinds = (
            "open" if structural == "query" else "binary",
            structural,
            question["types"]["semantic"],
            str(len(question["question"].split())),
            str(count_steps(question)),
        )
        for table, kind in zip(tables.values(), kinds, strict=True):
            table[kind].append(right[key])
    by_answer = tables.pop("")

    def listed(kind: str) -> float:
        if choices is None:
            return 0.0
        return _percent(_in_group(predictions[key], choices[key][kind], questions[key]) for key in ids)

    return {
        "accuracy": _percent(right.values()),
        "binary": _percent(by_answer["binary"]),
        "open": _percent(by_answer["open"]),
        "validity": listed("valid"),
        "plausibility": listed("plausible"),
        "consistency": consistency(questions, predictions, ids) if with_consistency else 0,
        **{
            name: {kind: {"accuracy": _percent(values), "count": len(values)} for kind, values in table.items()}
            for name, table in tables.items()
        },
        "grounding": 0,
        "distribution": distribution((questions[key] for key in ids), (predictions[key] for key in ids)),
    }
