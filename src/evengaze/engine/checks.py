"""What is refused or warned about before anything is pruned."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from evengaze.engine.attention import attention_module, implementation_of
from evengaze.errors import AttachError, ConfigError, LayoutWarning
from evengaze.protocol import Method, Stage


def refuse_second(model: nn.Module, held: Method | None) -> None:
    """Raise an AttachError if the model has a pruner."""
    if held is not None:
        raise AttachError(
            f"{type(model).__name__} already has {held.name} attached. Leave its `with` block or call "
            "remove() on its handle first; one pruner at a time."
        )


def check_stages(pruner: Method, stages: Sequence[Stage], layers: Sequence[nn.Module]) -> None:
    """Raise unless a method's stages fit a model's decoder layers.

    Raises:
        ConfigError: they are not in order, or outside the model.
        AttachError: the attention that a stage reads cannot be read.
    """
    at = [s.layer for s in stages]
    if sorted(set(at)) != at:
        raise ConfigError(f"{pruner.name}: stages must be at different layers, in ascending order, not at {at}")
    for stage in stages:
        if not 0 <= stage.layer < len(layers):
            raise ConfigError(
                f"{pruner.name}: layer {stage.layer} is outside the model, whose {len(layers)} decoder layers are "
                f"numbered 0 to {len(layers) - 1}"
            )
        if stage.layer == 0 and stage.attention == "previous":
            raise ConfigError(
                f"{pruner.name}: no attention has been paid before layer 0; the first layer to prune at is 1"
            )
        if stage.attended is not None:
            implementation_of(attention_module(layers[stage.attended]))


def warn_blind(model: nn.Module, pruner: Method) -> None:
    """Warn that a prompt of embeddings only may hold pictures that cannot be seen."""
    warnings.warn(
        f"{type(model).__name__} was called with embeddings and no input_ids, which would say where images are: "
        f"{pruner.name} prunes nothing. If there are images in them, pass input_ids, or say where they are: "
        "pruner(model, layout=VisualLayout.from_spans(spans, grid)).",
        LayoutWarning,
        stacklevel=2,
    )
