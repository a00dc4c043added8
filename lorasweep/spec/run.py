"""What a run is: RunSpec, its checks, its canonical form and its name (the hash).

Knows every field that changes a run's numbers. Refuses to know where or how it runs: that is
`Exec`, another type, which is never hashed. Standard library only.
"""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from lorasweep.errors import SpecError, unknown
from lorasweep.methods.base import Method, canonical_layers, method_class

TRAIN_VERSION = 1
"""Raised on purpose when the training maths changes: old results then stop counting as done."""

PRECISIONS = ("fp32", "bf16", "fp64")
SCHEDULES = ("constant", "linear", "cosine")
MODEL_SOURCES = ("hub", "folder", "gguf", "recipe")
DATASET_SOURCES = ("hub", "jsonl", "synthetic")
FORMATS = ("prompt_completion", "messages", "tokens")
MASKS = ("completion", "last_assistant", "all")
LR_RANGE = (1e-9, 1e2)


class Matrix(NamedTuple):
    """`count` weight matrices of one shape; d_in and d_out in units."""

    d_in: int
    d_out: int
    count: int


@dataclass
class Recipe:
    """How a small base model is pretrained. Its weights are cached by the hash of these fields and
    the shape."""

    dataset: str = "dialect"
    """Synthetic generator that the base is pretrained on."""
    knobs: dict[str, float] = field(default_factory=dict)
    """Settings of that generator (the pretraining language)."""
    length: int = 64
    """Tokens a sequence."""
    steps: int = 1000
    batch_size: int = 256
    lr: float = 3e-3
    """Peak learning rate; linear warm-up over the first 5% of steps, cosine to a tenth."""
    precision: str = "fp32"
    seed: int = 0


@dataclass
class ModelSpec:
    """Which weights, and their shape (so that costs are known without loading anything)."""

    name: str = "???"
    source: str = "???"
    """hub (transformers name), folder (a local folder), gguf (one file), recipe (trained here
    once)."""
    location: str = ""
    """Hub name, or file or folder name looked up under exec.models_dir; empty for recipe."""
    revision: str = ""
    """Hub commit or tag, or 'sha256:...' of the GGUF file: what makes two loads the same weights.
    """
    hidden_size: int = 0
    n_layers: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    head_size: int = 0
    mlp_size: int = 0
    vocab_size: int = 0
    tied: bool = False
    """True: the unembedding is the embedding's own matrix."""
    qk_norm: bool = False
    """True: a norm over each head's query and key (Qwen3)."""
    attention: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Last name parts of the nn.Linear modules that 'attention' means."""
    mlp: list[str] = field(default_factory=lambda: ["gate_proj", "up_proj", "down_proj"])
    unembedding: list[str] = field(default_factory=lambda: ["lm_head"])
    recipe: Recipe | None = None

    def matrices(self, layers: tuple[str, ...]) -> list[Matrix]:
        """List the matrices of the layer sets; raise SpecError if a set matches nothing."""
        return _once(self, f"matrices {layers}", lambda: self._matrices(layers))

    def _matrices(self, layers: tuple[str, ...]) -> list[Matrix]:
        h, q, kv = self.hidden_size, self.n_heads * self.head_size, self.n_kv_heads * self.head_size
        shape = {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, self.mlp_size),
            "up_proj": (h, self.mlp_size),
            "down_proj": (self.mlp_size, h),
            "lm_head": (h, self.vocab_size),
        }
        found = []
        for layer_set in layers:
            names = getattr(self, layer_set)
            strangers = [n for n in names if n not in shape]
            if strangers or not names:
                raise SpecError(
                    f"model {self.name!r}: layer set {layer_set!r} is {names}, which matches no known nn.Linear. "
                    f"Known: {', '.join(shape)}. Mixture-of-experts weights are not nn.Linear modules and are "
                    "refused: choose another layer set or a dense model."
                )
            count = 1 if layer_set == "unembedding" else self.n_layers
            found += [Matrix(*shape[name], count) for name in names]
        return found

    def set_of(self, name: str) -> str:
        """Return the layer set that a parameter's or module's name belongs to, or 'rest'
        (embedding, norms)."""
        parts = name.split(".")
        return next(
            (
                s
                for s in ("attention", "mlp", "unembedding")
                if not set(getattr(self, s)).isdisjoint(parts)
            ),
            "rest",
        )

    def n_matmul_params(self) -> int:
        """Count the weights that take part in matrix products, the unembedding included."""
        return sum(
            m.d_in * m.d_out * m.count for m in self.matrices(("attention", "mlp", "unembedding"))
        )

    def n_params(self) -> int:
        """Count all parameters: matrices, embedding and norms (no biases: Llama and Qwen3 have
        none)."""
        embedding = 0 if self.tied else self.vocab_size * self.hidden_size
        norms = (
            2 * self.n_layers + 1
        ) * self.hidden_size + self.qk_norm * 2 * self.head_size * self.n_layers
        return self.n_matmul_params() + embedding + norms


@dataclass
class DatasetSpec:
    """Which examples, in which split and form, and where the loss looks."""

    name: str = "???"
    source: str = "???"
    location: str = ""
    """Hub name, generator name, or folder looked up under exec.data_dir."""
    config: str = ""
    """Configuration name on the hub."""
    revision: str = ""
    """Hub revision, or 'sha256:...' over the files: what makes two loads the same rows."""
    train_split: str = "train"
    test_split: str = "test"
    """Split names; for jsonl, file names without the ending."""
    format: str = "prompt_completion"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    template: str = "{prompt}\n"
    """Text put before the completion; {prompt} is the row's prompt."""
    mask: str = "completion"
    """Tokens that bear loss: the completion, the last assistant message, or all."""
    max_length: int = 512
    """Tokens; a longer row is cut on the right."""
    n_train: int | None = None
    """Rows used, from the start of the split; None: all."""
    n_test: int = 1024
    """Held-out rows evaluated at the end."""
    n_test_curve: int = 256
    """Of these, the first rows: evaluated at the log-spaced steps before the end."""
    knobs: dict[str, float] = field(default_factory=dict)
    """Settings of a synthetic generator."""
    holdout: int = field(default=0, metadata={"added": 0})
    """Rows held out from the training split of a hub data set that has no other: the first after a
    shuffle; 0: test_split."""
    n_retain: int = field(default=0, metadata={"added": 0})
    """Rows of what the base was pretrained on (facts: of facts never trained), evaluated once at
    the end."""


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


@dataclass
class Exec:
    """Where and how runs are executed: never hashed, no effect on results but rounding."""

    runs_dir: str = "runs"
    reports_dir: str = "reports"
    models_dir: list[str] = field(default_factory=lambda: ["models"])
    """Folders searched for weights; the first is where trained recipes and conversions are cached.
    """
    data_dir: list[str] = field(default_factory=lambda: ["data"])
    workers: int | None = None
    """Processes; None: chosen for the machine."""
    threads: int | None = None
    """Threads a worker; None: the cores divided by the workers."""
    pack_size: int | None = None
    """Runs trained together over one base, at most; 1 turns packing off; None: measured on this
    machine."""
    micro_batch_size: int | None = None
    """Sequences a forward, for each member; None: chosen by the plan."""
    compile: bool = False
    """torch.compile the forward of models that have no passes of our own (on a GPU: all). Not
    verified on a GPU yet; on a CPU compiling takes minutes."""
    checkpoint_s: float = 60.0
    """Seconds between checkpoints."""
    retry: bool = False
    """Try failed runs again."""
    max_attempts: int = 5


# ---------------------------------------------------------------- canonical form and name


def snap_lr(lr: float) -> float:
    """Round a learning rate to 3 significant digits, so that a grid and its refinement meet."""
    return float(f"{lr:.2e}")


_SCALARS = frozenset((str, int, bool, float))


def _coerce(value: Any, kind: Any, where: str) -> Any:
    """Bring `value` to the field's type, so that 32 and 32.0 have one hash; SpecError if it cannot
    be."""
    if type(value) is kind and kind in _SCALARS and (kind is not float or math.isfinite(value)):
        return value  # the common case, first: planning coerces half a million values
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is list:
        if isinstance(value, list | tuple):
            return [_coerce(v, args[0], where) for v in value]
    elif origin is dict:
        if isinstance(value, dict):
            return {str(k): _coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
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
        return _plain(value, where)
    name = getattr(kind, "__name__", str(kind))
    raise SpecError(
        f"{where}={value!r} is no {name}. Give a {'finite number' if kind is float else name}."
    )


@cache
def _fields(cls: type) -> tuple[tuple[str, Any, Any], ...]:
    hints = typing.get_type_hints(cls)
    return tuple(
        (f.name, hints[f.name], f.metadata.get("added", dataclasses.MISSING))
        for f in dataclasses.fields(cls)
    )


def _plain(obj: Any, where: str = "") -> dict[str, Any]:
    """Turn a part of a spec into plain values of the declared types, added fields at their past
    value left out."""
    out = {}
    for name, kind, added in _fields(type(obj)):
        at = f"{where}.{name}" if where else name
        value = getattr(obj, name)
        if name == "layers":
            value = canonical_layers(value)
        value = _coerce(value, kind, at)
        if added is dataclasses.MISSING or value != added:
            out[name] = value
    return out


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_memo: dict[tuple[int, str], tuple[Any, Any]] = {}


def _once(obj: Any, what: str, compute: Callable[[], Any]) -> Any:
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


def part_json(obj: ModelSpec | DatasetSpec) -> str:
    """Return the canonical JSON of a model or data set."""
    return _once(
        obj, "json", lambda: _encode(_plain(obj, type(obj).__name__.removesuffix("Spec").lower()))
    )


def canonical(spec: RunSpec) -> str:
    """Write the spec as the one JSON text that is hashed: sorted keys, declared types, resolved
    values.

    A field added after the first release carries `metadata={"added": past}`, where `past` is the
    value that reproduces what was done before it existed; at that value it is left out, so old
    names stay.
    """
    values: dict[str, Any] = {}
    for name, kind, added in _fields(RunSpec):
        value = getattr(spec, name)
        if name in ("model", "dataset"):
            continue
        value = _plain(value, "method") if name == "method" else _coerce(value, kind, name)
        if name == "lr":
            value = snap_lr(value)
        if added is dataclasses.MISSING or value != added:
            values[name] = value
    low = {k: v for k, v in values.items() if k < "dataset"}
    middle = {k: v for k, v in values.items() if "dataset" < k < "model"}
    high = {k: v for k, v in values.items() if k > "model"}
    pieces = [
        _encode(low)[1:-1],
        f'"dataset":{part_json(spec.dataset)}',
        _encode(middle)[1:-1],
        f'"model":{part_json(spec.model)}',
        _encode(high)[1:-1],
    ]
    return "{" + ",".join(p for p in pieces if p) + "}"


def run_id(spec: RunSpec) -> str:
    """Name a run: the first 12 hex digits of the SHA-256 of its canonical form."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()[:12]


def from_plain(plain: dict[str, Any]) -> RunSpec:
    """Rebuild a RunSpec from its canonical dict; unknown keys are an error."""
    method = plain.get("method", {})
    cls = method_class(method.get("name", "???"))
    recipe = (plain.get("model") or {}).get("recipe")
    model = {**plain["model"], "recipe": _build(Recipe, recipe, "model.recipe") if recipe else None}
    parts = {
        "model": _build(ModelSpec, model, "model"),
        "dataset": _build(DatasetSpec, plain["dataset"], "dataset"),
        "method": _build(cls, method, "method"),
    }
    return _build(RunSpec, {**plain, **parts}, "")


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    names = [name for name, _, _ in _fields(cls)]
    for key in values:
        if key not in names:
            raise SpecError(unknown(f"{where + ' ' if where else ''}field", key, names))
    return cls(**values)


# ---------------------------------------------------------------- axes


def with_axes(spec: RunSpec, values: dict[str, Any]) -> RunSpec:
    """Return a copy with flat axes set: each name is looked up in the method's fields, then the
    spec's."""
    method_fields = {n for n, _, _ in _fields(type(spec.method))} - {"name"}
    spec_fields = {n for n, _, _ in _fields(RunSpec)} - {"method", "train_version"}
    in_method = {k: v for k, v in values.items() if k in method_fields}
    in_spec = {k: v for k, v in values.items() if k not in method_fields}
    for name in in_spec:
        if name not in spec_fields:
            raise SpecError(
                unknown(f"axis of method {spec.method.name!r}", name, method_fields | spec_fields)
            )
    method = dataclasses.replace(spec.method, **in_method) if in_method else spec.method
    return dataclasses.replace(spec, method=method, **in_spec)


# ---------------------------------------------------------------- checks


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise SpecError(message)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _check(value in allowed, f"{name}={value!r}. Allowed: {', '.join(allowed)}.")


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
    _check(
        low <= spec.lr <= high,
        f"lr={spec.lr}: a learning rate lies between {low} and {high}. Typical: 1e-5 to 1e-2.",
    )
    for name in ("batch_size", "steps"):
        _check(getattr(spec, name) >= 1, f"{name}={getattr(spec, name)}: at least 1.")
    _check(
        0 <= spec.warmup_steps < spec.steps or spec.warmup_steps == 0,
        f"warmup_steps={spec.warmup_steps}: from 0 to below steps={spec.steps}.",
    )
    _check(
        0 <= spec.beta1 < 1 and 0 <= spec.beta2 < 1,
        f"betas {spec.beta1}, {spec.beta2}: from 0 to below 1.",
    )
    _check(0 < spec.eps < 1, f"eps={spec.eps}: above 0 and below 1.")
    _check(spec.weight_decay >= 0, f"weight_decay={spec.weight_decay}: 0 or more.")
    _check(
        spec.clip_norm is None or spec.clip_norm > 0,
        f"clip_norm={spec.clip_norm}: above 0, or null for off.",
    )
    _check(0 <= spec.seed < 2**31, f"seed={spec.seed}: a whole number from 0 to 2^31 - 1.")
    _one_of("precision", spec.precision, PRECISIONS)
    _one_of("schedule", spec.schedule, SCHEDULES)
    _check(
        spec.train_version == TRAIN_VERSION,
        f"train_version={spec.train_version}, but this lorasweep trains by version {TRAIN_VERSION}. "
        "Leave it out, or install the lorasweep that trained it.",
    )
    _once(spec.model, "check", lambda: _validate_model(spec.model))
    _once(spec.dataset, "check", lambda: _validate_dataset(spec.dataset))
    _once(spec.model, f"check {spec.method!r}", lambda: spec.method.check(spec.model))


def _validate_model(model: ModelSpec) -> None:
    where = f"model {model.name!r}: "
    _one_of(where + "source", model.source, MODEL_SOURCES)
    shape = (
        "hidden_size",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_size",
        "mlp_size",
        "vocab_size",
    )
    for name in shape:
        _check(getattr(model, name) >= 1, f"{where}{name}={getattr(model, name)}: at least 1.")
    _check(
        model.n_heads % model.n_kv_heads == 0, f"{where}n_heads must be a multiple of n_kv_heads."
    )
    _check(
        (model.source == "recipe") == (model.recipe is not None),
        f"{where}source=recipe and a recipe block go together.",
    )
    _check(model.source == "recipe" or bool(model.location), f"{where}location is missing.")


def _validate_dataset(data: DatasetSpec) -> None:
    where = f"dataset {data.name!r}: "
    _one_of(where + "source", data.source, DATASET_SOURCES)
    _one_of(where + "format", data.format, FORMATS)
    _one_of(where + "mask", data.mask, MASKS)
    _check(bool(data.location), f"{where}location is missing.")
    _check(data.max_length >= 4, f"{where}max_length={data.max_length}: at least 4 tokens.")
    _check(data.n_test >= 1, f"{where}n_test={data.n_test}: at least 1 row.")
    _check(
        1 <= data.n_test_curve <= data.n_test,
        f"{where}n_test_curve={data.n_test_curve}: from 1 to n_test={data.n_test}.",
    )
    _check(
        data.holdout == 0 or (data.source == "hub" and data.holdout >= data.n_test),
        f"{where}holdout={data.holdout}: 0, or for source=hub at least n_test={data.n_test} rows.",
    )
    _check(data.n_retain >= 0, f"{where}n_retain={data.n_retain}: 0 or more rows.")
    _check(
        data.n_retain == 0 or data.source == "synthetic",
        f"{where}n_retain={data.n_retain}: only synthetic data sets know what the base was pretrained on. Leave it at 0.",
    )
    _check(
        data.n_train is None or data.n_train >= 1,
        f"{where}n_train={data.n_train}: at least 1, or null.",
    )
