"""Methods by name: how a class gets its name, and how text becomes a method.

A class is registered where it is defined, `@register` above `@dataclass`: ours as anybody's. The package only knows the
names of its modules and imports one when a method is asked for. A method from outside is found

* when its module is imported, as `register` runs then (`evengaze --plugin my_module ...`),
* as `my_module:MyMethod:keep=64`,
* through the entry-point group `evengaze.methods` of an installed package (the entry's name is the method's).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from evengaze.errors import ConfigError
from evengaze.methods.base import Pruner
from evengaze.spelling import did_you_mean

ENTRY_POINTS = "evengaze.methods"

MODULES = (
    "fastv",
    "pyramiddrop",
    "sparsevlm",
    "himap",
    "tokencarve",
    "illava",
    "visionzip",
    "divprune",
    "tome",
    "baselines",
    "official",
)
"""Modules of `evengaze.methods` that register methods, in the order in which the documentation lists them."""

_METHODS: dict[str, type[Pruner]] = {}
_PACKAGE = "evengaze.methods"
_IN_MODULE = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)(?::(?P<rest>.*))?", re.DOTALL)
_COMMA = re.compile(r",(?![^\[]*\])")
"""Commas that are not in brackets."""
_PERCENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*%")

M = TypeVar("M", bound=type[Pruner])


def names() -> tuple[str, ...]:
    """Names of all methods: the package's in the documentation's order, then registered ones and entry points."""
    _load_own()

    def place(item: tuple[str, type[Pruner]]) -> int:
        package, _, rest = item[1].__module__.partition(f"{_PACKAGE}.")
        module = rest.partition(".")[0]
        return MODULES.index(module) if not package and module in MODULES else len(MODULES)

    known = [name for name, _ in sorted(_METHODS.items(), key=place)]
    return (*known, *(name for name in _entry_points() if name not in known))


def get(name: str) -> type[Pruner]:
    """The class of a method.

    Raises:
        ConfigError: no method has that name, or the package that brings it cannot be imported.
    """
    key = name.strip().lower()
    if key not in _METHODS and key in MODULES:
        import_module(f"{_PACKAGE}.{key}")
    if key not in _METHODS:
        _load_own()
    if key not in _METHODS and key in (outside := _entry_points()):
        _load_entry_point(key, outside[key])
    if key not in _METHODS:
        known = names()
        raise ConfigError(
            f"unknown method {name!r}.{did_you_mean(key, known)} Known: {', '.join(known)}. One of your own is known "
            "once methods.register has seen its class: import its module (`evengaze --plugin MODULE`), or write "
            "my_module:MyMethod"
        )
    return _METHODS[key]


def find(text: str) -> type[Pruner]:
    """The class that is meant by a name or by `module:Class`, which is imported; parameters behind it do not count.

    Raises:
        ConfigError: as `get`, or the module cannot be imported or has no such class.
    """
    return get(_split_name(text)[0])


def register(method: M) -> M:
    """Make a method known under its `name`; used as a class decorator above `@dataclass`.

    A class that was defined anew in the same place, as notebooks do, replaces the old one.

    Raises:
        ConfigError: another class has the name already, or it is no method.
    """
    if not (isinstance(method, type) and issubclass(method, Pruner)):
        raise ConfigError(f"{method!r} is no method: register a subclass of evengaze.Pruner")
    if not isinstance(getattr(method, "name", None), str):
        raise ConfigError(f'{method.__qualname__} has no name: say `name = "my-method"` in its class')
    key = method.name.lower()  # as `get` looks names up
    if not method.__module__.startswith(f"{_PACKAGE}."):
        _load_own()
    old = _METHODS.get(key, method)
    if old is not method and (old.__module__, old.__qualname__) != (method.__module__, method.__qualname__):
        raise ConfigError(f"the method name {method.name!r} is taken by {old.__module__}.{old.__qualname__}")
    _METHODS[key] = method
    return method


def load(source: str) -> ModuleType:
    """Import a module from outside, so that the methods (and adapters) that it registers are known.

    Args:
        source: a module's name, or a path that ends in .py.

    Raises:
        ConfigError: there is no such module or file, or running it fails.
    """
    path = Path(source)
    try:
        if path.suffix != ".py":
            return import_module(source)
        if not path.is_file():
            raise ConfigError(f"{source}: there is no such file")
        name = f"evengaze_plugin_{path.stem}"
        found = spec_from_file_location(name, path)
        assert found is not None and found.loader is not None
        module = sys.modules[name] = module_from_spec(found)  # where pickle and dataclasses look for it
        found.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{source} cannot be imported ({type(error).__name__}: {error}). Give the name of a module that Python "
            "finds from here, or a file that ends in .py"
        ) from error
    return module


def parse(text: str) -> Pruner:
    """Read `name` or `name:key=value,key=value`; values are JSON or shares such as 12.5%.

    `debias` takes what `Debias.parse` takes. In place of a name, `module:Class` imports the class.

        parse("fastv:keep=0.25,layer=2,debias=llava-1.5-7b/fastv")
        parse("pyramiddrop:keep=[0.32,0.16,0.08],layers=[2,10,20]")
        parse("my_module:MyMethod:keep=12.5%")

    Raises:
        ConfigError: unknown method or parameter, one that is given twice, or a value out of range.
    """
    name, rest = _split_name(text)
    values: dict[str, Any] = {}
    for part in filter(None, _COMMA.split(rest)):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{part!r} in {text!r} is not of the form key=value")
        if (key := key.strip()) in values:
            raise ConfigError(f"{key} is given twice in {text!r}")
        values[key] = _value(value.strip())
    return _build(name, values)


def split(texts: Sequence[str]) -> tuple[str, ...]:
    """Split `none,fastv:keep=128,layer=2,random:keep=128` into methods.

    Methods are separated by commas or semicolons. A part `key=value` belongs to the method before it: a method's name
    has no "=", so this is never ambiguous. Commas in brackets do not separate.

        split(["fastv:keep=128,layer=2,none"])  ->  ("fastv:keep=128,layer=2", "none")

    Raises:
        ConfigError: a parameter stands before any method.
    """
    found: list[str] = []
    for text in texts:
        own = len(found)
        for block in text.split(";"):
            begin = True
            for part in filter(None, (p.strip() for p in _COMMA.split(block))):
                if "=" in part.partition(":")[0]:
                    if begin or len(found) == own:
                        raise ConfigError(f"methods {text!r}: {part!r} is a parameter without a method before it")
                    joint = "," if "=" in found[-1] else "" if found[-1].endswith(":") else ":"
                    found[-1] += joint + part
                else:
                    found.append(part)
                begin = False
    return tuple(found)


def spec(pruner: Pruner) -> str:
    """The shortest string that `parse` reads back; debiasing is not part of it (see `Pruner.to_dict`)."""
    changed = [
        f"{f.name}={json.dumps(value, separators=(',', ':')) if not isinstance(value, str) else value}"
        for f in fields(pruner)
        if f.name != "debias" and (value := getattr(pruner, f.name)) != f.default
    ]
    return pruner.name + (":" + ",".join(changed) if changed else "")


def from_dict(values: Mapping[str, Any]) -> Pruner:
    """Read back `Pruner.to_dict()`. Imports nothing that a file may name: a method from outside must be known.

    Raises:
        ConfigError: no "method" entry, an unknown method or parameter, or a value out of range.
    """
    rest = dict(values)
    name = rest.pop("method", None)
    if not isinstance(name, str):
        raise ConfigError(f"a method's dictionary needs a 'method' entry with one of {', '.join(names())}")
    if isinstance(rest.get("debias"), Mapping):
        from evengaze.debias import Debias

        rest["debias"] = Debias.from_dict(dict(rest["debias"]))
    return _build(name, rest)


def _build(name: str, values: Mapping[str, Any]) -> Pruner:
    method = get(name)
    known = {f.name: f for f in fields(method)}
    unknown = [k for k in values if k not in known]
    if unknown:
        raise ConfigError(
            f"{method.name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}."
            f"{did_you_mean(unknown[0], known)}"
        )
    missing = [k for k, f in known.items() if f.default is MISSING and f.default_factory is MISSING and k not in values]
    if missing:
        raise ConfigError(f"{method.name} needs {', '.join(missing)}")
    return method(**values)


def _split_name(text: str) -> tuple[str, str]:
    """The name of a method and the rest of its string; a class that is named by its module is imported for it."""
    name, _, rest = text.partition(":")
    found = _IN_MODULE.fullmatch(text.strip())
    if found is None or (name.strip().lower() in names() and not _is_method(found["module"], found["name"])):
        return name, rest
    module = load(found["module"])
    method = getattr(module, found["name"], None)
    if method is None:
        inside = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, Pruner)]
        raise ConfigError(
            f"{found['module']} has no class {found['name']}.{did_you_mean(found['name'], inside)} Methods in it: "
            f"{', '.join(inside) or 'none'}"
        )
    return register(method).name, found["rest"] or ""


def _is_method(module: str, name: str) -> bool:
    """Whether a module that has been imported before has a method's class of that name: it may be called as it is."""
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and issubclass(found, Pruner)


def _load_own() -> None:
    for module in MODULES:
        import_module(f"{_PACKAGE}.{module}")


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name.lower(): entry for entry in entry_points(group=ENTRY_POINTS)}


def _load_entry_point(key: str, entry: EntryPoint) -> None:
    try:
        method = entry.load()
    except Exception as error:  # somebody else's package
        raise ConfigError(f"the method {key!r} comes from {entry.value}, which fails: {error}") from error
    if register(method).name.lower() != key:
        raise ConfigError(f"the entry point {key!r} is for {entry.value}, whose name is {method.name!r}: use one name")


def _value(text: str) -> Any:
    """A JSON value, in which a share may be written in per cent; other text as it is."""
    try:
        return json.loads(_PERCENT.sub(lambda found: repr(float(found[1]) / 100), text))
    except json.JSONDecodeError:
        return text
