"""Frozen dataclasses to plain JSON values and back; a field of the wrong type is an error.

The input is untrusted, so nothing is guessed or filled in: the fields must be exactly those of the class, and the
constructors run the classes' own checks.
"""

from __future__ import annotations

import collections.abc
import sys
import types
from dataclasses import Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
#: Metadata of a dataclass's field that older programs do not know: it is not written where it has its default, so that
#: they can read the rest, and may be absent.
LATER = {"later": True}
_LARGEST_FLOAT = sys.float_info.max


def to_plain(value: object) -> Any:
    """`value` in JSON's types: dataclasses become objects, tuples become lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name))
            for field in fields(value)
            if not (_is_later(field) and getattr(value, field.name) == field.default)
        }
    if isinstance(value, collections.abc.Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[T], value: object, where: str) -> T:
    """Build a `kind` from plain JSON values.

    Args:
        kind: a dataclass, possibly nested, of str, int, float, bool, None, Literal, unions, tuples and mappings.
        value: the result of `json.loads`.
        where: name of the value, for messages.

    Raises:
        ValueError: a field is missing, unexpected or of the wrong type, or the class rejects a value.
    """
    return cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: object, where: str) -> Any:
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _decode_dataclass(cast(type, kind), value, where)
    if kind is object or kind is Any:
        return value
    if origin is Literal:
        if value not in get_args(kind):
            raise _mismatch(where, value, " or ".join(map(repr, get_args(kind))))
        return value
    if origin in (Union, types.UnionType):
        return _decode_union(kind, value, where)
    if origin is tuple:
        return _decode_tuple(kind, value, where)
    if origin in (dict, collections.abc.Mapping):
        _, item_kind = get_args(kind)
        if not isinstance(value, dict):
            raise _mismatch(where, value, "an object")
        return {key: _decode(item_kind, item, f"{where}.{key}") for key, item in value.items()}
    if kind is float:
        return _decode_float(value, where)
    if type(value) is not kind:  # exact: a bool is an int to isinstance
        raise _mismatch(where, value, kind.__name__)
    return value


def _decode_float(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _mismatch(where, value, "a number")
    if not -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT:  # NaN, Infinity, and integers too large for a float
        raise _mismatch(where, value, "a finite number")
    return float(value)


def _decode_dataclass(kind: type, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(where, value, "an object")
    names = [field.name for field in fields(kind)]
    missing = [field.name for field in fields(kind) if field.name not in value and not _is_later(field)]
    unexpected = [name for name in value if name not in names]
    if missing or unexpected:
        problems = [f"lacks {', '.join(missing)}"] * bool(missing)
        problems += [f"has the unknown {', '.join(unexpected)}"] * bool(unexpected)
        raise ValueError(f"{where} {' and '.join(problems)}")
    hints = get_type_hints(kind)
    return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in names if name in value})


def _is_later(field: Field[Any]) -> bool:
    return "later" in field.metadata


def _decode_union(kind: Any, value: object, where: str) -> Any:
    for option in get_args(kind):
        try:
            return None if option is type(None) and value is None else _decode(option, value, where)
        except ValueError:
            continue
    raise _mismatch(where, value, " or ".join(getattr(option, "__name__", str(option)) for option in get_args(kind)))


def _decode_tuple(kind: Any, value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _mismatch(where, value, "a list")
    kinds = get_args(kind)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{where} has {len(value)} entries, expected {len(kinds)}")
    return tuple(
        _decode(item_kind, item, f"{where}[{index}]")
        for index, (item_kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _mismatch(where: str, value: object, expected: str) -> ValueError:
    shown = repr(value)
    return ValueError(f"{where} is {shown if len(shown) <= 60 else shown[:57] + '...'}, expected {expected}")
