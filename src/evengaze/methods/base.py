"""What a method is made of, under the name of this package; it is defined in `evengaze.protocol`."""

from __future__ import annotations

from evengaze.protocol import (
    Merge,
    Mode,
    Positions,
    Pruner,
    Scope,
    Selection,
    Stage,
    View,
    resolve_keep,
    top,
    top_allowed,
)

__all__ = [
    "Merge",
    "Mode",
    "Positions",
    "Pruner",
    "Scope",
    "Selection",
    "Stage",
    "View",
    "resolve_keep",
    "top",
    "top_allowed",
]
