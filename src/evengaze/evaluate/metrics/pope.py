"""POPE: yes/no answers about objects, per split (AoiDragon/POPE `evaluate.py`, LLaVA `eval_pope.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def text_to_label(text: str) -> str:
    """Read "yes" or "no" from an answer.

    Only the first sentence counts; "no" needs a word that is exactly No, no or not; everything else is yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "no", "not") for word in words) else "yes"


@dataclass(frozen=True)
class Confusion:
    """Counts of one split; `answers` and `yes` also cover answers that no label was paired with."""

    tp: int
    fp: int
    tn: int
    fn: int
    answers: int
    yes: int

    @classmethod
    def count(cls, predicted: Sequence[str], labels: Sequence[str]) -> Confusion:
        """Pair predictions and labels by position; the longer list's rest is not paired."""
        pairs = list(zip(predicted, labels, strict=False))
        return cls(
            tp=pairs.count(("yes", "yes")),
            fp=pairs.count(("yes", "no")),
            tn=pairs.count(("no", "no")),
            fn=pairs.count(("no", "yes")),
            answers=len(predicted),
            yes=sum(label == "yes" for label in predicted),
        )

    def metrics(self) -> dict[str, float]:
        """Return accuracy, precision, recall, F1 and yes ratio.

        Raises:
            ZeroDivisionError: As in the official script: no answer, no yes-prediction or no yes-label.
        """
        precision = self.tp / (self.tp + self.fp)
        recall = self.tp / (self.tp + self.fn)
        return {
            "accuracy": (self.tp + self.tn) / (self.tp + self.tn + self.fp + self.fn),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "yes_ratio": self.yes / self.answers,
        }

    def guarded_metrics(self) -> dict[str, float]:
        """Return the same numbers with the usual convention that an undefined precision, recall or F1 is 0.

        Raises:
            ZeroDivisionError: There is no answer at all.
        """
        f1 = 2 * self.tp + self.fp + self.fn
        return {
            "accuracy": (self.tp + self.tn) / (self.tp + self.tn + self.fp + self.fn),
            "precision": self.tp / max(self.tp + self.fp, 1),
            "recall": self.tp / max(self.tp + self.fn, 1),
            "f1": 2 * self.tp / f1 if f1 else 0.0,
            "yes_ratio": self.yes / self.answers,
        }
