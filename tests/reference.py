"""A slow oracle for pruning at original positions: nothing is removed, dropped tokens are masked.

It shares no code with the engine: eager attention, no cache, the full sequence in every layer, and additive masks with
the smallest number in the columns of dropped tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def decoder_of(model: Any) -> Any:
    """The module with the decoder layers, found without the library's help."""
    found = [m for n, m in model.named_modules() if hasattr(m, "layers") and hasattr(m, "embed_tokens")]
    return found[0]


@contextmanager
def masked_from(model: Any, plan: Sequence[tuple[int, Tensor]]) -> Iterator[None]:
    """Hide tokens from a layer on.

    Args:
        model: an eager model.
        plan: pairs of a layer and the (B, L) bool of the tokens that nobody sees from that layer on.
    """
    handles = []
    for i, layer in enumerate(decoder_of(model).layers):
        hidden = [dropped for first, dropped in plan if i >= first]
        if hidden:
            dropped = torch.stack(hidden).any(0)
            handles.append(layer.register_forward_pre_hook(_hide(dropped), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hide(dropped: Tensor) -> Any:
    def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states, mask = args[0], kwargs["attention_mask"]
        length = states.shape[1]
        lowest = torch.finfo(states.dtype).min
        if mask is None:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            mask = torch.zeros(1, 1, length, length, dtype=states.dtype).masked_fill(future, lowest)
        column = torch.zeros(states.shape[0], length, dtype=torch.bool)
        column[:, : dropped.shape[1]] = dropped
        # A dropped token's own row means nothing; it may see itself so that no row is empty.
        blocked = column[:, None, None, :] & ~torch.eye(length, dtype=torch.bool)
        mask = mask.expand(states.shape[0], -1, -1, -1).masked_fill(blocked, lowest)
        return args, {**kwargs, "attention_mask": mask}

    return hook


def dropped_from(trace: Any) -> list[tuple[int, Tensor]]:
    """The plan that a trace recorded: for each stage, which tokens of the prompt left."""
    plan = []
    for stage in trace.stages:
        dropped = torch.zeros(len(stage.rows), trace.length, dtype=torch.bool)
        for b, row in enumerate(stage.rows):
            position = trace.layout.rows[b].position
            dropped[b, position[row.candidates]] = True
            dropped[b, position[row.kept]] = False
        plan.append((stage.layer, dropped))
    return plan


def last_row_attention(model: Any, layer: int, inputs: dict[str, Tensor]) -> Tensor:
    """(B, L) attention that the last token pays in a layer, averaged over heads, from eager's own weights."""
    weights: list[Tensor] = []
    module = decoder_of(model).layers[layer].self_attn
    handle = module.register_forward_hook(lambda m, a, out: weights.append(out[1]))
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return weights[0][:, :, -1].float().mean(1)


def generate(model: Any, inputs: dict[str, Tensor], steps: int = 6, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Greedy tokens (B, steps), logits (B, steps, V) and the cache."""
    options = {"do_sample": False, **options}
    out = model.generate(**inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences[:, -steps:], torch.stack(out.logits, 1), out.past_key_values
