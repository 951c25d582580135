"""Pruning inside an unmodified model: hooks cut, a one-shot tap scores, the cache remembers.

The only cutting point is the input of a decoder layer. Pre-hooks on the layers replace the hidden states at a stage,
and from there on the position ids, rotary tables and attention mask by the parts that belong to the surviving tokens.
What outlives the forward call is on the cache (`evengaze.engine.cache`); the rest (`evengaze.engine.prefill`) ends with
it. A call of the model itself returns states, and so logits, of the length of its inputs, with zeros where tokens were
dropped; `generate`, which looks at the last one only, is spared that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evengaze.compat import cache_in
from evengaze.engine import cache as kv
from evengaze.engine import checks
from evengaze.engine.attention import attention_module, hidden_attention, probe, tap, untap
from evengaze.engine.decode import Steps
from evengaze.engine.encoded import Encoded
from evengaze.engine.intercept import intercept
from evengaze.engine.masks import real_tokens
from evengaze.engine.prefill import Prefill, Selections
from evengaze.engine.rotary import Rotary
from evengaze.errors import LayoutError, NothingPrunedError, UnsupportedModelError
from evengaze.layout import VisualLayout
from evengaze.models import BareDecoder, adapter_for, find_decoder
from evengaze.models.base import Adapter, Call
from evengaze.protocol import Method, Stage
from evengaze.trace import Trace

_MARK = "_evengaze_handle"

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Frozen:
    """What a call without a cache decided, for the longer calls of the same generation that follow it."""

    inputs: Tensor
    layout: VisualLayout
    selections: list[Selections]

    def continued_by(self, inputs: Tensor) -> bool:
        """Whether a call repeats the recorded one with further tokens behind it."""
        batch, length = self.inputs.shape[:2]
        if inputs.shape[0] != batch or inputs.shape[1] <= length:
            return False
        return torch.equal(self.inputs, inputs[:, :length])


class Handle:
    """An attached pruner. A context manager: leaving it, also by an exception, restores the model.

    Args:
        model: a transformers model.
        pruner: the method.
        layout: where the visual tokens are; found by the family's adapter if left out.
        freeze: without a cache, every token of a generation repeats the prefill; repeat the first one's selection then
            (as a cache would), or rank anew each time.

    Attributes:
        model: the model.
        pruner: the method.
        trace: what the last call with visual tokens kept and dropped; None before the first.
    """

    def __init__(
        self, model: nn.Module, pruner: Method, layout: VisualLayout | None = None, *, freeze: bool = True
    ) -> None:
        unwrap = getattr(model, "get_base_model", None)  # adapters such as LoRA wrap the model whose forward runs
        model = unwrap() if callable(unwrap) else model
        self.model, self.pruner = model, pruner
        self.trace: Trace | None = None
        self._layout, self._freeze = layout, freeze
        self._adapter: Adapter | None = None if layout is not None else adapter_for(model)
        if isinstance(self._adapter, BareDecoder):
            raise UnsupportedModelError(
                f"{type(model).__name__} is a text decoder: it cannot know which of its inputs are visual tokens. Say "
                "where they are: pruner(model, layout=VisualLayout.from_spans(spans, grid))."
            )
        decoder = find_decoder(model) if self._adapter is None else self._adapter.decoder(model)
        self._decoder: Any = decoder
        self._layers: list[nn.Module] = list(decoder.get_submodule("layers").children())
        held: Handle | None = decoder.__dict__.get(_MARK)
        checks.refuse_second(model, None if held is None else held.pruner)
        stages = list(pruner.stages(len(self._layers)))
        checks.check_stages(pruner, stages, self._layers)
        self._stages = {stage.layer: (number, stage) for number, stage in enumerate(stages)}
        self._taps = {s.layer - 1 for s in stages if s.attention == "previous"}
        self._rotary = Rotary()
        self._steps = Steps(self._implementation, self._rotary)
        self._run: Prefill | None = None
        self._frozen: _Frozen | None = None
        self._encoded = Encoded()
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._labels: Tensor | None = None
        self._ignored = -100
        self._generating = False
        self._warned = False
        self._shared: dict[str, Any] = {}
        self._undo: list[Callable[[], Any]] = []
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
        """Take all hooks off; the model is as it was. Calling it twice does no harm.

        Caches that were filled before stay pruned, and refuse further tokens until a pruner is attached again.
        """
        while self._undo:
            self._undo.pop()()
        self._disarm()
        self._run = self._frozen = None
        self._encoded.clear()
        self._shared.clear()
        self._rotary.reset()
        self._steps.begin()

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)

    @property
    def _implementation(self) -> str:
        return self._decoder.config._attn_implementation or "eager"

    # -- setting up ---------------------------------------------------------------------------------------------------
    def _install(self) -> None:
        keep = self._undo.append
        self._decoder.__dict__[_MARK] = self
        keep(functools.partial(self._decoder.__dict__.pop, _MARK, None))
        base = getattr(self.model, "base_model", self.model)
        for outer in {id(m): m for m in (self.model, base) if m is not self._decoder}.values():
            keep(outer.register_forward_pre_hook(self._enter_model, with_kwargs=True).remove)
        keep(self._decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True).remove)
        keep(self._decoder.register_forward_hook(self._leave_decoder, with_kwargs=True, always_call=True).remove)
        for i, layer in enumerate(self._layers):
            hook = functools.partial(self._enter_layer, i)
            keep(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for name, module in self._decoder.named_children():
            if name.startswith("rotary_emb"):
                keep(module.register_forward_hook(self._leave_rotary, with_kwargs=True).remove)
        if callable(getattr(self.model, "generate", None)):
            keep(intercept(self.model, "generate", self._enter_generate, self._leave_generate))
        if self._adapter is not None:
            for undo in self._encoded.watch(base):
                keep(undo)
            keep(self._adapter.prepare(self.model, self._surviving))
        keep(self.pruner.prepare(self.model, self._adapter, self._shared))

    def _surviving(self) -> Tensor | None:
        return None if self._run is None else self._run.slots

    # -- what a call consists of --------------------------------------------------------------------------------------
    def _enter_generate(self, arguments: dict[str, Any]) -> None:
        checks.refuse_chunks(self.model, arguments)
        self._forget_encoded()
        self._frozen = None
        self._generating = True

    def _leave_generate(self) -> None:
        self._generating = False
        self._frozen = None

    def _forget_encoded(self) -> None:
        """What has been encoded so far belongs to no later call."""
        self._encoded.clear()
        self._shared["prompt"] = self._shared.get("prompt", 0) + 1

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if module is self.model:
            self._ids = self._mask = self._labels = None
            if not self._generating and kwargs.get("mm_encoder_outputs") is None:
                self._forget_encoded()  # left by a call that failed before it reached the decoder, or asked for outside
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.dim() == 2:
            self._ids = ids
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._mask = mask
        labels = kwargs.get("labels")
        if module is not self.model or not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        # The loss reads them behind the decoder: until then it is known which cannot be predicted.
        self._labels = labels.clone()
        self._ignored = int(kwargs.get("ignore_index", -100))
        return args, {**kwargs, "labels": self._labels}

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._run = None
        states = kwargs.get("inputs_embeds")
        if states is None:
            states = kwargs.get("input_ids", args[0] if args else None)
        if not torch.compiler.is_compiling():
            self._steps.begin()
            self._rotary.clear()
            if states is not None and states.shape[1] > 1:  # one token is a decoding step
                self._run = self._begin(states, kwargs.get("attention_mask"), cache_in(args, kwargs))

    def _begin(self, states: Tensor, mask: Any, cache: Any) -> Prefill | None:
        ids, given = self._ids, self._mask if self._mask is not None else mask
        self._ids = self._mask = None
        encoded, placed = tuple(self._encoded.calls), tuple(self._encoded.placed)
        self._forget_encoded()
        length, past = states.shape[1], 0 if cache is None else int(cache.get_seq_length())
        real = real_tokens(given, states, past)
        frozen = self._frozen
        if states.is_floating_point():
            blind = self._adapter is not None and ids is None and past == 0 and not encoded
            if blind and self._stages and not self._warned:
                self._warned = True
                checks.warn_blind(self.model, self.pruner)
        else:
            states = self._decoder.get_input_embeddings()(states)
        if frozen is not None and cache is None and frozen.continued_by(states):
            layout: VisualLayout | None = frozen.layout
        else:
            frozen = None
            layout = self._find(Call(ids, None if given is None else real, past, encoded, placed), length)
        if layout is None or layout.total == 0:
            return None
        kv.check(cache)
        if self._adapter is not None:
            reads = [s.attended for _, s in self._stages.values() if s.attended is not None]
            self._adapter.check_windows(self.model, reads, past + length)
        rows = tuple(row.to(states.device) for row in layout.expand(states.shape[0]).rows)
        return Prefill(
            layout=VisualLayout(rows),
            real=real,
            inputs=states,
            past=past,
            implementation=self._implementation,
            rotary=self._rotary if self.pruner.positions == "renumbered" else None,
            shared=self._shared,
            replay=None if frozen is None else frozen.selections,
        )

    def _find(self, call: Call, length: int) -> VisualLayout | None:
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
    def _enter_layer(self, i: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        whole = cache_in(args, kwargs)
        cache = kv.layer_of(whole, i)
        run = self._run
        if run is None:
            kv.admit(cache)
            return self._steps.arguments(i, args, kwargs, cache)
        run.cache = whole
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if i in self._stages:
            number, stage = self._stages[i]
            if run.replay is None:
                self._read(run, i, stage, layer, args, kwargs, cache)
            hidden = run.prune(self.pruner, number, stage, hidden)
        if i in self._taps and run.replay is None:
            tap(attention_module(layer), functools.partial(setattr, run, "states"), past=kv.stored(cache))
        run.entering.append(hidden.shape[1])
        if run.slots is not None and cache is not None:
            run.remember(i, cache, hidden.device)
        kv.admit(cache)
        if run.slots is None:
            return self._steps.arguments(i, args, kwargs, cache)
        return run.arguments(i, hidden, args, kwargs, cache)

    def _read(
        self,
        run: Prefill,
        i: int,
        stage: Stage,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: Any,
    ) -> None:
        """See to it that `run.states` is the attention that a stage ranks by."""
        if stage.attention == "previous":
            module = attention_module(self._layers[i - 1])
            if untap(module):
                raise hidden_attention(module)
        elif stage.attention == "own":
            hidden = args[0] if args else kwargs["hidden_states"]
            run.before(i, cache)
            if run.slots is not None:
                args, kwargs = run.arguments(i, hidden, args, kwargs, cache)
            else:
                args, kwargs = self._steps.arguments(i, args, kwargs, cache) or (args, kwargs)
            with torch.no_grad():
                states = probe(layer, args, kwargs)
            past = kv.stored(cache)
            if past:  # an earlier turn's keys are in the cache, which the probe does not touch
                states = replace(states, key=torch.cat([cache.keys[:, :, :past], states.key], 2), past=past)
            run.states = states

    def _leave_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not torch.compiler.is_compiling():
            self._rotary.observe(module, args, kwargs, out)

    # -- the end of a call --------------------------------------------------------------------------------------------
    def _disarm(self) -> None:
        for i in self._taps:
            untap(attention_module(self._layers[i]))

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if torch.compiler.is_compiling():
            return None
        run, self._run = self._run, None
        labels, self._labels = self._labels, None
        self._disarm()
        self._rotary.clear()
        if run is None or out is None:  # nothing to prune, or an exception is on its way
            return None
        if len(run.stages) < len(self._stages):
            missed = sorted(self._stages)[len(run.stages) :]
            raise NothingPrunedError(
                f"{self.pruner.name} never got to prune at layers {missed}: the model's forward does not call them. "
                "Check that the adapter's decoder() is the module whose layers really run."
            )
        self.trace = run.trace(self.pruner, len(self._layers))
        if self._freeze and self._generating and run.cache is None:
            self._frozen = _Frozen(run.inputs.detach(), run.layout, run.selections)
        if labels is not None:
            run.ignore(labels, self._ignored)
        return None if run.slots is None or self._generating else _restored(out, run)


def _restored(out: Any, run: Prefill) -> Any:
    """A decoder's output with a state for each token of the call again, as callers other than `generate` expect."""
    if isinstance(out, tuple):
        return (run.restored(out[0]), *out[1:])
    out.last_hidden_state = run.restored(out.last_hidden_state)
    return out
