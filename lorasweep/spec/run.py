"""What a run is: RunSpec, its checks and its id (the hash of its canonical form).

Knows every field that changes a run's numbers. Refuses to know where or how it runs: that is
`Exec`, another type, which is never hashed.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from lorasweep.errors import SpecError, unknown
from lorasweep.spec.canonical import Value, build, canonical_text, fields, not_allowed
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.method import Method
from lorasweep.spec.model import ModelSpec

TRAIN_VERSION = 1
"""Raised on purpose when the training maths changes: old results then stop counting as done."""

PRECISIONS = ("fp32", "bf16", "fp64")
SCHEDULES = ("constant", "linear", "cosine")
LR_RANGE = (1e-9, 1e2)


@dataclass(frozen=True)
class RunSpec(Value):
    """One training, fully specified: all that changes its numbers, and nothing else."""

    model: ModelSpec = field(default_factory=ModelSpec)
    dataset: DatasetSpec = field(default_factory=DatasetSpec)
    method: Method = field(default_factory=Method)
    lr: float = 1e-3
    """Peak learning rate, snapped to 3 significant digits."""
    schedule: str = "constant"
    warmup_steps: int = 0
    batch_size: int = 16
    """Sequences an update."""
    steps: int = 100
    """Updates."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    """Bound on a member's global gradient norm; None: off."""
    precision: str = "fp32"
    """fp32; bf16: autocast with fp32 master weights in every arm; fp64: for proofs."""
    seed: int = 0
    """Seeds the streams named 'data' and 'init'."""
    train_version: int = TRAIN_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self)["lr"] = snap_lr(self.lr)

    @cached_property
    def id(self) -> str:
        """The run's name: the first 12 hex digits of the SHA-256 of its canonical form."""
        return hashlib.sha256(canonical_text(self).encode()).hexdigest()[:12]

    def problems(self) -> Iterator[str]:
        """Yield what makes this run untrainable."""
        low, high = LR_RANGE
        if not low <= self.lr <= high:
            yield (
                f"lr={self.lr}: a learning rate lies between {low} and {high}. "
                "Typical: 1e-5 to 1e-2."
            )
        for name in ("batch_size", "steps"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)}: at least 1."
        if self.warmup_steps and not 0 <= self.warmup_steps < self.steps:
            yield f"warmup_steps={self.warmup_steps}: from 0 to below steps={self.steps}."
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            yield f"betas {self.beta1}, {self.beta2}: from 0 to below 1."
        if not 0 < self.eps < 1:
            yield f"eps={self.eps}: above 0 and below 1."
        if self.weight_decay < 0:
            yield f"weight_decay={self.weight_decay}: 0 or more."
        if self.clip_norm is not None and self.clip_norm <= 0:
            yield f"clip_norm={self.clip_norm}: above 0, or null for off."
        if not 0 <= self.seed < 2**31:
            yield f"seed={self.seed}: a whole number from 0 to 2^31 - 1."
        for name, allowed in (("precision", PRECISIONS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                yield not_allowed(name, getattr(self, name), allowed)
        if self.train_version != TRAIN_VERSION:
            yield (
                f"train_version={self.train_version}, but this lorasweep trains by version "
                f"{TRAIN_VERSION}. Leave it out, or install the lorasweep that trained it."
            )
        yield from filter(None, (self.model.problem, self.dataset.problem))


def snap_lr(lr: float) -> float:
    """Round a learning rate to 3 significant digits, so that a grid and its refinement meet."""
    return float(f"{lr:.2e}")


def validate(spec: RunSpec) -> None:
    """Raise SpecError if the spec cannot be trained. Needs no torch and no files."""
    for problem in spec.problems():
        raise SpecError(problem)
    spec.method.check(spec.model)


def from_plain(values: dict[str, Any], methods: Mapping[str, type[Method]]) -> RunSpec:
    """Rebuild a RunSpec from its canonical dict, with the classes of the methods by name.

    Raises:
        SpecError: a key or the method is unknown, or a value is of another type.
    """
    name = values.get("method", {}).get("name", "???")
    if name not in methods:
        raise SpecError(unknown("method", str(name), methods))
    return build(RunSpec, {**values, "method": build(methods[name], values["method"])})


def with_axes(spec: RunSpec, values: dict[str, Any]) -> RunSpec:
    """Return a copy with flat axes set: each key is looked up in the method's fields, then the
    spec's."""
    in_method, in_spec = _axes(type(spec.method)), _axes(RunSpec)
    for key in values:
        if key not in in_method and key not in in_spec:
            raise SpecError(
                unknown(f"axis of method {spec.method.name!r}", key, {**in_method, **in_spec})
            )
    of_method = {in_method[k]: v for k, v in values.items() if k in in_method}
    of_spec = {in_spec[k]: v for k, v in values.items() if k not in in_method}
    method = dataclasses.replace(spec.method, **of_method) if of_method else spec.method
    return dataclasses.replace(spec, method=method, **of_spec)


def _axis_fields(cls: type) -> dict[str, str]:
    """Return the field of each key that may be an axis."""
    no_axes = ("name", "method", "train_version")
    return {f.key: f.name for f in fields(cls) if f.name not in no_axes}


_axes: Callable[[type], dict[str, str]] = cache(_axis_fields)
