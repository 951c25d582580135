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

from evengaze.compat import cache_of
from evengaze.testing.oracle import additive_mask, decoder_of, hide


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
        states = args[0]
        later = states.shape[1] - dropped.shape[1]
        mask = hide(additive_mask(kwargs["attention_mask"], states), torch.nn.functional.pad(dropped, (0, later)))
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
    block = decoder_of(model).layers[layer]
    module = block.mixer if hasattr(block, "mixer") else block.self_attn  # Nemotron-H calls all kinds of them mixers
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
    return out.sequences[:, -steps:], torch.stack(out.logits, 1), cache_of(out)
