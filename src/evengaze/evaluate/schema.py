"""JSON into dataclasses: every field is checked against its annotation; an error says which one, and what it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from evengaze.errors import DataError
from evengaze.parameters import described

T = TypeVar("T")


def build(kind: type[T], value: Any, where: str = "") -> T:
    """Make a dataclass of a JSON object. Keys that it has no field for are left out.

    Args:
        kind: the dataclass; fields may be numbers, strings, booleans, None, lists, dicts and dataclasses of these.
        value: what JSON says.
        where: name of the object, for the message.

    Raises:
        DataError: the first field that is missing or of another type, or a number that is none (NaN, infinite).
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where or 'it'} must be an object, not {value!r:.60}")
    hints: dict[str, Any] = _hints(kind)  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        place = f"{where}.{field.name}" if where else field.name
        if field.name in value:
            made[field.name] = _value(hints[field.name], value[field.name], place)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise DataError(f"{place} is missing")
    return kind(**made)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(annotation: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _value(next(kind for kind in arguments if kind is not NoneType), value, where)
    if is_dataclass(annotation):
        return build(annotation, value, where)  # type: ignore[arg-type]
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_value(arguments[0], one, f"{where}[{i}]") for i, one in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], one, f"{where}[{key!r}]") for key, one in value.items()}
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise DataError(f"{where} is {value}, which is no number")
        return float(value)
    kind = origin or annotation
    number = not isinstance(value, bool) or kind is bool  # True is a whole number to Python
    if kind is Any or (isinstance(kind, type) and isinstance(value, kind) and number):
        return value
    raise DataError(f"{where} must be {described(annotation)}, not {value!r:.60}")
