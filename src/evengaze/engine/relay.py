"""Layers that get what the layer before them got need no hook to cut it.

The model's loop hands the same arguments to one layer after the other. Behind a stage, and in a decoding step, the
first layer finds out what is left of them; the layers behind it take that over. A hook costs the host as much as
several launches, so a `Relay` takes the places of such layers' hooks, in front of their forwards. Where nothing was
handed to it, or it is called with anything else, or by anybody else, it does what the hook would have done.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from evengaze.engine import cache as kv
from evengaze.engine.call import Call, Calls
from evengaze.engine.intercept import Registered
from evengaze.engine.kept import Kept
from evengaze.engine.prefill import Prefill
from evengaze.engine.sharing import Arguments

Enter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Arguments | None]
"""What a layer's hook does."""


class Handed:
    """What several layers of one call receive.

    Attributes:
        call: the call; None between calls.
        run: its prefill, if it is one.
        given: the keyword arguments with which the model calls each of them.
        made: what takes the places of some of these.
    """

    __slots__ = ("call", "given", "made", "run")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is handed on, and nothing held."""
        self.call: Call | None = None
        self.run: Prefill | None = None
        self.given: tuple[tuple[str, Any], ...] = ()
        self.made: dict[str, Any] = {}

    def set(self, call: Call, given: Mapping[str, Any], new: Arguments | None) -> None:
        """From the arguments of one of the layers before and after they were cut; None if nothing was."""
        self.call, self.run, self.given = call, call.run, tuple(given.items())
        self.made = {} if new is None else {name: v for name, v in new[1].items() if given.get(name) is not v}
        call.ending.append(self.clear)


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


_NOTHING = Handed()


class Relay:
    """A layer's forward in the place of its hook.

    Args:
        number: of the layer.
        layer: the layer.
        hook: on it.
        enter: what the hook does.
        calls: the running calls.
        handed: what was handed to layers last, by number.

    Attributes:
        forward: the layer's own, or what somebody else has put in its place.
        listening: the hooks that are called before and behind the layer.
    """

    def __init__(
        self,
        number: int,
        layer: nn.Module,
        hook: Registered,
        enter: Enter,
        calls: Calls,
        handed: Mapping[int, Handed],
    ) -> None:
        self._number, self._handed = number, handed
        self.layer, self._registered = layer, hook
        self._hook = hook.hooks[hook.number]
        self._enter, self._calls = enter, calls
        self.forward: Callable[..., Any] = layer.forward
        self._own: Any = None
        self._stands = False
        self._wrapped = False  # by somebody who calls it as if it were the layer's forward
        self.listening: tuple[dict[int, Any], dict[int, Any]] = hook.hooks, layer._forward_hooks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        if not is_compiling():
            handed = self._handed.get(self._number, _NOTHING)
            # Each thread has a top of its own: another's call, and one inside of this one, are not `handed.call`.
            if self._calls.top is handed.call and len(kwargs) == len(handed.given) and len(args) == 1:
                for name, value in handed.given:
                    if kwargs.get(name, self) is not value:  # `self` is nobody's argument
                        break
                else:
                    kwargs.update(handed.made)
                    if handed.run is not None:
                        handed.run.entered += 1
                    return self.forward(args[0], **kwargs)
        # Unless the hook has run, which an interrupt may have left, or the relay's time is over.
        if self._stands and self._registered.number not in self.listening[0]:
            args, kwargs = self._enter(self.layer, args, kwargs) or (args, kwargs)
        return self.forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.layer, "forward")  # a copy has the layer's own

    def begin(self) -> bool:
        """Take the hook's place, unless something else listens to the layer as well."""
        layer, (hooks, behind) = self.layer, self.listening
        if self.stands_in:  # an interrupt came in the midst
            self._stands = True
            hooks.pop(self._registered.number, None)
            return True
        if self._wrapped or len(hooks) != 1 or behind or layer._compiled_call_impl is not None:
            return False
        self.forward, self._own, self._stands = layer.forward, layer.__dict__.get("forward"), True
        layer.__dict__["forward"] = self
        hooks.pop(self._registered.number, None)
        return True

    @property
    def stands_in(self) -> bool:
        """Whether it has begun."""
        return self.layer.__dict__.get("forward") is self

    def end(self) -> None:
        """Let the hook work again."""
        hooks, number = self._registered.hooks, self._registered.number
        hooks[number] = self._hook
        hooks.move_to_end(number, last=False)  # others have come behind it
        self._stands = False
        if not self.stands_in:
            self._wrapped = True
            return
        if self._own is None:
            self.layer.__dict__.pop("forward", None)
        else:
            self.layer.__dict__["forward"] = self._own


class Relays:
    """The relays of one attachment. Once they stand in for hooks they do so for all calls, of any thread.

    Attributes:
        handed: what was handed to layers last, by number.
        never: whether hooks stay where they are.
    """

    def __init__(self) -> None:
        self.handed: dict[int, Handed] = {}
        self._of: dict[int, Relay] = {}
        self._standing: dict[int, Relay] = {}
        self._listening: list[dict[int, Any]] = []
        self._steps: tuple[Callable[[], Any], list[Holders]] = (lambda: None, [])
        self._inside: set[int] = set()
        self._lock = threading.Lock()
        self.never = False

    def add(self, number: int, relay: Relay) -> None:
        """A hooked layer."""
        self._of[number] = relay

    def enter(self, call: Call) -> None:
        """A call of the decoder begins."""
        with self._lock:
            if call.nested:
                return
            self._inside.add(threading.get_ident())
            # Prompts look whether somebody has come to listen to a layer, who expects its hook, and whether the steps
            # behind them may be compiled: their graphs would be compiled anew when forwards change.
            prompt = call.size[1] > 1 and self._standing
            if prompt and (any(self._listening) or getattr(call.cache, "is_compileable", False)):
                self._end()

    def leave(self, call: Call) -> None:
        """A call of the decoder ends."""
        if not call.nested:
            self._inside.discard(threading.get_ident())

    def groups(self, cache: Any) -> list[Holders]:
        """The layers to which the last step with a cache handed something; none if they or it have changed since."""
        of, groups = self._steps
        fits = of() is cache and all(group.kept is kv.kept_of(cache.layers[group.layer]) for group in groups)
        return groups if fits else []

    def stand(self, numbers: Iterable[int]) -> list[int]:
        """Those of some layers that a relay stands in for, from now on if it did not yet."""
        numbers = list(numbers)
        if not self.never and not all(i in self._standing for i in numbers):
            with self._lock:
                # Hooks are taken off while no other thread goes through them.
                if self._inside == {threading.get_ident()}:
                    for i in numbers:
                        if i not in self._standing and self._of[i].begin():
                            self._standing[i] = self._of[i]
                            self._listening += self._of[i].listening
        return [i for i in numbers if i in self._standing]

    def forward(self, number: int, layer: nn.Module) -> Callable[..., Any]:
        """A layer's forward, without what a hook would do before."""
        relay = self._of.get(number)
        return relay.forward if relay is not None and relay.stands_in else layer.forward

    def hand(self, handed: Mapping[int, Handed], cache: Any = None, groups: Sequence[Holders] = ()) -> None:
        """Hand things to layers, by number.

        Args:
            handed: what they receive.
            cache: with which further steps go on, if it is a step.
            groups: the layers by what they hold in it.
        """
        self.handed.update(handed)
        self._steps = (lambda: None, []) if cache is None else (weakref.ref(cache), list(groups))

    def forget(self, whole: Call) -> None:
        """Let go of what was handed on in calls that are a part of another, if an exception has ended them unseen."""
        for handed in list(self.handed.values()):
            call = handed.call
            while call is not None and call is not whole:
                call = call.outer
            if call is not None:
                handed.clear()

    def clear(self) -> None:
        """All hooks work, also after an interrupt in the midst of `stand`."""
        with self._lock:
            self._standing = {i: relay for i, relay in self._of.items() if relay.stands_in}
            self._inside &= {threading.get_ident()}
            self._end()

    def _end(self) -> None:
        """Let all hooks work, if no other thread is inside; a relay is forgotten once it has ended."""
        if not self._inside <= {threading.get_ident()}:
            return
        while self._standing:
            i = next(reversed(self._standing))
            self._standing[i].end()
            del self._standing[i]
        self._listening.clear()
        self.handed.clear()
        self._steps = (lambda: None, [])
