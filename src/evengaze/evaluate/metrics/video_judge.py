"""Video question answering: the judge's prompt, reading its verdict, averaging (Video-LLaVA `eval_video_qa.py`).

The judge and its prompt come from Video-ChatGPT.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from typing import Any

from evengaze.evaluate.judge import Judge, JudgeError

OFFICIAL_JUDGE = "gpt-3.5-turbo"
# Upstream asks without end; a judge that does not follow the format five times will not.
MAX_TRIES = 5

# The judge's wording is part of the metric.
_SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for "
    "question-answer pairs. Your task is to compare the predicted answer with the correct answer and "
    "determine if they match meaningfully. Here's how you can accomplish the task:------##INSTRUCTIONS: - "
    "Focus on the meaningful match between the predicted answer and the correct answer.\n- Consider "
    "synonyms or paraphrases as valid matches.\n- Evaluate the correctness of the prediction compared to "
    "the answer."
)
_USER = (
    "Please evaluate the following video-based question-answer pair:\n\nQuestion: {question}\nCorrect Answer: "
    "{answer}\nPredicted Answer: {prediction}\n\nProvide your evaluation only as a yes/no and score where the "
    "score is an integer value between 0 and 5, with 5 indicating the highest meaningful match. Please "
    "generate the response in the form of a Python dictionary string with keys 'pred' and 'score', where "
    "value of 'pred' is  a string of 'yes' or 'no' and value of 'score' is in INTEGER, not STRING.DO NOT "
    "PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary string. For example, "
    "your response should look like this: {{'pred': 'yes', 'score': 4.8}}."
)
PROMPT = f"{_SYSTEM}\n\n{_USER}"


def build_messages(question: str, answer: str, prediction: str) -> list[dict[str, str]]:
    """Write the judge's messages for one answer."""
    user = _USER.format(question=question, answer=answer, prediction=prediction)
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": user}]


def read_verdict(reply: str) -> Any:
    """Read the Python literal that a reply is.

    Raises:
        ValueError: It is none, or one that upstream could not have stored.
    """
    try:
        verdict = ast.literal_eval(reply)
        json.dumps(verdict)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a Python literal: {error}") from None
    return verdict


def read_pair(verdict: Any) -> tuple[bool, int]:
    """Read (right or wrong, score) from a verdict, with upstream's readings ("not sure" is no, 4.8 is 4).

    Raises:
        ValueError: It has no score, or neither yes nor no.
    """
    try:
        score = int(verdict["score"])
        said = verdict["pred"].lower()
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError) as error:
        raise ValueError(f"no 'pred' and 'score' in {str(verdict)[:80]}: {error!r}") from None
    if "yes" not in said and "no" not in said:
        raise ValueError(f"'pred' is {said!r}, neither yes nor no")
    return "yes" in said, score


def judge_answer(judge: Judge, messages: list[dict[str, str]], official: bool) -> Any:
    """Have one answer judged; a reply that cannot be read is asked for again.

    Args:
        judge: The judge.
        messages: See `build_messages`.
        official: Take any literal, as upstream; else only a usable verdict.

    Raises:
        JudgeError: No usable reply.
    """
    problem = ""
    for number in range(1, MAX_TRIES + 1):
        reply = judge.ask(messages, None, None, f"try {number}")
        try:
            verdict = read_verdict(reply.text)
            if not official:
                read_pair(verdict)
            return verdict
        except ValueError as error:
            problem = str(error)
    raise JudgeError(f"no usable verdict in {MAX_TRIES} replies: {problem}")


def aggregate_official(verdicts: Iterable[Any]) -> dict[str, Any]:
    """Average as upstream: an unusable verdict still counts in the score's denominator, not in the accuracy's.

    Raises:
        ZeroDivisionError: There is no verdict, or none with yes or no.
    """
    yes = no = total = count = 0
    for verdict in verdicts:
        count += 1
        try:
            total += int(verdict["score"])
            said = verdict["pred"].lower()
            if "yes" in said:
                yes += 1
            elif "no" in said:
                no += 1
        except (TypeError, KeyError, ValueError, OverflowError, AttributeError):
            continue
    return {
        "accuracy": yes / (yes + no),
        "average_score": total / count,
        "yes_count": yes,
        "no_count": no,
        "n": count,
    }


def aggregate(pairs: Iterable[tuple[bool, int]]) -> dict[str, Any]:
    """Average usable verdicts, accuracy and score over the same items."""
    items = list(pairs)
    yes = sum(right for right, _ in items)
    return {
        "accuracy": yes / len(items),
        "average_score": sum(score for _, score in items) / len(items),
        "yes_count": yes,
        "no_count": len(items) - yes,
        "n": len(items),
    }
