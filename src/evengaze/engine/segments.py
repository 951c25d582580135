"""The layers between two stages, and the vision tower, as one captured CUDA graph each.

Once a budget is fixed, what a run of layers between two stages receives has the same shapes for every prompt of one
length. The first layer of such a segment replays the graph of all of them; the others hand its result through. Hooks,
masks, caches and positions stay the engine's: each layer's keys and values go from the graph's buffers into the cache
at that layer's own turn (which copies them once), and the attention by which the next stage ranks is captured as well.

A shape is captured when it is seen for the second time; the first time runs as ever, and shows whether the model's loop
does anything between layers but call them. Calls that are no prefill of a first turn (decoding, further turns) run as
ever, too, and so do those of threads other than the one that attached the pruner: buffers serve one call at a time.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from evengaze.engine.attention import AttentionStates
from evengaze.engine.intercept import put
from evengaze.errors import ConfigError

if TYPE_CHECKING:
    from evengaze.engine.prefill import Prefill
    from evengaze.engine.tap import Taps

SHAPES = 32
"""Graphs that are kept; the one that was not used for the longest time goes first."""


class CudaGraph:
    """A function whose launches are recorded once and replayed. Its results stay in the same buffers.

    Args:
        function: from inputs by name to anything made of tensors.
        inputs: what it is captured with; copied.
        pool: memory shared by all graphs of an attachment, which never run at the same time.
    """

    def __init__(
        self, function: Callable[[Mapping[str, Tensor]], Any], inputs: Mapping[str, Tensor], pool: Any
    ) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(self._inputs)  # whatever is set up on first use
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.result = function(self._inputs)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Any:
        """The results for other inputs of the same shapes; they last until the next call."""
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return self.result

    @staticmethod
    def pool() -> Any:
        """Memory for several graphs."""
        return torch.cuda.graph_pool_handle()


def recorder(model: nn.Module) -> Any:
    """What captures a model's graphs.

    Raises:
        ConfigError: its graphs cannot be captured.
    """
    devices = {p.device for p in model.parameters()}
    if {d.type for d in devices} != {"cuda"}:
        where = ", ".join(sorted(map(str, devices)))
        raise ConfigError(f"graphs=True captures CUDA graphs, but the model is on {where}. Leave graphs out there.")
    if len(devices) > 1:
        raise ConfigError(
            f"graphs=True needs a model on one device, not on {len(devices)}: a graph is captured on one. Leave graphs "
            "out, or load the model without a device_map."
        )
    return CudaGraph


class _Store:
    """Stands in for the cache while a segment is captured: it only takes what layers store."""

    def __init__(self) -> None:
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the layer attends to: its own keys and values."""
        self.stored[layer] = (key, value)
        return key, value

    def get_seq_length(self, *args: Any) -> int:
        """Nothing was there before."""
        return 0


@dataclass
class _Result:
    """What a segment leaves: the states behind it, keys and values by layer, and attention that was listened to."""

    hidden: Any
    stored: dict[int, tuple[Tensor, Tensor]]
    states: AttentionStates | None


@dataclass
class _Running:
    """The segment that runs: a result to hand through, or the layers as they go by for the first time."""

    result: _Result | None
    run: Any
    kwargs: dict[str, Any] = field(default_factory=dict)
    last: Any = None


class Segments:
    """The graphs of one attachment.

    Args:
        layers: the decoder's layers.
        stages: the layers before which tokens leave.
        listened: the layers whose attention the stage behind them reads.
        probed: the layers whose own attention is read before they run.
        taps: the attachment's.
        run_of: gives the running prefill; None in other calls.
        kind: what captures a graph; see `recorder`.
    """

    def __init__(
        self,
        layers: list[Any],
        stages: list[int],
        listened: set[int],
        probed: set[int],
        taps: Taps,
        run_of: Callable[[], Prefill | None],
        kind: Any,
    ) -> None:
        self._layers, self._listened, self._probed = layers, listened, probed
        self._taps, self._run_of = taps, run_of
        self._forwards: list[Callable[..., Any]] = []
        cuts = [0, *sorted(stage for stage in stages if stage > 0), len(layers)]
        self._bounds = {i: (a, b) for a, b in pairwise(cuts) for i in range(a, b)}
        self._kind, self._pool = kind, kind.pool()
        self._graphs: OrderedDict[Any, Any] = OrderedDict()
        self._seen: set[Any] = set()
        self._thread = threading.get_ident()
        self._now: _Running | None = None
        self.counts = {"plain": 0, "captured": 0, "replayed": 0}

    def install(self) -> Callable[[], None]:
        """Take over the layers' forwards; returns what undoes it."""
        undo = []
        self._forwards = [layer.forward for layer in self._layers]
        for i, layer in enumerate(self._layers):
            undo.append(put(layer, "forward", functools.partial(self._forward, i, layer.forward)))

        def remove() -> None:
            for step in reversed(undo):
                step()
            self._graphs.clear()

        return remove

    def watch_tower(self, tower: Any) -> Callable[[], None]:
        """Capture a vision tower's forward as well; returns what undoes it."""
        return put(tower, "forward", functools.partial(self._tower, tower.forward))

    # -- a layer ------------------------------------------------------------------------------------------------------
    def _forward(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = None if torch.compiler.is_compiling() or threading.get_ident() != self._thread else self._run_of()
        probed = i in self._probed and self._taps.on(self._layers[i]).stops
        if run is None or run.past or len(args) != 1 or probed:
            return forward(*args, **kwargs)
        hidden, (first, end) = args[0], self._bounds[i]
        if i == first:
            self._now = self._begin(run, first, end, hidden, kwargs)
        now = self._now
        if now is None or now.run is not run:
            return forward(*args, **kwargs)
        if now.result is None:
            return self._watch(now, i, first, forward, hidden, kwargs)
        return self._hand_through(now.result, i, kwargs)

    def _begin(self, run: Any, first: int, end: int, hidden: Tensor, kwargs: dict[str, Any]) -> _Running | None:
        refuse(kwargs)
        tensors, shape = _flat({**kwargs, "hidden_states": hidden})
        key = (first, end, shape, torch.is_inference_mode_enabled())
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._seen:
                self._seen.add(key)
                self.counts["plain"] += 1
                return _Running(None, run)
            segment = functools.partial(self._segment, first, end, dict(kwargs))
            graph = self._remember(key, self._kind(segment, tensors, self._pool))
        self._graphs.move_to_end(key)
        self.counts["replayed"] += 1
        return _Running(graph(tensors), run)

    def _remember(self, key: Any, graph: Any) -> Any:
        self._graphs[key] = graph
        self.counts["captured"] += 1
        while len(self._graphs) > SHAPES:
            self._graphs.popitem(last=False)
        return graph

    def _segment(self, first: int, end: int, kwargs: dict[str, Any], tensors: Mapping[str, Tensor]) -> _Result:
        """What is captured: the layers one after the other."""
        store, found = _Store(), list[AttentionStates]()
        given = {k: store if isinstance(v, Cache) else v for k, v in _unflat(tensors, kwargs).items()}
        out: Any = tensors["hidden_states"]
        for i in range(first, end):
            states = out[0] if isinstance(out, tuple) else out
            tap = self._taps.on(self._layers[i]).apart(found.append) if i in self._listened else nullcontext()
            with tap:
                out = self._forwards[i](states, **given)
        return _Result(out, store.stored, found[-1] if found else None)

    def _hand_through(self, result: _Result, i: int, kwargs: dict[str, Any]) -> Any:
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if cache is not None and i in result.stored:
            cache.update(*result.stored[i], i)
        if i in self._listened and result.states is not None:
            self._taps.on(self._layers[i]).hear(result.states)
        return result.hidden

    def _watch(
        self, now: _Running, i: int, first: int, forward: Callable[..., Any], hidden: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """Run a layer, and see that its segment is nothing but layers that get the same things."""
        if i > first and not (hidden is now.last and _same(kwargs, now.kwargs)):
            raise ConfigError(
                f"graphs=True cannot serve {type(self._layers[i]).__name__}: between its layers this model does more "
                "than call the next one, or gives layers different masks or positions. Attach without graphs."
            )
        out = forward(hidden, **kwargs)
        now.last, now.kwargs = (out[0] if isinstance(out, tuple) else out), kwargs
        return out

    # -- the tower ----------------------------------------------------------------------------------------------------
    def _tower(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        pixels = kwargs.get("pixel_values", args[0] if args else None)
        if not isinstance(pixels, Tensor) or torch.is_grad_enabled() or len(args) > 1:
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling() or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        rest = {k: v for k, v in kwargs.items() if k != "pixel_values"}
        if any(isinstance(v, Tensor) for v in rest.values()):
            return forward(*args, **kwargs)
        key = ("tower", tuple(pixels.shape), pixels.dtype, repr(sorted(rest.items(), key=lambda item: item[0])))
        if key not in self._graphs:
            if key not in self._seen:
                self._seen.add(key)
                return forward(*args, **kwargs)
            self._remember(key, self._kind(lambda x: forward(x["pixels"], **rest), {"pixels": pixels}, self._pool))
        self._graphs.move_to_end(key)
        return self._graphs[key]({"pixels": pixels})


def refuse(kwargs: Mapping[str, Any]) -> None:
    """Raise a ConfigError if a call asks for what graphs cannot give."""
    if torch.is_grad_enabled():
        raise ConfigError("graphs=True records no gradients: call the model under torch.inference_mode() or no_grad().")
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise ConfigError(f"graphs=True keeps the states between layers in buffers: {name} cannot be had with it.")


def _flat(kwargs: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """The tensors of a layer's arguments by name, and all that a graph depends on beside their values."""
    tensors: dict[str, Tensor] = {}
    shape: list[Any] = []
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            tensors[name] = value
            shape.append((name, tuple(value.shape), value.stride(), value.dtype))
        elif isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value):
            for k, v in enumerate(value):
                tensors[f"{name}.{k}"] = v
            shape.append((name, tuple((tuple(v.shape), v.dtype) for v in value)))
        elif not isinstance(value, Cache):
            shape.append((name, repr(value)))
        else:
            shape.append((name, "cache"))
    return tensors, tuple(shape)


def _unflat(tensors: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the graph's tensors in the place of theirs."""
    found: dict[str, Any] = {}
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            found[name] = tensors[name]
        elif f"{name}.0" in tensors:
            found[name] = tuple(tensors[f"{name}.{k}"] for k in range(len(value)))
        else:
            found[name] = value
    return found


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[k] is other[k] for k in one)
