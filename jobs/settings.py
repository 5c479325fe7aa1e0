"""Dataclasses of settings to and from the plain values of JSON, with every value checked against its type."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from r2scp.store.errors import UsageError

Settings = TypeVar("Settings")

_SCALARS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}


def from_plain(kind: type[Settings], values: object, name: str) -> Settings:
    """A dataclass from what `asdict` made of one. `name` stands for it in messages.

    Raises `UsageError`, naming the key, for an unknown or missing key and for a value of the wrong type or
    out of range. Strings and truth values are not read as numbers.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{name} must be an object; got {values!r}")
    known = {field.name: field for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(str(key) for key in values.keys() - known.keys()):
        raise UsageError(f"{name} has no {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    required = {key for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - values.keys()):
        raise UsageError(f"{name} must have {', '.join(missing)}")
    hints = get_type_hints(kind)
    parts = {key: check_value(hints[key], value, f"{name}.{key}") for key, value in values.items()}
    try:
        return kind(**parts)
    except (TypeError, ValueError, UsageError) as error:
        raise UsageError(f"{name}: {error}") from error


def check_types(settings: object) -> None:
    """Raises `UsageError` for a field of a dataclass that is not of its type."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):  # pyright: ignore[reportArgumentType]
        check_value(hints[field.name], getattr(settings, field.name), field.name)


def check_value(hint: Any, value: object, name: str) -> Any:
    """`value` converted to the type `hint`. Raises `UsageError`."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in options:
            return None
        return check_value(next(option for option in options if option is not types.NoneType), value, name)
    if origin is Literal:
        return _one_of({option: option for option in options}, value, name)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise UsageError(f"{name} must be a list; got {value!r}")
        return origin(check_value(options[0], part, f"{name}[{at}]") for at, part in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{name} must be an object; got {value!r}")
        return {str(key): check_value(options[1], part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(hint, type) and is_dataclass(hint):
        return value if isinstance(value, hint) else from_plain(hint, value, name)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of({option.value: option for option in hint}, value, name)
    return _scalar(hint, value, name)


def _one_of(allowed: Mapping[object, object], value: object, name: str) -> object:
    if isinstance(value, str) and value in allowed:
        return allowed[value]
    raise UsageError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _scalar(hint: Any, value: object, name: str) -> object:
    if hint not in _SCALARS:
        return value
    accepted = (int, float) if hint is float else (hint,)
    # compared by `type`, because isinstance(True, int)
    if type(value) not in accepted or (hint is float and not math.isfinite(value)):  # pyright: ignore
        raise UsageError(f"{name} must be {_SCALARS[hint]}; got {value!r}")
    return value
