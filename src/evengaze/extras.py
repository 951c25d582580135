"""Packages that only some parts need: said by the name of the extra that brings them, where they are missing."""

from __future__ import annotations

from importlib.util import find_spec

from evengaze.errors import MissingExtraError


def require(extra: str, part: str, *modules: str) -> None:
    """Check that the packages of an extra are there; loads none of them.

    Args:
        extra: as in `pip install "evengaze[extra]"`.
        part: what needs them, in words.
        modules: the modules that are looked for.

    Raises:
        MissingExtraError: one is not installed.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'{part} needs {" and ".join(missing)}, which pruning itself does not: pip install "evengaze[{extra}]"'
        )
