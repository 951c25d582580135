"""Fonts that have the characters of a text: prompts are in any language, and the default font is not."""

from __future__ import annotations

import warnings
from functools import lru_cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

DEFAULT = "DejaVu Sans"
PREFERRED = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
    "Noto Sans",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
)
"""Looked at first, as they go with the default; then whatever else is installed."""

MISSING = "\u25a1"
"""Drawn for a character that no font has."""


class FontWarning(UserWarning):
    """No installed font has some characters of a figure's text."""


def drawable(text: str) -> tuple[str, list[str]]:
    """A text and the font families to draw it with.

    Characters that no installed font has become boxes, with one warning that says what to install.
    """
    files = _files()
    wanted = {ord(c) for c in text if not c.isspace()} - _characters(files[DEFAULT])
    if not wanted:
        return text, [DEFAULT]
    families = [DEFAULT]
    for name in _installed():
        found = wanted & _characters(files[name])
        if found:
            families.append(name)
            wanted -= found
        if not wanted:
            return text, families
    _warn("".join(sorted(map(chr, wanted)))[:12])
    return "".join(MISSING if ord(c) in wanted else c for c in text), families


@lru_cache(maxsize=32)
def _warn(characters: str) -> None:
    warnings.warn(
        f"no installed font has {characters}: they are drawn as boxes. Install one that does, such as the package "
        "fonts-noto-cjk, and try again",
        FontWarning,
        stacklevel=4,
    )


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    names = set(_files())
    first = [name for name in PREFERRED if name in names]
    return (*first, *sorted(names - set(first) - {DEFAULT}))


@lru_cache(maxsize=1)
def _files() -> dict[str, str]:
    """A file of each installed family, a regular one if there is one; fonts of mere boxes left out."""
    entries = [e for e in font_manager.fontManager.ttflist if not e.name.lower().startswith("last resort")]
    return {e.name: e.fname for e in sorted(entries, key=lambda e: (e.style == "normal", str(e.weight) in _REGULAR))}


_REGULAR = ("400", "normal", "regular")


@lru_cache(maxsize=256)
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a font that cannot be read is no help
        return frozenset()
