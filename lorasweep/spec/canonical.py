"""Frozen values of declared types, and their canonical JSON text, which is hashed.

Knows dataclasses and their type hints. Refuses to know what the fields mean.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

from lorasweep.errors import SpecError, unknown

SCALARS = frozenset((str, int, bool, float))
encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


class FrozenDict(dict[str, float]):
    """A dict that refuses changes."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a spec cannot be changed: make another with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, float]]]:
        return FrozenDict, (dict(self),)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class Field(NamedTuple):
    """One field of a value."""

    name: str
    key: str
    """Name in YAML files and on the command line."""
    stored: str
    """Name in the JSON that is hashed and stored."""
    kind: Any
    past: Any
    """For a field added after the first release: the value that reproduces the earlier behaviour.
    The canonical form leaves out a field with this value, so old ids stay valid. Else MISSING."""


def later(value: Any) -> Any:
    """Make a dataclass field added after the first release; its default keeps the old behaviour."""
    return dataclasses.field(default=value, metadata={"added": value})


def fields(cls: type) -> tuple[Field, ...]:
    """List the fields of a dataclass, in order.

    Metadata of a field: `key` and `stored` if they differ from the Python name; `added`: see
    `later`.
    """
    return _fields(cls)  # `cache` is on a second function, because of mypy


@cache
def _fields(cls: type) -> tuple[Field, ...]:
    hints = typing.get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        key = f.metadata.get("key", f.name)
        stored = f.metadata.get("stored", key)
        past = f.metadata.get("added", dataclasses.MISSING)
        found.append(Field(f.name, key, stored, hints[f.name], past))
    return tuple(found)


@cache
def _by_stored(cls: type) -> tuple[Field, ...]:
    return tuple(sorted(fields(cls), key=lambda f: f.stored))


class Value:
    """Base class of the frozen dataclasses that specify a run.

    Values are converted to the declared types, so that 32 and 32.0 have the same hash.
    """

    WHERE: ClassVar[str] = ""
    """Prefix of field names in messages, such as 'method.'."""

    def __post_init__(self) -> None:
        values = vars(self)  # the way to set fields of a frozen dataclass
        for f in fields(type(self)):
            values[f.name] = coerce(values[f.name], f.kind, self.WHERE, f.key)

    def values(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, value) of all fields, in order of declaration."""
        return ((f.name, getattr(self, f.name)) for f in fields(type(self)))

    def plain(self) -> dict[str, Any]:
        """Return the canonical form as a dict of JSON values."""
        return json.loads(self.canonical)

    @cached_property
    def canonical(self) -> str:
        """JSON text that is hashed: sorted keys, declared types, resolved values."""
        return canonical_text(self)

    @cached_property
    def problem(self) -> str | None:
        """First problem of this value as a sentence, or None."""
        return next(self.problems(), None)

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each problem of the values other than a wrong type."""
        yield from ()


V = TypeVar("V", bound=Value)


def canonical_text(value: Value) -> str:
    """Write a value's canonical JSON. Nested values are cached: the specs of a grid share them."""
    pieces: list[str] = []
    group: dict[str, Any] = {}
    kind: type = type(value)
    for f in _by_stored(kind):
        one = getattr(value, f.name)
        if isinstance(one, Value):
            if group:
                pieces.append(encode(group)[1:-1])
            pieces.append(f'"{f.stored}":{one.canonical}')
            group = {}
        elif f.past is dataclasses.MISSING or one != f.past:
            group[f.stored] = one
    if group:
        pieces.append(encode(group)[1:-1])
    return "{" + ",".join(pieces) + "}"


def coerce(value: Any, kind: Any, where: str, name: str) -> Any:
    """Convert `value` to the type `kind` of a field; raise SpecError if that is impossible."""
    if type(value) is kind and kind in SCALARS and (kind is not float or math.isfinite(value)):
        return value  # the common case comes first: planning coerces half a million values
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return coerce(value, next(a for a in args if a is not type(None)), where, name)
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(coerce(v, args[0], where, name) for v in value)
    elif origin is dict:
        if isinstance(value, FrozenDict):
            return value
        if isinstance(value, dict):
            return FrozenDict(
                {str(k): coerce(v, args[1], where, f"{name}.{k}") for k, v in value.items()}
            )
    elif kind is int:
        if number and value % 1 == 0:  # False for inf and NaN
            return int(value)
    elif kind is float:
        if number and math.isfinite(value):
            return float(value)
    elif isinstance(value, kind):
        return value
    expected = {int: "an int", float: "a finite number", str: "text", bool: "true or false"}
    what = expected.get(kind, getattr(kind, "__name__", kind))
    raise SpecError(f"{where}{name}: expected {what}, got {value!r}.")


def not_allowed(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Write the message for a setting that has none of its allowed values."""
    end = ", or leave it out" if "" in allowed else ""
    return f"{name}={value!r}. Allowed: {', '.join(filter(None, allowed))}{end}."


def build(cls: type[V], values: dict[str, Any]) -> V:
    """Make a value from a dict with the keys of YAML files or of the stored JSON.

    Raises:
        SpecError: a key is unknown, or a value has the wrong type.
    """
    known = {k: f for f in fields(cls) for k in (f.key, f.stored)}
    given = {}
    for key, value in values.items():
        if key not in known:
            raise SpecError(unknown(f"{cls.WHERE.rstrip('.')} field".lstrip(), key, known))
        kinds = typing.get_args(known[key].kind) or (known[key].kind,)  # X | None: both
        part = next((k for k in kinds if isinstance(k, type) and issubclass(k, Value)), None)
        if part is not None and isinstance(value, dict):
            value = build(part, value)
        given[known[key].name] = value
    return cls(**given)
