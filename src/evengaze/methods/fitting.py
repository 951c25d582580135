"""Default stage layers on decoders that attend in some of their layers only (Qwen3.5, LFM2, Granite, Nemotron-H)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from evengaze.errors import ConfigError
from evengaze.protocol import Stage


def fitted_changes(method: Any, depth: int, able: Sequence[int]) -> dict[str, Any]:
    """What to `replace` in a method whose stage layers are its defaults, so that it ranks where the decoder attends.

    Args:
        method: the method.
        depth: number of decoder layers.
        able: those that attend.

    Returns:
        `layer` or `layers`; nothing where the method can rank as it is, or where its layers were given.

    Raises:
        ConfigError: there are fewer layers that attend than stages.
    """
    name = _defaulted(method)
    if name is None:
        return {}
    stages = method.stages(depth)
    if all(stage.attended is None or stage.attended in able for stage in stages):
        return {}
    moved = _moved(method, stages, depth, able)
    if name == "layer":
        return {"layer": moved[-1]}
    plain = method.replace(layers=tuple(stage.layer for stage in stages))
    # A method may count the layer that ranks, and drop behind it.
    ahead = plain.stages(depth + 1)[0].layer - stages[0].layer
    return {"layers": tuple(layer - ahead for layer in moved)}


def _defaulted(method: Any) -> str | None:
    """The parameter that holds a method's stage layers, if nobody gave them."""
    for field in fields(method):
        if field.name == "layers" and getattr(method, "layers", ()) is None:
            return "layers"
        if field.name == "layer" and getattr(method, "layer", None) == field.default:
            return "layer"
    return None


def _moved(method: Any, stages: Sequence[Stage], depth: int, able: Sequence[int]) -> list[int]:
    """The nearest layers, in ascending order, at which the stages can rank."""
    moved: list[int] = []
    for left, stage in zip(reversed(range(len(stages))), stages, strict=True):
        behind = 0 if stage.attended is None else stage.layer - stage.attended
        at = range(depth) if stage.attended is None else [i + behind for i in able]
        free = [i for i in at if i < depth and (not moved or i > moved[-1])]
        free = free[: max(0, len(free) - left)]  # later stages need places, too
        if not free:
            raise ConfigError(
                f"{method.name} has {len(stages)} stages, but of this decoder's {depth} layers only "
                f"{', '.join(map(str, able)) or 'none'} can rank. Give layers= (and a keep that fits them)."
            )
        moved.append(min(free, key=lambda i: (abs(i - stage.layer), -i)))
    return moved
