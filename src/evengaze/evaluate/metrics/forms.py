"""Forms that benchmarks ask answers to have. An official scorer reads something into any string, also an empty one."""

from __future__ import annotations

import re

LONGEST = 10
"""Words of what still passes for a word or short phrase; references have six at most."""
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def is_something(text: str) -> bool:
    """Whether there is a letter or digit at all."""
    return any(character.isalnum() for character in text)


def is_short(text: str) -> bool:
    """Whether it is a word or a short phrase."""
    return is_something(text) and len(text.split()) <= LONGEST


def is_yes_or_no(text: str) -> bool:
    """Whether it begins with yes or no."""
    return _YES_NO.match(text) is not None
