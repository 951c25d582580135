"""Pruning inside an unmodified model: hooks cut, a one-shot tap scores, the cache remembers.

The only cutting point is the input of a decoder layer. Pre-hooks on the layers replace the hidden states at a stage,
and from there on the position ids, rotary tables and attention mask by the parts that belong to the surviving tokens.
Everything that outlives the forward call is on the cache (`evengaze.cache`); everything else ends with it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from evengaze import cache as kv
from evengaze.attention import AttentionStates, attention_module, hidden_attention, probe, tap, untap
from evengaze.cut import causal_mask, mask_columns, take, take_mask
from evengaze.errors import AttachError, ConfigError, LayoutError, NothingPrunedError
from evengaze.layout import VisualLayout, VisualTokens
from evengaze.methods.base import Pruner, Selection, Stage, View
from evengaze.models import adapter_for, find_decoder
from evengaze.models.base import Adapter, Call, EncoderCall
from evengaze.trace import RowTrace, StageTrace, Trace

_MARK = "_evengaze_handle"
_MASKS = ("attention_mask", "causal_mask")
_SEQUENCES = ("position", "cache_position", "freqs_cis", "per_layer_input")


def attach(model: nn.Module, pruner: Pruner, *, layout: VisualLayout | None = None) -> Handle:
    """Prune a model's visual tokens from now on, until the returned handle is removed.

    Args:
        model: a transformers model. Its `generate()` and forward are used as always.
        pruner: the method.
        layout: where the visual tokens are, for a bare decoder or an unknown family; found by the family's adapter if
            left out.

    Raises:
        AttachError: the model is attached already, or its attention cannot be read.
        UnsupportedModelError: no adapter serves the model.
        ConfigError: the method's stages do not fit the model.
    """
    return Handle(model, pruner, layout)


@dataclass
class _Prefill:
    """One forward call that holds visual tokens. Indices are into the call's L tokens unless said otherwise."""

    tables: list[VisualTokens]  # surviving visual tokens of each row; positions in the current sequence
    layout: VisualLayout
    real: Tensor  # (B, L) False for batch padding
    inputs: Tensor  # (B, L, d) embeddings, or (B, L) token ids
    past: int
    restore: bool
    origins: list[Tensor]  # which token of the row's layout each surviving one is
    slots: Tensor | None = None  # (B, M) original index of each token of the current sequence; None: all L
    filled: Tensor | None = None  # (B, M) False for fillers of ragged rows
    memory: list[dict[str, Any]] = field(default_factory=list)
    states: AttentionStates | None = None
    replay: list[list[Selection | None]] | None = None
    selections: list[list[Selection | None]] = field(default_factory=list)
    stages: list[StageTrace] = field(default_factory=list)
    entering: list[int] = field(default_factory=list)
    cache: Any = None
    memo: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    previous: dict[int, kv.Kept | None] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.real.shape[1]

    def once(self, key: Any, held: Any, make: Callable[[], Any]) -> Any:
        """`make()`, remembered under `key`. `held` stays alive with it, so that ids in the key stay unique."""
        if key not in self.memo:
            self.memo[key] = (held, make())
        return self.memo[key][1]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Slots (made explicit) and fillers on a device."""
        if self.slots is None:
            return torch.arange(self.length, device=device).expand(self.real.shape[0], -1), None
        filled = None if self.filled is None else self.filled.to(device)
        return self.slots.to(device), filled


@dataclass(frozen=True)
class _Frozen:
    """What a call without a cache decided, for the longer calls of the same generation that follow it."""

    inputs: Tensor
    layout: VisualLayout
    selections: list[list[Selection | None]]

    def continued_by(self, inputs: Tensor) -> bool:
        """Whether a call repeats the recorded one with further tokens behind it."""
        batch, length = self.inputs.shape[:2]
        if inputs.shape[0] != batch or inputs.shape[1] <= length or inputs.dtype != self.inputs.dtype:
            return False
        return torch.equal(self.inputs, inputs[:, :length])


class Handle:
    """An attached pruner. A context manager: leaving it, also by an exception, restores the model.

    Attributes:
        model: the model.
        pruner: the method.
        trace: what the last call with visual tokens kept and dropped; None before the first.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, layout: VisualLayout | None = None) -> None:
        self.model, self.pruner = model, pruner
        self.trace: Trace | None = None
        self._layout = layout
        self._adapter: Adapter | None = None if layout is not None else adapter_for(model)
        decoder = find_decoder(model) if self._adapter is None else self._adapter.decoder(model)
        self._decoder: Any = decoder
        if _MARK in self._decoder.__dict__:
            held: Handle = self._decoder.__dict__[_MARK]
            raise AttachError(
                f"{type(model).__name__} already has {held.pruner.name} attached. Leave its `with` block or call "
                "remove() on its handle first; one pruner at a time."
            )
        self._layers: Sequence[nn.Module] = tuple(self._decoder.layers)
        stages = list(pruner.stages(len(self._layers)))
        self._stages: dict[int, tuple[int, Stage]] = {s.layer: (n, s) for n, s in enumerate(stages)}
        self._taps = {s.layer - 1 for s in stages if s.attention == "previous"}
        self._check(stages)
        self._run: _Prefill | None = None
        self._frozen: _Frozen | None = None
        self._encoded: list[EncoderCall] = []
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._labels = False
        self._rotary: list[tuple[Any, nn.Module, tuple[Any, ...], dict[str, Any]]] = []
        self._rotary_of: dict[int, dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]] = {}
        self._decoding: dict[Any, tuple[Any, Any]] = {}
        self._undo: list[Callable[[], None]] = []
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take all hooks off; the model is as it was. Calling it twice does no harm."""
        while self._undo:
            self._undo.pop()()
        for layer in self._taps:
            untap(attention_module(self._layers[layer]))
        self._run = self._frozen = None
        self._encoded.clear()
        self._rotary.clear()

    # -- setting up -------------------------------------------------------------------------------------------------
    def _check(self, stages: Sequence[Stage]) -> None:
        layers = len(self._layers)
        if len(self._stages) != len(stages) or sorted(self._stages) != [s.layer for s in stages]:
            raise ConfigError(f"{self.pruner.name}: stages must be at different layers, in ascending order")
        for stage in stages:
            if not 0 <= stage.layer < layers:
                raise ConfigError(
                    f"{self.pruner.name}: layer {stage.layer} is outside the model, whose {layers} decoder layers are "
                    f"numbered 0 to {layers - 1}"
                )
            if stage.layer == 0 and stage.attention == "previous":
                raise ConfigError(
                    f"{self.pruner.name}: no attention has been paid before layer 0; the first layer to prune at is 1"
                )
            if stage.attention is not None:
                attention_module(self._layers[stage.layer - (stage.attention == "previous")])

    def _install(self) -> None:
        keep = self._undo.append
        self._decoder.__dict__[_MARK] = self
        keep(lambda: self._decoder.__dict__.pop(_MARK, None) and None)
        base = getattr(self.model, "base_model", self.model)
        for outer in {id(m): m for m in (self.model, base) if m is not self._decoder}.values():
            keep(outer.register_forward_pre_hook(self._enter_model, with_kwargs=True).remove)
        keep(self._decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True).remove)
        keep(self._decoder.register_forward_hook(self._leave_decoder, with_kwargs=True, always_call=True).remove)
        first = 0 if self.pruner.trims_earlier_caches else min([*self._taps, *self._stages], default=len(self._layers))
        for i, layer in enumerate(self._layers[first:], first):
            hook = functools.partial(self._enter_layer, i)
            keep(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if self.pruner.positions == "renumbered":
            for name, module in self._decoder.named_children():
                if name.startswith("rotary_emb"):
                    keep(module.register_forward_hook(self._leave_rotary, with_kwargs=True).remove)
        if callable(getattr(self.model, "generate", None)):
            keep(_intercept(self.model, "generate", self._enter_generate))
        if self._adapter is not None:
            for kind in ("image", "video"):
                if callable(getattr(base, f"get_{kind}_features", None)):
                    keep(_intercept(base, f"get_{kind}_features", functools.partial(self._encode, kind)))
            keep(self._adapter.prepare(self.model, self.surviving))
        vision = getattr(self.pruner, "prepare", None)
        if callable(vision):
            keep(vision(self.model, self._adapter))

    def surviving(self) -> Tensor | None:
        """(B, M) indices of the tokens of the running call that are still there; None if none has been dropped."""
        return None if self._run is None else self._run.slots

    # -- what a call consists of ------------------------------------------------------------------------------------
    def _enter_generate(self, arguments: dict[str, Any]) -> None:
        config = arguments.get("generation_config") or self.model.generation_config
        kwargs = arguments.get("kwargs", {})
        if kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None)) is not None:
            raise ConfigError(
                "prefill_chunk_size splits the prompt, so that visual tokens would be ranked by a question that has "
                "not been read yet. Set prefill_chunk_size=None; pruning already lowers the prefill's memory."
            )
        self._encoded.clear()
        self._frozen = None

    def _encode(self, kind: Any, arguments: dict[str, Any]) -> None:
        self._encoded.append(EncoderCall(kind, arguments))

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self.model:
            self._ids, self._mask, self._labels = None, None, False
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.dim() == 2:
            self._ids = ids
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._mask = mask
        self._labels = self._labels or kwargs.get("labels") is not None

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("inputs_embeds")
        if states is None:
            states = kwargs.get("input_ids", args[0] if args else None)
        if states is None or states.shape[1] == 1:  # a decoding step, also of a compiled graph
            if not torch.compiler.is_compiling():
                self._decoding.clear()
            self._run = None
            return
        self._decoding.clear()
        self._rotary.clear()
        ids, mask, labels = self._ids, self._mask, self._labels
        self._ids, self._mask, self._labels = None, None, False
        if mask is None and isinstance(kwargs.get("attention_mask"), Tensor):
            mask = kwargs["attention_mask"]
        self._run = self._begin(states, ids, mask, kwargs.get("past_key_values"), labels)

    def _begin(
        self, states: Tensor, ids: Tensor | None, mask: Tensor | None, cache: Any, restore: bool
    ) -> _Prefill | None:
        batch, length = states.shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        if mask is not None and mask.dim() == 2:
            real = mask[:, -length:].bool().to(states.device)
        elif mask is not None and mask.dim() == 4:
            seen = mask[:, 0, -1, past : past + length]
            real = (seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2).expand(batch, -1)
        else:
            real = torch.ones(batch, length, dtype=torch.bool, device=states.device)
        replay = None
        frozen = self._frozen
        if frozen is not None and cache is None and frozen.continued_by(states):
            layout: VisualLayout | None = frozen.layout
            replay = frozen.selections
        else:
            layout = self._find(ids, real if mask is not None else None, past, length)
        self._encoded.clear()
        if layout is None or layout.total == 0:
            return None
        layout = layout.expand(batch)
        tables = [row.to(states.device) for row in layout.rows]
        _check_positions(tables, real)
        return _Prefill(
            tables=tables,
            layout=VisualLayout(tuple(tables)),
            real=real,
            inputs=states,
            past=past,
            restore=restore,
            origins=[torch.arange(len(t), device=states.device) for t in tables],
            memory=[{} for _ in tables],
            replay=replay,
        )

    def _find(self, ids: Tensor | None, mask: Tensor | None, past: int, length: int) -> VisualLayout | None:
        if self._adapter is None:
            assert self._layout is not None
            reach = max((int(r.position.max()) + 1 for r in self._layout.rows if len(r)), default=0)
            if past:
                return None  # spans describe the prompt, which is in the cache
            if reach > length:
                raise LayoutError(f"the layout reaches to token {reach}, but the call has only {length} tokens")
            return self._layout
        call = Call(ids, mask, past, tuple(self._encoded))
        layout = self._adapter.layout(self.model, call)
        if self._encoded and (layout is None or layout.total == 0):
            raise LayoutError(
                "images or videos were encoded, but the prompt has no visual tokens. Build the inputs with the model's "
                "processor, with one image placeholder in the text for each image."
            )
        return layout

    # -- layers -----------------------------------------------------------------------------------------------------
    def _enter_layer(
        self, i: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache = kv.layer_of(kwargs.get("past_key_values"), i)
        run = self._run
        if run is None:
            return self._decode(i, args, kwargs, cache)
        run.cache = kwargs.get("past_key_values")
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if i in self._stages:
            number, stage = self._stages[i]
            self._read(run, i, stage, layer, args, kwargs, cache)
            hidden = self._prune(run, number, stage, hidden)
        if i in self._taps:
            tap(attention_module(layer), functools.partial(setattr, run, "states"), past=kv.stored(cache))
        run.entering.append(hidden.shape[1])
        if run.slots is None:
            return self._decode(i, args, kwargs, cache)
        if cache is not None:
            self._remember(run, i, cache, hidden.device)
        return self._sliced(run, i, hidden, args, kwargs, cache)

    def _read(
        self,
        run: _Prefill,
        i: int,
        stage: Stage,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: Any,
    ) -> None:
        """Put the attention states that a stage ranks by into `run.states`."""
        if run.replay is not None or stage.attention is None:
            untap(attention_module(self._layers[i - 1])) if stage.attention == "previous" else None
            run.states = None
        elif stage.attention == "own":
            hidden = args[0] if args else kwargs["hidden_states"]
            run.previous[i] = kv.kept_of(cache)
            if run.slots is not None:
                args, kwargs = self._sliced(run, i, hidden, args, kwargs, cache)
            else:
                args, kwargs = self._decode(i, args, kwargs, cache) or (args, kwargs)
            states, past = probe(layer, args, kwargs), kv.stored(cache)
            if past:  # an earlier turn's keys are in the cache that the probe did not touch
                states = replace(states, key=torch.cat([cache.keys[:, :, :past], states.key], 2), past=past)
            run.states = states
        elif run.states is None:
            untap(attention_module(self._layers[i - 1]))
            raise hidden_attention(attention_module(self._layers[i - 1]))

    def _prune(self, run: _Prefill, number: int, stage: Stage, hidden: Tensor) -> Tensor:
        """Ask the method, row by row, and cut the hidden states."""
        inputs = run.inputs
        embeddings = inputs if inputs.is_floating_point() else self._decoder.get_input_embeddings()(inputs)
        views = [self._view(run, b, number, hidden, embeddings) for b in range(hidden.shape[0])]
        if run.replay is not None:
            chosen = run.replay[number]
        else:
            chosen = [None if view is None else self.pruner.select(view) for view in views]
        run.states = None
        run.selections.append(chosen)
        run.stages.append(self._stage_trace(run, number, stage, chosen))
        if all(
            s is None or (len(s.keep) == len(t) and s.merge is None) for s, t in zip(chosen, run.tables, strict=True)
        ):
            return hidden
        batch, length = hidden.shape[:2]
        alive = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
        if run.filled is not None:
            alive &= run.filled.to(hidden.device)
        rows = [_row_plan(alive[b], run.tables[b], chosen[b]) for b in range(batch)]
        size = max(len(slots) for slots, _ in rows)
        slots, filled = _stack(rows, alive, size)
        old, _ = run.on(hidden.device)
        source = slots.clone()
        for b, (_, order) in enumerate(rows):
            source[b, filled[b]] = order
        out = take(hidden, source, 1)
        for b, selection in enumerate(chosen):
            self._keep_row(run, b, selection, slots[b], filled[b], source[b], hidden, out)
        run.slots = old.gather(1, slots)
        run.filled = None if bool(filled.all()) else filled
        run.memo.clear()
        return out

    @staticmethod
    def _keep_row(
        run: _Prefill,
        b: int,
        selection: Selection | None,
        slots: Tensor,
        filled: Tensor,
        source: Tensor,
        hidden: Tensor,
        out: Tensor,
    ) -> None:
        """Merge one row's states into `out` and move its table to the new sequence."""
        table = run.tables[b]
        place = torch.full((hidden.shape[1],), -1, dtype=torch.long, device=hidden.device)
        place[source[filled]] = filled.nonzero().flatten()  # where each surviving token went
        if selection is None:
            return
        chosen = selection.keep
        if selection.recycled is not None and len(selection.recycled):
            chosen = torch.cat([chosen, selection.recycled])
        if selection.merge is not None and len(selection.merge.source):
            merge = selection.merge
            states = hidden[b, table.position[merge.source]].float() * merge.weight.float()[:, None]
            target = place[table.position[merge.target]]
            total = torch.zeros(out.shape[1:], dtype=torch.float32, device=out.device).index_add_(0, target, states)
            touched = torch.unique(target)
            out[b, touched] = total[touched].to(out.dtype)
        moved = table.take(chosen)
        run.tables[b] = replace(moved, position=place[moved.position])
        run.origins[b] = run.origins[b][chosen]

    @staticmethod
    def _view(run: _Prefill, b: int, number: int, hidden: Tensor, embeddings: Tensor) -> View | None:
        device = hidden.device
        run.tables[b] = run.tables[b].to(device)
        run.origins[b] = run.origins[b].to(device)
        if len(run.layout.rows[b]) == 0:
            return None
        slots, filled = run.on(device)
        real = run.real[b].to(device)[slots[b]]
        if filled is not None:
            real = real & filled[b]
        return View(
            stage=number,
            tokens=run.tables[b],
            original=len(run.layout.rows[b]),
            hidden=hidden[b],
            embeddings=embeddings[b],
            initial=run.layout.rows[b],
            real=real,
            memory=run.memory[b],
            states=run.states,
            row=b,
        )

    # -- what later layers receive ------------------------------------------------------------------------------------
    def _sliced(
        self, run: _Prefill, i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The layer's arguments, cut to the tokens that are left."""
        cut = dict(kwargs)
        before = run.previous.get(i)
        for name, value in kwargs.items():
            held = (value, before)
            key: tuple[Any, ...] = (name, id(value), id(before), hidden.device)
            if name in _MASKS:
                key += (type(cache), getattr(cache, "max_cache_len", None), kv.stored(cache))
                make = functools.partial(self._cut_mask, run, before, value, cache, hidden)
            elif value is not None and name.startswith(_SEQUENCES):
                make = functools.partial(self._cut_positions, run, i, name, value, hidden)
            else:
                continue
            cut[name] = run.once(key, held, make)
        rest = tuple(_cut_tree(v, run.slots, run.length, -2) if isinstance(v, (Tensor, tuple)) else v for v in args[1:])
        if args:
            return (hidden, *rest), cut
        cut["hidden_states"] = hidden
        return args, cut

    def _cut_positions(self, run: _Prefill, i: int, name: str, value: Any, hidden: Tensor) -> Any:
        assert run.slots is not None
        new = self._renumbered(run, i, hidden.device)
        if new is not None and name.startswith("position_embeddings"):
            for out, module, args, kwargs in self._rotary:
                if out is value:
                    self._rotary_of.setdefault(i, {})[name] = (module, args[2:], kwargs)
                    return _rotate(module, hidden, new, args[2:], kwargs)
        if name == "position_ids":
            return new if new is not None else _cut_tree(value, run.slots, run.length, -1)
        return _cut_tree(value, run.slots, run.length, -2)

    def _renumbered(self, run: _Prefill, i: int, device: torch.device) -> Tensor | None:
        """(B, M) positions without gaps, or None where positions stay as they were."""
        if self.pruner.positions != "renumbered" or not self._one_dimensional():
            return None
        slots, filled = run.on(device)
        there = run.real.to(device).gather(1, slots)
        if filled is not None:
            there = there & filled
        start = self._first_position(run, device)
        before = run.previous.get(i)
        if before is not None and before.shift is not None:
            start = start - before.shift.to(device)
        return (there.long().cumsum(1) - 1).clamp(min=0) + start

    def _one_dimensional(self) -> bool:
        """Whether the rotary positions are (B, L); multimodal rotary embeddings have several axes and stay."""
        return all(_rotary_positions(args, kwargs).dim() == 2 for _, _, args, kwargs in self._rotary)

    def _first_position(self, run: _Prefill, device: torch.device) -> Tensor:
        """(B, 1) position of each row's first real token of this call."""
        positions = _rotary_positions(*self._rotary[0][2:]).to(device).expand(run.real.shape[0], -1)
        return positions.gather(1, run.real.to(device).int().argmax(1, keepdim=True))

    def _remember(self, run: _Prefill, i: int, cache: Any, device: torch.device) -> None:
        """Tell the cache layer which tokens it is about to store."""
        old = run.previous[i] = kv.kept_of(cache)
        slots, filled = run.on(device)
        kept = run.once(("kept", id(old)), old, lambda: self._kept(run, slots, filled, old))
        kv.record(cache, kept, run.length - slots.shape[1])

    def _kept(self, run: _Prefill, slots: Tensor, filled: Tensor | None, old: kv.Kept | None) -> kv.Kept:
        entries, real = kv.entries(old, run.past, slots + run.past, filled)
        shift = None
        if self.pruner.positions == "renumbered" and self._one_dimensional():
            there = run.real.to(slots.device)
            left = there.gather(1, slots)
            left = left if filled is None else left & filled
            shift = there.sum(1, keepdim=True) - left.sum(1, keepdim=True)
            if old is not None and old.shift is not None:
                shift = shift + old.shift.to(shift.device)
        return kv.Kept(entries, real, run.past + run.length, shift)

    def _cut_mask(self, run: _Prefill, before: kv.Kept | None, mask: Any, cache: Any, hidden: Tensor) -> Any:
        slots, filled = run.on(hidden.device)
        held, real = kv.entries(before, run.past, slots + run.past, filled)
        queries, total = slots.shape[1], run.past + run.length
        if mask is None:
            return None if real is None else causal_mask(real, queries, self._implementation, hidden.dtype)
        flat = isinstance(mask, Tensor) and mask.dim() == 2
        columns, real = kv.mask_columns_of(cache, held, real, queries, mask_columns(mask), total, flat)
        return take_mask(mask, None if flat else slots, columns, real)

    @property
    def _implementation(self) -> str:
        return self._decoder.config._attn_implementation or "eager"

    # -- decoding -----------------------------------------------------------------------------------------------------
    def _decode(
        self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Fit a step's mask and positions to a layer whose cache was pruned in an earlier call."""
        kept = kv.kept_of(cache)
        if kept is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cut = dict(kwargs)
        if kept.shift is not None:
            position = kwargs["position_ids"] - kept.shift.to(hidden.device)
            cut["position_ids"] = position
            for name, (module, rest, options) in self._rotary_of.get(i, {}).items():
                cut[name] = _rotate(module, hidden, position, rest, options)
        mask = kwargs.get("attention_mask")
        if mask is None and kept.real is None:
            return (args, cut) if kept.shift is not None else None
        if torch.compiler.is_compiling():
            cut["attention_mask"] = self._step_mask(mask, kept, cache, hidden)
        else:  # one gather for each step and kept set, not for each layer
            key = (id(mask), id(kept), type(cache), kv.stored(cache), hidden.device)
            if key not in self._decoding:
                self._decoding[key] = ((mask, kept), self._step_mask(mask, kept, cache, hidden))
            cut["attention_mask"] = self._decoding[key][1]
        return args, cut

    def _step_mask(self, mask: Any, kept: kv.Kept, cache: Any, hidden: Tensor) -> Any:
        queries = hidden.shape[1]
        flat = isinstance(mask, Tensor) and mask.dim() == 2
        if mask is not None and not flat and kv.is_fixed(cache):
            columns, real = kv.fixed_columns(cache, kept, mask_columns(mask))
            return take_mask(mask, None, columns.to(hidden.device), real.to(hidden.device))
        past = int(cache.get_seq_length())
        new = torch.arange(past, past + queries, device=hidden.device).expand(hidden.shape[0], -1)
        slots, filled = kv.entries(kept, past, new, None)
        if mask is None:
            assert filled is not None
            visible = filled[:, -(kv.stored(cache) + queries) :]
            return causal_mask(visible, queries, self._implementation, hidden.dtype)
        columns, filled = kv.mask_columns_of(cache, slots, filled, queries, mask_columns(mask), past + queries, flat)
        return take_mask(mask, None, columns, filled)

    # -- the end of a call --------------------------------------------------------------------------------------------
    def _leave_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if self._run is not None:
            self._rotary.append((out, module, args, kwargs))

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        run, self._run = self._run, None
        if torch.compiler.is_compiling():
            return None
        for i in self._taps:
            untap(attention_module(self._layers[i]))
        self._rotary.clear()
        if run is None or out is None:  # nothing to prune, or an exception is on its way
            return None
        if len(run.stages) < len(self._stages):
            missing = sorted(layer for layer, (n, _) in self._stages.items() if n >= len(run.stages))
            raise NothingPrunedError(
                f"{self.pruner.name} never got to prune at layers {missing}: the model's forward does not call them. "
                "Check that the adapter's decoder() is the module whose layers really run."
            )
        if self.pruner.trims_earlier_caches and run.slots is not None and run.cache is not None:
            self._trim(run)
        self.trace = self._make_trace(run)
        self._frozen = _Frozen(run.inputs, run.layout, run.selections) if run.cache is None else None
        if run.restore and run.slots is not None:
            states = out.last_hidden_state
            full = states.new_zeros(states.shape[0], run.length, states.shape[2])
            index = run.slots.to(states.device)[..., None].expand_as(states)
            out.last_hidden_state = full.scatter(1, index, states)
            return out
        return None

    def _trim(self, run: _Prefill) -> None:
        """Crop the caches of the layers below the last stage to what the layers above it hold."""
        last = kv.kept_of(kv.layer_of(run.cache, len(self._layers) - 1))
        if last is None:
            return
        new = torch.arange(run.past, run.past + run.length, device=last.slots.device).expand(len(run.tables), -1)
        for i in range(len(self._layers)):
            layer = kv.layer_of(run.cache, i)
            kept = kv.kept_of(layer)
            if kept is last or not isinstance(layer, DynamicLayer) or isinstance(layer, DynamicSlidingWindowLayer):
                continue
            fresh = kept is None or kept.end < run.past + run.length
            held = kv.entries(kept, run.past, new, None)[0] if fresh else kept.slots
            index = torch.searchsorted(held.contiguous(), last.slots.contiguous())
            kv.trim(layer, index, last, held.shape[1] - index.shape[1])

    def _stage_trace(self, run: _Prefill, number: int, stage: Stage, chosen: Sequence[Selection | None]) -> StageTrace:
        rows = []
        for b, selection in enumerate(chosen):
            memory, origin = run.memory[b], run.origins[b]
            if selection is None:
                rows.append(RowTrace.empty())
                continue
            rows.append(
                RowTrace(
                    candidates=origin,
                    kept=origin[selection.keep],
                    recycled=None if selection.recycled is None else origin[selection.recycled],
                    merge=selection.merge,
                    raw=memory.get(f"raw{number}"),
                    scores=memory.get(f"score{number}"),
                )
            )
        return StageTrace(stage.layer, stage.attention, rows)

    def _make_trace(self, run: _Prefill) -> Trace:
        layers = len(self._layers)
        entering = [run.length] * (layers - len(run.entering)) + run.entering
        held, per_token = [], []
        for i in range(layers):
            cache = kv.layer_of(run.cache, i)
            states = [] if cache is None or not cache.is_initialized else [cache.keys, cache.values]
            held.append(sum(t.numel() * t.element_size() for t in states))
            per_token.append(sum(t.numel() // t.shape[-2] * t.element_size() for t in states if t.shape[-2]))
        return Trace(
            pruner=self.pruner.to_dict(),
            layout=run.layout,
            length=run.length,
            stages=run.stages,
            entering=entering,
            kv_bytes=held,
            kv_bytes_per_token=per_token,
        )


# -- helpers ----------------------------------------------------------------------------------------------------------
def _intercept(owner: Any, name: str, before: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
    """Call `before` with a bound method's arguments by name, then the method; returns what undoes it.

    transformers encodes images in methods that are no module calls, which hooks cannot see.
    """
    method = getattr(owner, name)
    signature = inspect.signature(method)
    own = owner.__dict__.get(name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs)
        bound.apply_defaults()
        before(dict(bound.arguments))
        return method(*args, **kwargs)

    def undo() -> None:
        if own is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = own

    owner.__dict__[name] = call
    return undo


def _check_positions(tables: Sequence[VisualTokens], real: Tensor) -> None:
    for b, table in enumerate(tables):
        if len(table) and int(table.position.max()) >= real.shape[1]:
            raise LayoutError(
                f"row {b}: a visual token at position {int(table.position.max())}, but the call has {real.shape[1]} tokens"
            )


def _row_plan(alive: Tensor, table: VisualTokens, selection: Selection | None) -> tuple[Tensor, Tensor]:
    """Which slots of the current sequence survive in a row, and which token goes into each of them."""
    alive = alive.clone()
    if selection is not None:
        chosen = selection.keep
        recycled = selection.recycled
        if recycled is not None and len(recycled):
            chosen = torch.cat([chosen, recycled])
        alive[table.position] = False
        alive[table.position[chosen]] = True
        slots = alive.nonzero().flatten()
        if recycled is not None and len(recycled):
            # Recycled tokens stand behind the kept ones; slots only order tokens, so any of the row's visual slots do.
            visual = torch.isin(slots, table.position)
            order = slots.clone()
            order[visual] = table.position[chosen]
            return slots, order
        return slots, slots
    slots = alive.nonzero().flatten()
    return slots, slots


def _stack(rows: Sequence[tuple[Tensor, Tensor]], alive: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows of unlike length as one (B, size) index; shorter rows get dropped tokens as fillers."""
    slots, filled = [], []
    for index, _ in rows:
        missing = size - len(index)
        flag = torch.ones(len(index), dtype=torch.bool, device=index.device)
        if missing:
            dead = torch.ones(alive.shape[1], dtype=torch.bool, device=index.device)
            dead[index] = False
            index = torch.cat([index, dead.nonzero().flatten()[:missing]])
            flag = torch.cat([flag, flag.new_zeros(missing)])
            order = index.argsort()
            index, flag = index[order], flag[order]
        slots.append(index)
        filled.append(flag)
    return torch.stack(slots), torch.stack(filled)


def _cut_tree(value: Any, slots: Tensor | None, length: int, dim: int) -> Any:
    """Cut every tensor of a nest of tuples and dicts along its sequence axis."""
    if isinstance(value, (tuple, list)):
        return type(value)(_cut_tree(v, slots, length, dim) for v in value)
    if isinstance(value, dict):
        return {k: _cut_tree(v, slots, length, dim) for k, v in value.items()}
    if not isinstance(value, Tensor) or slots is None or value.dim() < 2 or value.shape[dim] != length:
        return value
    return take(value, slots, dim)


def _rotary_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["position_ids"] if "position_ids" in kwargs else args[1]  # type: ignore[no-any-return]


def _rotate(module: nn.Module, hidden: Tensor, positions: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The rotary tables of other positions, by the very call that made the model's own."""
    if "position_ids" in kwargs:
        return module.forward(hidden, **{**kwargs, "position_ids": positions})
    return module.forward(hidden, positions, *args, **kwargs)
