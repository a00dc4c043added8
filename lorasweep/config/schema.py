"""The keys of the configuration with types and defaults; keys of a run are fields of RunSpec."""

import dataclasses
import functools
import operator
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from lorasweep.spec.execution import Cluster, Exec
from lorasweep.spec.run import RunSpec
from lorasweep.sweep.request import Settings


@functools.cache
def writable(value: type) -> Any:
    """Make a writable copy of a frozen dataclass, with its YAML keys, for OmegaConf to fill."""

    def kind_of(kind: Any) -> Any:
        if typing.get_origin(kind) is typing.Literal:
            return str  # OmegaConf has no type for it
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            return functools.reduce(operator.or_, map(kind_of, kind.__args__))
        return writable(kind) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else kind

    hints = typing.get_type_hints(value)
    members = []
    for f in dataclasses.fields(value):
        factory = f.default_factory
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            factory = writable(factory)
        missing = factory is dataclasses.MISSING
        given = {"default": f.default} if missing else {"default_factory": factory}
        members.append((f.metadata.get("key", f.name), kind_of(hints[f.name]), field(**given)))
    bases = tuple(writable(b) for b in value.__bases__ if dataclasses.is_dataclass(b))
    return dataclasses.make_dataclass(value.__name__, members, bases=bases)


@dataclass
class Scale:
    """The size at which a question is answered."""

    name: str = "???"
    extends: str = ""
    """Another scale, whose block of a sweep is merged before the block of this one."""


@dataclass
class Config(writable(Settings), writable(RunSpec)):  # type: ignore[misc]
    """The whole configuration: the fields of a run, the scale, and the settings of the command."""

    rates: int | str = 3
    serve: Any = "peft"
    """Read from a file in conf/serve; a request has its name."""
    arms: Any = ""
    """Names of the sweep's arms to train, one or a list; empty: all."""
    scale: Scale = field(default_factory=Scale)
    cluster: writable(Cluster) = field(default_factory=writable(Cluster))  # type: ignore[valid-type]
    exec: writable(Exec) = field(default_factory=writable(Exec))  # type: ignore[valid-type]
    hardware: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)
    """Made into a Sweep by `question.made`."""
