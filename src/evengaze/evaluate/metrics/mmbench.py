"""MMBench: reading an option from an answer, and circular accuracy.

A question is asked once per rotation of its options and counts only when every rotation is right. Three rules say which
option an answer names: the plain letter; VLMEvalKit's (`vlmeval/utils/matching_util.py`, what the leaderboard's
reference code uses without a GPT); lmms-eval's (`tasks/mmbench/mmbench_evals.py` with `eval_method="static"` and
`tasks/_task_utils/mcq_extract.py`). With bare-letter answers all three agree.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

Choices = Mapping[str, str]
"""Option text by letter; missing options are left out."""

MILLION = 1_000_000
"""Rotations of a question have its index plus multiples of this."""

ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def letter_rule(answer: str, choices: Choices) -> str | None:
    """Take the answer when it is exactly an option letter."""
    return answer if len(answer) == 1 and answer in "ABCDE" else None


# -- VLMEvalKit ----------------------------------------------------------------------------------------------------

_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


def _vlmevalkit_letter(answer: str, choices: Choices) -> str | None:
    if _FAILED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(_MARKS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    stated = _STATED.search(answer)
    return stated.group(1).upper() if stated and stated.group(1).upper() in choices else None


def _by_text(answer: str, choices: Choices) -> str | None:
    """Return the only option whose text occurs in the answer, ignoring case."""
    lowered = answer.lower()
    found = [letter for letter, text in choices.items() if text.lower() in lowered]
    return found[0] if len(found) == 1 else None


def vlmevalkit_rule(answer: str, choices: Choices) -> str | None:
    """Infer as VLMEvalKit does before it would ask a GPT; "Z" stands for a refusal."""
    letter = _vlmevalkit_letter(answer, choices)
    if letter:
        return letter
    if len(answer.lower()) > 2 * sum(len(text) for text in choices.values()):
        return None
    return _by_text(answer, choices)


# -- lmms-eval -----------------------------------------------------------------------------------------------------

# (what stands before the letter, what stands after it), in the order they are tried.
_FRAMES = (
    *(("", after) for after in (".", ",", ":", ")", ").")),
    *(("(", after) for after in (")", ").")),
    *((":", after) for after in ("", ",", ".", ")", ").")),
)


def lmms_eval_rule(answer: str, choices: Choices) -> str | None:
    """Infer as lmms-eval does before its fallback: the older MMBench rules."""
    if _FAILED not in answer:
        words = answer.split()
        # "A" in a longer answer may be the article.
        frames = _FRAMES if "A" in words and len(words) > 3 else (("", ""), *_FRAMES)
        for before, after in frames:
            named = [letter for letter in "ABCDE" if before + letter + after in words]
            if len(named) == 1:
                return named[0]
    return _by_text(answer, choices)


_PHRASES = (
    *(f"{article}answer is" for article in ("the ", "", "the correct ", "correct ", "the best ", "best ", "my ")),
    *(f"{article}option is" for article in ("the correct ", "correct ", "the best ", "best ")),
    *(f"{article}choice is" for article in ("the ", "", "the correct ", "correct ", "my ")),
    *("i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def extract_choice(answer: str, letters: Sequence[str]) -> str | None:
    """Pick the most telling mention of a letter: by how it is written, then the last one.

    lmms-eval `extract_mcq_answer`, its fallback in static mode.

    Args:
        answer: The answer.
        letters: Valid letters.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare = text.strip()
    text = f" {text} "
    lowered = text.lower()
    starts = [lowered.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in lowered]
    mentions: list[tuple[int, int, str]] = []
    for letter in letters:
        for rank, form in (
            (6, f"({letter})"),
            (5, f"{letter}."),
            (4, f"{letter}:"),
            (3, f"{letter})"),
            (2, f"{letter} "),
        ):
            if form in text:
                mentions.append((rank, text.rfind(form), letter))
        mentions += [(7, at, letter) for at in (text.find(letter, start) for start in starts) if at != -1]
        if bare.startswith(letter) and (len(bare) == 1 or not bare[1].isalpha()):
            mentions.append((10, 0, letter))
        if bare.endswith(letter) and (len(bare) == 1 or not bare[-2].isalpha()):
            mentions.append((9, len(text) - 1, letter))
    if not mentions:
        mentions = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(mentions)[2] if mentions else None


def lmms_eval_static_rule(answer: str, choices: Choices) -> str | None:
    """Infer as lmms-eval does in static mode, fallback included."""
    return lmms_eval_rule(answer, choices) or (extract_choice(answer, sorted(choices)) if answer.strip() else None)


RULES: dict[str, Callable[[str, Choices], str | None]] = {
    "letter": letter_rule,
    "vlmevalkit": vlmevalkit_rule,
    "lmms-eval": lmms_eval_static_rule,
}


# -- accuracy ------------------------------------------------------------------------------------------------------


def circular_groups(indices: Sequence[int]) -> dict[int, list[int]]:
    """Group the rotations of a question under its own index; groups without that row are left out."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index in indices:
        groups[index % MILLION].append(index)
    present = set(indices)
    return {main: groups[main] for main in indices if main < MILLION and main in present}


def circular_hits(inferred: Mapping[int, str | None], truth: Mapping[int, str]) -> dict[int, int]:
    """Return 1 per question whose every rotation is right, else 0."""
    groups = circular_groups(list(inferred))
    return {main: int(all(inferred[i] == truth[i] for i in members)) for main, members in groups.items()}


def mean_by(hits: Mapping[int, int], label: Mapping[int, str]) -> dict[str, float]:
    """Average hits per label, labels in order; questions without a label are left out."""
    groups: dict[str, list[int]] = defaultdict(list)
    for main, hit in hits.items():
        if label.get(main):
            groups[label[main]].append(hit)
    return {name: sum(groups[name]) / len(groups[name]) for name in sorted(groups)}
