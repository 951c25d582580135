"""Listening to the attention of single modules: the queries and keys that they hand to their attention function.

A tapped module's config is shadowed for as long as the tap is there. The shadow *is* the config (both have the same
dictionary), but while a tap is armed in the running thread it gives its implementation another name: one that equals
the real name in every comparison, yet finds, in the table of transformers' public `AttentionInterface`, a function that
reports what it received and then calls the real implementation. While nothing is armed in a thread, and in code that is
being compiled, nothing is different at all.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from evengaze.compat import without_cache
from evengaze.engine.attention import AttentionStates, attention_module, hidden_attention, implementation_of

Sink = Callable[[AttentionStates], None]

_lock = threading.Lock()
"""Held while taps are put on and taken off, never while a model runs."""


class _Stop(BaseException):
    """Leaves a probed layer at its attention call. Not an Exception, so that no model code swallows it."""


_WAITING = 16
"""Calls of a thread that may wait for the same module's attention, one inside of the other."""


@dataclass(frozen=True)
class _Armed:
    owner: Any
    sink: Sink
    past: int
    once: bool
    stop: bool


class Tap:
    """A tap on one attention module. Whether it is armed is every thread's own matter, and every call's.

    Args:
        module: an attention module.
        current: gives the running call, an object of its own for each.
    """

    def __init__(self, module: nn.Module, current: Callable[[], Any] = lambda: None) -> None:
        self.module, self._current = module, current
        self._thread = _Thread()
        self._installed = False
        self._install()

    def _install(self) -> None:
        implementation_of(self.module)
        with _lock:
            module: Any = self.module
            if not isinstance(module.config, _Shadow):
                module.config = _shadow(module.config)
            _set(module.config, (*module.config._evengaze_taps, self))
            self._installed = True

    def remove(self) -> None:
        """Take the tap off; with the last one the module has its own config back. Calling it twice does no harm."""
        with _lock:
            module: Any = self.module
            self._thread = _Thread()  # nothing is armed in any thread
            if not self._installed:
                return
            self._installed = False
            if isinstance(module.config, _Shadow):
                left = tuple(tap for tap in module.config._evengaze_taps if tap is not self)
                _set(module.config, left)
                if not left:
                    module.config = module.config._evengaze_config

    def arm(self, sink: Sink, *, past: int = 0, once: bool = True, stop: bool = False) -> None:
        """Hand the states of the module's next attention in the running call (of every one, if not `once`) to `sink`.

        Args:
            sink: receives the states before the real attention runs.
            past: cached entries in front of the call's first query.
            once: disarm before the sink is called.
            stop: leave the layer at the attention call by an exception that `probe` catches.
        """
        if not self._listens():  # somebody gave the module another config
            self.remove()
            self._install()
        owner, armed = self._current(), self._thread.armed
        armed[id(owner)] = _Armed(owner, sink, past, once, stop)
        while len(armed) > _WAITING:  # left by calls that ended unseen
            armed.pop(next(iter(armed)))

    def disarm(self) -> bool:
        """Stop listening in the running call; whether the tap was still waiting."""
        armed = self._thread.armed
        return bool(armed) and armed.pop(id(self._current()), None) is not None

    @property
    def stops(self) -> bool:
        """Whether the layer is to be left at its attention in the running call."""
        waiting = self._thread.armed.get(id(self._current()))
        return waiting is not None and waiting.stop

    def hear(self, states: AttentionStates) -> None:
        """Hand states over in the place of an attention call that does not happen, as it did before."""
        waiting = self._thread.armed.pop(id(self._current()), None)
        if waiting is not None:
            waiting.sink(states)

    @contextmanager
    def apart(self, sink: Sink) -> Iterator[None]:
        """Listen inside a `with` block; what was waiting in the running call goes on waiting behind it."""
        armed, key = self._thread.armed, id(self._current())
        waiting = armed.pop(key, None)
        self.arm(sink)
        try:
            yield
        finally:
            armed.pop(key, None)
            if waiting is not None:
                armed[key] = waiting

    def _listens(self) -> bool:
        config = self.module.config
        return isinstance(config, _Shadow) and self in config._evengaze_taps


class _Thread(threading.local):
    """What waits for the module's attention, by the call that does."""

    def __init__(self) -> None:
        self.armed: dict[int, _Armed] = {}


def is_tapped(module: Any) -> bool:
    """Whether somebody listens, or may listen, to a module's attention."""
    return isinstance(module.__dict__.get("config"), _Shadow)


def probe(tap: Tap, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionStates:
    """The queries and keys with which a layer that has not run yet would attend to its input.

    The layer is left at its attention call; its cache is not touched.

    Args:
        tap: on the layer's attention module.
        forward: the layer's.
        args: what it would be called with.
        kwargs: likewise, by name.

    Raises:
        AttachError: the layer never called the attention interface.
    """
    found: list[AttentionStates] = []
    tap.arm(found.append, stop=True)
    try:
        args, kwargs = without_cache(args, kwargs)
        forward(*args, **kwargs)
    except _Stop:
        return found[0]
    finally:
        tap.disarm()
    raise hidden_attention(tap.module)


class Taps:
    """The taps of one attachment, each put on when it is first needed, on the module that a layer has now."""

    def __init__(self, current: Callable[[], Any] = lambda: None) -> None:
        self._current = current
        self._taps: dict[int, Tap] = {}
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()

    def on(self, layer: nn.Module) -> Tap:
        """The tap on a layer's attention."""
        name = self._names.get(id(layer))
        module = None if name is None else layer._modules.get(name)
        tap = self._taps.get(id(module))
        if tap is None:
            module = attention_module(layer)
            with self._lock:
                tap = self._taps.get(id(module)) or Tap(module, self._current)
                self._taps[id(module)] = tap
                self._names |= {id(layer): name for name, part in layer._modules.items() if part is module}
        return tap

    def disarm(self) -> None:
        """Stop listening in the running call."""
        for tap in list(self._taps.values()):
            tap.disarm()

    def remove(self) -> None:
        """Take all off."""
        for tap in self._taps.values():
            tap.remove()
        self._taps.clear()


# -- the shadow -------------------------------------------------------------------------------------------------------
_PREFIX = "evengaze:"


class _Name(str):
    """An implementation's name. It equals the plain one, but tables find the entry of the prefixed one for it.

    Tables themselves hold the prefixed one, a plain string: releases of torch.compile do not read a table whose keys
    have a hash of their own, also where nobody looks for them.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(_PREFIX + str(self))

    def __eq__(self, other: object) -> bool:
        return str(self) == other or _PREFIX + str(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


class _Shadow:
    """A config as a tapped module sees it; a base class of the classes that `_shadow_class` makes."""

    _evengaze_config: Any
    _evengaze_taps: tuple[Tap, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the config's, which would make a new kind of config of it."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _itself, (self._evengaze_config,)  # copies and pickles have the config


def _itself(value: Any) -> Any:
    return value


def _shadow(config: Any) -> Any:
    kind: Any = type(config)
    shadow = object.__new__(_shadow_class(kind))
    object.__setattr__(shadow, "__dict__", config.__dict__)
    object.__setattr__(shadow, "_evengaze_config", config)
    _set(shadow, ())
    return shadow


def _set(shadow: Any, taps: tuple[Tap, ...]) -> None:
    object.__setattr__(shadow, "_evengaze_taps", taps)


@functools.cache
def _shadow_class(base: Any) -> Any:
    real: Any = base._attn_implementation

    def implementation(self: Any) -> Any:
        name = real.fget(self)
        if not torch.compiler.is_compiling():
            for tap in self._evengaze_taps:
                if tap._thread.armed:
                    return _listening(name)
        return name

    body = {
        "__slots__": ("_evengaze_config", "_evengaze_taps"),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_attn_implementation": property(implementation, real.fset),
    }
    return type(base.__name__, (_Shadow, base), body)


@functools.cache
def _listening(name: str | None) -> _Name:
    """The name under which `_tapped` is registered for an implementation."""
    plain = str(name or "eager")
    AttentionInterface.register(_PREFIX + plain, _tapped)
    if plain in ALL_MASK_ATTENTION_FUNCTIONS:  # some modules make masks of their own
        AttentionMaskInterface.register(_PREFIX + plain, ALL_MASK_ATTENTION_FUNCTIONS[plain])
    return _Name(plain)


# -- the attention function -------------------------------------------------------------------------------------------
def _tapped(
    module: nn.Module, query: Tensor, key_states: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """Report to what is armed, then let the real implementation do the work."""
    taps = [tap for tap in getattr(module.config, "_evengaze_taps", ()) if tap._thread.armed]
    waiting = [tap._thread.armed for tap in taps]
    armed = []
    for tap, entries in zip(taps, waiting, strict=True):
        key = id(tap._current())
        if key in entries:
            armed.append(entries[key])
            if entries[key].once or entries[key].stop:
                del entries[key]
        tap._thread.armed = {}  # from here on the module has its plain name, by which flash finds its kernel
    try:
        for each in armed:
            each.sink(_states(module, query, key_states, mask, each.past, kwargs))
        if any(each.stop for each in armed):
            raise _Stop
        return _implementation(module)(module, query, key_states, value, mask, *args, **kwargs)
    finally:
        for tap, entries in zip(taps, waiting, strict=True):
            tap._thread.armed = entries


def _states(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, past: int, options: dict[str, Any]
) -> AttentionStates:
    scaling, causal = options.get("scaling"), options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    return AttentionStates(
        query,
        key,
        mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        options.get("softcap"),
        options.get("s_aux"),
        options.get("sliding_window"),
        past,
        bool(causal),
    )


def _implementation(module: Any) -> Callable[..., Any]:
    """What the module would have called without a tap: its file's own table and eager function come first."""
    name = module.config._attn_implementation
    files = [sys.modules[kind.__module__] for kind in type(module).__mro__]
    table = next((f.ALL_ATTENTION_FUNCTIONS for f in files if hasattr(f, "ALL_ATTENTION_FUNCTIONS")), None)
    eager = next((f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward")), None)
    if name is None or name == "eager":
        if eager is None:
            raise hidden_attention(module)
        return eager  # type: ignore[no-any-return]
    if table is None:
        table = ALL_ATTENTION_FUNCTIONS
    return table.get_interface(name, eager)  # type: ignore[no-any-return]
