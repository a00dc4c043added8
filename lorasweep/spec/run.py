"""RunSpec: the settings of one run, their checks and the run id. `Exec` is not part of the id."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Annotated, Any, Literal

from lorasweep.errors import SpecError, unknown
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.method import Method
from lorasweep.spec.metric import why_not_early
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.trainer import TrainerSpec
from lorasweep.spec.values import ABOVE_0, BELOW_1, Is, Value, encode, fields, later, misfits

TRAIN_VERSION = 1
"""Increase it when the training maths changes: old results then no longer count as done."""

OF_SAMPLING = ("group_size", "max_new_tokens", "reward_scale")
"""Fields that apply only to objectives that sample completions."""
LR_RANGE = (1e-9, 1e2)
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class RunSpec(Value):
    """All settings that change the results of a run (other than by rounding), and no others."""

    model: ModelSpec = field(default_factory=ModelSpec)
    dataset: DatasetSpec = field(default_factory=DatasetSpec)
    method: Method = field(default_factory=Method)
    lr: Annotated[float, Is("typical: 1e-5 to 1e-2", *LR_RANGE)] = 1e-3
    """Peak learning rate, snapped to 3 significant digits."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Is("updates", 0)] = 0
    batch_size: Annotated[int, Is("sequences per update", 1)] = 16
    steps: Annotated[int, Is("updates", 1)] = 100
    beta1: Annotated[float, Is("", 0, BELOW_1)] = 0.9
    beta2: Annotated[float, Is("", 0, BELOW_1)] = 0.95
    eps: Annotated[float, Is("", ABOVE_0, BELOW_1)] = 1e-8
    weight_decay: Annotated[float, Is("", 0)] = 0.0
    clip_norm: Annotated[float | None, Is("global norm", ABOVE_0)] = None
    """Gradients are clipped to it; None: no clipping."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """fp32; bf16: autocast over fp32 trained weights; fp64: for tests of exactness."""
    seed: Annotated[int, Is("", 0, 2**31 - 1)] = 0
    """Seed of the random streams 'data', 'init' and 'sample'."""
    objective: Literal["sft", "policy_gradient"] = later("sft")
    """sft: the NLL of given answers. policy_gradient: the reward of sampled completions."""
    group_size: Annotated[int, Is("completions", 0)] = later(0)
    """policy_gradient (as the next two fields). Completions per prompt; their mean reward is the
    baseline. An update has batch_size / group_size prompts."""
    max_new_tokens: Annotated[int, Is("tokens", 0)] = later(0)
    """Maximum number of tokens of a completion, including the end token."""
    reward_scale: Literal["none", "group"] = later("none")
    """Divisor of the advantage. none: 1 (the study; Dr. GRPO, arXiv 2503.20783). group: standard
    deviation of the group's rewards, plus 1e-4 (GRPO, arXiv 2402.03300)."""
    early_stopping: Annotated[int, Is("evaluations; 0: off", 0)] = later(0)
    """sft: end after this many evaluations in a row without a better validation loss, and keep the
    weights of the best one. 0: make all updates, and keep the last weights."""
    test_rows: bool = later(True)
    """False: a trial, which is measured on validation rows only. A run that differs in nothing else
    takes the weights of its trial, if they are kept, and only measures the test rows."""
    trainer: TrainerSpec = later(TrainerSpec())
    """What trains the run. Another trainer's run is measured by us, at the end only."""
    train_version: int = TRAIN_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        vars(self)["lr"] = snap_lr(self.lr)

    @cached_property
    def id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical form."""
        return hashlib.sha256(encode(self.tree()).encode()).hexdigest()[:12]

    @property
    def draw(self) -> int | None:
        """Number of the data set's draw; None if all seeds share one draw."""
        return self.seed if self.dataset.draw_by_seed else None

    @property
    def trial(self) -> "RunSpec":
        """This run without the measures on test rows."""
        return dataclasses.replace(self, test_rows=False)

    @property
    def has_curve(self) -> bool:
        """Whether the run is evaluated between start and end."""
        return self.dataset.n_test_curve > 0 or self.early_stopping > 0

    def problems(self) -> Iterator[str]:
        """Yield why this run cannot be trained: single fields, fields together, model and data."""
        patience, rows, n = self.early_stopping, self.dataset.n_validation, self.group_size
        supervised, longest = self.objective == "sft", self.dataset.max_length
        past = {f.name: f.past for f in fields(RunSpec)}
        unused = [k for k in OF_SAMPLING if supervised and getattr(self, k) != past[k]]
        never = why_not_early(patience, self.steps, rows) if patience and supervised else ""
        fits = supervised or 1 <= self.max_new_tokens < longest
        together = (
            ("warmup_steps", 0 < self.steps <= self.warmup_steps, f"fewer than steps={self.steps}"),
            *((k, True, "to be left out with objective=sft") for k in unused),
            (
                "group_size",
                not supervised and n < 2,
                "at least 2, for a baseline; typical: 8 or 16",
            ),
            (
                "batch_size",
                not supervised and n > 1 and self.batch_size % n,
                f"a multiple of group_size={n}: an update has batch_size / group_size prompts",
            ),
            ("max_new_tokens", not fits, f"1 or more, and less than dataset.max_length={longest}"),
            ("train_version", self.train_version != TRAIN_VERSION, f"{TRAIN_VERSION}, or no value"),
            ("early_stopping", patience and not supervised, "0 without objective=sft"),
            ("early_stopping", never, f"0, or other dataset.n_validation and steps: {never}"),
            ("test_rows", not (self.test_rows or rows), "true with dataset.n_validation=0"),
        )
        yield from misfits(self, "", together)
        if rows and not supervised:
            yield f"dataset.n_validation={rows}: expected 0 without objective=sft."
        yield from filter(None, (self.model.problem, self.dataset.problem, self.trainer.problem))
        if self.trainer.command:
            yield from self.trainer.refusals(self)


def snap_lr(lr: float) -> float:
    """Round a learning rate to 3 significant digits, so that grids and refinements share runs."""
    return float(f"{lr:.2e}")


def is_unpinned(part: ModelSpec | DatasetSpec) -> bool:
    """Return whether the content behind a name on the hub can change: it names no commit."""
    names = [part.revision]
    if isinstance(part, DatasetSpec) and part.test_location:
        names.append(part.test_revision)
    return part.source == "hub" and not all(map(COMMIT.fullmatch, names))


def validate(spec: RunSpec) -> None:
    """Raise SpecError if the spec cannot be trained. Needs no torch and no files."""
    for problem in spec.problems():
        raise SpecError(problem)
    spec.method.check(spec.model)


def with_axes(spec: RunSpec, values: dict[str, Any]) -> RunSpec:
    """Return a copy with `values` set; keys are fields of the method, or else of RunSpec."""
    kind: type = type(spec.method)
    of_method, of_spec = _axes(kind), _axes(RunSpec)
    for key in values:
        if key not in of_method and key not in of_spec:
            what = f"axis of method {spec.method.name!r}"
            raise SpecError(unknown(what, key, {**of_method, **of_spec}))
    changes = {of_spec[k]: v for k, v in values.items() if k not in of_method}
    if of_values := {of_method[k]: v for k, v in values.items() if k in of_method}:
        changes["method"] = dataclasses.replace(spec.method, **of_values)
    return dataclasses.replace(spec, **changes)


@cache
def _axes(cls: type) -> dict[str, str]:
    """Map each key that may be an axis to its field."""
    no_axes = ("name", "method", "trainer", "train_version")
    return {f.key: f.name for f in fields(cls) if f.name not in no_axes}
