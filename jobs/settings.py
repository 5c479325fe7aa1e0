"""Dataclasses of settings to and from the plain values of JSON, each value held to its type."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from r2scp.store.errors import UsageError

Built = TypeVar("Built")


def built(wanted: type[Built], values: object, name: str) -> Built:
    """A dataclass from what `asdict` made of one. `name` stands for it in messages.

    Raises `UsageError`, naming the key, for one that is unknown or missing and for a value of another type
    or out of range. Strings are not read as numbers, nor truth values.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{name} must be an object; got {values!r}")
    known = {field.name: field for field in fields(wanted)}  # pyright: ignore[reportArgumentType]
    if strange := sorted(str(key) for key in values.keys() - known.keys()):
        raise UsageError(f"{name} has no {', '.join(strange)}; there is: {', '.join(sorted(known))}")
    needed = {key for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if absent := sorted(needed - values.keys()):
        raise UsageError(f"{name} must say {', '.join(absent)}")
    hints = get_type_hints(wanted)
    parts = {key: checked(hints[key], value, f"{name}.{key}") for key, value in values.items()}
    try:
        return wanted(**parts)
    except (TypeError, ValueError, UsageError) as error:
        raise UsageError(f"{name}: {error}") from error


def hold_to_types(settings: object) -> None:
    """Raises `UsageError` for a field of a dataclass that is not of its type."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):  # pyright: ignore[reportArgumentType]
        checked(hints[field.name], getattr(settings, field.name), field.name)


def checked(hint: Any, value: object, name: str) -> Any:
    """`value` as `hint` has it. Raises `UsageError`."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in options:
            return None
        return checked(next(option for option in options if option is not types.NoneType), value, name)
    if origin is Literal:
        return _one_of({option: option for option in options}, value, name)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise UsageError(f"{name} must be a list; got {value!r}")
        return origin(checked(options[0], part, f"{name}[{at}]") for at, part in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{name} must be an object; got {value!r}")
        return {str(key): checked(options[1], part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(hint, type) and is_dataclass(hint):
        return value if isinstance(value, hint) else built(hint, value, name)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of({option.value: option for option in hint}, value, name)
    return _scalar(hint, value, name)


def _one_of(allowed: Mapping[object, object], value: object, name: str) -> object:
    if isinstance(value, str) and value in allowed:
        return allowed[value]
    raise UsageError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _scalar(hint: Any, value: object, name: str) -> object:
    kinds = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}
    if hint not in kinds:
        return value
    wanted = (int, float) if hint is float else (hint,)
    # by `type`: True is no number
    if type(value) not in wanted or (hint is float and not math.isfinite(value)):  # pyright: ignore
        raise UsageError(f"{name} must be {kinds[hint]}; got {value!r}")
    return value
