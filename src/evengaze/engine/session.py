"""A pruner attached to an unmodified model: what is put onto the model, and what takes it off again.

The only cutting point is the input of a decoder layer. Hooks before the layers (`evengaze.engine.layer_calls`) replace
the hidden states at a stage, and from there on the position ids, rotary tables and attention mask by the parts that
belong to the surviving tokens. A one-shot tap (`evengaze.engine.tap`) reads the attention by which a method ranks. What
a running call holds is on an object of its own (`evengaze.engine.call`), made and ended by hooks around the model and
its decoder (`evengaze.engine.model_calls`). What outlives the call is on the cache (`evengaze.engine.cache`).

A call of the model itself returns states, and so logits, of the length of its inputs, with zeros where tokens were
dropped; `generate`, which looks at the last one only, is spared that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from evengaze.engine import compiled, guard
from evengaze.engine.call import Calls
from evengaze.engine.encoded import Encoded, Features, watch
from evengaze.engine.generation import refuse_packing
from evengaze.engine.graphs import Graphs
from evengaze.engine.intercept import before_forward, behind_forward, intercept
from evengaze.engine.layer_calls import LayerCalls
from evengaze.engine.model_calls import ModelCalls
from evengaze.engine.plan import Plan, claim
from evengaze.engine.prompt import Prompts
from evengaze.engine.question import Said, check_said
from evengaze.engine.rotary import Served
from evengaze.engine.segments import Segments
from evengaze.engine.tap import Taps
from evengaze.errors import AttachError, ConfigError, UnsupportedModelError
from evengaze.layout import VisualLayout
from evengaze.memory import Shared
from evengaze.protocol import Method
from evengaze.trace import Trace

_TRACES = 1000
"""How many traces a handle remembers."""


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
        graphs: the captured graphs; None if it was attached without.
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
        graphs: bool | Graphs = False,
    ) -> None:
        self._plan = plan = Plan.of(model, pruner, layout)
        self.model, self.pruner = plan.model, plan.pruner
        self.trace: Trace | None = None
        self.traces: deque[Trace] = deque(maxlen=_TRACES)
        self.question = question
        self.graphs = graphs if isinstance(graphs, Graphs) else Graphs() if graphs else None
        self._lent_graphs = graphs is self.graphs
        self._segments: Segments | None = None
        self._undo: list[Callable[[], Any]] = []
        self._calls = Calls()
        self._served: Served = {}
        self._features = Features()
        self._taps = Taps(self._calls.alive)
        self._shared = Shared(lambda: self._encoded().notes, lambda: self._calls.alive().own)
        self._layer_calls = LayerCalls(plan, self._calls, self._taps, self._served)
        self._model_calls = ModelCalls(
            plan,
            self._calls,
            self._layer_calls,
            Prompts(plan, lambda: self.question, self._shared),
            self._taps,
            self._served,
            self._features,
            rerank=rerank,
            freeze=freeze,
            hook=self._hook,
            report=self._report,
        )
        self._pending = self._model_calls.pending
        guard.refuse_running([*plan.outer, plan.decoder])
        try:
            self._install(model)
        except BaseException:
            self._uninstall()
            raise

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:  # the first error is the one to report
            self._pending.clear()
        self.remove()

    def __reduce__(self) -> NoReturn:
        raise AttachError(
            "a handle belongs to one model in one process: it is neither copied nor pickled. Copy or save the model (a "
            "copy has no pruner) and attach handle.pruner to that; handle.trace can be copied and pickled."
        )

    def remove(self) -> None:
        """Take all hooks off; the model is as it was. Calling it twice does no harm.

        Waits until the calls that other threads are making have ended. Caches that were filled before stay pruned, and
        refuse further tokens until a pruner is attached again.

        Raises:
            AttachError: called from inside a call of the model.
        """
        if self._undo:
            guard.wait_until_idle([*self._plan.outer, self._plan.decoder])
        self._uninstall()
        self._model_calls.look(wait=True)

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self._plan.layers)

    @property
    def question(self) -> Said:
        """Where prompts end, as it was given to `Pruner.__call__`; may be set anew for each call."""
        return self._question

    @question.setter
    def question(self, said: Said) -> None:
        check_said(said)
        self._question = said

    # -- what is put onto the model -----------------------------------------------------------------------------------
    def _install(self, wrapper: nn.Module) -> None:
        """Put everything on; `wrapper` is what was given as the model, with what compiles or wraps it."""
        plan, keep, on = self._plan, self._undo.append, self._model_calls
        keep(claim(plan, self))
        for outer in plan.outer:
            keep(before_forward(outer, on.enter_model))
            keep(behind_forward(outer, on.leave_model, always=True))
        for module in (*plan.outer, plan.decoder):
            keep(guard.refuse_replicas(module))
        keep(before_forward(plan.decoder, on.enter_decoder))
        if self.graphs is not None:  # before the call forgets its prefill
            keep(behind_forward(plan.decoder, self._leave_graphs, always=True))
        keep(behind_forward(plan.decoder, on.leave_decoder, always=True))
        self._hook(range(plan.first, len(plan.layers)))
        for i in plan.previous | plan.own:
            self._taps.on(plan.layers[i])
        for name, module in plan.decoder.named_children():
            if name.startswith("rotary_emb"):
                keep(behind_forward(module, on.leave_rotary))
        if callable(getattr(plan.model, "generate", None)):
            keep(intercept(plan.model, "generate", on.generate))
        for name in ("generate_batch", "init_continuous_batching"):
            if plan.stages and callable(getattr(plan.model, name, None)):
                keep(intercept(plan.model, name, refuse_packing))
        if plan.adapter is not None:
            for undo in watch(plan.base, self._encoded, self._features):
                keep(undo)
            keep(plan.adapter.prepare(plan.model, self._surviving))
        keep(plan.pruner.prepare(plan.model, plan.adapter, self._shared))
        if self.graphs is not None:
            self._capture(self.graphs)
        # Last, for what is compiled steps aside where it holds hooks or taps.
        wrappers = () if wrapper is plan.model else tuple(wrapper.modules())
        for undo in compiled.step_aside(plan.model, plan.decoder, self._prefills, wrappers):
            self._layer_calls.relays.never = True  # what is compiled would find them in the places of forwards
            keep(undo)

    def _hook(self, numbers: Iterable[int]) -> None:
        self._layer_calls.hook(numbers, self._undo.append)

    def _capture(self, graphs: Graphs) -> None:
        """Run the layers between stages, and the tower, as graphs."""
        plan = self._plan
        if plan.lenders or plan.recurrent:
            raise ConfigError(
                f"graphs=True cannot serve {type(plan.model).__name__}: some of its layers borrow keys from others, or "
                "carry a state through the sequence. Attach without graphs."
            )
        towers: list[nn.Module] = []
        if plan.adapter is not None:
            with suppress(UnsupportedModelError):
                towers.append(plan.adapter.vision_tower(plan.model).module)
        if not self._lent_graphs:
            self._undo.append(graphs.clear)
        graphs.serve(plan.model, list(plan.layers), towers)
        self._segments = Segments(
            graphs,
            list(plan.layers),
            list(plan.stages),
            set(plan.previous),
            set(plan.own),
            self._taps,
            lambda: self._calls.top.run,
            lambda: self._calls.alive().outermost,
        )
        self._undo.append(self._segments.install())
        for tower in () if getattr(plan.pruner, "in_tower", False) else towers:
            self._undo.append(self._segments.watch_tower(tower))

    def _leave_graphs(self, *call: Any) -> None:
        """The decoder has been left: its prefill needs the graphs no longer."""
        if torch.compiler.is_compiling() or self._segments is None:
            return
        run = self._calls.alive().run
        if run is not None:
            self._segments.leave(run)

    def _uninstall(self) -> None:
        self._layer_calls.relays.clear()
        while self._undo:  # an interrupt leaves the rest for the next time
            self._undo[-1]()
            self._undo.pop()
        self._taps.remove()
        for gate in list(self._layer_calls.gates):  # of calls that ended in a way that hooks do not see
            gate.open = False
        self._calls.clear()
        self._shared.clear()
        self._served.clear()
        self._features.clear()

    # -- what others ask it -------------------------------------------------------------------------------------------
    def _prefills(self) -> bool:
        """Whether this thread is in a prefill."""
        return self._calls.top.run is not None

    def _surviving(self) -> Tensor | None:
        """Which tokens of the running prefill are left; None if all are."""
        run = self._calls.top.run
        return None if run is None else run.slots

    def _encoded(self) -> Encoded:
        return self._calls.alive().encoded

    def _report(self, trace: Trace) -> None:
        self.trace = trace
        self.traces.append(trace)
