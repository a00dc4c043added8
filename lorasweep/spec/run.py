"""What a run is: RunSpec, its checks, its canonical form and its name (the hash).

Knows every field that changes a run's numbers. Refuses to know where or how it runs: that is
`Exec`, another type, which is never hashed. Standard library only.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorasweep.errors import SpecError, unknown
from lorasweep.spec.canonical import build, check, coerce, encode, fields, once, one_of, plain
from lorasweep.spec.dataset import DatasetSpec, validate_dataset
from lorasweep.spec.method import Method, canonical_layers
from lorasweep.spec.model import ModelSpec, Recipe, validate_model

TRAIN_VERSION = 1
"""Raised on purpose when the training maths changes: old results then stop counting as done."""

PRECISIONS = ("fp32", "bf16", "fp64")
SCHEDULES = ("constant", "linear", "cosine")
LR_RANGE = (1e-9, 1e2)


@dataclass
class RunSpec:
    """One training, fully specified. Everything in here changes the numbers; nothing outside does."""

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


def snap_lr(lr: float) -> float:
    """Round a learning rate to 3 significant digits, so that a grid and its refinement meet."""
    return float(f"{lr:.2e}")


def part_json(obj: ModelSpec | DatasetSpec) -> str:
    """Return the canonical JSON of a model or data set."""
    return once(
        obj, "json", lambda: encode(plain(obj, type(obj).__name__.removesuffix("Spec").lower()))
    )


def canonical(spec: RunSpec) -> str:
    """Write the spec as the one JSON text that is hashed: sorted keys, declared types, resolved
    values.

    A field added after the first release carries `metadata={"added": past}`, where `past` is the
    value that reproduces what was done before it existed; at that value it is left out, so old
    names stay.
    """
    values: dict[str, Any] = {}
    for name, kind, added in fields(RunSpec):
        value = getattr(spec, name)
        if name in ("model", "dataset"):
            continue
        if name == "method":
            value = plain(value, "method")
            if "layers" in value:
                value["layers"] = canonical_layers(value["layers"])
        else:
            value = coerce(value, kind, name)
        if name == "lr":
            value = snap_lr(value)
        if added is dataclasses.MISSING or value != added:
            values[name] = value
    low = {k: v for k, v in values.items() if k < "dataset"}
    middle = {k: v for k, v in values.items() if "dataset" < k < "model"}
    high = {k: v for k, v in values.items() if k > "model"}
    pieces = [
        encode(low)[1:-1],
        f'"dataset":{part_json(spec.dataset)}',
        encode(middle)[1:-1],
        f'"model":{part_json(spec.model)}',
        encode(high)[1:-1],
    ]
    return "{" + ",".join(p for p in pieces if p) + "}"


def run_id(spec: RunSpec) -> str:
    """Name a run: the first 12 hex digits of the SHA-256 of its canonical form."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()[:12]


def from_plain(values: dict[str, Any], methods: Mapping[str, type[Method]]) -> RunSpec:
    """Rebuild a RunSpec from its canonical dict, with the classes of the methods by name.

    Raises:
        SpecError: a key or the method is unknown.
    """
    method = values.get("method", {})
    name = method.get("name", "???")
    if name not in methods:
        raise SpecError(unknown("method", str(name), methods))
    recipe = (values.get("model") or {}).get("recipe")
    model = {**values["model"], "recipe": build(Recipe, recipe, "model.recipe") if recipe else None}
    parts = {
        "model": build(ModelSpec, model, "model"),
        "dataset": build(DatasetSpec, values["dataset"], "dataset"),
        "method": build(methods[name], method, "method"),
    }
    return build(RunSpec, {**values, **parts}, "")


def with_axes(spec: RunSpec, values: dict[str, Any]) -> RunSpec:
    """Return a copy with flat axes set: each name is looked up in the method's fields, then the
    spec's."""
    method_fields = {n for n, _, _ in fields(type(spec.method))} - {"name"}
    spec_fields = {n for n, _, _ in fields(RunSpec)} - {"method", "train_version"}
    in_method = {k: v for k, v in values.items() if k in method_fields}
    in_spec = {k: v for k, v in values.items() if k not in method_fields}
    for name in in_spec:
        if name not in spec_fields:
            raise SpecError(
                unknown(f"axis of method {spec.method.name!r}", name, method_fields | spec_fields)
            )
    method = dataclasses.replace(spec.method, **in_method) if in_method else spec.method
    return dataclasses.replace(spec, method=method, **in_spec)


def checked_id(spec: RunSpec) -> str:
    """Validate a spec and return its run_id."""
    text = canonical(spec)  # checks the types
    _validate_values(spec)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def validate(spec: RunSpec) -> None:
    """Raise SpecError if the spec cannot be trained. Changes nothing; needs no torch and no files."""
    checked_id(spec)


def _validate_values(spec: RunSpec) -> None:
    low, high = LR_RANGE
    check(
        low <= spec.lr <= high,
        f"lr={spec.lr}: a learning rate lies between {low} and {high}. Typical: 1e-5 to 1e-2.",
    )
    for name in ("batch_size", "steps"):
        check(getattr(spec, name) >= 1, f"{name}={getattr(spec, name)}: at least 1.")
    check(
        0 <= spec.warmup_steps < spec.steps or spec.warmup_steps == 0,
        f"warmup_steps={spec.warmup_steps}: from 0 to below steps={spec.steps}.",
    )
    check(
        0 <= spec.beta1 < 1 and 0 <= spec.beta2 < 1,
        f"betas {spec.beta1}, {spec.beta2}: from 0 to below 1.",
    )
    check(0 < spec.eps < 1, f"eps={spec.eps}: above 0 and below 1.")
    check(spec.weight_decay >= 0, f"weight_decay={spec.weight_decay}: 0 or more.")
    check(
        spec.clip_norm is None or spec.clip_norm > 0,
        f"clip_norm={spec.clip_norm}: above 0, or null for off.",
    )
    check(0 <= spec.seed < 2**31, f"seed={spec.seed}: a whole number from 0 to 2^31 - 1.")
    one_of("precision", spec.precision, PRECISIONS)
    one_of("schedule", spec.schedule, SCHEDULES)
    check(
        spec.train_version == TRAIN_VERSION,
        f"train_version={spec.train_version}, but this lorasweep trains by version {TRAIN_VERSION}. "
        "Leave it out, or install the lorasweep that trained it.",
    )
    once(spec.model, "check", lambda: validate_model(spec.model))
    once(spec.dataset, "check", lambda: validate_dataset(spec.dataset))
    once(spec.model, f"check {spec.method!r}", lambda: spec.method.check(spec.model))
