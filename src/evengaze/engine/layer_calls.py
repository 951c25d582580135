"""Before each decoder layer: tokens leave at a stage, and what the layer receives is cut to those that are left."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from evengaze.compat import by_name, cache_in
from evengaze.engine import cache as kv
from evengaze.engine import cache_layers, compiled
from evengaze.engine.attention import hidden_attention
from evengaze.engine.call import Call, Calls
from evengaze.engine.decode import Steps, in_graph
from evengaze.engine.intercept import before_forward
from evengaze.engine.plan import Plan
from evengaze.engine.prefill import Prefill
from evengaze.engine.relay import Handed, Holders, Relay, Relays
from evengaze.engine.rotary import Rotary, Served
from evengaze.engine.sharing import Arguments, Fold, borrowed
from evengaze.engine.tap import Taps, probe
from evengaze.protocol import Stage


class LayerCalls:
    """The calls of the layers of one attachment.

    Args:
        plan: of the attachment.
        calls: the running calls of the model.
        taps: on the layers' attention.
        served: the rotary calls that make the layers' arguments.

    Attributes:
        gates: of the caches that were pruned.
        relays: what stands in for the hooks of layers that get what an earlier one gets.
        unhooked: layers that a pruner has no business with.
    """

    def __init__(self, plan: Plan, calls: Calls, taps: Taps, served: Served) -> None:
        self._plan, self._calls, self._taps = plan, calls, taps
        self._stages, self._previous = plan.stages, plan.previous
        self._lenders, self._lending = plan.lenders, frozenset(plan.lenders.values())
        self._plain = Steps(plan.decoder.config, Rotary(served), remember=False)
        # Layers that are not alike, or not in one place, are each looked at.
        devices = {p.device for p in plan.decoder.parameters()}
        self._relayed = not plan.lenders and not plan.recurrent and len(devices) == 1
        self._hooked: set[int] = set()
        self._lock = threading.Lock()
        self.unhooked = list(range(len(plan.layers)))
        self.gates: WeakSet[cache_layers.Gate] = WeakSet()
        self.relays = Relays()

    @property
    def watched(self) -> int:
        """Number of layers that are hooked."""
        return len(self._hooked)

    def hook(self, numbers: Iterable[int], keep: Callable[[Callable[[], None]], None]) -> None:
        """Hook those of some layers that are not hooked yet; `keep` gets what undoes it."""
        with self._lock:
            for i in set(numbers) - self._hooked:
                layer, enter = self._plan.layers[i], functools.partial(self._enter, i)
                hook = before_forward(layer, enter)
                keep(hook)
                self.relays.add(i, Relay(i, layer, hook, enter, self._calls, self.relays.handed))
                self._hooked.add(i)
            self.unhooked = [i for i in range(len(self._plan.layers)) if i not in self._hooked]

    def _enter(self, i: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if torch.compiler.is_compiling():
            return self._compiled(i, args, kwargs)
        call = self._calls.top
        if call.idle:
            return None
        # A call inside this one may have ended in a way that hooks do not see. To find out means to walk the stack,
        # which decoding steps are spared.
        if call.nested or call.run is not None:
            call = self._calls.alive()
        if call.run is not None:
            call.run.entered += 1
        if len(args) == 1 and args[0].dim() == 3 and not self._lenders:
            return self._arguments(call, i, layer, args, kwargs)
        args, kwargs = by_name(layer, args, kwargs)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        slots = None if call.run is None else call.run.slots
        fold = Fold(hidden.shape, call.size[0], call.size[1] if slots is None else slots.shape[1])
        flat = (args, kwargs) if hidden.dim() == 3 else fold.arguments(args, kwargs, fold.flat(hidden))
        borrows = i in self._lenders
        new = self._borrow(call, i, *flat) if borrows else self._arguments(call, i, layer, *flat, fold)
        if i in self._lending:
            call.lent[i] = None if new is None else new[1]
        if new is None or hidden.dim() == 3:
            return new
        return fold.arguments(*new, fold.back(new[0][0] if new[0] else new[1]["hidden_states"]))

    def _compiled(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """The arguments of a decoding step in code that is being compiled."""
        whole = cache_in(args, kwargs)
        cache = kv.layer_of(whole, i)
        if i in self._lenders and kv.kept_of(kv.layer_of(whole, self._lenders[i])) is not None:
            compiled.refuse_sharing()
        if kv.kept_of(cache) is None or kv.is_fixed(cache):
            return in_graph(args, kwargs, cache)
        return self._plain.arguments(i, args, kwargs, cache)

    def _borrow(self, call: Call, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """The arguments of a layer without keys of its own."""
        if call.run is not None:
            call.run.narrow[i] = (args[0] if args else kwargs["hidden_states"]).shape[1]
        lent = call.lent.get(self._lenders[i])
        return None if lent is None else borrowed(call.run, i, args, kwargs, lent)

    def _arguments(
        self,
        call: Call,
        i: int,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        fold: Fold | None = None,
    ) -> Arguments | None:
        """What a layer is to receive, from (B, M, d) states; None if nothing changes."""
        run, steps = call.run, call.steps or self._plain
        # A decoder called without a cache makes one, which its layers are the first to show; as do layers called alone.
        if call.cache is None or not call.decoding:
            call.cache = cache_in(args, kwargs)
            if run is not None:
                run.cache = call.cache
        cache = kv.layer_of(call.cache, i)
        relayed = self._relayed and fold is None and not call.nested and not torch.is_grad_enabled()
        given = dict(kwargs) if relayed else kwargs  # as the model gives them: what follows writes into `kwargs`
        if run is None:
            if relayed and call.decoding and call.steps is not None and not call.steps.relayed:
                self._relay_step(call, call.steps, i, args, given)
            return steps.arguments(i, args, kwargs, cache)
        changed = i in self._stages
        if changed:
            number, stage = self._stages[i]
            if run.replay is None:
                self._read(run, steps, i, stage, layer, args, kwargs, cache, fold)
            hidden = run.prune(self._plan.pruner, number, stage, args[0] if args else kwargs["hidden_states"])
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            if run.gate is not None:
                self.gates.add(run.gate)
        if i in self._previous and run.replay is None:
            self._taps.on(layer).arm(functools.partial(setattr, run, "states"), past=run.stored(cache))
        if run.slots is None:
            return steps.arguments(i, args, kwargs, cache) or ((args, kwargs) if changed else None)
        new = run.arguments(i, args, kwargs, cache)
        if changed and relayed and run.alike(len(self._plan.layers)):
            self._relay_prefill(call, run, i, given, new)
        return new

    def _relay_step(self, call: Call, steps: Steps, i: int, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        """In a step, let the layers behind `i` take over what it gets, or what those get that hold the same tokens."""
        steps.relayed = True
        groups = self.relays.groups(call.cache) or self._relayed_groups(call.cache, i)
        held = [kv.kept_of(call.cache.layers[i]), *(group.kept for group in groups)]
        steps.shift(held, args, given)
        for group in groups:
            new = steps.arguments(group.layer, args, dict(given), call.cache.layers[group.layer])
            group.handed.set(call, given, new)

    def _relayed_groups(self, cache: Any, first: int) -> list[Holders]:
        """Relay the layers behind the first one of a step, by what they hold in the cache; none if they cannot be."""
        found: dict[int, Holders] = {}
        handed, kind = {}, cache_layers.kind_of(type(kv.layer_of(cache, first)))
        for k in self.relays.stand(k for k in range(first + 1, len(self._plan.layers)) if k in self._hooked):
            layer = kv.layer_of(cache, k)
            if cache_layers.kind_of(type(layer)) is not kind:  # layers of another kind get another mask
                continue
            kept = kv.kept_of(layer)
            if id(kept) not in found:
                found[id(kept)] = Holders(k, kept, Handed())
            handed[k] = found[id(kept)].handed
        groups = list(found.values())
        self.relays.hand(handed, cache, groups)
        return groups

    def _relay_prefill(self, call: Call, run: Prefill, stage: int, given: dict[str, Any], new: Arguments) -> None:
        """Let the layers up to the next stage take over what the first one behind a stage gets."""
        handed = Handed()
        handed.set(call, given, new)
        behind = range(stage + 1, min((n for n in self._stages if n > stage), default=len(self._plan.layers)))
        told = self.relays.stand(k for k in behind if k not in self._previous)
        self.relays.hand(dict.fromkeys(told, handed))
        run.pass_on(stage, told)

    def _read(
        self,
        run: Prefill,
        steps: Steps,
        i: int,
        stage: Stage,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: Any,
        fold: Fold | None,
    ) -> None:
        """See to it that `run.states` is the attention that a stage ranks by."""
        if stage.attention == "previous":
            tap = self._taps.on(self._plan.layers[i - 1])
            if tap.disarm() or run.states is None:  # the layer did not run, or compiled code ran in its place
                raise hidden_attention(tap.module)
        elif stage.attention == "own":
            kwargs = dict(kwargs)  # the layer itself is still to be called with them
            if run.slots is not None:
                args, kwargs = run.arguments(i, args, kwargs, cache, remember=False)
            else:
                args, kwargs = steps.arguments(i, args, kwargs, cache) or (args, kwargs)
            if fold is not None:
                args, kwargs = fold.arguments(args, kwargs, fold.back(args[0] if args else kwargs["hidden_states"]))
            with torch.no_grad():
                states = probe(self._taps.on(layer), self.relays.forward(i, layer), args, kwargs)
            past = run.stored(cache)
            if past:  # an earlier turn's keys are in the cache, which the probe does not touch
                states = replace(states, key=torch.cat([cache.keys[:, :, :past], states.key], 2), past=past)
            run.states = states
