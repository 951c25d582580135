"""What differs between releases of transformers, all of it, found by what a thing is where that is possible.

Decoder layers are called with a cache, masks and things that have one entry a token. The names of these arguments
change: the cache was `past_key_values` before 5.24. A cache is an instance of `Cache`, a mask says so or is a flex
`BlockMask`, and what else is to be cut has the sequence's length along its sequence axis.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import cache_utils
from transformers.cache_utils import Cache, QuantizedLayer

OLDEST, NEWEST = "5.21", "5.24"
"""The oldest and the newest release of transformers that `make compat` was run with."""

QUANTIZED_LAYER: type = getattr(cache_utils, "BaseQuantizedLayer", QuantizedLayer)  # the base came with the FP8 cache


def untested(release: str = transformers.__version__) -> str | None:
    """What to know about a release of transformers that lies outside the tested ones; None about the others."""
    number = Version(release).release[:2]
    if Version(OLDEST).release <= number <= Version(NEWEST).release:
        return None
    newer = number > Version(NEWEST).release
    return (
        f"transformers {release} is {'newer' if newer else 'older'} than the releases that evengaze was tested with "
        f"({OLDEST} to {NEWEST}). A self-check on a tiny decoder passed; your model's family was not checked. "
        + ("Look for a newer evengaze: pip install -U evengaze." if newer else "Upgrade: pip install -U transformers.")
    )


def cache_in(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """The key-value cache among a call's arguments, None without one."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def without_cache(args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with None in the place of the cache."""

    def bare(value: Any) -> Any:
        return None if isinstance(value, Cache) else value

    return tuple(map(bare, args)), {name: bare(value) for name, value in kwargs.items()}


def cache_of(output: Mapping[str, Any]) -> Any:
    """The key-value cache of a model's or of `generate`'s output; None without one."""
    return cache_in((), output)


def cache_in_output(output: Any) -> Any:
    """The same of a decoder's output, which may be a plain tuple."""
    return cache_in(output, {}) if isinstance(output, tuple) else cache_of(output)


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as a keyword argument of a model's forward or `generate`."""
    parameters = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in parameters else "past_key_values": cache}


def checkpoints_hooks(layer: nn.Module) -> bool:
    """Whether the backward pass will run a layer again together with its hooks, when the call that they belong to is
    over: gradient checkpointing before transformers 5.23, which wrapped `__call__`; since then it wraps `forward`."""
    checkpointing = layer.training and bool(getattr(layer, "gradient_checkpointing", False))
    return checkpointing and type(layer).__call__ is not nn.Module.__call__


def by_name(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A decoder layer's arguments with all but the states by name (Gemma 3n and 4 pass tables by position)."""
    if len(args) < 2:
        return args, kwargs
    names = list(inspect.signature(layer.forward).parameters)
    return args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}


def is_mask(name: str, value: Any) -> bool:
    """Whether an argument of a decoder layer says which keys its queries may see.

    Rotary tables may have four axes as well, and a missing mask is known by its name alone.
    """
    four = isinstance(value, Tensor) and value.dim() == 4 and not name.startswith(("position", "freqs", "per_layer"))
    return isinstance(value, BlockMask) or "mask" in name or four
