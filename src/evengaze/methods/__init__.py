"""Pruning methods, by name; and what a method is made of, for people who write one.

Names are the same in Python, on the command line and in result files: `parse("fastv:keep=128,layer=2")` makes the
object that `FastV(keep=128, layer=2)` makes, and `spec(pruner)` writes the string again. Modules load on first use.
See `evengaze.methods.registry` for how a class gets its name.
"""

from __future__ import annotations

from evengaze.methods.base import Pruner
from evengaze.methods.registry import find, from_dict, get, load, names, parse, register, spec, split
from evengaze.methods.stages import Grouping, ManyStages, OneStage
from evengaze.protocol import (
    Merge,
    Mode,
    Positions,
    Scope,
    Selection,
    Source,
    Stage,
    View,
    resolve_keep,
    top,
    top_allowed,
)

__all__ = [
    "Grouping",
    "ManyStages",
    "Merge",
    "Mode",
    "OneStage",
    "Positions",
    "Pruner",
    "Scope",
    "Selection",
    "Source",
    "Stage",
    "View",
    "find",
    "from_dict",
    "get",
    "load",
    "names",
    "parse",
    "register",
    "resolve_keep",
    "spec",
    "split",
    "top",
    "top_allowed",
]
