"""Pruning methods, by name; and what a method is made of, for people who write one.

Names are the same in Python, on the command line and in result files: `parse("fastv:keep=128,layer=2")` makes the
object that `FastV(keep=128, layer=2)` makes, and `spec(pruner)` writes the string again. Modules load on first use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any

from evengaze.errors import ConfigError
from evengaze.methods.base import Pruner
from evengaze.methods.stages import Grouping, ManyStages, OneStage
from evengaze.protocol import (
    Merge,
    Mode,
    Positions,
    Scope,
    Selection,
    Source,
    Stage,
    View,
    resolve_keep,
    top,
    top_allowed,
)

_METHODS: dict[str, str | type[Pruner]] = {
    "fastv": "evengaze.methods.fastv:FastV",
    "pyramiddrop": "evengaze.methods.pyramiddrop:PyramidDrop",
    "sparsevlm": "evengaze.methods.sparsevlm:SparseVLM",
    "himap": "evengaze.methods.himap:HiMAP",
    "tokencarve": "evengaze.methods.tokencarve:TokenCarve",
    "illava": "evengaze.methods.illava:ILLaVA",
    "visionzip": "evengaze.methods.visionzip:VisionZip",
    "divprune": "evengaze.methods.divprune:DivPrune",
    "tome": "evengaze.methods.tome:ToMe",
    "dense": "evengaze.methods.baselines:Dense",
    "random": "evengaze.methods.baselines:Random",
    "uniform": "evengaze.methods.baselines:Uniform",
    "pool": "evengaze.methods.baselines:Pool",
    "fastv-masked": "evengaze.methods.official:FastVMasked",
    "fastv-recompute": "evengaze.methods.official:FastVRecompute",
    "himap-recompute": "evengaze.methods.official:HiMAPRecompute",
}

__all__ = [
    "Grouping",
    "ManyStages",
    "Merge",
    "Mode",
    "OneStage",
    "Positions",
    "Pruner",
    "Scope",
    "Selection",
    "Source",
    "Stage",
    "View",
    "from_dict",
    "get",
    "names",
    "parse",
    "register",
    "resolve_keep",
    "spec",
    "top",
    "top_allowed",
]


def names() -> tuple[str, ...]:
    """Names of all methods, in the order in which the documentation lists them."""
    return tuple(_METHODS)


def get(name: str) -> type[Pruner]:
    """The class of a method.

    Raises:
        ConfigError: no method has that name.
    """
    key = name.strip().lower()
    if key not in _METHODS:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(_METHODS)}. Add your own with methods.register")
    entry = _METHODS[key]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        entry = _METHODS[key] = getattr(import_module(module), attribute)
    return entry


def register(method: type[Pruner]) -> type[Pruner]:
    """Make a method known under its `name`; usable as a class decorator.

    Raises:
        ConfigError: another class has the name already.
    """
    key = method.name.lower()  # as `get` looks names up
    if key in _METHODS and get(key) is not method:
        raise ConfigError(f"the method name {method.name!r} is taken by {get(key).__qualname__}")
    _METHODS[key] = method
    return method


def parse(text: str) -> Pruner:
    """Read `name` or `name:key=value,key=value`; values are JSON; `debias` takes what `Debias.parse` takes.

        parse("fastv:keep=0.25,layer=2,debias=llava-1.5-7b/fastv")
        parse("pyramiddrop:keep=[0.32,0.16,0.08],layers=[2,10,20]")

    Raises:
        ConfigError: unknown method or parameter, one that is given twice, or a value out of range.
    """
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    for part in filter(None, re.split(r",(?![^\[]*\])", rest)):  # commas outside brackets
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{part!r} in {text!r} is not of the form key=value")
        if (key := key.strip()) in values:
            raise ConfigError(f"{key} is given twice in {text!r}")
        values[key] = _value(value.strip())
    return _build(name, values)


def spec(pruner: Pruner) -> str:
    """The shortest string that `parse` reads back; debiasing is not part of it (see `Pruner.to_dict`)."""
    changed = [
        f"{f.name}={json.dumps(value, separators=(',', ':')) if not isinstance(value, str) else value}"
        for f in fields(pruner)
        if f.name != "debias" and (value := getattr(pruner, f.name)) != f.default
    ]
    return pruner.name + (":" + ",".join(changed) if changed else "")


def from_dict(values: Mapping[str, Any]) -> Pruner:
    """Read back `Pruner.to_dict()`.

    Raises:
        ConfigError: no "method" entry, an unknown method or parameter, or a value out of range.
    """
    rest = dict(values)
    name = rest.pop("method", None)
    if not isinstance(name, str):
        raise ConfigError(f"a method's dictionary needs a 'method' entry with one of {', '.join(_METHODS)}")
    if isinstance(rest.get("debias"), Mapping):
        from evengaze.debias import Debias

        rest["debias"] = Debias.from_dict(dict(rest["debias"]))
    return _build(name, rest)


def _build(name: str, values: Mapping[str, Any]) -> Pruner:
    method = get(name)
    known = {f.name: f for f in fields(method)}
    unknown = [k for k in values if k not in known]
    if unknown:
        raise ConfigError(f"{method.name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")
    missing = [k for k, f in known.items() if f.default is MISSING and f.default_factory is MISSING and k not in values]
    if missing:
        raise ConfigError(f"{method.name} needs {', '.join(missing)}")
    return method(**values)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
