"""One forward call that holds visual tokens: what is left of its sequence, and how to cut things to that.

Indices are into the call's L tokens ("slots") unless they are said to be into the current sequence of M tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from evengaze.compat import is_mask
from evengaze.engine import cache as kv
from evengaze.engine import layers
from evengaze.engine.attention import AttentionStates
from evengaze.engine.kept import Kept, Pictures, entries, missing
from evengaze.engine.masks import take
from evengaze.engine.rotary import Rotary
from evengaze.errors import ConfigError
from evengaze.layout import VisualLayout, VisualTokens
from evengaze.protocol import Method, Selection, Source, Stage, View
from evengaze.trace import RowTrace, StageTrace, Trace

Selections = list[Selection | None]
"""What a stage decided for each row; None for rows without visual tokens."""


@dataclass
class Prefill:
    """The state of one prefill.

    Attributes:
        layout: the visual tokens of every row before pruning.
        real: (B, L) bool, False for batch padding.
        inputs: (B, L, d) states that enter layer 0.
        past: logical length of what the cache held before.
        implementation: the decoder's attention implementation.
        rotary: where survivors are renumbered; None where they keep their positions.
        shared: the attachment's dictionary for methods.
        replay: selections of an earlier call to repeat instead of asking the method.
        candidates: how many of the last tokens are a draft's, behind the prompt: they do not rank.
        slots: (B, M) slot of each token of the current sequence; None while all are there.
        filled: (B, M) bool, False for fillers of rows that kept fewer tokens than others; None without fillers.
        tables: surviving visual tokens of each row, with positions in the current sequence.
        origins: for each of them, which token of the row's layout it is.
        states: attention states for the next stage.
        sources: whose attention every stage so far reads.
        selections: what every stage so far decided.
        entering: length of the sequence that entered each layer.
        merges: whether a stage so far has merged tokens.
        recurrent: layers whose state runs through the sequence token by token, instead of attention.
    """

    layout: VisualLayout
    real: Tensor
    inputs: Tensor
    past: int
    implementation: str
    rotary: Rotary | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    replay: list[Selections] | None = None
    candidates: int = 0
    slots: Tensor | None = None
    filled: Tensor | None = None
    tables: list[VisualTokens] = field(default_factory=list)
    origins: list[Tensor] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    states: AttentionStates | None = None
    sources: list[Source] = field(default_factory=list)
    selections: list[Selections] = field(default_factory=list)
    stages: list[StageTrace] = field(default_factory=list)
    entering: list[int] = field(default_factory=list)
    cache: Any = None
    merges: bool = False
    recurrent: frozenset[int] = frozenset()
    _before: dict[int, Kept | None] = field(default_factory=dict)
    _memo: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables = list(self.layout.rows)
        self.origins = [torch.arange(len(t), device=t.position.device) for t in self.tables]
        self.memory = [{} for _ in self.tables]
        self.shared["layout"] = self.layout

    @property
    def length(self) -> int:
        """L."""
        return self.real.shape[1]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """`slots`, spelt out if nothing has been dropped, and `filled`, on a device."""
        if self.slots is None:
            return torch.arange(self.length, device=device).expand(len(self.tables), -1), None
        return self.slots.to(device), None if self.filled is None else self.filled.to(device)

    # -- a stage ------------------------------------------------------------------------------------------------------
    def prune(self, pruner: Method, number: int, stage: Stage, hidden: Tensor) -> Tensor:
        """Ask the method, row by row, and cut the hidden states.

        Args:
            pruner: the method.
            number: index of the stage among its stages.
            stage: the stage.
            hidden: (B, M, d) input of the stage's layer.

        Returns:
            (B, M', d).
        """
        self.sources.append(stage.attention)
        if self.replay is not None:
            chosen = self.replay[number]
            self._move(hidden.device)
        else:
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                views = [self._view(b, number, hidden.detach()) for b in range(len(self.tables))]
                chosen = [None if view is None else pruner.select(view) for view in views]
        self.states = None
        self.selections.append(chosen)
        self.merges |= any(s is not None and s.merge is not None for s in chosen)
        rows = [self._trace(b, number, s) for b, s in enumerate(chosen)]
        if not all(
            s is None or (s.merge is None and len(s.keep) == len(t)) for s, t in zip(chosen, self.tables, strict=True)
        ):
            hidden = self._cut(stage, hidden, chosen)
        places = zip(self.origins, self.tables, strict=True)
        rows = [replace(r, tokens=o, place=t.position) for r, (o, t) in zip(rows, places, strict=True)]
        self.stages.append(StageTrace(stage.layer, stage.attention, rows))
        return hidden

    def _cut(self, stage: Stage, hidden: Tensor, chosen: Selections) -> Tensor:
        """(B, M', d) what is left of (B, M, d); tables, slots and caches follow."""
        old, _ = self.on(hidden.device)
        there = self._there(hidden.device)
        orders = [None if s is None else self._order(b, s) for b, s in enumerate(chosen)]
        plans = [_plan(there[b], self.tables[b], order) for b, order in enumerate(orders)]
        padding = ~self.real.to(hidden.device).gather(1, old)
        index, source, filled = _stack(plans, padding, front=bool(self.recurrent))
        out = take(hidden, source, 1)
        for b, selection in enumerate(chosen):
            if selection is not None:
                self._follow(b, selection, source[b], filled[b], hidden[b], out[b])
        self.slots = old.gather(1, index)
        self.filled = None if bool(filled.all()) else filled
        if self.recurrent and self.past and self.filled is not None:
            raise ConfigError(
                "rows that keep different numbers of tokens need fillers, which a recurrent layer would read into the "
                "state that it has of the conversation so far. Prune further prompts of this model one row at a time, "
                "or give all rows pictures of one size."
            )
        self._memo.clear()
        layers.guard(self.cache)
        if stage.trims_below:
            self._trim_below(stage.layer, hidden.device)
        return out

    def _move(self, device: torch.device) -> None:
        self.tables = [t.to(device) for t in self.tables]
        self.origins = [o.to(device) for o in self.origins]

    def _view(self, b: int, number: int, hidden: Tensor) -> View | None:
        if len(self.layout.rows[b]) == 0:
            return None
        self.tables[b], self.origins[b] = self.tables[b].to(hidden.device), self.origins[b].to(hidden.device)
        slots, filled = self.on(hidden.device)
        real = self.real[b].to(hidden.device)[slots[b]] & (slots[b] < self.length - self.candidates)
        return View(
            stage=number,
            tokens=self.tables[b],
            original=len(self.layout.rows[b]),
            hidden=hidden[b],
            embeddings=self.inputs[b].detach(),
            initial=self.layout.rows[b],
            real=real if filled is None else real & filled[b],
            sources=tuple(self.sources),
            memory=self.memory[b],
            shared=self.shared,
            states=self.states,
            row=b,
        )

    def _follow(
        self, b: int, selection: Selection, source: Tensor, filled: Tensor, hidden: Tensor, out: Tensor
    ) -> None:
        """Merge one row's states into `out` (M', d) and move its table to the new sequence."""
        table = self.tables[b]
        place = torch.full((len(hidden),), -1, dtype=torch.long, device=hidden.device)
        place[source[filled]] = filled.nonzero().flatten()
        merge = selection.merge
        if merge is not None and len(merge.source):
            parts = hidden[table.position[merge.source]].float() * merge.weight.float()[:, None]
            target = place[table.position[merge.target]]
            total = torch.zeros(out.shape, dtype=torch.float32, device=out.device).index_add_(0, target, parts)
            touched = torch.unique(target)
            out[touched] = total[touched].to(out.dtype)
        chosen = self._order(b, selection)
        moved = table.take(chosen)
        self.tables[b] = replace(moved, position=place[moved.position])
        self.origins[b] = self.origins[b][chosen]

    def _order(self, b: int, selection: Selection) -> Tensor:
        """Surviving candidates in the order in which they stand afterwards.

        Recycled tokens stand behind the kept ones of their picture (text may follow it) if positions are renumbered;
        else every token stays at its own.
        """
        if selection.recycled is None:
            return selection.keep
        chosen = torch.cat([selection.keep, selection.recycled.to(selection.keep.device)])
        if self.rotary is None or not self.rotary.renumbers:
            return chosen.sort().values
        table = self.tables[b]
        picture = table.image[chosen] * (int(table.frame.max()) + 1) + table.frame[chosen]
        return chosen[torch.sort(picture, stable=True).indices]

    # -- what later layers receive ------------------------------------------------------------------------------------
    def arguments(
        self, layer: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer's arguments, cut to the tokens that are left.

        Args:
            layer: index of the layer.
            hidden: (B, M, d) its hidden states, cut already.
            args: positional arguments as the model passes them.
            kwargs: keyword arguments as the model passes them.
            cache: the layer's cache, or None.
        """
        cut, before = dict(kwargs), self._before.get(layer)
        for name, value in kwargs.items():
            key: tuple[Any, ...] = (name, id(value), id(before), hidden.device)
            if layer in self.recurrent and is_mask(name, value):
                key, make = ("there", hidden.device), functools.partial(self._alive, hidden.device)
            elif is_mask(name, value):
                key += (type(cache), getattr(cache, "max_cache_len", None), kv.stored(cache))
                make = functools.partial(self._mask, before, value, cache, hidden)
            elif isinstance(value, (Tensor, tuple, list, dict)):
                make = functools.partial(self._positions, before, name, value, hidden)
                if self.rotary is not None:
                    self.rotary.serve(layer, name, value)
            else:
                continue
            cut[name] = self._once(key, (value, before), make)
        if not args:
            return args, {**cut, "hidden_states": hidden}
        return (hidden, *(_tree(v, self.slots, self.length, -2) for v in args[1:])), cut

    def _once(self, key: Any, held: Any, make: Callable[[], Any]) -> Any:
        """`make()`, remembered: layers share arguments. `held` stays alive, so that the ids in a key stay unique."""
        if key not in self._memo:
            self._memo[key] = (held, make())
        return self._memo[key][1]

    def _mask(self, before: Kept | None, mask: Any, cache: Any, hidden: Tensor) -> Any:
        slots, filled = self.on(hidden.device)
        past, length = self.past, self.length
        return kv.cut_mask(
            mask, cache, before, hidden, self.implementation, past=past, length=length, slots=slots, real=filled
        )

    def _positions(self, before: Kept | None, name: str, value: Any, hidden: Tensor) -> Any:
        if self.rotary is not None and self.rotary.renumbers:
            positions = self._renumbered(self.rotary, before, hidden.device)
            if name == "position_ids":
                return positions
            table = self.rotary.retable(value, hidden, positions)
            if table is not None:
                return table
        return _tree(value, self.slots, self.length, -1 if name == "position_ids" else -2)

    def _renumbered(self, rotary: Rotary, before: Kept | None, device: torch.device) -> Tensor:
        """(B, M) positions without gaps, counted from each row's first token."""
        start = rotary.first_position(self.real.to(device))
        if before is not None and before.shift is not None:
            start = start - before.shift.to(device)
        return (self._there(device).long().cumsum(1) - 1).clamp(min=0) + start

    def _there(self, device: torch.device) -> Tensor:
        """(B, M) bool: neither batch padding nor a filler."""
        slots, filled = self.on(device)
        there = self.real.to(device).gather(1, slots)
        return there if filled is None else there & filled

    def _alive(self, device: torch.device) -> Tensor | None:
        """The (B, M) mask of a layer with a state: where it must read nothing; None if everything counts."""
        there = self._there(device)
        return None if bool(there.all()) else there

    def restored(self, states: Tensor) -> Tensor:
        """(B, L, d) states at their places in the call, zeros where tokens were dropped, from those that are left."""
        slots, filled = self.on(states.device)
        if filled is not None:
            states = states.masked_fill(~filled[..., None], 0.0)
        full = states.new_zeros(states.shape[0], self.length, states.shape[2])
        return full.scatter(1, slots[..., None].expand_as(states), states)

    def ignore(self, labels: Tensor, index: int) -> None:
        """Write `index` over the (B, L) labels that a dropped token would have to predict: those right behind one."""
        slots, filled = self.on(labels.device)
        there = torch.ones_like(slots, dtype=torch.bool) if filled is None else filled
        gone = torch.ones_like(labels, dtype=torch.bool).scatter(1, slots, ~there)
        labels[:, 1:][gone[:, :-1]] = index

    # -- the cache ----------------------------------------------------------------------------------------------------
    def before(self, layer: int, cache: Any) -> None:
        """Note what a layer's cache remembered when the call began."""
        self._before.setdefault(layer, kv.kept_of(cache))

    def remember(self, layer: int, cache: Any, device: torch.device) -> None:
        """Tell a layer's cache which tokens it is about to store."""
        self.before(layer, cache)
        old = self._before[layer]
        kept = self._once(("kept", id(old)), old, functools.partial(self._kept, old, device))
        layers.record(cache, kept, self.length - self.on(device)[0].shape[1])

    def _kept(self, old: Kept | None, device: torch.device) -> Kept:
        slots, filled = self.on(device)
        held, kept_real = entries(old, self.past, slots + self.past, filled)
        lost = None
        if self.rotary is not None and self.rotary.renumbers:
            lost = missing(old, self.past, self.real.to(device), slots, self._there(device))
        pictures = () if old is None else old.pictures
        here = Pictures(tuple((t.position, t.image) for t in self.layout.rows), self.past, self.merges)
        return Kept(held, kept_real, self.past + self.length, lost, (*pictures, here))

    def _trim_below(self, stage: int, device: torch.device) -> None:
        """Take what has been dropped out of the caches of the layers below a stage, too."""
        everything = torch.arange(self.past, self.past + self.length, device=device).expand(len(self.tables), -1)
        for i in range(stage):
            cache = kv.layer_of(self.cache, i)
            if kv.is_sliding(cache) or not kv.stored(cache):
                continue
            self.before(i, cache)
            old, now = self._before[i], kv.kept_of(cache)
            if now is None or now is old:
                held, _ = entries(old, self.past, everything, None)
            else:  # above an earlier stage of this call
                held = now.slots.to(device)
            kept = self._once(("kept", id(old)), old, functools.partial(self._kept, old, device))
            if self.rotary is not None:  # the layer has run, at the positions that it knows
                kept = kept.without_shift(now)
            place = torch.zeros(len(held), self.past + self.length, dtype=torch.long, device=device)
            place.scatter_(1, held, torch.arange(held.shape[1], device=device).expand(len(held), -1))
            index = place.gather(1, kept.slots)
            layers.trim(cache, index, kept, held.shape[1] - index.shape[1])

    # -- the record ---------------------------------------------------------------------------------------------------
    def _trace(self, b: int, number: int, selection: Selection | None) -> RowTrace:
        if selection is None:
            return RowTrace.empty()
        origin, memory = self.origins[b], self.memory[b]
        return RowTrace(
            candidates=origin,
            kept=origin[selection.keep],
            recycled=None if selection.recycled is None else origin[selection.recycled],
            merge=selection.merge,
            raw=memory.get(f"raw{number}"),
            scores=memory.get(f"score{number}"),
        )

    def trace(self, pruner: Method, layers: int) -> Trace:
        """What happened, once the call is over."""
        total = self.past + self.length
        sizes = [kv.sizes(kv.layer_of(self.cache, i), total) for i in range(layers)]
        held, unpruned = [list(column) for column in zip(*sizes, strict=True)]
        return Trace(pruner.to_dict(), self.layout, self.length, self.stages, self.entering, held, unpruned)


def _plan(alive: Tensor, table: VisualTokens, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which indices of the current sequence survive in a row, and which token moves into each of them."""
    if chosen is None:
        index = alive.nonzero().flatten()
        return index, index
    survivors = table.position[chosen]
    alive = alive.clone()
    alive[table.position] = False
    alive[survivors] = True
    index = alive.nonzero().flatten()
    source = index.clone()
    # Where recycled tokens move behind the kept ones, an index only orders tokens: any of the visual ones serves.
    source[torch.isin(index, table.position)] = survivors
    return index, source


def _stack(
    plans: Sequence[tuple[Tensor, Tensor]], padding: Tensor, *, front: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Plans of unlike length as one (B, M) index and source, and which of them are no fillers.

    Short rows are filled up with batch padding, which is masked anyway; then with dropped tokens, which must be. They
    stand where they were, or in `front`: a recurrent layer's state decays at fillers, unless nothing is in it yet.
    """
    size = max(len(index) for index, _ in plans)
    rows = []
    for (index, source), padded in zip(plans, padding, strict=True):
        free = torch.ones_like(padded)
        free[index] = False
        spare = torch.cat([(free & padded).nonzero().flatten(), (free & ~padded).nonzero().flatten()])
        spare = spare[: size - len(index)]
        filled = torch.cat([torch.ones_like(index, dtype=torch.bool), padded[spare]])
        order = torch.cat([index, spare]).argsort()
        if front:
            order = torch.arange(size, device=index.device).roll(len(spare))
        index, source = torch.cat([index, spare])[order], torch.cat([source, spare])[order]
        rows.append((index, source, filled[order]))
    index, source, filled = (torch.stack(column) for column in zip(*rows, strict=True))
    return index, source, filled


def _tree(value: Any, slots: Tensor | None, length: int, dim: int) -> Any:
    """Cut every tensor of a nest of tuples and dicts along its sequence axis: `dim`, or the last one of a matrix."""
    if isinstance(value, (tuple, list)):
        return type(value)(_tree(v, slots, length, dim) for v in value)
    if isinstance(value, dict):
        return {k: _tree(v, slots, length, dim) for k, v in value.items()}
    if not isinstance(value, Tensor) or slots is None or value.dim() < 2:
        return value
    dim = -1 if value.dim() == 2 else dim
    if value.shape[dim] != length or value.shape[dim - 1] not in (1, slots.shape[0]):
        return value
    return take(value, slots, dim)
