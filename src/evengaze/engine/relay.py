"""Layers that get what the layer before them got need no hook to cut it.

The model's loop hands the same arguments to one layer after the other. Behind a stage, and in a decoding step, the
first layer finds out what is left of them; the layers behind it take that over. A hook costs the host as much as
several launches, so those of such layers rest until the call ends, and a `Relay` stands in for the layer's forward. If
it is called with anything else, or by anybody else, it does what the hook would have done.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from evengaze.engine import cache as kv
from evengaze.engine.call import Call, Calls
from evengaze.engine.intercept import Registered
from evengaze.engine.kept import Kept
from evengaze.engine.sharing import Arguments

Enter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments | None]
"""What a layer's hook does."""


class Handed:
    """What several layers of one call receive.

    Attributes:
        call: the call; None between calls.
        given: the keyword arguments with which the model calls each of them.
        made: what takes the places of some of these.
    """

    __slots__ = ("call", "given", "made")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is handed on, and nothing held."""
        self.call: Call | None = None
        self.given: tuple[tuple[str, Any], ...] = ()
        self.made: dict[str, Any] = {}

    def set(self, call: Call, given: Mapping[str, Any], new: Arguments | None) -> None:
        """From the arguments of one of the layers before and after they were cut; None if nothing was."""
        self.call, self.given = call, tuple(given.items())
        self.made = {} if new is None else {name: v for name, v in new[1].items() if given.get(name) is not v}


@dataclass(frozen=True)
class Holders:
    """Layers that hold the same tokens in a cache, known by one of them.

    Attributes:
        layer: its number.
        kept: what it remembers.
        handed: what they receive.
    """

    layer: int
    kept: Kept | None
    handed: Handed


class Relay:
    """A layer's forward while its hook rests.

    Args:
        layer: the layer.
        hook: on it.
        enter: what the hook does.
        calls: the running calls.
    """

    def __init__(self, layer: nn.Module, hook: Registered, enter: Enter, calls: Calls) -> None:
        self.layer, self._registered = layer, hook
        self._hook = hook.hooks[hook.number]
        self._enter, self._calls = enter, calls
        self._forward: Callable[..., Any] = layer.forward
        self._own: Any = None
        self._handed: Handed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        handed = self._handed
        # Each thread has a top of its own: another thread's call, and one inside of this one, are not `handed.call`.
        if self._calls.top is handed.call and len(args) == 1 and len(kwargs) == len(handed.given):
            for name, value in handed.given:
                if kwargs.get(name, self) is not value:  # `self` is nobody's argument
                    break
            else:
                kwargs.update(handed.made)
                if (run := self._calls.top.run) is not None:
                    run.entered += 1
                return self._forward(*args, **kwargs)
        # A hook that has just come back has cut them already.
        if not (handed.made and all(kwargs.get(name) is value for name, value in handed.made.items())):
            args, kwargs = self._enter(self.layer, args, kwargs) or (args, kwargs)
        return self._forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.layer, "forward")  # a copy has the layer's own

    def begin(self, handed: Handed) -> bool:
        """Stand in for the hook, unless something else listens to the layer as well."""
        layer, hooks = self.layer, self._registered.hooks
        if len(hooks) != 1 or layer._forward_hooks or layer._compiled_call_impl is not None:
            return False
        self._handed, self._forward, self._own = handed, layer.forward, layer.__dict__.get("forward")
        layer.__dict__["forward"] = self
        hooks.pop(self._registered.number, None)
        return True

    @property
    def stands_in(self) -> bool:
        """Whether it has begun."""
        return self.layer.__dict__.get("forward") is self

    def end(self) -> None:
        """Let the hook work again."""
        self._registered.hooks[self._registered.number] = self._hook
        if self._own is None:
            self.layer.__dict__.pop("forward", None)
        else:
            self.layer.__dict__["forward"] = self._own


class Relays:
    """The relays of one attachment. They serve one call at a time, while no other thread is in the decoder.

    Those of a decoding step go on standing in for the next step.
    """

    def __init__(self) -> None:
        self._of: dict[int, Relay] = {}
        self._running: list[Relay] = []
        self._groups: list[Holders] = []
        self._cache: Callable[[], Any] = lambda: None
        self._inside: set[int] = set()
        self._thread = 0
        self._lock = threading.Lock()

    def add(self, number: int, relay: Relay) -> None:
        """A hooked layer."""
        self._of[number] = relay

    def enter(self, call: Call) -> None:
        """A call of the decoder begins."""
        with self._lock:
            me = threading.get_ident()
            # A step of the same thread finds them standing; prompts, and whoever else comes in, get the hooks.
            if call.nested or call.size[1] != 1 or me != self._thread:
                self._end()
            if not call.nested:
                self._inside.add(me)

    def leave(self, call: Call) -> None:
        """A call of the decoder ends."""
        with self._lock:
            if call.nested or call.run is not None:
                self._end()
            for group in self._groups:
                group.handed.clear()
            if not call.nested:
                self._inside.discard(threading.get_ident())

    def groups(self, cache: Any) -> list[Holders]:
        """Those that stand in for steps that go on with a cache; none if it has changed since."""
        with self._lock:
            if self._cache() is cache and all(g.kept is kv.kept_of(cache.layers[g.layer]) for g in self._groups):
                return self._groups
            self._end()
            return []

    def begin(self, handed: Mapping[int, Handed], cache: Any = None, groups: Sequence[Holders] = ()) -> list[int]:
        """Relay layers, by number; returns those that are.

        Args:
            handed: what they receive.
            cache: with which further steps go on, if it is a step.
            groups: the layers by what they hold in it.
        """
        with self._lock:
            self._thread = threading.get_ident()
            # A forward is the module's, whoever calls it: not while another thread is in the decoder.
            if self._inside != {self._thread}:
                return []
            begun = [i for i, what in handed.items() if self._of[i].begin(what)]
            self._running += [self._of[i] for i in begun]
            if groups:
                self._groups, self._cache = list(groups), weakref.ref(cache)
            return begun

    def clear(self) -> None:
        """All hooks work, also after an interrupt in the midst of `begin`."""
        with self._lock:
            self._running = [relay for relay in self._of.values() if relay.stands_in]
            self._end()

    def _end(self) -> None:
        """Let all hooks work; a relay is forgotten once it has ended, as an interrupt may come in between."""
        while self._running:
            self._running[-1].end()
            self._running.pop()
        self._groups = []
