"""VQA accuracy against ten human answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evengaze.evaluate.metrics.normalize import evalai_normalize, fold_whitespace, vqa_normalize


def leave_one_out(matches: Sequence[bool]) -> float:
    """Average of min(1, matches / 3) over all subsets that leave one annotator out (Antol et al. 2015, section 3.3).

    Args:
        matches: For every annotator, whether the answer is the predicted one.

    Returns:
        Credit in [0, 1]; for ten annotators 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4 or more matches.
    """
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def evalai_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Credit with EvalAI's normaliser on both sides (LLaVA `m4c_evaluator.py`; lmms-eval for VizWiz)."""
    wanted = evalai_normalize(prediction)
    return leave_one_out([evalai_normalize(answer) == wanted for answer in answers])


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Credit as in GT-Vision-Lab/VQA `vqaEval.py`.

    Normalises only when the annotators do not all agree; otherwise the comparison is raw and case-sensitive.
    """
    wanted, given = fold_whitespace(prediction), [fold_whitespace(answer) for answer in answers]
    if len(set(given)) > 1:
        wanted, given = vqa_normalize(wanted), [vqa_normalize(answer) for answer in given]
    return leave_one_out([answer == wanted for answer in given])


def vqa_report(
    credits: Mapping[Any, float], answer_type: Mapping[Any, str], question_type: Mapping[Any, str]
) -> dict[str, Any]:
    """Average credits as `vqaEval.py` does: overall, per answer type and per question type, in percent.

    Args:
        credits: Credit per question id.
        answer_type: "yes/no", "number" or "other" per question id.
        question_type: First words of the question per question id.
    """

    def mean(ids: list[Any]) -> float:
        return 100 * sum(credits[i] for i in ids) / len(ids)

    def by(kind: Callable[[Any], str]) -> dict[str, float]:
        groups: dict[str, list[Any]] = {}
        for i in credits:
            groups.setdefault(kind(i), []).append(i)
        return {name: mean(ids) for name, ids in groups.items()}

    return {
        "overall": mean(list(credits)),
        "perAnswerType": by(answer_type.__getitem__),
        "perQuestionType": by(question_type.__getitem__),
    }
