"""Matching free-form answers without a judge. Never to be mixed with a judge's accuracy."""

from __future__ import annotations

from collections.abc import Callable

from evengaze.evaluate.metrics.normalize import evalai_normalize


def exact(prediction: str, answer: str) -> bool:
    """Whether the two strings are equal."""
    return prediction == answer


def _loose(text: str) -> str:
    return text.strip().lower().rstrip(".").strip()


def exact_loose(prediction: str, answer: str) -> bool:
    """Whether they are equal but for case, outer white space and final periods."""
    return _loose(prediction) == _loose(answer)


def normalised(prediction: str, answer: str) -> bool:
    """Whether they are equal after EvalAI's normaliser."""
    return evalai_normalize(prediction) == evalai_normalize(answer)


def contained(prediction: str, answer: str) -> bool:
    """Whether the normalised answer occurs in the normalised prediction as a run of whole words."""
    wanted = evalai_normalize(answer)
    return bool(wanted) and f" {wanted} " in f" {evalai_normalize(prediction)} "


MATCHES: dict[str, Callable[[str, str], bool]] = {
    "exact_match": exact,
    "exact_match_loose": exact_loose,
    "normalised_match": normalised,
    "containment": contained,
}


def with_alternatives(match: Callable[[str, str], bool], prediction: str, answer: str) -> bool:
    """Match against an answer in MM-Vet's notation: `a<OR>b` takes either, `a<AND>b` asks for both."""
    return any(all(match(prediction, part) for part in way.split("<AND>")) for way in answer.split("<OR>"))
