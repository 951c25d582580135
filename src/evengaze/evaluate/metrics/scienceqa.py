"""ScienceQA: reading an option from an answer (LLaVA `llava/eval/eval_science_qa.py`)."""

from __future__ import annotations

import re

LETTERS = "ABCDE"
FAILED = "FAILED"
# The final dot is a wildcard upstream: any one character but a newline.
_STATED = re.compile(r"The answer is ([A-Z]).")


def parse_answer(text: str) -> str:
    """Read a letter from an answer, or `FAILED`.

    Taken are exactly one letter A-E, a letter followed by ". ", and "The answer is X" when it occurs once and a
    character follows.
    """
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    stated: list[str] = _STATED.findall(text)
    return stated[0] if len(stated) == 1 else FAILED


def option_index(letter: str, n_choices: int) -> int:
    """Return the option a letter names, or -1 when there is no such option."""
    return LETTERS[:n_choices].find(letter) if len(letter) == 1 else -1
