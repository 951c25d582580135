"""How often the host waits for an accelerator, counted without one.

A GPU runs behind the host. Whoever asks it for a value (`item`, `nonzero`, a boolean mask as an index) waits until it
has caught up, and the launches that would have kept it busy are not made meanwhile. On a CPU none of this costs
anything, so it creeps in unseen. `DeviceReads` plays an accelerator on the CPU: what belongs to the model and its
inputs, and all that is computed from them, counts as living there, and what asks for its values is counted.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten

READS = {
    _aten._local_scalar_dense: "item",
    _aten.nonzero: "nonzero",
    _aten.masked_select: "masked_select",
    _aten.equal: "equal",
    _aten.is_nonzero: "is_nonzero",
    _aten.bincount: "bincount",
    _aten._unique: "unique",
    _aten._unique2: "unique",
    _aten.unique_dim: "unique",
    _aten.unique_consecutive: "unique",
    _aten.unique_dim_consecutive: "unique",
    _aten._linalg_eigh: "eigh",  # the solver's status is looked at
    _aten._linalg_svd: "svd",
}
"""Operators whose shape or outcome depends on values, so that the host waits for them."""

_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index)
_TO_HOST = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)
_MOVES = (Tensor.to, Tensor.type_as)
_MAKES = (torch.tensor, torch.as_tensor, torch.asarray)


class DeviceReads:
    """Counts waits for an accelerator inside a `with` block, as if the model lived on one.

    Args:
        things: modules, tensors, and nests of them that live on the accelerator at the start.

    Attributes:
        reads: what asked for values, by kind.
        uploads: blocking copies to the accelerator (`.to(device)` without `non_blocking`, `torch.tensor(..., device)`),
            for which the host waits, too.
        places: file and line of each, in order.

    A device that is named by a string is the host ("cpu"); one that is given as `torch.device` the accelerator.
    """

    def __init__(self, *things: Any) -> None:
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.places: list[str] = []
        self._there = WeakIdKeyDictionary()
        self._modes: tuple[Any, ...] = (_Functions(self), _Operators(self))
        for tensor in _tensors(things):
            self.mark(tensor)

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exc)

    @property
    def total(self) -> int:
        """All reads."""
        return sum(self.reads.values())

    def mark(self, tensor: Tensor) -> None:
        """From now on a tensor lives on the accelerator."""
        self._there[tensor] = True

    def lives_there(self, *values: Any) -> bool:
        """Whether any tensor in a nest does."""
        return any(isinstance(v, Tensor) and v in self._there for v in tree_leaves(values))

    def note(self, counter: Counter[str], kind: str) -> None:
        """Count one."""
        counter[kind] += 1
        frame = next(
            (f for f in reversed(traceback.extract_stack()) if "/torch/" not in f.filename and f.filename != __file__),
            None,
        )
        self.places.append(f"{kind}: {frame.filename}:{frame.lineno}" if frame else kind)


class _Functions(TorchFunctionMode):
    """Moves between host and accelerator, which are no operators where both are the CPU."""

    def __init__(self, owner: DeviceReads) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, owner = kwargs or {}, self._owner
        if func in _TO_HOST and owner.lives_there(args[0]):
            owner.note(owner.reads, func.__name__)
            copy = _outside(Tensor.clone, args[0])
            return _outside(func, copy, *args[1:], **kwargs)
        if func is Tensor.copy_ and kwargs.get("non_blocking") and not owner.lives_there(args[0]):
            return _outside(func, *args, **kwargs)  # fetched meanwhile; whoever looks at it has waited for an event
        if func in _MOVES:
            devices = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, (torch.device, str))]
            target = next((v.device for v in args[1:2] if isinstance(v, Tensor)), None)
            there = owner.lives_there(args[0])
            if "cpu" in [d for d in devices if isinstance(d, str)]:
                if there:
                    owner.note(owner.reads, "cpu")
                return _outside(Tensor.clone, _outside(func, *args, **kwargs))
            if (devices or target is not None) and not there:
                if not kwargs.get("non_blocking", False):
                    owner.note(owner.uploads, "to")
                moved = _outside(Tensor.clone, _outside(func, *args, **kwargs))
                owner.mark(moved)
                return moved
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and isinstance(kwargs.get("device"), torch.device):
            if func in _MAKES and not owner.lives_there(args):
                owner.note(owner.uploads, func.__name__)
            owner.mark(made)
        return made


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators that look at values; and what is computed from what."""

    def __init__(self, owner: DeviceReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, owner = kwargs or {}, self._owner
        if torch.is_inference_mode_enabled():  # operators made of others come here whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        packet = func.overloadpacket
        if owner.lives_there(args, kwargs):
            kind = READS.get(packet)
            if packet in _INDEXING and any(
                isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
            ):
                kind = "boolean index"
            if packet is _aten.repeat_interleave and func is not _aten.repeat_interleave.self_int:
                given = kwargs.get("output_size")
                kind = "repeat_interleave" if given is None else None
            if kind is not None:
                owner.note(owner.reads, kind)
            out = func(*args, **kwargs)
            for tensor in _tensors([out]):
                owner.mark(tensor)
            return out
        return func(*args, **kwargs)


def _outside(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Call without any mode: nothing is counted, and the result lives on the host."""
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        return func(*args, **kwargs)


def _tensors(things: Iterable[Any]) -> Iterator[Tensor]:
    for thing in things:
        if isinstance(thing, nn.Module):
            yield from thing.parameters()
            yield from thing.buffers()
        else:
            yield from (leaf for leaf in tree_leaves(thing) if isinstance(leaf, Tensor))
