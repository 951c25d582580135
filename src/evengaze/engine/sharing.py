"""Layers that attend to the keys of an earlier layer (Gemma 3n and 4), and states with more than three axes.

A layer that borrows keys has no cache of its own. What it receives must fit the lender's: the mask and the rotary
tables of the lender in the same call. Gemma 4 moreover computes no more than the last token in these layers, where it
can: they are cut to as many queries as there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from evengaze.compat import is_mask
from evengaze.engine.prefill import Prefill

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_POSITIONS = ("position_embeddings", "position_ids")


def lenders(layers: Sequence[nn.Module], config: Any) -> dict[int, int]:
    """Layers that attend to the keys of another -> the layer whose keys those are.

    As in transformers' `modeling_gemma3n.py` and `modeling_gemma4.py`: the last layer of the same type with keys of its
    own.
    """
    kinds = getattr(config, "layer_types", None) or [None] * len(layers)
    own: dict[Any, int] = {}
    found = {}
    for i, (layer, kind) in enumerate(zip(layers, kinds, strict=False)):
        if getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False):
            found[i] = own[kind]
        else:
            own[kind] = i
    return found


def borrowed(
    run: Prefill | None, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], lent: Mapping[str, Any]
) -> Arguments:
    """The arguments of a layer that borrows keys.

    Args:
        run: the prefill; None in a call that prunes nothing.
        layer: index of the layer.
        args: as the model passes them.
        kwargs: likewise.
        lent: what the lender received in this call.
    """
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    queries = hidden.shape[1]
    new = {name: value for name, value in kwargs.items() if not is_mask(name, value)}
    if run is not None and run.slots is not None and queries == run.slots.shape[1]:
        args, new = run.arguments(layer, args, new, None)
    for name, value in lent.items():
        if is_mask(name, value) or name in _POSITIONS:
            new[name] = _last(name, value, queries)
    return args, new


def _last(name: str, value: Any, queries: int) -> Any:
    """What belongs to the last queries."""
    if isinstance(value, (tuple, list)):
        return type(value)(_last(name, v, queries) for v in value)
    if not isinstance(value, Tensor):
        return value
    if is_mask(name, value):
        return value[:, :, -queries:] if value.dim() == 4 else value
    return value[..., -queries:] if name == "position_ids" else value[..., -queries:, :]


class Fold:
    """States (B, L, d), made of states with a fourth axis where a model has them.

    Args:
        shape: of the model's states.
        batch: B.
        length: L, of the tokens that are there.
    """

    def __init__(self, shape: Sequence[int], batch: int, length: int) -> None:
        self._plain = len(shape) == 3
        # Gemma 3n has (predictions, B, L, d); several residual streams may also stand behind the sequence.
        self._ahead = len(shape) == 4 and tuple(shape[:2]) != (batch, length)
        self._extra = 1 if self._plain else shape[0] if self._ahead else shape[2]

    def flat(self, states: Tensor) -> Tensor:
        """(B, L, extra * d)."""
        if self._plain:
            return states
        return (states.permute(1, 2, 0, 3) if self._ahead else states).flatten(2)

    def back(self, states: Tensor) -> Tensor:
        """What the model expects."""
        if self._plain:
            return states
        whole = states.reshape(*states.shape[:2], self._extra, -1)
        return whole.permute(2, 0, 1, 3).contiguous() if self._ahead else whole

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor) -> Arguments:
        """A layer's arguments with other states."""
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})
