"""CUDA graphs of one model: captured, kept within a bound of memory, and dropped once the model has changed.

A graph replays kernels at the addresses that they were captured with: the weights', its own inputs' and its results'.
So inputs are copied in, results are copied out before anybody else sees them, and weights are looked at before each
call: if one lies elsewhere now (`model.to`, `load_state_dict(assign=True)`, an adapter merged, added or switched), all
graphs are dropped. Values of weights may change in place.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from evengaze.engine.intercept import Hook
from evengaze.errors import ConfigError

Function = Callable[[Mapping[str, Tensor]], Any]
"""What a graph is captured of: from tensors by name to anything made of tensors."""

_OWN = ("transformers.utils.output_capturing",)
"""Where hooks come from that do nothing unless outputs are collected, which is refused."""


_capturing = threading.Lock()
"""CUDA captures one graph at a time in a process."""


def _nobody() -> None:
    """Stands for a reference whose object is gone."""


class CudaGraph:
    """A function whose launches are recorded once and replayed. Its results stay in the same buffers.

    Args:
        function: what is captured.
        inputs: what it is captured with; copied.
        pool: memory shared by all graphs of a model, which never run at the same time.
    """

    def __init__(self, function: Function, inputs: Mapping[str, Tensor], pool: Any) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with _capturing:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # whatever is set up on first use: handles, workspaces, chosen algorithms
                    function(self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
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


class Graphs:
    """The CUDA graphs of one model. Give it to each attachment that shall use them again.

        graphs = eg.Graphs()
        for request in requests:
            with eg.FastV(keep=128)(model, graphs=graphs):
                model.generate(**request)

    `graphs=True` makes one that ends with its attachment. Methods, and the dense model, may take turns with one object.

    Args:
        memory: bytes that inputs and results of graphs may hold together; None is an eighth of the device's memory. The
            graphs that were not used for the longest time go first.
        shapes: most graphs that are kept, and most shapes that are waited for to come again.

    Attributes:
        counts: how often segments and towers were "captured" and "replayed", or ran as ever, by reason.
        user: of the attachment that uses them.
        cuts: layers before which the model does more than call them.
    """

    def __init__(self, memory: int | None = None, *, shapes: int = 64) -> None:
        if shapes < 1 or (memory is not None and memory < 1):
            raise ConfigError(f"Graphs(memory={memory}, shapes={shapes}): both must be at least 1")
        self._memory, self._shapes = memory, shapes
        self.counts: Counter[str] = Counter()
        self.user: Any = None
        self.cuts: set[int] = set()
        self._model: ref[nn.Module] | None = None
        self._kind: Any = None
        self._pool: Any = None
        self._held: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._seen: OrderedDict[Any, None] = OrderedDict()
        self._lock = threading.Lock()
        self._holder: Any = None
        self._stream: Any = None
        self._ahead: Callable[[], Any] = _nobody
        self._layers: _Weights | None = None
        self._towers: _Weights | None = None

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        return f"Graphs({len(self._held)} of {self.nbytes / 2**20:.0f} MiB{': ' if counts else ''}{counts})"

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs and results. What graphs need in between comes on top, once for all of them."""
        return sum(size for _, size in self._held.values())

    def clear(self) -> None:
        """Drop all graphs, and give their memory back."""
        self._seen.clear()
        self._drop()

    def _drop(self) -> None:
        self._held.clear()
        self._pool = None if self._kind is None else self._kind.pool()

    def serve(self, model: nn.Module, layers: list[nn.Module], towers: list[nn.Module]) -> None:
        """From now on the graphs are of a model's decoder layers and vision towers.

        Raises:
            ConfigError: they are another model's, or graphs of this one cannot be captured.
        """
        if self._model is not None and self._model() is not model:
            raise ConfigError("these Graphs are of another model: make one Graphs() for each model.")
        kind = recorder(model)
        if self._model is None or kind is not self._kind:
            self.cuts.clear()
            self._model, self._kind = ref(model), kind
            self.clear()
        with self._lock:
            self._layers, self._towers = self._layers or _Weights(layers), self._towers or _Weights(towers)
            self._layers.parts, self._towers.parts = layers, towers

    # -- one call at a time -------------------------------------------------------------------------------------------
    def take(self, call: Any, whole: Any = None) -> bool:
        """Whether a call may use the graphs from now on, until `leave`: their buffers serve one at a time.

        Args:
            call: the prefill.
            whole: the outermost call that it is a part of.
        """
        with self._lock:
            held = None if self._holder is None else self._holder()
            if held is not None and held is not call:
                return False
            if held is None:
                self._holder = ref(call)
                self._order()
                if whole is None or self._ahead() is not whole:
                    self._check(self._layers)
                self._ahead = _nobody
            return True

    def leave(self, call: Any) -> None:
        """A call that may have used the graphs is over."""
        with self._lock:
            if self._holder is not None and self._holder() is call:
                self._holder = None

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """The graphs for as long as a `with` block takes; False if a call has them."""
        with self._lock:
            free = self._holder is None or self._holder() is None
            if free:
                self._order()
                self._check(self._towers)
                yield True
        if not free:
            yield False

    def look_ahead(self, whole: Any) -> None:
        """Look at the layers in a turn, while the device is busy with it: the prefill of the same call need not then.

        Args:
            whole: the outermost call that runs.
        """
        if whole is not None:
            self._check(self._layers)
            self._ahead = ref(whole)

    def _order(self) -> None:
        """Let what runs now come behind what ran before."""
        if self._kind is CudaGraph:
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream

    def _check(self, weights: _Weights | None) -> None:
        """Drop all graphs if some weights are elsewhere.

        Raises:
            ConfigError: somebody listens inside.
        """
        if weights is None:
            return
        if weights.changed():
            self.counts["dropped: the model changed"] += len(self._held)
            self._drop()
        heard = [*weights.listened, *filter(_is_listened, weights.parts)]
        if heard:
            names = ", ".join(dict.fromkeys(type(module).__name__ for module in heard))
            raise ConfigError(
                f"graphs=True calls no hooks inside of graphs, but {names} has some. Remove them, or attach without "
                "graphs."
            )

    # -- graphs -------------------------------------------------------------------------------------------------------
    def graph(self, key: Any, function: Function, inputs: Mapping[str, Tensor]) -> Any:
        """The graph of a key; captured if the key was seen before, None if not."""
        held = self._held.get(key)
        if held is not None:
            self._held.move_to_end(key)
            self.counts["replayed"] += 1
            return held[0]
        if key not in self._seen:
            return None
        graph = self._kind(function, inputs, self._pool)
        self._held[key] = graph, _bytes(inputs) + _bytes(getattr(graph, "result", None))
        self.counts["captured"] += 1
        limit = self._limit()
        while len(self._held) > 1 and (len(self._held) > self._shapes or self.nbytes > limit):
            self._held.popitem(last=False)
        return graph

    def saw(self, key: Any) -> None:
        """What belongs to a key has run as ever, and may be captured the next time."""
        self._seen[key] = None
        self.counts["first sight"] += 1
        while len(self._seen) > self._shapes:
            self._seen.popitem(last=False)

    def _limit(self) -> float:
        if self._memory is not None:
            return self._memory
        if self._kind is not CudaGraph:
            return float("inf")
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 8


class _Weights:
    """Where the weights of modules lie, what these consist of, who listens to them, and which adapters are on."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts
        self._list()
        self._now = self._look()

    def changed(self) -> bool:
        """Whether anything is not as it was when this was last asked."""
        before, self._now = self._now, self._look()
        if before == self._now:
            return False
        self._list()  # there may be other modules now
        self._now = self._look()
        return True

    def _list(self) -> None:
        """Look for what is asked at each call: walking through modules takes five times as long."""
        modules = [module for part in self.parts for module in part.modules() if module is not part]
        inside = [module.__dict__ for module in (*self.parts, *modules)]
        self._tensors = [held[n] for held in inside for n in ("_parameters", "_buffers") if held[n]]
        self._children = [held["_modules"] for held in inside if held["_modules"]]
        self._hooks = [held[n] for held in inside[len(self.parts) :] for n in ("_forward_pre_hooks", "_forward_hooks")]
        self._adapters = [held for held in inside if "_disable_adapters" in held]  # PEFT's layers
        self.listened = list(filter(_is_listened, modules))

    def _look(self) -> list[Any]:
        found: list[Any] = [flag for part in self.parts for flag in (id(part), part.training)]
        for table in self._tensors:
            for tensor in table.values():
                found.append(None if tensor is None else tensor.data_ptr())
        for children in self._children:
            found += map(id, children.values())
        found += map(len, self._hooks)
        for held in self._adapters:
            found += (held["_disable_adapters"], str(held.get("_active_adapter")), str(held.get("merged_adapters")))
        return found


def _is_listened(module: nn.Module) -> bool:
    """Whether a hook that is neither ours nor transformers' own waits for a module's calls."""
    hooks: list[Any] = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return any(not isinstance(h, Hook) and not str(getattr(h, "__module__", "")).startswith(_OWN) for h in hooks)


def _bytes(held: Any) -> int:
    return sum(
        t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in tensors(held)}.values()
    )


def tensors(held: Any) -> list[Tensor]:
    """All tensors in nests of tuples, lists, mappings and dataclasses."""
    if is_dataclass(held) and not isinstance(held, (type, Mapping)):
        held = list(vars(held).values())
        return [t for value in held for t in tensors(value)]
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, Tensor)]


def copied(held: Any) -> Any:
    """The same nest with copies of its tensors, made in one launch where the device can."""
    leaves, spec = tree_flatten(held)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    unique = {id(leaves[i]): leaves[i] for i in places}
    copies = dict(zip(unique, copies_of(list(unique.values())), strict=True))
    for i in places:
        leaves[i] = copies[id(leaves[i])]
    return tree_unflatten(leaves, spec)


def copies_of(given: list[Tensor]) -> list[Tensor]:
    """A copy of each tensor."""
    made = [torch.empty_like(t) for t in given]
    if made:
        torch._foreach_copy_(made, given)
    return made
