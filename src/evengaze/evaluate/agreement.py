"""How often a pruned model answers as the dense one does, and where not; this needs no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evengaze.evaluate.metrics.normalize import evalai_normalize


@dataclass(frozen=True)
class Flip:
    """A question that is answered otherwise than by the dense model.

    Attributes:
        key: the record's key.
        prompt: the question.
        dense: the dense model's answer.
        answer: the pruned model's.
        dense_credit: what the dense model's answer is worth, from 0 to 1; None if that is not known.
        credit: the same of the pruned model's.
    """

    key: str
    prompt: str
    dense: str
    answer: str
    dense_credit: float | None = None
    credit: float | None = None

    @property
    def change(self) -> float:
        """How much was won (above 0) or lost; 0 if it is not known what both answers are worth."""
        return 0.0 if self.credit is None or self.dense_credit is None else self.credit - self.dense_credit


@dataclass(frozen=True)
class Agreement:
    """Answers of a pruned and of the dense model to the same questions.

    Attributes:
        count: questions that both have answered.
        flips: those that they answer differently, in the dataset's order.
    """

    count: int
    flips: tuple[Flip, ...]

    @property
    def share(self) -> float:
        """Share of equal answers."""
        return 1 - len(self.flips) / self.count

    @property
    def won(self) -> int:
        """Answers that became better."""
        return sum(flip.change > 0 for flip in self.flips)

    @property
    def lost(self) -> int:
        """Answers that became worse."""
        return sum(flip.change < 0 for flip in self.flips)


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are equal, up to what VQA's normalisation takes for equal (unless nothing is left by it)."""
    if one.strip() == other.strip():
        return True
    normal = evalai_normalize(one)
    return bool(normal) and normal == evalai_normalize(other)


def agree(
    dense: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, Mapping[str, Any]],
    dense_credits: Mapping[str, float],
    credits: Mapping[str, float],
) -> Agreement | None:
    """Compare answers with the dense model's.

    Args:
        dense: the dense model's answer lines by key.
        answers: the other's.
        dense_credits: what the dense model's answers are worth, by key, as far as known.
        credits: the same of the other's.

    Returns:
        None if they have no question in common.
    """
    common = [key for key in dense if key in answers]
    if not common:
        return None
    flips = [
        Flip(
            key,
            str(answers[key].get("prompt", "")),
            str(dense[key]["text"]),
            str(answers[key]["text"]),
            dense_credits.get(key),
            credits.get(key),
        )
        for key in common
        if not same_answer(str(dense[key]["text"]), str(answers[key]["text"]))
    ]
    return Agreement(len(common), tuple(flips))
