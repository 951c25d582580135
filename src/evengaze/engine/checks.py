"""What is refused or warned about before anything is pruned."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import torch
from torch import nn

from evengaze.compat import checkpoints_hooks
from evengaze.engine.attention import attention_module, implementation_of
from evengaze.errors import AttachError, ConfigError, LayoutWarning, NothingPrunedError, QuestionWarning
from evengaze.models.base import attending_layers
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
            _check_attends(pruner, stage, layers)
            implementation_of(attention_module(layers[stage.attended]))


def refuse_checkpointing(layers: Sequence[nn.Module]) -> None:
    """Raise a ConfigError if the backward pass would run layers again without what was cut for them."""
    if torch.is_grad_enabled() and any(map(checkpoints_hooks, layers)):
        raise ConfigError(
            "gradient checkpointing of this release of transformers runs layers again in the backward pass, behind the "
            "pruned call, with the whole prompt's positions and masks. Upgrade (pip install -U 'transformers>=5.23'), "
            "or train without it: model.gradient_checkpointing_disable()."
        )


def _check_attends(pruner: Method, stage: Stage, layers: Sequence[nn.Module]) -> None:
    """Raise a ConfigError that names the nearest layer that works, if a stage ranks by a layer without attention."""
    able, read = attending_layers(layers), stage.attended
    if read in able or not able:
        return
    behind = stage.layer - read if read is not None else 0
    possible = [i + behind for i in able if i + behind < len(layers)]
    near = min(possible, key=lambda i: (abs(i - stage.layer), -i), default=None)
    raise ConfigError(
        f"{pruner.name}: layer {stage.layer} ranks by the attention of layer {read}, which has none: "
        f"{type(layers[read or 0]).__name__} carries a state through the sequence instead (linear attention, "
        f"convolution or Mamba). The nearest layer that works is {near}; attention is in layers "
        f"{', '.join(map(str, able))}."
    )


def check_lending(pruner: Method, stages: Sequence[Stage], lending: Collection[int]) -> None:
    """Raise a ConfigError if tokens would leave behind a layer whose keys later layers attend to."""
    late = [stage.layer for stage in stages if lending and stage.layer > min(lending)]
    if late:
        raise ConfigError(
            f"{pruner.name}: tokens cannot leave at layer {late[0]}: later layers attend to the keys "
            f"of layers {', '.join(map(str, sorted(lending)))}, which still hold them. The last layer that works is "
            f"{min(lending)}."
        )


def warn_answers(pruner: Method) -> None:
    """Warn that an answer which is read together with its prompt sees more than one that is generated."""
    warnings.warn(
        f"{pruner.name} drops tokens from the caches of layers that have read them. Where prompt and answer are one "
        "call, these layers show the answer the whole picture: the tokens kept are those of generate(), but the "
        "answer's logits are not the same. Use a method without trims_below where they have to be (RL, likelihoods).",
        QuestionWarning,
        stacklevel=2,
    )


def warn_blind(model: nn.Module, pruner: Method) -> None:
    """Warn that a prompt of embeddings only may hold pictures that cannot be seen."""
    warnings.warn(
        f"{type(model).__name__} was called with embeddings and no input_ids, which would say where images are: "
        f"{pruner.name} prunes nothing. If there are images in them, pass input_ids, or say where they are: "
        "pruner(model, layout=VisualLayout.from_spans(spans, grid)).",
        LayoutWarning,
        stacklevel=2,
    )


def refuse_missed(pruner: Method, stages: Sequence[int], entered: int, layers: int) -> None:
    """Raise a NothingPrunedError if a call went past stages or layers.

    Args:
        pruner: the method.
        stages: layers before which it should have pruned, but did not.
        entered: decoder layers that ran under the pruner's eyes.
        layers: decoder layers when it was attached.
    """
    if stages:
        raise NothingPrunedError(
            f"{pruner.name} never got to prune at layers {list(stages)}: the model's forward does not call them. They "
            "were replaced or compiled after the pruner was attached (then attach it afterwards), or the adapter's "
            "decoder() is not the module whose layers really run."
        )
    if entered < layers:
        raise NothingPrunedError(
            f"{pruner.name} saw only {entered} of {layers} decoder layers run: some were skipped, or replaced "
            "since it was attached. Detach it before you change the model, then attach it again."
        )
