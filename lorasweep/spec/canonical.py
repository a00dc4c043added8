"""The canonical form of a spec's parts: values of the declared types, as the one JSON text that is
hashed.

Knows dataclasses and their type hints. Refuses to know what the fields mean.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any

from lorasweep.errors import SpecError, unknown

_SCALARS = frozenset((str, int, bool, float))


def coerce(value: Any, kind: Any, where: str) -> Any:
    """Bring `value` to the field's type, so that 32 and 32.0 have one hash; SpecError if it cannot
    be."""
    if type(value) is kind and kind in _SCALARS and (kind is not float or math.isfinite(value)):
        return value  # the common case, first: planning coerces half a million values
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is list:
        if isinstance(value, list | tuple):
            return [coerce(v, args[0], where) for v in value]
    elif origin is dict:
        if isinstance(value, dict):
            return {str(k): coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if (
            isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
        ):  # False for inf, NaN
            return int(value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif kind is str:
        if isinstance(value, str):
            return value
    elif dataclasses.is_dataclass(kind):
        return plain(value, where)
    name = getattr(kind, "__name__", str(kind))
    raise SpecError(
        f"{where}={value!r} is no {name}. Give a {'finite number' if kind is float else name}."
    )


@cache
def fields(cls: type) -> tuple[tuple[str, Any, Any], ...]:
    """Return (name, type, past value) of each field; a past value belongs to a field added later."""
    hints = typing.get_type_hints(cls)
    return tuple(
        (f.name, hints[f.name], f.metadata.get("added", dataclasses.MISSING))
        for f in dataclasses.fields(cls)
    )


def plain(obj: Any, where: str = "") -> dict[str, Any]:
    """Turn a part of a spec into plain values of the declared types, added fields at their past
    value left out."""
    out = {}
    for name, kind, added in fields(type(obj)):
        at = f"{where}.{name}" if where else name
        value = getattr(obj, name)
        value = coerce(value, kind, at)
        if added is dataclasses.MISSING or value != added:
            out[name] = value
    return out


encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_memo: dict[tuple[int, str], tuple[Any, Any]] = {}


def once(obj: Any, what: str, compute: Callable[[], Any]) -> Any:
    """Compute something of a model or data set once an object: thousands of specs of a grid share
    one."""
    kept = _memo.get((id(obj), what))
    if kept is None or kept[0] is not obj:
        if len(_memo) > 4096:
            _memo.clear()
        kept = _memo[id(obj), what] = (
            obj,
            compute(),
        )  # holding the object keeps its id from being reused
    return kept[1]


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """Make a part of a spec from plain values; unknown keys are an error."""
    names = [name for name, _, _ in fields(cls)]
    for key in values:
        if key not in names:
            raise SpecError(unknown(f"{where + ' ' if where else ''}field", key, names))
    return cls(**values)


def check(ok: bool, message: str) -> None:
    """Raise SpecError with `message` unless `ok`."""
    if not ok:
        raise SpecError(message)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise SpecError unless `value` is allowed."""
    check(value in allowed, f"{name}={value!r}. Allowed: {', '.join(allowed)}.")
