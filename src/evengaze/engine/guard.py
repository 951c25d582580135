"""Who else uses the model: other threads, copies, replicas, modules that have been replaced."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from torch import nn

from evengaze.engine.intercept import intercept
from evengaze.errors import AttachError

_CALLS = ("_call_impl", "generate")
"""Functions in which a module runs; their frames have it as `self`."""

_WAIT = 0.005
"""Seconds between two looks at what other threads do."""

_REPLICATE = "_replicate_for_data_parallel"
"""What torch's DataParallel calls of every module that it makes replicas of."""


_looking = threading.Lock()

_LOOK = 0.1
"""Seconds for which no thread takes its turn from the one that looks, far more than a look takes."""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold the interpreter lock: frames of a thread that runs meanwhile, of generators above all, may be freed ones.

    Who waits for the lock asks for it a switch interval after it was last handed over, which `sleep` sees to.
    """
    with _looking:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_LOOK)
        try:
            time.sleep(0)
            yield
        finally:
            sys.setswitchinterval(interval)


def running(modules: Sequence[nn.Module]) -> Iterator[int]:
    """The threads, this one first, that are in a call of one of the modules."""
    here = threading.get_ident()
    with _undisturbed():
        frames = sys._current_frames()
        found = [thread for thread, frame in frames.items() if _in_call(frame, modules)]
        frames.clear()
    return iter(sorted(found, key=lambda thread: thread != here))


def _in_call(frame: FrameType | None, modules: Sequence[nn.Module]) -> bool:
    """Whether a call of one of the modules is on a thread's stack, of which `frame` is the innermost."""
    while frame is not None:
        if frame.f_code.co_name in _CALLS:
            owner = frame.f_locals.get("self")
            if any(owner is module for module in modules):
                return True
        frame = frame.f_back
    return False


def refuse_running(modules: Sequence[nn.Module]) -> None:
    """Raise an AttachError if a thread is in a call of one of the modules, which would be pruned from the middle on."""
    thread = next(running(modules), None)
    if thread is not None:
        name = next((t.name for t in threading.enumerate() if t.ident == thread), thread)
        raise AttachError(
            f"a call of {type(modules[0]).__name__} is running in thread {name}: a pruner cannot be attached in the "
            "middle of it. Attach before the first call, or when it has ended."
        )


def wait_until_idle(modules: Sequence[nn.Module]) -> None:
    """Return when no other thread is in a call of one of the modules.

    Raises:
        AttachError: this thread is in one.
    """
    while (thread := next(running(modules), None)) is not None:
        if thread == threading.get_ident():
            raise AttachError(
                f"a call of {type(modules[0]).__name__} is running in this very thread: its pruner cannot be taken off "
                "from inside of it (a hook, a streamer, a logits processor). Do so when the call has ended."
            )
        time.sleep(_WAIT)


def refuse_copy(module: nn.Module) -> NoReturn:
    """The error for a copy that shares the hooks of the module that a pruner is attached to, but is another."""
    raise AttachError(
        f"this {type(module).__name__} is a shallow copy or a replica of the model that a pruner is attached to, and "
        "shares its hooks. Call the model itself, make copies (copy.deepcopy) of it, or detach it first."
    )


def refuse_replicas(module: nn.Module) -> Callable[[], None]:
    """See to it that torch's DataParallel is an error that says so; returns what undoes it."""

    def refuse(arguments: dict[str, Any]) -> NoReturn:
        raise AttachError(
            f"DataParallel runs replicas of {type(module).__name__} that share its methods and hooks, but not its "
            "weights: they cannot be pruned. Use one process for each device (DistributedDataParallel, accelerate), or "
            "device_map for a model that needs several."
        )

    return intercept(module, _REPLICATE, refuse)
