"""torch.compile: what was compiled before a pruner was attached runs uncompiled where tokens are dropped.

A prefill loses tokens between its layers by what the method decides; that cannot be one graph. Decoding can. So what is
compiled (a model, its forward, its decoder, single layers, by `torch.compile` or `Module.compile`) is asked at each
call: prefills run uncompiled, steps as they did. What is compiled later, or around the model, is not seen here; there
the hooks are traced, and refuse (`Traced`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evengaze.engine.call import Call, Calls
from evengaze.engine.generation import brings_pictures
from evengaze.engine.intercept import Hook, put
from evengaze.engine.tap import is_tapped
from evengaze.errors import AttachError
from evengaze.models.base import Adapter

_CALL, _FORWARD, _INNER, _ORIGINAL = "_compiled_call_impl", "forward", "_orig_mod", "_torchdynamo_orig_callable"

Uncompiled = Callable[[tuple[Any, ...], dict[str, Any]], bool]
"""From a call's arguments to whether it must not run compiled."""


def inner(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` wraps; the module itself if it is no such wrapper."""
    while _INNER in getattr(module, "_modules", {}):
        module = module.get_submodule(_INNER)
    return module


class Dispatch:
    """A compiled function that steps aside for the calls that must not run compiled."""

    def __init__(self, owner: nn.Module, name: str, plain: Callable[..., Any], uncompiled: Uncompiled) -> None:
        self._owner, self._name, self._plain, self._uncompiled = owner, name, plain, uncompiled
        self._compiled = owner.__dict__[name]
        functools.update_wrapper(self, getattr(plain, "forward", plain), updated=())  # generate reads the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        if not torch.compiler.is_compiling() and self._uncompiled(args, kwargs):
            return self._plain(*args, **kwargs)
        return self._compiled(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)  # compiled functions cannot be copied; a copy is not compiled


def step_aside(
    model: nn.Module, decoder: nn.Module, pruning: Callable[[], bool], wrappers: tuple[nn.Module, ...] = ()
) -> Iterator[Callable[[], None]]:
    """Let everything compiled step aside for what a pruner does; yields what undoes it.

    Args:
        model: with all hooks and taps in place.
        decoder: the module with the layers.
        pruning: whether this thread is in a prefill.
        wrappers: compiled modules around the model.
    """
    found = []
    for module in (*wrappers, *model.modules()):
        for name, plain in _plain(module):
            if not _holds_hooks(module, itself=name == _CALL):
                continue
            if any(m is decoder for m in module.modules()):
                uncompiled: Uncompiled = _is_prompt
            elif any(m is module for m in decoder.modules()):

                def uncompiled(args: Any, kwargs: Any) -> bool:
                    return pruning()
            else:

                def uncompiled(args: Any, kwargs: Any) -> bool:
                    return True

            found.append(type(inner(module)).__name__)
            yield put(module, name, Dispatch(module, name, plain, uncompiled))
    if found:
        warnings.warn(
            f"{', '.join(dict.fromkeys(found))}: compiled, but prefills run uncompiled while a pruner is attached; "
            "decoding stays compiled.",
            stacklevel=5,
        )


def _plain(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Names under which a module holds compiled functions, and what these compile."""
    held: Any = module.__dict__
    if held.get(_CALL) is not None:
        yield _CALL, module._call_impl
    if _INNER in module._modules:
        if _FORWARD in held:
            yield _FORWARD, module.get_submodule(_INNER)
    elif hasattr(held.get(_FORWARD), _ORIGINAL):
        function = held[_FORWARD]
        while hasattr(function, _ORIGINAL):
            function = getattr(function, _ORIGINAL)
        yield _FORWARD, function


def _holds_hooks(module: nn.Module, *, itself: bool) -> bool:
    """Whether something of ours runs inside of what a module has compiled: its forward, or `itself` with its hooks."""
    for part in module.modules():
        if is_tapped(part):
            return True
        if part is module and not itself:
            continue
        hooks: list[Any] = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        if any(isinstance(hook, Hook) for hook in hooks):
            return True
    return False


def _is_prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has several tokens a row, or it cannot be seen how many."""
    for given in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args):
        if isinstance(given, Tensor) and given.dim() >= 2:
            return given.shape[1] > 1
    return True


class Traced:
    """What a hook does that is being compiled itself: nothing in a step; in a prompt with pictures, raise.

    Args:
        model: the model.
        adapter: its family's adapter; None if the caller says where visual tokens are.
        calls: the running calls.
        prunes: whether the method has any stage.
    """

    def __init__(self, model: nn.Module, adapter: Adapter | None, calls: Calls, *, prunes: bool) -> None:
        self._model, self._adapter, self._calls, self._prunes = model, adapter, calls, prunes

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise an AttachError, when the compiled code runs, if the call of a model or decoder brings pictures."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        states = tokens if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if self._prunes and isinstance(states, Tensor) and states.shape[1] > 1:
            _refuse_pictures(self, tokens, pictured=brings_pictures(kwargs))

    def brings(self, call: Call, ids: Tensor | None) -> bool:
        """Whether a call holds pictures, as far as that can be known before the decoder."""
        if not self._prunes:
            return False
        if call.pictured or call.encoded.calls or self._adapter is None:
            return True
        known = torch.tensor(self._adapter.visual_token_ids(self._model))
        return ids is not None and not ids.is_floating_point() and bool(torch.isin(ids, known.to(ids.device)).any())

    def refuse(self, ids: Tensor | None, *, pictured: bool) -> None:
        """Raise an AttachError if the running call brings pictures."""
        call = self._calls.alive()
        if pictured or self.brings(call, call.ids if ids is None else ids):
            raise AttachError(
                "torch.compile was asked to compile a prefill with visual tokens. A pruner drops tokens from it, which "
                "cannot be compiled. Attach the pruner after the model has been compiled: prefills then run "
                "uncompiled, decoding compiled. Or do not compile it: generate(cache_implementation='static') compiles "
                "decoding by itself, which works under a pruner. With a Trainer, set torch_compile=False."
            )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_pictures(traced: Traced, ids: Tensor | None, *, pictured: bool) -> None:
    """Not compiled: it looks at tokens and at the running call, and its error reaches the caller as it is."""
    traced.refuse(ids, pictured=pictured)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def refuse_sharing() -> None:
    """Raise an AttachError for compiled steps of layers that attend to the keys of an earlier, pruned one."""
    raise AttachError(
        "layers of this model attend to the keys of earlier layers, whose cache was pruned: such steps cannot be "
        "compiled yet. Generate with disable_compile=True."
    )


def refuse_tracing() -> None:
    """Raise an AttachError for `torch.jit.trace`."""
    raise AttachError(
        "torch.jit.trace would record which tokens this prompt keeps, and keep the same of every other. Trace the "
        "model without a pruner."
    )
