"""Notice calls of a method, without changing what it does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def intercept(
    owner: Any,
    name: str,
    before: Callable[[dict[str, Any]], None] | None = None,
    after: Callable[[], None] | None = None,
    returned: Callable[[dict[str, Any], Any], None] | None = None,
) -> Callable[[], None]:
    """Call `before` with a bound method's arguments by name, then the method, then `after`; returns what undoes it.

    transformers encodes images in methods that are no module calls, which hooks cannot see.

    Args:
        owner: the object whose method it is.
        name: of the method.
        before: receives the arguments.
        after: called in any case.
        returned: receives the arguments and the result, unless the method raises.
    """
    method = getattr(owner, name)
    signature = inspect.signature(method)
    own = owner.__dict__.get(name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        if before is not None:
            before(arguments)
        try:
            result = method(*args, **kwargs)
            if returned is not None:
                returned(arguments, result)
            return result
        finally:
            if after is not None:
                after()

    def undo() -> None:
        if own is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = own

    owner.__dict__[name] = call
    return undo
