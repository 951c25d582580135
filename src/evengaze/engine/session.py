"""Pruning inside an unmodified model: hooks cut, a one-shot tap scores, the cache remembers.

The only cutting point is the input of a decoder layer. Pre-hooks on the layers replace the hidden states at a stage,
and from there on the position ids, rotary tables and attention mask by the parts that belong to the surviving tokens.
What outlives the forward call is on the cache (`evengaze.engine.cache`); the rest (`evengaze.engine.prefill`) ends with
it. A call of the model itself returns states, and so logits, of the length of its inputs, with zeros where tokens were
dropped; `generate`, which looks at the last one only, is spared that.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from evengaze.compat import by_name, cache_in, cache_in_output
from evengaze.engine import cache as kv
from evengaze.engine import checks, compiled, guard, layers, segments
from evengaze.engine.attention import hidden_attention
from evengaze.engine.call import Call, Calls, Frozen, module_frame
from evengaze.engine.decode import Steps, in_graph
from evengaze.engine.encoded import Encoded, Features, watch
from evengaze.engine.first import check_first, note_failure
from evengaze.engine.generation import Request, brings_pictures, refuse_packing
from evengaze.engine.intercept import Mark, before_forward, behind_forward, intercept, put
from evengaze.engine.masks import read_prompt, real_tokens
from evengaze.engine.prefill import Prefill, restored
from evengaze.engine.question import Said, answered_in, check_said, clues, questions, said_of
from evengaze.engine.rerank import ranked_anew
from evengaze.engine.rotary import Rotary, Served
from evengaze.engine.sharing import Fold, borrowed, lenders
from evengaze.engine.tap import Taps, probe
from evengaze.errors import ConfigError, LayoutError, UnsupportedModelError
from evengaze.layout import VisualLayout
from evengaze.models import BareDecoder, adapter_for, find_decoder
from evengaze.models.base import Adapter, attending_layers
from evengaze.models.base import Call as Prompt
from evengaze.models.generic import Generic
from evengaze.models.refusals import refuse_decoder
from evengaze.protocol import Method, Pending, Shared, Stage
from evengaze.trace import Trace

_MARK = "_evengaze_handle"
_TRACES = 1000

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Handle:
    """An attached pruner. A context manager: leaving it, also by an exception, restores the model.

    Args:
        model: a transformers model.
        pruner: the method.
        layout: where the visual tokens are; found by the family's adapter if left out.
        question: where prompts end, if not at the end of their calls; see `Pruner.__call__`.
        rerank: let a later turn of a conversation rank anew, by its own question; see `Pruner.__call__`.
        freeze: without a cache, every token of a generation repeats the prefill; repeat the first one's selection then
            (as a cache would), or rank anew each time.
        graphs: capture the layers between stages, and the vision tower, as CUDA graphs; see `Pruner.__call__`.

    Any number of threads may call the model at once. What belongs to a call is on that call's own object.

    Attributes:
        model: the model.
        pruner: the method.
        trace: what the last call with visual tokens (of any thread) kept and dropped; None before the first.
        traces: the same of all such calls in the order in which they ended; of the last 1000.
    """

    def __init__(
        self,
        model: nn.Module,
        pruner: Method,
        layout: VisualLayout | None = None,
        *,
        question: Said = None,
        rerank: bool = False,
        freeze: bool = True,
        graphs: bool = False,
    ) -> None:
        wrapper, model = model, compiled.inner(model)
        unwrap = getattr(model, "get_base_model", None)  # adapters such as LoRA wrap the model whose forward runs
        model = compiled.inner(unwrap()) if callable(unwrap) else model
        self.model, self.pruner = model, pruner
        self.trace: Trace | None = None
        self.traces: deque[Trace] = deque(maxlen=_TRACES)
        self._layout, self._rerank, self._freeze = layout, rerank, freeze
        self._recorder = segments.recorder(model) if graphs else None
        self._segments: segments.Segments | None = None
        self.question = question
        self._adapter: Adapter | None = None if layout is not None else adapter_for(model)
        if isinstance(self._adapter, BareDecoder):
            raise UnsupportedModelError(
                f"{type(model).__name__} is a text decoder: it cannot know which of its inputs are visual tokens. Say "
                "where they are: pruner(model, layout=VisualLayout.from_spans(spans, grid))."
            )
        decoder = find_decoder(model) if self._adapter is None else self._adapter.decoder(model)
        decoder = compiled.inner(decoder)
        if self._adapter is None:
            refuse_decoder(decoder)
        self._decoder: Any = decoder
        self._layers: list[nn.Module] = list(map(compiled.inner, decoder.get_submodule("layers").children()))
        held: Mark | None = decoder.__dict__.get(_MARK)
        checks.refuse_second(model, None if held is None else held.value.pruner)
        able = attending_layers(self._layers)
        self._lenders = lenders(self._layers, decoder.config)
        self._lending = frozenset(self._lenders.values())
        if self._lending:  # behind the first of them tokens must stay
            able = tuple(i for i in able if i < min(self._lending))
        if len(able) < len(self._layers) and hasattr(pruner, "fitted"):
            self.pruner = pruner = pruner.fitted(len(self._layers), able)
        stages = list(pruner.stages(len(self._layers)))
        checks.check_stages(pruner, stages, self._layers)
        checks.check_lending(pruner, stages, self._lending)
        self._stages = {stage.layer: (number, stage) for number, stage in enumerate(stages)}
        self._previous = {s.layer - 1 for s in stages if s.attention == "previous"}
        self._own = {s.layer for s in stages if s.attention == "own"}
        self._recurrent = frozenset(range(len(self._layers))) - frozenset(attending_layers(self._layers))
        self._calls = Calls()
        self._taps = Taps(self._calls.alive)
        self._served: Served = {}
        self._features = Features()
        self._plain = Steps(self._implementation, Rotary(self._served), remember=False)
        self._traced = compiled.Traced(model, self._adapter, self._calls, prunes=bool(stages))
        self._pending: list[Pending] = []
        self._hooked: set[int] = set()
        self._unhooked: list[int] = []
        self._gates: WeakSet[layers.Gate] = WeakSet()
        self._lock = threading.Lock()
        self._warned = self._told = False
        self._unseen = isinstance(self._adapter, Generic)
        self._shared = Shared(lambda: self._encoded().notes, lambda: self._calls.alive().own)
        self._undo: list[Callable[[], Any]] = []
        base: nn.Module = getattr(model, "base_model", model)
        self._outer = list({id(m): m for m in (model, base) if m is not decoder}.values())
        guard.refuse_running([*self._outer, decoder])
        try:
            self._install(base, wrapper)
        except BaseException:
            self._uninstall()
            raise

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:  # the first error is the one to report
            self._pending.clear()
        self.remove()

    def remove(self) -> None:
        """Take all hooks off; the model is as it was. Calling it twice does no harm.

        Waits until the calls that other threads are making have ended. Caches that were filled before stay pruned, and
        refuse further tokens until a pruner is attached again.

        Raises:
            AttachError: called from inside a call of the model.
        """
        if self._undo:
            guard.wait_until_idle([*self._outer, self._decoder])
        self._uninstall()
        self._look(wait=True)

    def _look(self, *, wait: bool = False) -> None:
        """Check what devices have computed for it by now; with `wait`, all of it."""
        for pending in list(self._pending):
            if wait or pending.known:
                self._pending.remove(pending)
                pending.check()

    def _uninstall(self) -> None:
        while self._undo:  # an interrupt leaves the rest for the next time
            self._undo[-1]()
            self._undo.pop()
        self._taps.remove()
        for gate in list(self._gates):  # of calls that ended in a way that hooks do not see
            gate.open = False
        self._calls.clear()
        self._shared.clear()
        self._served.clear()
        self._features.clear()

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    @property
    def _implementation(self) -> str:
        return self._decoder.config._attn_implementation or "eager"

    @property
    def question(self) -> Said:
        """Where prompts end, as it was given to `Pruner.__call__`; may be set anew for each call."""
        return self._question

    @question.setter
    def question(self, said: Said) -> None:
        check_said(said)
        self._question = said

    # -- setting up ---------------------------------------------------------------------------------------------------
    def _install(self, base: nn.Module, wrapper: nn.Module) -> None:
        keep = self._undo.append
        keep(put(self._decoder, _MARK, Mark(self)))
        for outer in self._outer:
            keep(before_forward(outer, self._enter_model))
            keep(behind_forward(outer, self._leave_model, always=True))
        for module in (*self._outer, self._decoder):
            keep(guard.refuse_replicas(module))
        keep(before_forward(self._decoder, self._enter_decoder))
        keep(behind_forward(self._decoder, self._leave_decoder, always=True))
        first = min(self._previous | set(self._stages), default=len(self._layers))
        if any(stage.trims_below for _, stage in self._stages.values()):
            first = 0
        self._hook_layers(range(first, len(self._layers)))
        for i in self._previous | self._own:
            self._taps.on(self._layers[i])
        for name, module in self._decoder.named_children():
            if name.startswith("rotary_emb"):
                keep(behind_forward(module, self._leave_rotary))
        if callable(getattr(self.model, "generate", None)):
            keep(intercept(self.model, "generate", self._generate))
        for name in ("generate_batch", "init_continuous_batching"):
            if self._stages and callable(getattr(self.model, name, None)):
                keep(intercept(self.model, name, refuse_packing))
        if self._adapter is not None:
            for undo in watch(base, self._encoded, self._features):
                keep(undo)
            keep(self._adapter.prepare(self.model, self._surviving))
        keep(self.pruner.prepare(self.model, self._adapter, self._shared))
        if self._recorder is not None:
            self._capture()
        wrappers = () if wrapper is self.model else tuple(wrapper.modules())
        for undo in compiled.step_aside(self.model, self._decoder, lambda: self._calls.top.run is not None, wrappers):
            keep(undo)

    def _capture(self) -> None:
        """Run the layers between stages, and the tower, as graphs."""
        if self._lenders or self._recurrent:
            raise ConfigError(
                f"graphs=True cannot serve {type(self.model).__name__}: some of its layers borrow keys from others, or "
                "carry a state through the sequence. Attach without graphs."
            )
        self._segments = segments.Segments(
            self._layers,
            list(self._stages),
            self._previous,
            self._own,
            self._taps,
            lambda: self._calls.top.run,
            self._recorder,
        )
        self._undo.append(self._segments.install())
        if self._adapter is not None and not getattr(self.pruner, "in_tower", False):
            with suppress(UnsupportedModelError):
                tower = self._adapter.vision_tower(self.model).module
                self._undo.append(self._segments.watch_tower(tower))

    def _surviving(self) -> Tensor | None:
        run = self._calls.top.run
        return None if run is None else run.slots

    def _encoded(self) -> Encoded:
        return self._calls.alive().encoded

    # -- what a call consists of --------------------------------------------------------------------------------------
    @contextmanager
    def _generate(self, arguments: dict[str, Any]) -> Iterator[None]:
        request = Request(self.model, arguments)
        if self._stages:
            trims = any(stage.trims_below for _, stage in self._stages.values())
            ahead = self._adapter is not None and self._adapter.reads_ahead
            request.check(self.pruner, self._decoder, self._layers, trims=trims, ahead=ahead)
        with (
            ranked_anew(request, pictures=self._adapter is not None) if self._rerank else nullcontext(),
            self._calls.generate(request),
        ):
            yield

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if torch.compiler.is_compiling():
            self._traced.check(args, kwargs)
            return None
        if not any(module is outer for outer in self._outer):
            guard.refuse_copy(module)
        call = self._calls.alive()
        if module is self.model or call.frame is None or call.decoding:
            # Encodings left by a call that failed before it reached the decoder, or asked for outside, are not its own;
            # those whose features it is given are.
            outputs = kwargs.get("mm_encoder_outputs")
            inherit = module is not self.model or outputs is not None
            call = self._calls.enter(module_frame(), inherit=inherit, known=self._features.of(outputs))
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.dim() == 2:
            call.ids = ids
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            call.mask = mask
        call.pictured |= brings_pictures(kwargs)
        if module is self.model:
            call.keep = kwargs.get("logits_to_keep")
        labels = kwargs.get("labels")
        if module is not self.model or not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        # The loss reads them behind the decoder: until then it is known which cannot be predicted.
        call.labels = labels.clone()
        call.ignored = int(kwargs.get("ignore_index", -100))
        return args, {**kwargs, "labels": call.labels}

    def _leave_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if torch.compiler.is_compiling():
            return
        call = self._calls.leave(module_frame())
        if call is not None and out is not None and not call.entered and self._traced.brings(call, call.ids):
            checks.refuse_missed(self.pruner, sorted(self._stages), 0, len(self._layers))

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._traced.check(args, kwargs)
            gate = layers.gate_of(cache_in(args, kwargs))
            if gate is not None:
                gate.open = True
            return
        if module is not self._decoder:
            guard.refuse_copy(module)
        call = self._calls.alive()
        if call.frame is None or call.decoding:  # the decoder itself was called
            call = self._calls.enter(module_frame(), inherit=True)
        if self._pending:
            self._look()
        call.decoding = call.entered = True
        call.run = None
        call.lent.clear()
        call.rotary = Rotary(self._served)
        call.steps = Steps(self._implementation, call.rotary)
        states = kwargs.get("inputs_embeds")
        if states is None:
            states = kwargs.get("input_ids", args[0] if args else None)
        call.size = (0, 0) if states is None else (states.shape[0], states.shape[1])
        call.cache = cache_in(args, kwargs)
        gate = layers.gate_of(call.cache)
        if gate is not None:
            gate.open = True
            self._gates.add(gate)
            # Layers that this pruner has no business with, but another had.
            found = [i for i in self._unhooked if kv.kept_of(kv.layer_of(call.cache, i)) is not None]
            if found:
                self._hook_layers(found)
        if states is not None and states.shape[1] > 1:  # one token is a decoding step
            call.run = self._begin(call, states, kwargs, call.cache)
        call.idle = call.run is None and gate is None and not call.nested

    def _begin(self, call: Call, states: Tensor, kwargs: dict[str, Any], cache: Any) -> Prefill | None:
        ids, given = call.ids, call.mask if call.mask is not None else kwargs.get("attention_mask")
        call.ids = call.mask = None
        encoded, placed = call.encoded.calls, tuple(call.encoded.placed)
        notes = call.encoded.noted()
        call.encoded.take()
        length, past = states.shape[1], kv.length_of(cache)
        real = real_tokens(given, states, past)
        if states.is_floating_point():
            blind = self._adapter is not None and ids is None and past == 0 and not encoded
            if blind and self._stages and not self._warned:
                self._warned = True
                checks.warn_blind(self.model, self.pruner)
        else:
            states = self._decoder.get_input_embeddings()(states)
        frozen = call.continued(states) if cache is None else None
        padded: Tensor | None = None
        if frozen is not None:
            layout: VisualLayout | None = frozen.layout
        elif (past or call.drafting) and not call.pictured and not encoded:
            return None  # placeholder ids in later text, or from a draft, are no pictures
        else:
            ids, padded = read_prompt(ids, None if given is None else real)
            layout = self._find(Prompt(ids, padded, past, encoded, placed), length)
        if layout is None or layout.total == 0:
            return None
        kv.check(cache)
        if self._adapter is not None:
            reads = [s.attended for _, s in self._stages.values() if s.attended is not None]
            self._adapter.check_windows(self.model, reads, past + length)
        rows = tuple(row.to("cpu") for row in layout.expand(states.shape[0]).rows)
        if frozen is not None and given is not None:
            _, padded = read_prompt(None, real)
        known = clues(
            kwargs, call, length=length, masked=given is not None, past=past, said=said_of(self.question, ids, past)
        )
        asked = None if frozen is not None else questions(VisualLayout(rows), padded, length, known)
        trims = any(stage.trims_below for _, stage in self._stages.values())
        if trims and asked is not None and not self._told and answered_in(asked, padded, known, length):
            self._told = True
            checks.warn_answers(self.pruner)
        return Prefill(
            layout=VisualLayout(rows),
            padded=padded,
            asked=asked,
            samples=known.samples_of(states),
            real=real,
            inputs=states,
            past=past,
            implementation=self._implementation,
            rotary=call.rotary if self.pruner.positions == "renumbered" else None,
            cache=cache,
            fresh=layers.gate_of(cache) is None,
            watched=len(self._hooked),
            shared=self._shared,
            notes=notes,
            replay=None if frozen is None else frozen.selections,
            recurrent=self._recurrent,
        )

    def _find(self, call: Prompt, length: int) -> VisualLayout | None:
        """The layout of a call, as it was given or as the adapter sees it."""
        layout: VisualLayout | None
        if self._adapter is None:
            layout = None if call.past else self._layout  # spans describe the prompt, not what follows it
        else:
            layout = self._adapter.layout(self.model, call)
            if call.encoded and (layout is None or layout.total == 0):
                raise LayoutError(
                    "images or videos were encoded, but the prompt has no visual tokens. Build the inputs with the "
                    "model's processor, with one image placeholder in the text for each image."
                )
        reach = max((int(r.position.max()) + 1 for r in layout.rows if len(r)), default=0) if layout is not None else 0
        if reach > length:
            raise LayoutError(f"the layout reaches to token {reach}, but the call has only {length} tokens")
        return layout

    # -- layers -------------------------------------------------------------------------------------------------------
    def _hook_layers(self, numbers: Iterable[int]) -> None:
        """Hook those of some layers that are not hooked yet."""
        with self._lock:
            for i in set(numbers) - self._hooked:
                self._undo.append(before_forward(self._layers[i], functools.partial(self._enter_layer, i)))
                self._hooked.add(i)
            self._unhooked = [i for i in range(len(self._layers)) if i not in self._hooked]

    def _enter_layer(self, i: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if torch.compiler.is_compiling():
            whole = cache_in(args, kwargs)
            cache = kv.layer_of(whole, i)
            if i in self._lenders and kv.kept_of(kv.layer_of(whole, self._lenders[i])) is not None:
                compiled.refuse_sharing()
            if kv.kept_of(cache) is None or kv.is_fixed(cache):
                return in_graph(args, kwargs, cache)
            return self._plain.arguments(i, args, kwargs, cache)
        call = self._calls.top
        if call.idle:
            return None
        if call.nested or call.run is not None:
            call = self._calls.alive()  # a call inside this one may have ended in a way that hooks do not see
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
        if call.cache is None or not call.decoding:
            call.cache = cache_in(args, kwargs)
            if run is not None:
                run.cache = call.cache
        cache = kv.layer_of(call.cache, i)
        if run is None:
            return steps.arguments(i, args, kwargs, cache)
        changed = i in self._stages
        if changed:
            number, stage = self._stages[i]
            if run.replay is None:
                self._read(run, steps, i, stage, layer, args, kwargs, cache, fold)
            hidden = run.prune(self.pruner, number, stage, args[0] if args else kwargs["hidden_states"])
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
            if run.gate is not None:
                self._gates.add(run.gate)
        if i in self._previous and run.replay is None:
            self._taps.on(layer).arm(functools.partial(setattr, run, "states"), past=run.stored(cache))
        if run.slots is None:
            return steps.arguments(i, args, kwargs, cache) or ((args, kwargs) if changed else None)
        return run.arguments(i, args, kwargs, cache)

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
            tap = self._taps.on(self._layers[i - 1])
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
                states = probe(self._taps.on(layer), layer, args, kwargs)
            past = run.stored(cache)
            if past:  # an earlier turn's keys are in the cache, which the probe does not touch
                states = replace(states, key=torch.cat([cache.keys[:, :, :past], states.key], 2), past=past)
            run.states = states

    def _leave_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if torch.compiler.is_compiling():
            return
        rotary = self._calls.top.rotary
        if rotary is not None:
            rotary.observe(module, args, kwargs, out)

    # -- the end of a call --------------------------------------------------------------------------------------------
    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if torch.compiler.is_compiling():
            gate = layers.gate_of(cache_in(args, kwargs))
            if gate is not None:
                gate.open = False
            return None
        call, frame = self._calls.alive(), module_frame()
        if not call.decoding:  # an exception came before it began
            return None
        for i in self._previous if call.run is not None else ():
            self._taps.on(self._layers[i]).disarm()
        for gate in (layers.gate_of(call.cache), None if call.run is None else call.run.gate):
            if gate is not None:
                gate.open = False
        run = call.end()
        if call.frame is frame:
            self._calls.leave(frame)
        if run is not None and out is None and self._unseen:
            note_failure(self.model)
        if run is None or out is None:  # nothing to prune, or an exception is on its way
            return None
        if run.cache is None:
            run.cache = cache_in_output(out)
        checks.refuse_missed(self.pruner, sorted(self._stages)[len(run.stages) :], run.entered, run.watched)
        self._pending += run.pending
        self.trace = run.trace(self.pruner, len(self._layers))
        self.traces.append(self.trace)
        if self._unseen:
            check_first(self.model, run, self.trace, out, self._lenders)
            self._unseen = False
        if self._freeze and call.repeating and run.cache is None and run.replay is None:
            call.freeze(Frozen(run.inputs.detach(), run.layout, run.selections))
        if call.labels is not None:
            run.ignore(call.labels, call.ignored)
        return None if run.slots is None or call.generating else restored(out, run)
