"""Notice calls of methods and modules, without changing what they do.

What is put onto a module here is not copied with it: a deep copy, a pickle or a saved file of an attached model is the
model without a pruner.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

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


class Method:
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


def before_forward(module: nn.Module, hook: Callable[..., Any]) -> Callable[[], None]:
    """Call `hook(module, args, kwargs)` before a module's forward; returns what undoes it."""
    return module.register_forward_pre_hook(Hook(hook), with_kwargs=True).remove


def behind_forward(module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> Callable[[], None]:
    """Call `hook(module, args, kwargs, output)` behind a module's forward, `always` also behind one that failed."""
    return module.register_forward_hook(Hook(hook), with_kwargs=True, always_call=always).remove


def intercept(owner: Any, name: str, around: Around) -> Callable[[], None]:
    """Surround calls of a bound method by a context manager made from its arguments; returns what undoes it.

    transformers encodes images in methods that are no module calls, which hooks cannot see.
    """
    return put(owner, name, Method(owner, name, getattr(owner, name), around))


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
