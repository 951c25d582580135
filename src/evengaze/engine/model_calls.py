"""Around the calls of `generate`, the model and its decoder: where a call begins, what it brings, how it ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from evengaze.compat import cache_in, cache_in_output
from evengaze.engine import cache as kv
from evengaze.engine import cache_layers, checks, compiled, guard
from evengaze.engine.call import Call, Calls, Frozen, module_frame
from evengaze.engine.decode import Steps
from evengaze.engine.encoded import Features
from evengaze.engine.first import check_first, note_failure
from evengaze.engine.generation import Request, brings_pictures
from evengaze.engine.layer_calls import LayerCalls
from evengaze.engine.plan import Plan
from evengaze.engine.prefill import Prefill, restored
from evengaze.engine.prompt import Prompts
from evengaze.engine.rerank import ranked_anew
from evengaze.engine.rotary import Rotary, Served
from evengaze.engine.sharing import Arguments
from evengaze.engine.tap import Taps
from evengaze.models.generic import Generic
from evengaze.protocol import Pending
from evengaze.trace import Trace


class ModelCalls:
    """The calls of the model of one attachment; all methods but `look` are hooks.

    Args:
        plan: of the attachment.
        calls: the running calls.
        layer_calls: those of the decoder's layers.
        prompts: finds their visual tokens.
        taps: on the layers' attention.
        served: the rotary calls that make the layers' arguments.
        features: what is known of the features that calls are given.
        rerank: let a later turn of a conversation rank anew.
        freeze: without a cache, let the calls of a generation repeat the selection of the first one.
        hook: hooks further layers.
        report: receives the trace of each call with visual tokens.

    Attributes:
        pending: checks of scores that devices are still computing.
    """

    def __init__(
        self,
        plan: Plan,
        calls: Calls,
        layer_calls: LayerCalls,
        prompts: Prompts,
        taps: Taps,
        served: Served,
        features: Features,
        *,
        rerank: bool,
        freeze: bool,
        hook: Callable[[Iterable[int]], None],
        report: Callable[[Trace], None],
    ) -> None:
        self._plan, self._calls, self._layer_calls, self._prompts = plan, calls, layer_calls, prompts
        self._taps, self._served, self._features = taps, served, features
        self._rerank, self._freeze, self._hook, self._report = rerank, freeze, hook, report
        self._outer = plan.outer
        self._traced = compiled.Traced(plan.model, plan.adapter, calls, prunes=bool(plan.stages))
        self._untried = isinstance(plan.adapter, Generic)
        self._even = False  # whether layers of one kind hold as many bytes as others, as far as is known
        self._slices = "logits_to_keep" in inspect.signature(plan.model.forward).parameters
        self.pending: list[Pending] = []

    def look(self, *, wait: bool = False) -> None:
        """Check what devices have computed for it by now; with `wait`, all of it."""
        for pending in list(self.pending):
            if wait or pending.known:
                try:
                    self.pending.remove(pending)
                except ValueError:  # a call of another thread has taken it meanwhile
                    continue
                pending.check()

    @contextmanager
    def generate(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Around a call of `generate`."""
        plan, request = self._plan, Request(self._plan.model, arguments)
        if plan.stages:
            ahead = plan.adapter is not None and plan.adapter.reads_ahead
            request.check(plan.pruner, plan.decoder, plan.layers, trims=plan.trims, ahead=ahead)
        with (
            ranked_anew(request, pictures=plan.adapter is not None) if self._rerank else nullcontext(),
            self._calls.generate(request),
        ):
            whole = self._calls.top
            try:
                yield
            except BaseException:
                self._layer_calls.relays.forget(whole)
                raise

    def _refuse_tracing(self) -> None:
        if self._plan.stages and torch._C._get_tracing_state() is not None:
            compiled.refuse_tracing()

    # -- the model ----------------------------------------------------------------------------------------------------
    def enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Before the model, or the module inside of it that encodes pictures."""
        if torch.compiler.is_compiling():
            self._traced.check(args, kwargs)
            return None
        if not any(module is outer for outer in self._outer):
            guard.refuse_copy(module)
        self._refuse_tracing()
        whole = module is self._plan.model
        call = self._calls.alive()
        if whole or call.frame is None or call.decoding:
            # Encodings left by a call that failed before it reached the decoder, or asked for outside, are not its own;
            # those whose features it is given are.
            outputs = kwargs.get("mm_encoder_outputs")
            inherit = not whole or outputs is not None
            call = self._calls.enter(module_frame(), inherit=inherit, known=self._features.of(outputs))
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.dim() == 2:
            call.ids = ids
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            call.mask = mask
        call.pictured |= brings_pictures(kwargs)
        if whole:
            call.keep = kwargs.get("logits_to_keep")
        labels = kwargs.get("labels")
        if not whole or not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        # The loss reads them behind the decoder: until then it is known which cannot be predicted.
        call.labels = labels.clone()
        call.ignored = int(kwargs.get("ignore_index", -100))
        return args, {**kwargs, "labels": call.labels}

    def leave_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Behind it."""
        if torch.compiler.is_compiling():
            return
        call = self._calls.leave(module_frame())
        if call is not None and out is not None and not call.entered and self._traced.brings(call, call.ids):
            checks.refuse_missed(self._plan.pruner, sorted(self._plan.stages), 0, len(self._plan.layers))

    # -- its decoder --------------------------------------------------------------------------------------------------
    def enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder: the call is a prefill if it holds visual tokens."""
        if torch.compiler.is_compiling():
            self._traced.check(args, kwargs)
            _set_gate(cache_layers.gate_of(cache_in(args, kwargs)), is_open=True)
            return
        if module is not self._plan.decoder:
            guard.refuse_copy(module)
        self._refuse_tracing()
        call = self._calls.alive()
        if call.frame is None or call.decoding:  # the decoder itself was called
            call = self._calls.enter(module_frame(), inherit=True)
        if self.pending:
            self.look()
        states = kwargs.get("inputs_embeds")
        if states is None:
            states = kwargs.get("input_ids", args[0] if args else None)
        size = (0, 0) if states is None else (states.shape[0], states.shape[1])
        rotary = Rotary(self._served)
        call.begin(size, cache_in(args, kwargs), rotary, Steps(self._plan.decoder.config, rotary))
        self._layer_calls.relays.enter(call)
        gate = cache_layers.gate_of(call.cache)
        if gate is not None:
            _set_gate(gate, is_open=True)
            self._layer_calls.gates.add(gate)
            self._hook_pruned(call.cache)
        if states is not None and states.shape[1] > 1:  # one token is a decoding step
            watched = self._layer_calls.watched
            call.run = self._prompts.begin(call, states, kwargs, call.cache, watched=watched)
        call.idle = call.run is None and gate is None and not call.nested

    def _hook_pruned(self, cache: Any) -> None:
        """Hook layers that this pruner has no business with, but one had that pruned the cache before."""
        found = [i for i in self._layer_calls.unhooked if kv.kept_of(kv.layer_of(cache, i)) is not None]
        if found:
            self._hook(found)

    def leave_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Behind a rotary module of the decoder."""
        if torch.compiler.is_compiling():
            return
        rotary = self._calls.top.rotary
        if rotary is not None:
            rotary.observe(module, args, kwargs, out)

    def leave_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Behind the decoder, also behind an exception: `out` is None then."""
        if torch.compiler.is_compiling():
            _set_gate(cache_layers.gate_of(cache_in(args, kwargs)), is_open=False)
            return None
        call, frame = self._calls.alive(), module_frame()
        if not call.decoding:  # an exception came before it began
            return None
        self._layer_calls.relays.leave(call)
        for i in self._plan.previous if call.run is not None else ():
            self._taps.on(self._plan.layers[i]).disarm()
        _set_gate(cache_layers.gate_of(call.cache), is_open=False)
        _set_gate(None if call.run is None else call.run.gate, is_open=False)
        run = call.end()
        if call.frame is frame:
            self._calls.leave(frame)
        if run is None:
            return None
        if out is None:
            if self._untried:
                note_failure(self._plan.model)
            return None
        return self._end(call, run, out)

    def _end(self, call: Call, run: Prefill, out: Any) -> Any:
        """What a prefill leaves, and the decoder's output if it changes."""
        plan = self._plan
        if run.cache is None:
            run.cache = cache_in_output(out)
        checks.refuse_missed(plan.pruner, sorted(plan.stages)[len(run.stages) :], run.entered, run.watched)
        self.pending += run.pending
        trace = run.trace(plan.settings, len(plan.layers), even=self._even)
        if not self._even and not plan.trims:
            self._even = trace.kv_bytes[0] > 0 and len(set(trace.kv_bytes_unpruned)) == 1
        self._report(trace)
        if self._untried:
            check_first(plan.model, run, trace, out, plan.lenders)
            self._untried = False
        if self._freeze and call.repeating and run.cache is None and run.replay is None:
            call.freeze(Frozen(run.inputs.detach(), run.layout, run.selections))
        if call.labels is not None:
            run.ignore(call.labels, call.ignored)
        # Logits that are asked for are those of the last tokens: they are there already.
        read = call.generating or (self._slices and call.labels is None and run.shows(call.keep))
        return None if run.slots is None or read else restored(out, run)


def _set_gate(gate: cache_layers.Gate | None, *, is_open: bool) -> None:
    if gate is not None:
        gate.open = is_open
