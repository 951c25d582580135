"""What somebody may have meant by a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known names that look most like a word, whatever its case; none if none does."""
    by_key = {name.lower(): name for name in known}
    return [by_key[key] for key in get_close_matches(word.strip().lower(), by_key, n=count, cutoff=0.6)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question with a blank before it, to be put behind a message; empty if nothing looks like the word."""
    found = nearest(word, known)
    return f" Did you mean {found[0]!r}?" if found else ""
