"""Whether a method's parameters are of the types that its fields are annotated with, for any dataclass.

What is close enough is turned into what the annotation says: numpy's numbers into Python's, lists and arrays (as JSON,
the command line and numpy give them) into tuples. Everything else is an error that names the parameter, what it should
have been (the annotation in words, or what the field's metadata says under "expected") and what it was.
"""

from __future__ import annotations

import inspect
import numbers
import sys
import types
from collections.abc import Sequence
from dataclasses import Field, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from evengaze.errors import ConfigError


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


class _Mismatch(Exception):
    """A value is not of its annotation's type."""


def coerce(method: _Dataclass, name: str | None = None) -> None:
    """Bring the fields of a frozen dataclass to their annotated types, in place.

    A field whose annotation cannot be evaluated at run time (a name that is imported for type checkers only) is taken
    as it is.

    Args:
        method: the dataclass.
        name: what it is called in the message; its own `name`, or its class's, by default.

    Raises:
        ConfigError: a value is of another type.
    """
    for field, annotation in _annotations(type(method)).items():
        value = getattr(method, field)
        try:
            object.__setattr__(method, field, _as(annotation, value))
        except _Mismatch:
            name = name or getattr(method, "name", type(method).__name__)
            metadata = method.__dataclass_fields__[field].metadata
            expected = metadata.get("expected") or described(annotation)
            raise ConfigError(f"{name}: {field} must be {expected}, not {value!r:.200}") from None


@lru_cache(maxsize=256)
def _annotations(owner: type[_Dataclass]) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return {f.name: _annotation(owner, f) for f in fields(owner)}


def _annotation(owner: type, f: Field[Any]) -> Any:
    """The type of a field, looked up where its class was written; Any if that is not possible."""
    if not isinstance(f.type, str):
        return f.type
    home = next(c for c in owner.__mro__ if f.name in inspect.get_annotations(c))
    names = {**vars(sys.modules[home.__module__]), home.__name__: home}
    holder = types.SimpleNamespace(__annotations__={f.name: f.type})
    try:
        return get_type_hints(holder, globalns=names)[f.name]
    except (NameError, TypeError, SyntaxError, AttributeError):
        return Any


def _as(annotation: Any, value: Any) -> Any:
    """The value as its annotation wants it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _as_one_of(arguments, value)
    if origin is Literal:
        return _check(value, any(value is a or (type(value) is type(a) and value == a) for a in arguments))
    if annotation is tuple or origin is tuple:
        return _as_tuple(arguments, value)
    if annotation is None or annotation is types.NoneType:
        return _check(value, value is None)
    if annotation in (int, float):
        return _as_number(annotation, value)
    kind = origin or annotation
    if not isinstance(kind, type):  # Any, a type variable
        return tuple(value) if isinstance(value, list) else value
    try:
        fits = isinstance(value, kind)
    except TypeError:  # a protocol that says nothing at run time
        return value
    if isinstance(value, list) and kind is not list:
        value = tuple(value)  # hashable, as a parameter should be
    return _check(value, fits)


def _as_one_of(kinds: Sequence[Any], value: Any) -> Any:
    # True is a whole number to Python: the exact type goes first.
    for kind in sorted(kinds, key=lambda k: k is not type(value)):
        try:
            return _as(kind, value)
        except _Mismatch:
            continue
    raise _Mismatch


def _as_number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):  # numpy's as well
        raise _Mismatch
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(_check(value, kind is float and isinstance(value, numbers.Real)))


def _as_tuple(kinds: Sequence[Any], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple, range)):
        many = getattr(value, "ndim", 0) == 1 and callable(getattr(value, "tolist", None))
        value = _check(value, many).tolist()
    if not kinds:
        return tuple(value)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = [kinds[0]] * len(value)
    _check(value, len(kinds) == len(value))
    return tuple(_as(kind, v) for kind, v in zip(kinds, value, strict=True))


def _check(value: Any, fits: bool) -> Any:
    if not fits:
        raise _Mismatch
    return value


def described(annotation: Any, *, many: bool = False) -> str:
    """An annotation in words: "a number or a sequence of numbers"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _listed([word for a in arguments for word in _choices(a)])
    if origin is Literal:
        return _listed(_choices(annotation))
    if annotation is tuple or origin is tuple:
        inner = f" of {described(arguments[0], many=True)}" if arguments else ""
        fixed = bool(arguments) and arguments[-1] is not Ellipsis
        return (f"{len(arguments)} values, " if fixed else "") + ("sequences" if many else "a sequence") + inner
    words = {int: "whole number", float: "number", str: "string"}
    if annotation in words:
        return words[annotation] + "s" if many else f"a {words[annotation]}"
    if annotation is bool:
        return "True or False"
    if annotation is None or annotation is types.NoneType:
        return "None"
    kind = origin or annotation
    return str(getattr(kind, "__name__", kind))


def _choices(annotation: Any) -> list[str]:
    return list(map(repr, get_args(annotation))) if get_origin(annotation) is Literal else [described(annotation)]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
