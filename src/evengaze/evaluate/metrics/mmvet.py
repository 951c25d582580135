"""MM-Vet: the judge's prompt, reading its grade, averaging over capabilities (yuweihao/MM-Vet evaluator)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evengaze.evaluate.judge import Judge, JudgeError

OFFICIAL_JUDGE = "gpt-4-0613"
MAX_TOKENS = 3
# Temperatures of the repetitions after an unreadable reply.
_REPEATS = (0.0, 0.5, 1.0, 1.5, 2.0)
_AGAIN = "\nPredict the correctness of the answer (digit): "

_EQUATION = "What is x in the equation? | -1 <AND> -5 | "
_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries "
    "Iceland and Greenland are misleading. Despite its name, Iceland is known for its beautiful green "
    "landscapes, while Greenland is mostly covered in ice and snow. The meme is saying that the person has "
    "trust issues because the names of these countries do not accurately represent their landscapes. | "
)
# The judge's wording is part of the metric.
_RULE = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the "
    "prediction. <AND> in the ground truth means it is totally right only when all elements in the ground "
    "truth are present in the prediction, and <OR> means it is totally right when any one element in the "
    "ground truth is present in the prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, "
    "0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the last space of the "
    "correctness score."
)
_VAGUE = (
    "The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is "
    "not very icy and Greenland isn't very green. | 0.4"
)
_EXACT = (
    "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. "
    "Iceland, despite its name, has lush green landscapes while Greenland is mostly covered in ice and "
    "snow. The text 'This is why I have trust issues' is a playful way to suggest that these "
    "contradictions can lead to distrust or confusion. The humor in this meme is derived from the "
    "unexpected contrast between the names of the countries and their actual physical characteristics. | 1.0"
)
PROMPT = "\n".join(
    [
        _RULE,
        "",
        "Question | Ground truth | Prediction | Correctness",
        "--- | --- | --- | ---",
        f"{_EQUATION}x = 3 | 0.0",
        f"{_EQUATION}x = -1 | 0.5",
        f"{_EQUATION}x = -5 | 0.5",
        f"{_EQUATION}x = -5 or 5 | 0.5",
        f"{_EQUATION}x = -1 or x = -5 | 1.0",
        _MEME + _VAGUE,
        _MEME + _EXACT,
        "",
    ]
)


def build_question(question: str, answer: str, prediction: str) -> str:
    """Write the judge's message for one answer."""
    spaced = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return PROMPT + "\n" + " | ".join((question, spaced, prediction, ""))


def read_grade(reply: str) -> float | None:
    """Read a grade in [0, 1] from what stands before the first space; None when there is none ("nan" passes)."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return None if grade > 1.0 or grade < 0.0 else grade


def grade(judge: Judge, message: str, turn: str, official: bool) -> dict[str, Any]:
    """Have one answer graded, asking again up to five times.

    Args:
        judge: The judge.
        message: See `build_question`.
        turn: Which run, for the cache.
        official: Ignore the fifth repetition's reply and grade 0 then, as upstream; else failing is an error.

    Returns:
        `model`, `content` and `score` as upstream stores them.

    Raises:
        JudgeError: No readable grade (not in official mode), or no reply.
    """
    tries = [("", 0.0), *((_AGAIN, temperature) for temperature in _REPEATS)]
    for number, (suffix, temperature) in enumerate(tries):
        messages = [{"role": "user", "content": message + suffix}]
        reply = judge.ask(messages, MAX_TOKENS, temperature, f"{turn}, try {number + 1}")
        last = number == len(tries) - 1
        if official and last:
            return {"model": reply.model, "content": reply.text, "score": 0.0}
        score = read_grade(reply.text)
        if score is not None and (official or score == score):
            return {"model": reply.model, "content": reply.text.split(" ")[0].strip(), "score": score}
    raise JudgeError(f"no grade between 0 and 1 in {len(tries)} replies; the last was {reply.text!r}")


def aggregate(grades: Mapping[str, Sequence[float]], capabilities: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Average grades per capability, per set of capabilities and in total.

    Args:
        grades: Per item, its grade in every run.
        capabilities: Per item of the dataset, what it needs. Sums are divided by how many items these are.

    Returns:
        `total`, `std` (of the totals of the runs), `runs`, `capabilities` and `capability_sets` (named by
        their sorted members), in percent and rounded to one decimal as upstream; `total_unrounded_per_run`.
    """
    n_runs = len(next(iter(grades.values())))
    count: dict[tuple[str, str], int] = defaultdict(int)
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * n_runs)

    def groups(item: str) -> list[tuple[str, str]]:
        needs = sorted(set(capabilities[item]))
        return [("total", ""), ("set", "_".join(needs)), *(("capability", name) for name in needs)]

    for item in capabilities:
        for group in groups(item):
            count[group] += 1
    for item, scores in grades.items():
        for group in groups(item):
            sums[group] = [total + score for total, score in zip(sums[group], scores, strict=True)]
    percent = {group: np.array(sums[group]) / n * 100 for group, n in count.items()}
    totals = percent["total", ""]

    def rounded(kind: str) -> dict[str, float]:
        return {name: float(np.round(values.mean(), 1)) for (of, name), values in percent.items() if of == kind}

    return {
        "total": float(np.round(totals.mean(), 1)),
        "std": float(np.round(totals.std(), 1)),
        "runs": [float(value) for value in np.round(totals, 1)],
        "total_unrounded_per_run": [float(value) for value in totals],
        "capabilities": rounded("capability"),
        "capability_sets": rounded("set"),
    }
