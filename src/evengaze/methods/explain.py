"""What a method's parameters mean, read from the docstrings of its classes."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, dataclass, fields
from typing import Any

from evengaze.methods.base import Pruner

_ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): (?P<text>.*)$")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: as in Python and on the command line.
        default: None if there is none (see `needed`) or if that is the default.
        needed: whether it must be given.
        about: what it means.
    """

    name: str
    default: Any
    needed: bool
    about: str


def parameters(method: type[Pruner]) -> list[Parameter]:
    """The parameters of a method in the order of its fields; those that all methods share come last."""
    told = _told(method)
    found = [
        Parameter(
            f.name,
            None if f.default is MISSING else f.default,
            f.default is MISSING and f.default_factory is MISSING,
            told.get(f.name, ""),
        )
        for f in fields(method)
    ]
    last = shared()
    return sorted(found, key=lambda one: one.name in last)


def shared() -> set[str]:
    """Names of the parameters that all methods have."""
    return {f.name for f in fields(Pruner)}


def about(method: type[Pruner]) -> str:
    """The first line of its documentation; that which `dataclass` makes up says nothing."""
    said = (inspect.getdoc(method) or "").strip().partition("\n")[0]
    return "" if said.startswith(f"{method.__name__}(") else said


def _told(method: type[Pruner]) -> dict[str, str]:
    """What the `Attributes:` sections of a class and of those that it is derived from say, the nearest first."""
    found: dict[str, str] = {}
    for cls in method.__mro__:
        text = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        _, _, section = text.partition("Attributes:\n")
        entries: list[tuple[list[str], list[str]]] = []
        for line in section.splitlines():
            entry = _ENTRY.match(line.strip()) if re.match(r"\s{2,4}\w", line) else None
            if entry is not None:
                entries.append((entry["names"].split(", "), [entry["text"]]))
            elif line.strip() and entries and line.startswith("     "):
                entries[-1][1].append(line.strip())
            elif line and not line.startswith(" "):
                break
        for names, lines in entries:
            for name in names:
                found.setdefault(name, " ".join(lines))
    return found
