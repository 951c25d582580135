"""One forward call that holds visual tokens: what is left of its sequence, and how to cut things to that.

Indices are into the call's L tokens ("slots") unless they are said to be into the current sequence of M tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from evengaze.candidates import Candidates
from evengaze.compat import is_mask
from evengaze.engine import cache as kv
from evengaze.engine import cache_layers
from evengaze.engine.asked import select_asked
from evengaze.engine.attention import AttentionStates
from evengaze.engine.kept import Kept, Pictures, entries, missing
from evengaze.engine.left import Left, tree
from evengaze.engine.masks import take
from evengaze.engine.question import Questions
from evengaze.engine.record import Decided, RowTraces
from evengaze.engine.rows import Decision, Group, cut, decided, groups, split
from evengaze.engine.text import Text
from evengaze.errors import ConfigError
from evengaze.layout import VisualLayout
from evengaze.memory import Shared, Store
from evengaze.protocol import (
    Merge,
    Method,
    Pending,
    Selection,
    Source,
    Stage,
    View,
    Words,
    merge_states,
)
from evengaze.trace import StageTrace, Trace

Selections = list[Decision]
"""What a stage decided; rows without visual tokens are in none."""


@dataclass(kw_only=True)
class Prefill(Left):
    """The state of one prefill.

    Attributes:
        layout: the visual tokens of every row before pruning.
        config: the decoder's.
        shared: what methods keep for the attachment.
        notes: what they noted while the call's pictures were encoded.
        replay: selections of an earlier call to repeat instead of asking the method.
        asked: who ranks what; None if every row is one prompt that ends with the row, in text.
        pending: checks of scores that are still being computed.
        states: attention states for the next stage.
        sources: whose attention every stage so far reads.
        selections: what every stage so far decided.
        stages: the record of every stage so far, for the trace.
        lengths: by stage layer, the length of the sequence that goes on.
        entered: layers that ran under the pruner's eyes.
        watched: layers that are hooked.
        narrow: length of the sequence that entered layers which compute fewer tokens than there are.
        cache: the decoder's; None without one.
        gate: of the cache, once something has been dropped from it.
        fresh: whether the cache came without anything dropped from it.
        merges: whether a stage so far has merged tokens.
        recurrent: layers whose state runs through the sequence token by token, instead of attention.
    """

    layout: VisualLayout
    config: Any
    shared: Shared = field(default_factory=Shared)
    notes: Store = field(default_factory=Store)
    replay: list[Selections] | None = None
    asked: Questions | None = None
    pending: list[Pending] = field(default_factory=list)
    states: AttentionStates | None = None
    sources: list[Source] = field(default_factory=list)
    selections: list[Selections] = field(default_factory=list)
    stages: list[StageTrace] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    cache: Any = None
    merges: bool = False
    recurrent: frozenset[int] = frozenset()
    _before: dict[int, Kept | None] = field(default_factory=dict)
    entered: int = 0
    watched: int = 0
    narrow: dict[int, int] = field(default_factory=dict)
    fresh: bool = True
    gate: cache_layers.Gate | None = None
    _alike: bool | None = None
    _made: dict[Any, tuple[dict[str, Any], dict[str, Any], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._text = Text(self.layout, self.padded, self.length, self.asked)

    @property
    def _moves(self) -> bool:
        """Whether recycled tokens move behind the kept ones of their picture."""
        return self.rotary is not None and self.rotary.renumbers

    # -- a stage ------------------------------------------------------------------------------------------------------
    def prune(self, pruner: Method, number: int, stage: Stage, hidden: Tensor) -> Tensor:
        """Ask the method, and cut the hidden states.

        Args:
            pruner: the method.
            number: index of the stage among its stages.
            stage: the stage.
            hidden: (B, M, d) input of the stage's layer.

        Returns:
            (B, M', d).
        """
        self.sources.append(stage.attention)
        device = hidden.device
        if not self.groups:
            self.groups = groups(self.layout, self.padded, self.length, device, self.asked)
        self.groups = [group.to(device) for group in self.groups]
        if self.replay is not None:
            chosen = self.replay[number]
        else:
            with _exact(device):
                chosen = self._ask(pruner, number, _detached(hidden))
        self.states = None
        self.selections.append(chosen)
        self.merges |= any(d.selection.merge is not None for d in chosen)
        parts = list(split(self.groups, chosen))
        self.groups = [group for group, _ in parts]
        # A stage that keeps everything leaves all as it is: the logits are the dense model's, bit for bit.
        if not all(s is None or (s.merge is None and s.survivors == len(g.tokens)) for g, s in parts):
            hidden = self._cut(stage, hidden, parts)
        rows = [
            Decided(group.rows, group.tokens, selection, after.tokens, group.pins, after.pin_places)
            for (group, selection), after in zip(parts, self.groups, strict=True)
            if selection is not None
        ]
        self.stages.append(StageTrace(stage.layer, stage.attention, RowTraces(self.batch, rows)))
        self.lengths[stage.layer] = hidden.shape[1]
        return hidden

    def _cut(self, stage: Stage, hidden: Tensor, parts: Sequence[tuple[Group, Selection | None]]) -> Tensor:
        """(B, M', d) what is left of (B, M, d); groups, slots and caches follow."""
        plan = cut(parts, self.batch, moves=self._moves, front=bool(self.recurrent))
        out = take(hidden, plan.source, 1)
        for (before, _), after, left in zip(parts, plan.groups, plan.survivors, strict=True):
            if left is not None and left[0].merge is not None:
                out = _merged(hidden, out, before, after, left[0].merge, left[1])
        self.groups = plan.groups
        self.slots = plan.index if self.slots is None else self.slots.to(hidden.device).gather(1, plan.index)
        self.filled = plan.filled
        if self.recurrent and self.past and self.filled is not None:
            raise ConfigError(
                "rows that keep different numbers of tokens need fillers, which a recurrent layer would read into the "
                "state that it has of the conversation so far. Prune further prompts of this model one row at a time, "
                "or give all rows pictures of one size."
            )
        self._memo.clear()
        self._made.clear()
        if self.gate is None:
            self.gate = cache_layers.put_gate(self.cache, stage.layer)
        if stage.trims_below:
            self._trim_below(stage.layer, hidden.device)
        return out

    def _ask(self, pruner: Method, number: int, hidden: Tensor) -> Selections:
        """What the method decides from (B, M, d) states, group by group."""
        chosen, paid, inputs = [], self.states, _detached(self.inputs)
        if paid is not None and self.samples is not None and paid.mask is None:  # as for flash, which is told lengths
            paid = replace(paid, samples=self._samples(paid.query.device))
        for group in self.groups:
            if not len(group.tokens):
                if group.pins:  # nothing to choose from, but visual tokens all the same
                    chosen.append(Decision(group.rows, Selection(group.tokens.position)))
                continue
            every = len(group.rows) == len(hidden)
            view = View(
                stage=number,
                tokens=group.tokens,
                original=group.original,
                hidden=hidden if every else hidden[group.at(hidden.device)],
                embeddings=inputs if every else inputs[group.at(inputs.device)],
                words=self._text.words(group, self.slots, hidden.shape[1], group.tokens),
                sources=tuple(self.sources),
                rows=group.rows,
                pinned=len(group.pins),
                states=paid if paid is None or every else paid.select(group.at(paid.query.device)),
                memory=group.memory,
                layout=self.layout,
                notes=self.notes,
                shared=self.shared,
            )
            if group.asked:
                words = functools.partial(self._words, group, hidden.shape[1])
                selection, pending = select_asked(view, group, words, pruner.select)
                chosen.append(Decision(group.rows, selection))
                self.pending += pending
            else:
                chosen += decided(group, pruner.select(view))
        self.pending += [d.selection.pending for d in chosen if d.selection.pending is not None]
        return chosen

    def _words(self, group: Group, current: int, question: int, tokens: Candidates) -> Words:
        return self._text.words(group, self.slots, current, tokens, question)

    # -- what later layers receive ------------------------------------------------------------------------------------
    def arguments(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any, *, remember: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer's arguments, cut to the tokens that are left. Layers that get the same things share the work.

        Args:
            layer: index of the layer.
            args: positional arguments; the hidden states are cut already.
            kwargs: keyword arguments as the model passes them to this call of the layer alone: they are changed.
            cache: the layer's cache, or None.
            remember: whether the layer is about to store the tokens.
        """
        before = None
        if cache is not None:
            before = self.before(layer, cache)
            if remember:
                self.remember(cache, before)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        kind: tuple[Any, ...] = (hidden.device, layer in self.recurrent, id(before), type(cache))
        if self.past or kv.is_fixed(cache):  # else all layers are empty, and alike
            kind += (getattr(cache, "max_cache_len", None), self.stored(cache))
        key = (*kind, *map(id, kwargs.values()))
        made = self._made.get(key)
        if made is None:
            cut, served = self._arguments(layer, hidden, kwargs, cache, before)
            made = cut, served, (before, *kwargs.values())  # what is held keeps the ids in the key unique
            if args:  # else the hidden states are among the keys
                self._made[key] = made
        kwargs.update(made[0])
        if self.rotary is not None:
            self.rotary.serve(layer, made[1])
            if remember and kv.is_fixed(cache):  # compiled steps find the rotary calls there
                cache.tables = made[1]
        if len(args) > 1:
            return (hidden, *(tree(v, self.slots, self.length, -2) for v in args[1:])), kwargs
        return args, kwargs

    def _arguments(
        self, layer: int, hidden: Tensor, kwargs: dict[str, Any], cache: Any, before: Kept | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keyword arguments that change, and the rotary calls that made some of them."""
        cut: dict[str, Any] = {}
        served: dict[str, Any] = {}
        for name, value in kwargs.items():
            key: tuple[Any, ...] = (name, id(value), id(before), hidden.device)
            if name == "hidden_states":
                continue
            if layer in self.recurrent and is_mask(name, value):
                key, make = ("there", hidden.device), functools.partial(self._alive, hidden.device)
            elif is_mask(name, value):
                key += (type(cache), getattr(cache, "max_cache_len", None), self.stored(cache))
                make = functools.partial(self._mask, before, value, cache, hidden)
            elif self.samples is not None and name.startswith(("cu_seq_lens_", "max_length_")):
                make = functools.partial(self._lengths, name, value, hidden.device)
            elif isinstance(value, (Tensor, tuple, list, dict)):
                make = functools.partial(self._positions, before, name, value, hidden)
                if self.rotary is not None:
                    served |= self.rotary.made(name, value)
            else:
                continue
            cut[name] = self._once(key, (value, before), make)
        return cut, served

    def _mask(self, before: Kept | None, mask: Any, cache: Any, hidden: Tensor) -> Any:
        slots, filled = self.on(hidden.device)
        past, length = self.past, self.length
        return kv.cut_mask(mask, cache, before, hidden, self.config, past=past, length=length, slots=slots, real=filled)

    def stored(self, cache: Any) -> int:
        """Entries that a layer's cache held before this call; a static one counts on the device."""
        return kv.stored(cache) if self.past else 0

    # -- the cache ----------------------------------------------------------------------------------------------------
    def before(self, layer: int, cache: Any) -> Kept | None:
        """What a layer's cache remembered when the call began."""
        if layer not in self._before:
            self._before[layer] = None if self.fresh else kv.kept_of(cache)
        return self._before[layer]

    def alike(self, layers: int) -> bool:
        """Whether the caches of all layers are of one kind that grows, and were empty; looked at once."""
        if self._alike is None:
            self._alike = self.cache is None or self._are_alike(layers)
        return self._alike

    def _are_alike(self, layers: int) -> bool:
        last = kv.layer_of(self.cache, layers - 1)  # which makes those before it as well
        if self.past or not self.fresh or last is None or cache_layers.is_a(last, StaticLayer):
            return False
        kinds = set(map(type, self.cache.layers[:layers]))
        return set(map(cache_layers.kind_of, kinds)) == {cache_layers.kind_of(type(last))}

    def pass_on(self, layer: int, others: Sequence[int]) -> None:
        """Tell the caches of other layers, alike and empty, that they are about to store what that of `layer` does."""
        if self.cache is not None:
            assert self.slots is not None
            kept = kv.kept_of(self.cache.layers[layer])
            told = [self.cache.layers[k] for k in others]
            cache_layers.record_all(told, kept, self.length - self.slots.shape[1])
        if self.rotary is not None:
            calls = self.rotary.served(layer)
            for k in others:
                self.rotary.serve(k, calls)

    def remember(self, cache: Any, before: Kept | None) -> None:
        """Tell a layer's cache which tokens it is about to store."""
        assert self.slots is not None
        device = self.slots.device
        kept = self._once(("kept", id(before)), before, functools.partial(self._kept, before, device))
        if kv.kept_of(cache) is kept:  # it has been told before
            return
        cache_layers.record(cache, kept, self.length - self.slots.shape[1])

    def _kept(self, old: Kept | None, device: torch.device) -> Kept:
        """What a cache holds that remembered `old`, once it has stored the tokens that are left."""
        slots, filled = self.on(device)
        held, kept_real = entries(old, self.past, slots + self.past if self.past else slots, filled)
        lost = None
        if self.rotary is not None and self.rotary.renumbers:
            if self.real is None and filled is None and not self.past:  # what `missing` gives, with fewer launches
                lost = torch.ones(self.batch, self.length, dtype=torch.bool, device=device).scatter_(1, slots, False)
            else:
                lost = missing(old, self.past, self.reality(device), slots, self._there(device))
        pictures = () if old is None else old.pictures
        here = Pictures(tuple((t.position, t.image) for t in self.layout.rows), self.past, self.merges)
        return Kept(held, kept_real, self.past + self.length, lost, (*pictures, here))

    def _trim_below(self, stage: int, device: torch.device) -> None:
        """Take what has been dropped out of the caches of the layers below a stage, too."""
        everything = torch.arange(self.past, self.past + self.length, device=device).expand(self.batch, -1)
        for i in range(stage):
            cache = kv.layer_of(self.cache, i)
            if kv.is_sliding(cache) or not kv.stored(cache):  # a window forgets by itself; or nothing is in it
                continue
            old, now = self.before(i, cache), kv.kept_of(cache)
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
            cache_layers.trim(cache, index, kept, held.shape[1] - index.shape[1])

    def shows(self, last: Any) -> bool:
        """Whether the `last` tokens of every row are there, in their places behind all others."""
        if not isinstance(last, int) or self.padded is not None or self.filled is not None:
            return False
        return 0 < last <= self.length - max(row.span[1] for row in self.layout.rows)

    # -- the record ---------------------------------------------------------------------------------------------------
    def trace(self, settings: Mapping[str, Any], layers: int, *, even: bool = False) -> Trace:
        """What happened, once the call is over.

        Args:
            settings: the method's parameters.
            layers: number of decoder layers.
            even: whether layers of one kind hold as many bytes as others if as many tokens enter them.
        """
        total = self.past + self.length
        entering = [self.length] * layers
        for layer, length in self.lengths.items():
            entering[layer:] = [length] * (layers - layer)
        for layer, length in self.narrow.items():
            entering[layer] = length
        held_layers = getattr(self.cache, "layers", ())[:layers]
        if even and len(held_layers) == layers and not self.narrow and self.alike(layers):
            last = dict(zip(entering, held_layers, strict=True))
            one = {length: kv.sizes(layer, total) for length, layer in last.items()}
            sizes = [one[length] for length in entering]
        else:
            sizes = [kv.sizes(layer, total) for layer in held_layers]
            sizes += [(0, 0)] * (layers - len(sizes))
        held, unpruned = [list(column) for column in zip(*sizes, strict=True)]
        return Trace(settings, self.layout, self.length, self.stages, entering, held, unpruned)


def _exact(device: torch.device) -> AbstractContextManager[None]:
    """Without gradients, in the precision that is asked for; entering both contexts takes longer than a launch."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        return _without_either(device)
    return nullcontext()


def _detached(states: Tensor) -> Tensor:
    return states.detach() if states.requires_grad else states


@contextmanager
def _without_either(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _merged(hidden: Tensor, out: Tensor, before: Group, after: Group, merge: Merge, order: Tensor) -> Tensor:
    """Write merged states over those of their targets in `out`, (B, M', d).

    Args:
        hidden: (B, M, d) the states before the stage.
        out: the states after it.
        before: the rows before.
        after: the rows after.
        merge: what is merged.
        order: (rows, m) the survivors among the candidates.
    """
    if not merge.source.shape[1]:
        return out
    at = after.at(hidden.device)
    place = torch.zeros_like(before.tokens.position).scatter_(1, order, after.tokens.position)
    moved = Merge(before.tokens.position.gather(1, merge.source), place.gather(1, merge.target), merge.weight)
    part = out[at]
    merge_states(hidden[at], part, moved)
    if not isinstance(at, slice):
        out[at] = part
    return out


def restored(out: Any, run: Prefill) -> Any:
    """A decoder's output with a state for each token of the call again, as callers other than `generate` expect."""
    states = out[0] if isinstance(out, tuple) else out.last_hidden_state
    if run.narrow and states.shape[1] in run.narrow.values():  # the last tokens only, as they were asked for
        return out
    if isinstance(out, tuple):
        return (run.restored(out[0]), *out[1:])
    out.last_hidden_state = run.restored(out.last_hidden_state)
    return out
