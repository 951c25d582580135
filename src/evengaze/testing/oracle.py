"""A slow oracle for pruned generation: nothing is removed, no cache, and no code shared with the engine.

What a run decided is read from its trace and replayed on a model with eager attention: in every layer from a stage on,
the columns of dropped tokens are masked; merged states are written over the states of their targets; where survivors
are renumbered, the rotary tables are computed anew. Every step recomputes the whole sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding

from evengaze.layout import VisualTokens
from evengaze.methods.base import Pruner
from evengaze.protocol import Merge
from evengaze.trace import Trace


@dataclass
class _Step:
    """What one stage does to one row, in slots of the full sequence.

    Attributes:
        source: (m,) slots from which the survivors' states come.
        target: (m,) slots in which they stand from here on.
        gone: (L,) bool, slots that nobody sees from here on.
        merge: (target slot, source slot, weight) of every part of a merged state.
    """

    source: Tensor
    target: Tensor
    gone: Tensor
    merge: list[tuple[int, int, float]]


@contextmanager
def replayed(
    model: Any, pruner: Pruner, trace: Trace, attention_mask: Tensor, *, ends_in_picture: bool = False
) -> Iterator[None]:
    """Make a dense eager model compute what a pruned one should have computed.

    Args:
        model: with eager attention and nothing attached; call its `generate` with `use_cache=False`.
        pruner: the method of the run.
        trace: of the run. It must be the trace of a whole prompt, without a cache in front of it.
        attention_mask: (B, L) of the prompt.
        ends_in_picture: whether every prompt's last token is a visual one, behind which nothing moves.
    """
    decoder = decoder_of(model)
    renumber = pruner.positions == "renumbered" and getattr(decoder, "rotary_emb", None) is not None
    renumber = renumber and not _multimodal_rope(decoder.config)
    plan = {
        s.layer: rows
        for s, rows in zip(trace.stages, _plan(trace, renumber, ends_in_picture, attention_mask.device), strict=True)
    }
    trim = any(stage.trims_below for stage in pruner.stages(len(decoder.layers)))
    state = _State(decoder, plan, attention_mask.bool(), renumber, trim)
    handles = [
        layer.register_forward_pre_hook(state.hook(i), with_kwargs=True) for i, layer in enumerate(decoder.layers)
    ]
    handles += [layer.register_forward_hook(state.spread(i)) for i, layer in enumerate(decoder.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decoder_of(model: Any) -> Any:
    """The module with decoder layers and token embeddings, found without the library's help."""
    names = ("embed_tokens", "embeddings")
    found = (
        m
        for m in model.modules()
        if hasattr(m, "layers") and any(isinstance(getattr(m, n, None), Embedding) for n in names)
    )
    return next(found)


def _multimodal_rope(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]  # one for all layers, or one for each type
    return any("mrope_section" in kind for kind in kinds)


def _plan(trace: Trace, move: bool, ends: bool, device: torch.device) -> Iterator[list[_Step]]:
    """One step for each stage and row. `move`: recycled tokens go behind the kept ones of their picture."""
    place = [{k: int(p) for k, p in enumerate(row.position)} for row in trace.layout.rows]
    gone = torch.zeros(len(place), trace.length, dtype=torch.bool)
    for stage in trace.stages:
        steps = []
        for b, row in enumerate(stage.rows):
            candidates = row.candidates.tolist()
            old = [place[b][c] for c in candidates]
            merge = _parts(row.merge, old)
            survivors = row.kept.tolist() + ([] if row.recycled is None else row.recycled.tolist())
            if move:  # a picture's recycled tokens stand behind its kept ones
                survivors = _by_picture(survivors, trace.layout.rows[b], ends)
            source = [place[b][s] for s in survivors]
            target = sorted(source) if move else source
            gone[b, old] = True
            gone[b, target] = False
            place[b] = dict(zip(survivors, target, strict=True))
            if merge:
                moved = dict(zip(source, target, strict=True))
                merge = [(moved[t], s, w) for t, s, w in merge]
            there, here = (torch.tensor(slots, dtype=torch.long, device=device) for slots in (source, target))
            steps.append(_Step(there, here, gone[b].clone().to(device), merge))
        yield steps


def _by_picture(survivors: list[int], table: VisualTokens, ends: bool) -> list[int]:
    last = [ends and token == len(table) - 1 for token in range(len(table))]
    pictures = list(zip(last, table.image.tolist(), table.frame.tolist(), strict=True))
    return sorted(survivors, key=lambda token: pictures[token])  # stable: within a picture the order stays


def _parts(merge: Merge | None, slots: list[int]) -> list[tuple[int, int, float]]:
    if merge is None:
        return []
    triples = zip(merge.target.tolist(), merge.source.tolist(), merge.weight.tolist(), strict=True)
    return [(slots[t], slots[s], w) for t, s, w in triples]


class _State:
    """Hooks of one replay."""

    def __init__(self, decoder: Any, plan: dict[int, list[_Step]], real: Tensor, renumber: bool, trim: bool) -> None:
        self.decoder, self.plan, self.real, self.length = decoder, plan, real, real.shape[1]
        self.renumber, self.trim = renumber, trim
        self.total = self.length
        self.whole: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def gone(self, layer: int, total: int) -> Tensor | None:
        """(B, total) bool: slots that nobody sees in a layer; None before the first stage."""
        passed = [rows for at, rows in self.plan.items() if at <= layer]
        if not passed:
            return None
        gone = torch.stack([step.gone for step in passed[-1]])
        return torch.nn.functional.pad(gone, (0, total - self.length))

    def hook(self, i: int) -> Any:
        """The pre-hook of a layer."""

        def enter(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            parameters = list(inspect.signature(layer.forward).parameters)
            kwargs = {**dict(zip(parameters[1:], args[1:], strict=False)), **kwargs}
            args = args[:1]
            if i == 0:
                self.total = states.shape[-2]
            if not attends(layer):
                return self.shortened(i, states, args, kwargs)
            total, rows = self.total, states.shape[-2]  # the last layers may compute the last token only
            mask = additive_mask(kwargs["attention_mask"], states, total)
            if i in self.plan:
                states = self.edit(states, self.plan[i])
            gone = self.gone(i, total)
            if gone is not None:
                if self.renumber:
                    moved = self.positions(i, states, gone, kwargs["position_ids"])
                    moved = {k: _last(v, rows) for k, v in moved.items()}
                    kwargs.update({k: v for k, v in moved.items() if kwargs.get(k) is not None})  # layers may have none
                mask = hide(mask, gone)
            elif self.trim and self.sees_all(i):
                # The caches below the stage lose the dropped tokens once the prompt has been read; those of sliding
                # windows, which forget by themselves, do not.
                last = torch.stack([step.gone for step in self.plan[max(self.plan)]])
                late = torch.arange(total, device=last.device)[-rows:] >= self.length
                columns = torch.nn.functional.pad(last, (0, total - self.length))
                mask = mask.masked_fill(late[None, None, :, None] & columns[:, None, None], torch.finfo(mask.dtype).min)
            kwargs["attention_mask"] = mask
            if args:
                return (states, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": states}

        return enter

    def shortened(self, i: int, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a layer that has a state instead of attention: the survivors alone, padded on the left, as
        if the others had never been there."""
        if i in self.plan:
            states = self.edit(states, self.plan[i])
        gone = self.gone(i, states.shape[1])
        if gone is not None:
            seen = torch.nn.functional.pad(self.real, (0, states.shape[1] - self.length), value=True)
            index, alive = _left_padded(seen & ~gone)
            self.whole[i] = (states, index, alive)
            states = states.gather(1, index[..., None].expand(-1, -1, states.shape[2])) * alive[..., None]
            kwargs["attention_mask"] = None if bool(alive.all()) else alive.long()
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states}

    def spread(self, i: int) -> Any:
        """The hook behind a layer: what `shortened` left out is put back."""

        def leave(layer: Any, args: tuple[Any, ...], out: Any) -> Any:
            if i not in self.whole:
                return out
            states, index, alive = self.whole.pop(i)
            short = out[0] if isinstance(out, tuple) else out
            full = states.clone()
            for b in range(len(full)):
                full[b, index[b][alive[b]]] = short[b][alive[b]]
            return (full, *out[1:]) if isinstance(out, tuple) else full

        return leave

    def sees_all(self, layer: int) -> bool:
        """Whether a layer attends to the whole sequence."""
        types = getattr(self.decoder.config, "layer_types", None)
        return types is None or types[layer] == "full_attention"

    @staticmethod
    def edit(states: Tensor, rows: list[_Step]) -> Tensor:
        """Move and merge states at a stage: (B, L, d), or several states of each token, (n, B, L, d)."""
        if states.dim() == 4:
            return torch.stack([_State.edit(part, rows) for part in states])
        out = states.clone()
        for b, step in enumerate(rows):
            out[b, step.target] = states[b, step.source]
            sums: dict[int, Tensor] = {}
            for target, source, weight in step.merge:
                part = weight * states[b, source].float()
                sums[target] = sums[target] + part if target in sums else part
            for target, value in sums.items():
                out[b, target] = value.to(out.dtype)
        return out

    def positions(self, i: int, states: Tensor, gone: Tensor, old: Tensor) -> dict[str, Any]:
        """Positions without gaps from each row's first real token, and the rotary tables that belong to them."""
        seen = torch.nn.functional.pad(self.real, (0, self.total - self.length), value=True)
        first = old.expand(len(seen), -1).gather(1, seen.int().argmax(1, keepdim=True))
        new = ((seen & ~gone).long().cumsum(1) - 1).clamp(min=0) + first
        rotary = self.decoder.rotary_emb
        typed = "layer_type" in inspect.signature(rotary.forward).parameters
        extra = (self.decoder.config.layer_types[i],) if typed else ()
        return {"position_ids": new, "position_embeddings": rotary(states, new, *extra)}


def attends(layer: Any) -> bool:
    """Whether a decoder layer has attention."""
    names = ("self_attn", "attention", "attn", "self_attention")
    return any(getattr(layer, name, None) is not None for name in names) or hasattr(
        getattr(layer, "mixer", None), "k_proj"
    )


def _left_padded(alive: Tensor) -> tuple[Tensor, Tensor]:
    """(B, m) slots of each row's survivors, those of shorter rows behind stand-ins, and which are none."""
    most = int(alive.sum(1).max())
    index = torch.zeros(len(alive), most, dtype=torch.long, device=alive.device)
    real = torch.zeros(len(alive), most, dtype=torch.bool, device=alive.device)
    for b, row in enumerate(alive):
        there = row.nonzero()[:, 0]
        index[b, most - len(there) :], real[b, most - len(there) :] = there, True
    return index, real


def additive_mask(mask: Tensor | None, states: Tensor, total: int | None = None) -> Tensor:
    """(B, 1, L, total) additive mask of the last L queries, also where the model made none."""
    batch, length = states.shape[-3:-1]
    total = length if total is None else total
    if mask is None:
        lowest = torch.finfo(states.dtype).min
        future = torch.ones(total, total, dtype=torch.bool, device=states.device).triu(1)[-length:]
        mask = torch.zeros(1, 1, length, total, dtype=states.dtype, device=states.device).masked_fill(future, lowest)
    return mask.expand(batch, -1, -1, -1)


def _last(value: Any, rows: int) -> Any:
    """The last rows of positions (B, L) or tables (B, L, d)."""
    if isinstance(value, tuple):
        return tuple(_last(v, rows) for v in value)
    return value[:, -rows:]


def hide(mask: Tensor, gone: Tensor) -> Tensor:
    """Mask the columns of slots that are gone. Their own rows mean nothing, but must not be empty."""
    itself = torch.eye(gone.shape[1], dtype=torch.bool, device=gone.device)[-mask.shape[2] :]
    return mask.masked_fill(gone[:, None, None] & ~itself, torch.finfo(mask.dtype).min)
