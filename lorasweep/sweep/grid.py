"""A sweep is a question: its claims with margins, its arms and axes, and the runs that they expand
to.

Pure: standard library only, no files, no torch.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.methods.registry import method_class
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec, validate, with_axes

MAX_RUNS = 100_000
WHOSE = ("study", "popular", "ours")


@dataclass
class Claim:
    """What is measured, what is expected, and how far off still counts: stated before any run."""

    says: str = ""
    """The claim in words, as a table shows it. Not judged, so not part of the hash."""
    whose: str = "ours"
    """Who claims it: `study`, `popular` (summaries of it, libraries' defaults, other papers) or
    `ours`. Not hashed."""
    measure: str = ""
    """What is measured, with its unit, as a table shows it. Not hashed."""
    beside: str = ""
    """What has to be said beside the verdict: where it is claimed, what else is known of it. Not
    hashed."""
    estimand: str = ""
    expected: float = math.nan
    margin: list[float] = field(default_factory=list)
    """[low, high]: the claim is SUPPORTED if the 95% interval lies inside, REFUTED if it lies
    outside."""
    primary: bool = False
    rivals: dict[str, float] = field(default_factory=dict)
    """Other values in print, by name."""


@dataclass
class Second:
    """The second stage: fresh seeds at the learning rates around each curve's best."""

    seeds: list[int] = field(default_factory=list)
    n_lrs: int = 3
    arms: list[str] = field(default_factory=list)
    """Arms that get fresh seeds; empty: all. For a control that no verdict rests on, where a run is
    dear."""


@dataclass
class Sweep:
    """One file of sweeps/."""

    question: str = ""
    source: str = ""
    how: str = ""
    """How it is measured, and what that leaves open: what a reader must know beside the answer."""
    claims: dict[str, Claim] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    """Shared axes: name -> list of values."""
    arms: dict[str, Any] = field(default_factory=dict)
    """Arm name -> {method: name, axis: list or value, ...}."""
    second: Second = field(default_factory=Second)
    rounds: int = 1
    """Looks at the answer that are planned, 1 to 5: each is judged at a stricter level, so that all
    together err in 5%."""
    analysis: str = ""
    at: dict[str, Any] = field(default_factory=dict)
    """Scale name -> what the arms and axes take from it: ${sweep.at.${scale.at}.ranks}. Not part of
    the question."""
    parts: list[str] = field(default_factory=list)
    """Names of sweeps that are asked one after another instead of arms of its own: +sweep=study."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep and the arm that it stands for."""

    arm: str
    spec: RunSpec
    id: str


def geom(low: float, high: float, per_decade: float) -> list[float]:
    """List learning rates from `low` to `high`, `per_decade` a factor 10, snapped to 3 significant
    digits."""
    if not (0 < low <= high and per_decade > 0 and math.isfinite(high / low)):
        raise SpecError(
            f"geom:{low},{high},{per_decade}: needs 0 < low <= high and a positive count per decade."
        )
    n = math.floor(math.log10(high / low) * per_decade + 1e-6)
    return [float(f"{low * 10 ** (i / per_decade):.2e}") for i in range(n + 1)]


def around(centre: float, n: int, factor: float) -> list[float]:
    """List `n` learning rates at `factor` apart, `centre` in the middle."""
    if not (centre > 0 and n >= 1 and factor > 1):
        raise SpecError(f"around:{centre},{n},{factor}: needs centre > 0, n >= 1, factor > 1.")
    return [float(f"{centre * factor ** (i - (n - 1) / 2):.2e}") for i in range(int(n))]


def check_sweep(name: str, sweep: Sweep) -> None:
    """Raise SpecError if the question is not stated in full: claims with margins, arms, no empty
    axis."""
    where = f"sweep {name!r}"
    if not sweep.question:
        raise SpecError(f"{where} asks no question. Write `question: ...` at its top.")
    if sweep.parts:
        if sweep.arms or sweep.axes or sweep.claims:
            raise SpecError(
                f"{where} has parts, so it has no arms, axes and claims of its own: they are those of its parts."
            )
        return
    if not sweep.claims:
        raise SpecError(
            f"{where} has no claims. State at least one, with estimand and margin, before any run."
        )
    for key, claim in sweep.claims.items():
        if claim.whose not in WHOSE:
            raise SpecError(
                f"{where}, claim {key!r}: whose={claim.whose!r}. Write one of {', '.join(WHOSE)}."
            )
        low, high = (claim.margin + [math.nan, math.nan])[:2]
        if len(claim.margin) != 2 or not low < high:
            raise SpecError(
                f"{where}, claim {key!r}: margin={claim.margin}. Give [low, high] with low < high."
            )
    if not 1 <= sweep.rounds <= 5:
        raise SpecError(f"{where}: rounds={sweep.rounds}. Plan 1 to 5 looks at the answer.")
    if not sweep.arms:
        raise SpecError(f"{where} has no arms, so there is nothing to run.")
    for arm, axes in sweep.arms.items():
        if not isinstance(axes, dict) or "method" not in axes:
            raise SpecError(f"{where}, arm {arm!r}: needs a method. Write `method: lora` below it.")
    for arm in sweep.second.arms:
        if arm not in sweep.arms:
            raise SpecError(
                f"{where}: second.arms names {arm!r}, which is not an arm. Its arms: {', '.join(sweep.arms)}; "
                "sweep.second.arms=[] means all of them."
            )
    for axis, values in _all_axes(sweep):
        if isinstance(values, list) and not values:
            raise SpecError(
                f"{where}: axis {axis!r} is an empty list, so the grid is empty. Give at least one value."
            )


def _all_axes(sweep: Sweep) -> list[tuple[str, Any]]:
    shared = list(sweep.axes.items())
    return shared + [
        (f"arms.{a}.{k}", v) for a, axes in sweep.arms.items() for k, v in axes.items()
    ]


def expand(
    base: RunSpec, sweep: Sweep, model: Callable[[str], ModelSpec], dataset: Callable[[str], Any]
) -> list[Point]:
    """Expand a sweep over `base` into its checked, distinct runs, in the order of arms and axes.

    `model` and `dataset` turn the names on those axes into specs. Every point is checked; all that
    is wrong is raised in one SpecError.
    """
    points: dict[str, Point] = {}
    problems: list[str] = []
    seen_arms: dict[str, str] = {}
    look: dict[str, Callable[[str], Any]] = {"model": model, "dataset": dataset}
    known: dict[str, Any] = {}
    for arm, axes in sweep.arms.items():
        fields = {k: v for k, v in {**sweep.axes, **axes}.items() if k != "method"}
        cls = method_class(axes["method"])
        method = base.method if type(base.method) is cls else cls()
        start = dataclasses.replace(base, method=method)
        found = assignments(fields)
        if len(found) > MAX_RUNS:
            raise SpecError(
                f"arm {arm!r} has {len(found)} runs; the limit is {MAX_RUNS}. Shorten an axis."
            )
        for values in found:
            where = f"arm {arm!r}, point {_say(values)}"
            try:
                values = {k: look[k](v) if k in look else v for k, v in values.items()}
                spec = with_axes(
                    start, values if "knobs" not in values else _with_knobs(start, values, known)
                )
                validate(spec)
            except SpecError as error:
                problems.append(f"{where}: {error}")
                if len(problems) >= 5:
                    break
                continue
            if seen_arms.setdefault(spec.id, arm) == arm:
                points.setdefault(spec.id, Point(arm, spec, spec.id))
    if problems:
        raise SpecError("\n".join(problems) + ("\n..." if len(problems) >= 5 else ""))
    if not points:
        raise SpecError("the grid is empty: no arm has a point.")
    return list(points.values())


def assignments(axes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the product of axes as dicts from field to value.

    An axis is a list of values, or one value. A value that is a mapping sets several fields at
    once, and is a product of its
    own: `cell: [{batch_size: 4, steps: 800, lr: [1e-3, 2e-3]}, {batch_size: 16, steps: 200, lr:
    [2e-3]}]` has three. The field `knobs` is a mapping itself: settings of a synthetic data set.
    """
    size = math.prod(len(v) if isinstance(v, list) else 1 for v in axes.values())
    if size > MAX_RUNS:
        raise SpecError(
            f"an arm has {size} runs or more; the limit is {MAX_RUNS}. Shorten an axis."
        )
    parts = []
    for name, values in axes.items():
        part: list[dict[str, Any]] = []
        for value in values if isinstance(values, list) else [values]:
            part += (
                assignments(value)
                if isinstance(value, dict) and name != "knobs"
                else [{name: value}]
            )
        parts.append(part)
    return [
        {k: v for part in chosen for k, v in part.items()} for chosen in itertools.product(*parts)
    ]


def fields_of(axes: dict[str, Any]) -> set[str]:
    """Return the fields that axes set, those inside mappings included."""
    found = set()
    for name, values in axes.items():
        inner = [
            v
            for v in (values if isinstance(values, list) else [values])
            if isinstance(v, dict) and name != "knobs"
        ]
        found |= set().union(*(fields_of(v) for v in inner)) if inner else {name}
    return found


def _with_knobs(start: RunSpec, values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Put knobs into the data set, whose name then tells them; runs of the same knobs share one
    object."""
    values = dict(values)
    knobs, data = values.pop("knobs"), values.get("dataset", start.dataset)
    name = f"{data.name}({', '.join(f'{k}={v:g}' for k, v in sorted(knobs.items()))})"
    if name not in known:
        params = {**data.generator_params, **knobs}
        known[name] = dataclasses.replace(data, name=name, generator_params=params)
    return {**values, "dataset": known[name]}


def _say(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}={getattr(v, 'name', v)}" for k, v in values.items())


def curve_key(point: Point) -> tuple[str, str]:
    """Runs with the same key are one curve: equal but for lr and seed, in one arm."""
    return point.arm, dataclasses.replace(point.spec, lr=1.0, seed=0).canonical


def second_stage(
    points: Sequence[Point], second: Second, nll: Callable[[str], float | None]
) -> list[Point]:
    """Return the runs of the second stage: fresh seeds at the `n_lrs` learning rates around each
    curve's best.

    `nll` gives a run's final held-out NLL; None for one that diverged. It is asked about the first
    stage's runs only, so that the answer does not change as the second stage fills.
    """
    curves: dict[tuple[str, str], dict[float, list[Point]]] = {}
    for p in points:
        curves.setdefault(curve_key(p), {}).setdefault(p.spec.lr, []).append(p)
    extra: dict[str, Point] = {}
    for (arm, _), by_lr in curves.items():
        if second.arms and arm not in second.arms:
            continue
        lrs = sorted(by_lr)
        scores = []
        for lr in lrs:
            values = [nll(p.id) for p in by_lr[lr]]
            usable = [v for v in values if v is not None and math.isfinite(v)]
            scores.append(
                sum(usable) / len(usable) if usable and len(usable) == len(values) else math.inf
            )
        if not any(math.isfinite(s) for s in scores):
            continue
        best = min(range(len(lrs)), key=scores.__getitem__)
        first = min(max(0, best - second.n_lrs // 2), max(0, len(lrs) - second.n_lrs))
        for lr in lrs[first : first + second.n_lrs]:
            for seed in second.seeds:
                spec = dataclasses.replace(by_lr[lr][0].spec, seed=seed)
                extra.setdefault(spec.id, Point(arm, spec, spec.id))
    known = {p.id for p in points}
    return [p for p in extra.values() if p.id not in known]
