"""`--debias auto`: the best debiasing that is known for a model and a method without calibrating."""

from __future__ import annotations

from pathlib import Path

from evengaze.debias import Curve, Debias, PaddingMask
from evengaze.debias.presets import published_trend
from evengaze.methods import Pruner

CURVES = Path(__file__).parent.parent / "demo" / "curves"
"""Curves of the embedded model, one a method, each with the trends of all layers."""


def automatic(pruner: Pruner, *, source: str, architecture: str, layers: int) -> Debias | None:
    """Both steps where a trend for the model's architecture and the method is known, else only padding's.

    Args:
        pruner: the method.
        source: what the model was loaded from; "demo" is the embedded one, whose curves are part of the package.
        architecture: see `evengaze.debias.curve.architecture_of`.
        layers: decoder layers.

    Returns:
        None for a method that does not rank by attention from text.
    """
    layer = pruner.ranked_layer(layers)
    if layer is None:
        return None
    if source == "demo":
        return Debias.of(embedded_curve(pruner.name), layer=layer)
    if published_trend(architecture, pruner.name, layer) is not None:
        return Debias.preset(f"llava-1.5-7b/{pruner.name}")
    return Debias(padding=PaddingMask())


def embedded_curve(method: str) -> Curve:
    """The embedded model's curve for a method; FastV's, which ranks by the last token's attention, for others."""
    path = CURVES / f"{method}.json"
    return Curve.load(path if path.is_file() else CURVES / "fastv.json")
