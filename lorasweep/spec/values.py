"""Settings as frozen values: types, limits and meaning stand at the field, ids come from them.

A field is declared once, as rank: Annotated[int, Is("columns of A", 1)] = 32. From that come
conversion, error messages, and the canonical JSON text, which is hashed.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar

from lorasweep.errors import SpecError, unknown

ABOVE_0, BELOW_1 = math.ulp(0.0), 1 - 2.0**-53
"""The limits of open intervals: the floats next to 0 and 1."""
UNSET: Any = "???"
"""The value, in OmegaConf, of a setting that must be given."""
SCALARS = frozenset((str, int, bool, float))
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


class Is(NamedTuple):
    """What a setting is: its meaning in words, and the limits of a number, which are allowed."""

    text: str = ""
    low: float = -math.inf
    high: float = math.inf


class Field(NamedTuple):
    """One field of a dataclass of settings."""

    name: str
    key: str
    """Name in YAML files and on the command line."""
    stored: str
    """Name in the JSON that is hashed and stored."""
    kind: Any
    """Type without `| None`; str where only some texts are allowed."""
    optional: bool
    required: bool
    allowed: tuple[Any, ...]
    """The values of a Literal; empty: any of the type."""
    means: Is
    past: Any
    """For a field added after the first release: the value that reproduces the earlier behaviour.
    The canonical form leaves out a field with this value, so old ids stay valid. Else MISSING."""

    @property
    def expected(self) -> str:
        """The values that are allowed, in words."""
        text, low, high = self.means
        what = WORDS.get(self.kind, getattr(self.kind, "__name__", str(self.kind)))
        if typing.get_origin(self.kind):
            what = str(self.kind)
        limits = [f"of at least {low:.10g}" if low != ABOVE_0 else "above 0"] * (low > -math.inf)
        limits += [f"at most {high:.10g}" if high != BELOW_1 else "below 1"] * (high < math.inf)
        what = " ".join([", ".join(filter(None, self.allowed)) or what, " and ".join(limits)])
        without = ", or null" * self.optional + ", or leave it out" * ("" in self.allowed)
        return f"{what.strip()}{f' ({text})' if text else ''}{without}"

    def converted(self, value: Any) -> Any:
        """Return the value with the declared type; raise ValueError if that is impossible."""
        return None if value is None and self.optional else _converted(value, self.kind)

    def fits(self, value: Any) -> bool:
        """Return whether a value of the declared type is allowed."""
        if value is None or value == dataclasses.MISSING:
            return True
        if self.allowed:
            return value in self.allowed
        low, high = self.means[1:]
        return self.kind not in (int, float) or (low == -high == -math.inf) or low <= value <= high

    def wrong(self, value: Any) -> str:
        """Return the message for a value that does not fit."""
        expected = ". Allowed:" if self.allowed else ": expected"
        return f"{self.key}={value!r}{expected} {self.expected}."


def later(value: Any) -> Any:
    """Make a dataclass field added after the first release; its default keeps the old behaviour."""
    return dataclasses.field(default=value, metadata={"added": value})


def _fields(cls: type) -> tuple[Field, ...]:
    """List the fields of a dataclass, in order.

    Metadata of a field: `key` and `stored` if they differ from its name; `added`: see `later`.
    """
    hints, found = typing.get_type_hints(cls, include_extras=True), []
    for f in dataclasses.fields(cls):
        kind, means, allowed = hints[f.name], Is(), ()
        if typing.get_origin(kind) is Annotated:
            kind, means = typing.get_args(kind)
        optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
        if optional:
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if typing.get_origin(kind) is Literal:
            kind, allowed = str, typing.get_args(kind)
        key = f.metadata.get("key", f.name)
        stored, past = f.metadata.get("stored", key), f.metadata.get("added", dataclasses.MISSING)
        required = f.default is f.default_factory is dataclasses.MISSING
        found.append(Field(f.name, key, stored, kind, optional, required, allowed, means, past))
    return tuple(found)


fields: Callable[[type], tuple[Field, ...]] = cache(_fields)  # stated, because `cache` hides it


def _converted(value: Any, kind: Any) -> Any:
    if type(value) is kind and kind in SCALARS and (kind is not float or math.isfinite(value)):
        return value  # the common case comes first: planning converts half a million values
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return origin(_converted(v, of[0]) for v in value)
    if origin is dict and isinstance(value, dict):
        return {str(k): _converted(v, of[1]) for k, v in value.items()}
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value) and (kind is float or value % 1 == 0):
            return kind(value)
    elif origin is None and isinstance(value, kind):
        return value
    raise ValueError(value)


def problems_of(cls: type, values: dict[str, Any], where: str = "") -> Iterator[str]:
    """Convert the values of a dataclass of settings in place; yield a sentence for each problem.

    Problems: a name that is unknown or missing, a wrong type, a value that is not allowed. Mappings
    become the dataclasses that are declared for them.

    Args:
        values: by the key of YAML files and tables.
        where: what a message begins with, before the key, such as 'column '.
    """
    known = {f.key: f for f in fields(cls)}
    for key in values:
        if key not in known:
            yield unknown(where.strip(" .") or "setting", str(key), known)
    for key, f in known.items():
        if key not in values:
            if f.required:
                yield f"{where}{key}: missing. Expected {f.expected}."
            continue
        kind = typing.get_args(f.kind)[-1] if typing.get_origin(f.kind) is dict else f.kind
        if dataclasses.is_dataclass(kind) and isinstance(values[key], dict):
            parts = {"": values[key]} if kind is f.kind else dict(values[key])
            for name, part in parts.items():
                if isinstance(part, dict):
                    at = f"{where}{key}.{name}." if name else f"{where}{key}."
                    part = dict(part)
                    problems = list(problems_of(kind, part, at))  # type: ignore[arg-type]
                    parts[name] = part if problems else kind(**part)  # type: ignore[operator]
                    yield from problems
                elif not isinstance(part, kind):  # type: ignore[arg-type]
                    yield f"{where}{key}.{name}={part!r}: expected settings by name."
            values[key] = parts.get("", parts)
            continue
        try:
            values[key] = f.converted(values[key])
        except ValueError:
            yield where + f.wrong(values[key])
        else:
            if not f.fits(values[key]):
                yield where + f.wrong(values[key])


def misfits(
    value: Any, where: str = "", together: Iterable[tuple[str, Any, str]] = ()
) -> Iterator[str]:
    """Yield a sentence for each field of settings whose value is not one that is allowed.

    `together`: what holds for several fields: the one to correct, whether it is wrong, and what is
    expected of it.
    """
    for f in fields(type(value)):
        if not f.fits(getattr(value, f.name)):
            yield where + f.wrong(getattr(value, f.name))
    for name, wrong, expected in together:
        if wrong:
            yield f"{where}{name}={getattr(value, name)!r}: expected {expected}."


class FrozenDict(dict[str, Any]):
    """A dict that refuses changes."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a spec cannot be changed: make another with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self))  # of the keys: values may be lists, and 1 equals 1.0


class Value:
    """Base class of the frozen dataclasses that specify a run.

    Values are converted to the declared types, so that 32 and 32.0 have the same hash.
    """

    WHERE: ClassVar[str] = ""
    """Prefix of field names in messages, such as 'method.'."""

    def __post_init__(self) -> None:
        values = vars(self)  # the way to set fields of a frozen dataclass
        for f in fields(type(self)):
            try:
                value = f.converted(values[f.name])
                values[f.name] = FrozenDict(value) if type(value) is dict else value
            except ValueError:
                raise SpecError(self.WHERE + f.wrong(values[f.name])) from None

    def values(self) -> Iterator[tuple[str, Any]]:
        """Yield (name, value) of all fields, in order of declaration."""
        return ((f.name, getattr(self, f.name)) for f in fields(type(self)))

    def plain(self) -> dict[str, Any]:
        """Return the canonical form as a dict of JSON values."""
        return json.loads(encode(self.tree()))

    def tree(self) -> dict[str, Any]:
        """Return the values that are hashed, by stored key, without those of the past."""
        return {
            f.stored: one._tree if isinstance(one, Value) else one
            for f in fields(type(self))
            if (one := getattr(self, f.name)) != f.past
        }

    _tree = cached_property(tree)  # of a part: the specs of a grid share their parts

    @cached_property
    def canonical(self) -> str:
        """JSON text that is hashed: sorted keys, declared types, resolved values."""
        return encode(self.tree())

    @cached_property
    def problem(self) -> str | None:
        """First problem of this value as a sentence, or None."""
        return next(self.problems(), None)

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each problem of the values other than a wrong type."""
        yield from misfits(self, self.WHERE)


V = TypeVar("V", bound=Value)


def build(cls: type[V], values: dict[str, Any]) -> V:
    """Make a value from a dict with the keys of YAML files or of the stored JSON.

    Raises:
        SpecError: a key is unknown, or a value has the wrong type.
    """
    known, given = {k: f for f in fields(cls) for k in (f.key, f.stored)}, {}
    for key, value in values.items():
        if (f := known.get(key)) is None:
            raise SpecError(unknown(f"{cls.WHERE.rstrip('.')} field".lstrip(), key, known))
        is_part = isinstance(value, dict) and isinstance(f.kind, type) and issubclass(f.kind, Value)
        given[f.name] = build(f.kind, value) if is_part else value
    return cls(**given)
