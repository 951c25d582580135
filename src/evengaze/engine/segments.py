"""The layers between two stages, and the vision tower, as one captured CUDA graph each.

Once a budget is fixed, what a run of layers between two stages receives has the same shapes for every prompt of one
length. The first layer of such a segment replays the graph of all of them; the others hand its result through. Hooks,
masks, caches and positions stay the engine's: the keys and values of a segment are copied out of the graph's buffers
together, and go into the cache at each layer's own turn; the attention by which the next stage ranks is captured, too.

A shape is captured when it is seen for the second time; the first time runs as ever, and shows where the model's loop
does more between layers than call the next one with the same things: there, too, a segment ends (layers with masks or
tables of their own, pictures that are added to the states of early layers). Calls that are no prefill of a first turn
(decoding, further turns) run as ever, too, and so does a call that finds the graphs in use by another thread: buffers
serve one call at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import output_capturing

from evengaze.engine.attention import AttentionStates
from evengaze.engine.graphs import Graphs, copied
from evengaze.engine.intercept import put
from evengaze.engine.stored import StandIn, copied_states, put_away, without
from evengaze.errors import ConfigError, out_of_memory

if TYPE_CHECKING:
    from evengaze.engine.prefill import Prefill
    from evengaze.engine.tap import Taps


_IN_USE = "graphs in use by another call"
"""A reason of `Graphs.counts`."""


class _Forward:
    """What stands in the place of a layer's or a tower's forward.

    Compiled code sees the plain forward only. There is one object for each module, whoever is attached: another one
    would be compiled anew.
    """

    def __init__(self) -> None:
        self.plain: Any = None
        self.instead: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        return self.instead(*args, **kwargs)

    def __reduce__(self) -> Any:  # a copy of the module has its own forward
        owner = getattr(self.plain, "__self__", None)
        return (functools.partial, (self.plain,)) if owner is None else (getattr, (owner, "forward"))


_idle: WeakKeyDictionary[nn.Module, _Forward] = WeakKeyDictionary()
"""Those of modules that nobody is attached to."""


def _replace(module: nn.Module, instead: Callable[..., Any]) -> tuple[_Forward, Callable[[], None]]:
    """Let `instead` be called in the place of a module's forward; returns what stands there, and what undoes it."""
    held = _idle.pop(module, None) or _Forward()
    held.plain, held.instead = module.forward, instead
    undo = put(module, "forward", held)

    def remove() -> None:
        undo()
        held.instead = held.plain
        if module.__dict__.get("forward") is not held:
            held.plain = held.instead = None  # else they would keep the module
            _idle[module] = held

    return held, remove


@dataclass
class _Result:
    """What a segment leaves: the states behind it, keys and values by layer, and attention that was listened to."""

    hidden: Any
    stored: dict[int, tuple[Tensor, Tensor]]
    states: AttentionStates | None


@dataclass
class _Running:
    """The segment that runs: a result to hand through, or the layers as they go by for the first time."""

    run: Any
    key: Any
    kwargs: dict[str, Any]
    result: _Result | None = None
    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    last: Any = None
    copy: Tensor | None = None

    def goes_on(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> bool:
        """Whether the next layer gets what the last one returned, untouched, and what the others got."""
        if hidden is not self.last or not _same(kwargs, self.kwargs):
            return False
        return self.copy is None or torch.equal(hidden, self.copy)


class Segments:
    """An attachment's use of a model's graphs.

    Args:
        graphs: the model's.
        layers: the decoder's layers.
        stages: the layers before which tokens leave.
        listened: the layers whose attention the stage behind them reads.
        probed: the layers whose own attention is read before they run.
        taps: the attachment's.
        run_of: gives the running prefill; None in other calls.
        whole_of: gives the outermost of the running calls; None outside of them.
    """

    def __init__(
        self,
        graphs: Graphs,
        layers: list[Any],
        stages: list[int],
        listened: set[int],
        probed: set[int],
        taps: Taps,
        run_of: Callable[[], Prefill | None],
        whole_of: Callable[[], Any],
    ) -> None:
        self._graphs, self._layers = graphs, layers
        self._listened, self._probed = listened, probed
        self._taps, self._run_of, self._whole_of = taps, run_of, whole_of
        self._stages = stages
        self._cut()
        self._forwards: list[_Forward] = []
        self._undo: list[Callable[[], None]] = []
        self._now: _Running | None = None

    def install(self) -> Callable[[], None]:
        """Take over the layers' forwards; returns what undoes it."""
        self._graphs.user = self
        for i, layer in enumerate(self._layers):
            held, undo = _replace(layer, functools.partial(self._forward, i))
            self._forwards.append(held)
            self._undo.append(undo)

        def remove() -> None:
            while self._undo:
                self._undo[-1]()
                self._undo.pop()
            self._now = self._graphs.user = None

        return remove

    def watch_tower(self, tower: Any) -> Callable[[], None]:
        """Capture a vision tower's forward as well; returns what undoes it."""
        held, undo = _replace(tower, lambda *args, **kwargs: self._tower(held.plain, *args, **kwargs))
        return undo

    def leave(self, run: Any) -> None:
        """A prefill is over."""
        if self._now is not None and self._now.run is run:
            self._now = None
        self._graphs.leave(run)

    # -- a layer ------------------------------------------------------------------------------------------------------
    def _forward(self, i: int, *args: Any, **kwargs: Any) -> Any:
        forward, run = self._forwards[i].plain, self._run_of()
        if run is None or len(args) != 1 or (i in self._probed and self._taps.on(self._layers[i]).stops):
            return forward(*args, **kwargs)
        hidden, now = args[0], self._now
        if i > self._bounds[i][0] and now is not None and now.run is run and not now.goes_on(hidden, kwargs):
            if now.result is not None:
                raise ConfigError(
                    f"graphs=True cannot serve this call: between its layers the model does what it did not do when "
                    f"{type(self._layers[i]).__name__} was captured. Attach without graphs."
                )
            self._cut(i)
        first, end = self._bounds[i]
        if i == first:
            begun = self._begin(run, first, end, hidden, kwargs)
            if begun is None:  # the graphs may be another call's, whose `_now` stays
                return forward(*args, **kwargs)
            self._now = begun
        now = self._now
        if now is None or now.run is not run:
            return forward(*args, **kwargs)
        if now.result is not None:
            return self._hand_through(now, now.result, i, kwargs)
        out = forward(hidden, **kwargs)
        now.last = out[0] if isinstance(out, tuple) else out
        now.copy = now.last.clone()  # what a model adds in place (deepstack) would not be noticed else
        if i == end - 1:
            self._graphs.saw(now.key)
        return out

    def _cut(self, *numbers: int) -> None:
        """Segments begin at stages, and where the model does something between its layers."""
        self._graphs.cuts.update(numbers)
        cuts = sorted({0, *self._stages, *self._graphs.cuts, len(self._layers)})
        self._bounds = {i: (a, b) for a, b in pairwise(cuts) for i in range(a, b)}

    def _begin(self, run: Any, first: int, end: int, hidden: Tensor, kwargs: dict[str, Any]) -> _Running | None:
        """A segment begins: replayed if it is captured, watched for the first time, or None if it runs as ever."""
        refuse(kwargs, hidden.device)
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        why, sizes = without(run, cache, first, end)
        if why is None and not self._graphs.take(run, self._whole_of()):
            why = _IN_USE
        if why is not None:
            self._graphs.counts[why] += 1
            if self._now is not None and self._now.run is run:
                self._now = None
            return None
        tensors, shape = _flat({**kwargs, "hidden_states": hidden})
        heard = frozenset(i for i in range(first, end) if i in self._listened)
        key = (first, end, heard, shape, tuple(sizes.items()), torch.is_inference_mode_enabled())
        function = functools.partial(_segment, self._graphs, range(first, end), heard, dict(kwargs), sizes)
        graph = self._captured(key, function, tensors)
        if graph is None:
            return _Running(run, key, kwargs)
        result: _Result = graph(tensors)
        last = result.hidden[0] if isinstance(result.hidden, tuple) else result.hidden
        return _Running(run, key, kwargs, result, copied_states(result.stored), last)

    def _captured(self, key: Any, function: Callable[..., Any], tensors: Mapping[str, Tensor]) -> Any:
        """The graph of a key; None if it is seen for the first time.

        Raises:
            ConfigError: it cannot be captured.
        """
        try:
            return self._graphs.graph(key, function, tensors)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ConfigError(
                f"graphs=True: {type(self._layers[0]).__name__} cannot be captured as a CUDA graph ({error}). Attach "
                "without graphs, or load the model with attn_implementation='sdpa'."
            ) from error

    def run(
        self,
        numbers: range,
        heard: frozenset[int],
        kwargs: dict[str, Any],
        sizes: Mapping[int, int],
        tensors: Mapping[str, Tensor],
    ) -> _Result:
        """What is captured: layers one after the other."""
        store, found = StandIn(sizes), list[AttentionStates]()
        given = {k: store if isinstance(v, Cache) else v for k, v in _unflat(tensors, kwargs).items()}
        out: Any = tensors["hidden_states"]
        for i in numbers:
            states = out[0] if isinstance(out, tuple) else out
            tap = self._taps.on(self._layers[i]).apart(found.append) if i in heard else nullcontext()
            with tap:
                out = self._forwards[i].plain(states, **given)
        return _Result(out, store.stored, found[-1] if found else None)

    def _hand_through(self, now: _Running, result: _Result, i: int, kwargs: dict[str, Any]) -> Any:
        """What a layer does when its segment has been replayed: it stores, is listened to, and returns the result."""
        cache = next((value for value in kwargs.values() if isinstance(value, Cache)), None)
        if cache is not None and i in now.stored:
            put_away(cache, i, *now.stored[i])
        if i in self._listened and result.states is not None:
            self._taps.on(self._layers[i]).hear(result.states)
        return result.hidden

    # -- the tower ----------------------------------------------------------------------------------------------------
    def _tower(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        pixels: Any = kwargs.get("pixel_values", args[0] if args else None)
        rest = {k: v for k, v in kwargs.items() if k != "pixel_values"}
        plain = not isinstance(pixels, Tensor) or torch.is_grad_enabled() or len(args) > 1
        if plain or any(isinstance(v, Tensor) for v in rest.values()):
            self._graphs.counts["tower with further tensors or gradients"] += 1
            return forward(*args, **kwargs)
        key: tuple[Any, ...] = ("tower", tuple(pixels.shape), pixels.dtype, torch.is_inference_mode_enabled())
        key += (repr(sorted(rest.items(), key=lambda item: item[0])),)
        with self._graphs.turn() as free:
            if not free:
                self._graphs.counts[_IN_USE] += 1
            else:
                graph = self._captured(key, lambda given: forward(given["pixels"], **rest), {"pixels": pixels})
                if graph is not None:
                    result = copied(graph({"pixels": pixels}))
                    self._graphs.look_ahead(self._whole_of())
                    return result
                self._graphs.saw(key)
        return forward(*args, **kwargs)


def _segment(graphs: Graphs, *args: Any) -> _Result:
    """What is captured, by whoever is attached."""
    user: Segments = graphs.user
    return user.run(*args)


def refuse(kwargs: Mapping[str, Any], device: torch.device) -> None:
    """Raise a ConfigError if a call asks for what graphs cannot give."""
    if torch.is_grad_enabled():
        raise ConfigError("graphs=True records no gradients: call the model under torch.inference_mode() or no_grad().")
    if torch.is_autocast_enabled(device.type):
        raise ConfigError(
            "graphs=True does not work under autocast, which casts weights anew. Load the model in bfloat16 or "
            "float16, or attach without graphs."
        )
    collected = output_capturing._active_collector.get() or ()
    for name in ("attentions", "hidden_states"):
        if kwargs.get(f"output_{name}") or name in collected:
            raise ConfigError(
                f"graphs=True keeps the states between layers in buffers: output_{name} cannot be had with it."
            )


def _flat(kwargs: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[Any, ...]]:
    """The tensors of a layer's arguments by name, and all that a graph depends on beside their values."""
    tensors: dict[str, Tensor] = {}
    shape: list[Any] = []
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            tensors[name] = value
            shape.append((name, tuple(value.shape), value.stride(), value.dtype, value.device))
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
    """Whether two layers are given the very same things."""
    return one.keys() == other.keys() and all(one[k] is other[k] for k in one)
