"""Notice calls of methods and modules, without changing what they do.

What is put onto a module here is not copied with it: a deep copy, a pickle or a saved file of an attached model is the
model without a pruner.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

Around = Callable[[dict[str, Any]], AbstractContextManager[Callable[[Any], None] | None]]
"""From a method's arguments by name to what surrounds its call: a context manager, whose value is called with the
method's result if it is not None."""


def inert(*args: Any, **kwargs: Any) -> None:
    """What is left of a hook in a copy of its module: nothing."""


def _inert() -> Callable[..., None]:
    return inert


class Hook(functools.partial):  # type: ignore[type-arg]
    """A module hook that a copy of the module does not have."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


class Watched:
    """A bound method that is watched; a copy of its owner has the method itself."""

    def __init__(self, owner: Any, name: str, method: Callable[..., Any], around: Around) -> None:
        self._owner, self._name, self._method, self._around = owner, name, method, around
        self._signature = inspect.signature(method)
        self._own = name in owner.__dict__
        functools.update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result."""
        bound = self._signature.bind_partial(*args, **kwargs)
        bound.apply_defaults()
        with self._around(dict(bound.arguments)) as returned:
            result = self._method(*args, **kwargs)
            if returned is not None:
                returned(result)
            return result

    def __reduce__(self) -> tuple[Any, ...]:
        if self._own:  # somebody else's, as it was
            return functools.partial, (self._method,)
        return getattr, (self._owner, self._name)


class Mark:
    """Whose a module is; a copy of the module is nobody's."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Registered:
    """A hook on a module. Called, it is taken off.

    Attributes:
        hooks: all hooks of its kind on the module, by number.
        number: its own.
    """

    def __init__(self, hooks: OrderedDict[int, Any], number: int, remove: Callable[[], None]) -> None:
        self.hooks, self.number, self._remove = hooks, number, remove

    def __call__(self) -> None:
        """Take it off."""
        self._remove()


def before_forward(module: nn.Module, hook: Callable[..., Any]) -> Registered:
    """Call `hook(module, args, kwargs)` before a module's forward; returns what undoes it."""
    return _register(module, "_forward_pre_hooks", ["_forward_pre_hooks_with_kwargs"], hook)


def behind_forward(module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> Registered:
    """Call `hook(module, args, kwargs, output)` behind a module's forward, `always` also behind one that failed."""
    flags = ["_forward_hooks_with_kwargs", *(["_forward_hooks_always_called"] if always else [])]
    return _register(module, "_forward_hooks", flags, hook)


_free: WeakKeyDictionary[nn.Module, dict[str, list[int]]] = WeakKeyDictionary()
"""Numbers of hooks that were taken off, by module and kind."""


def _register(module: nn.Module, kind: str, flags: list[str], hook: Callable[..., Any]) -> Registered:
    """What torch's `register_forward_hook` does, but hooks that come and go have the same numbers again.

    Compiled graphs look a hook's number up: with another one they would be compiled anew for each attachment.
    """
    free = _free.setdefault(module, {}).setdefault(":".join([kind, *flags]), [])
    hooks, extra = getattr(module, kind), [getattr(module, flag) for flag in flags]
    handle = RemovableHandle(hooks, extra_dict=extra)
    if free:
        handle.id = free.pop(0)
    number = handle.id
    for table, value in [(hooks, Hook(hook)), *((flag, True) for flag in extra)]:
        table[number] = value

    def remove() -> None:
        handle.remove()
        if number not in free:
            free.append(number)
            free.sort()

    return Registered(hooks, number, remove)


def intercept(owner: Any, name: str, around: Around) -> Callable[[], None]:
    """Surround calls of a bound method by a context manager made from its arguments; returns what undoes it.

    transformers encodes images in methods that are no module calls, which hooks cannot see.
    """
    return put(owner, name, Watched(owner, name, getattr(owner, name), around))


def put(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Put an attribute into an object's own dictionary; returns what undoes it."""
    there, own = name in owner.__dict__, owner.__dict__.get(name)
    owner.__dict__[name] = value

    def undo() -> None:
        if owner.__dict__.get(name) is not value:  # somebody has put something else there since
            return
        if there:
            owner.__dict__[name] = own
        else:
            owner.__dict__.pop(name, None)

    return undo
