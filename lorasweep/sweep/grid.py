"""Expand the arms and axes of a sweep into runs, name them, and make runs that follow from results.

These are fresh seeds around each optimum, and runs that the analysis adds after an interim
analysis, which `store.looks` records.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.errors import RankTooLarge, SpecError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.method import Method
from lorasweep.spec.model import LAYER_SETS, ROUTER, ModelSpec
from lorasweep.spec.run import RunSpec, snap_lr, validate, with_axes
from lorasweep.spec.values import fields
from lorasweep.sweep.question import Replicates, Sweep, axes_of

MAX_RUNS = 100_000
MAX_PROBLEMS = 5
"""Problems of runs that one message lists."""
GENERATOR_PARAMS = "generator_params"
"""The axis whose values are mappings, each with parameters of a synthetic data set."""
WHOLE = (GENERATOR_PARAMS, "fields")
"""Axes whose values are mappings as a whole."""
FIRST = ("model", "dataset", "rank", "alpha", "layers", "scope", "batch_size", "steps")
"""Fields that come first in a name, in this order."""
REST = "embedding, norms"
Axes = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One run of a sweep, with its arm."""

    arm: str
    spec: RunSpec

    @property
    def id(self) -> str:
        """The run's id."""
        return self.spec.id


def geom(low: float, high: float, per_decade: float) -> list[float]:
    """List learning rates from `low` to `high`, `per_decade` per factor of 10, to 3 digits."""
    if not (0 < low <= high and per_decade > 0 and math.isfinite(high / low)):
        raise SpecError("geom:LOW,HIGH,PER_DECADE: expected numbers above 0, as geom:1e-4,1e-2,4.")
    n = math.floor(math.log10(high / low) * per_decade + 1e-6)
    return [snap_lr(low * 10 ** (i / per_decade)) for i in range(n + 1)]


def around(centre: float, n: int, factor: float) -> list[float]:
    """List `n` learning rates a `factor` apart, with `centre` in the middle, to 3 digits."""
    if not (centre > 0 and n >= 1 and factor > 1):
        raise SpecError("around:CENTRE,N,FACTOR: expected a factor above 1, as around:1e-3,7,2.")
    return [snap_lr(centre * factor ** (i - (n - 1) / 2)) for i in range(int(n))]


def expand(base: RunSpec, sweep: Sweep, look_up: Callable[[str, str], Any]) -> list[Point]:
    """Return the distinct runs of a sweep over `base`, in the order of arms and axes.

    `look_up(group, name)` returns the spec of a name on the axes model and dataset, or a method.

    Raises:
        SpecError: runs are not valid; the message has up to MAX_PROBLEMS problems, each with its
            first run.
    """
    points: dict[str, Point] = {}
    problems: dict[str, list[str]] = {}
    # one spec per name, so that it is checked and encoded once for thousands of runs
    with_params: dict[str, DatasetSpec] = {}
    for arm, axes in sweep.arms.items():
        start, name = base, axes["method"]
        if base.method.name != name:
            start = dataclasses.replace(base, method=look_up("method", name))
        begun = False
        for given in assignments({**sweep.axes, **axes_of(axes)}):
            values = {
                k: look_up(k, v) if k in ("model", "dataset") else v for k, v in given.items()
            }
            if params := values.pop(GENERATOR_PARAMS, None):
                numbers = params.values() if isinstance(params, dict) else [None]
                if not all(isinstance(v, int | float) for v in numbers):
                    raise SpecError(f"generator_params={params!r}: expected numbers by name.")
                data = values.get("dataset", start.dataset)
                name = f"{data.name}({', '.join(f'{k}={v:g}' for k, v in sorted(params.items()))})"
                if name not in with_params:
                    merged = {**data.generator_params, **params}
                    with_params[name] = dataclasses.replace(
                        data, name=name, generator_params=merged
                    )
                values["dataset"] = with_params[name]
            try:
                spec = with_axes(start, values)
                validate(spec)
            except SpecError as error:
                if not (sweep.search and begun and isinstance(error, RankTooLarge)):
                    shown = ", ".join(f"{k}={v}" for k, v in given.items())
                    hint = " Other ranks for all arms: lora.rank=1,4." * isinstance(
                        error, RankTooLarge
                    )
                    problems.setdefault(f"{error}{hint}", []).append(f"arm {arm!r}, point {shown}")
                continue  # a search compares the ranks that the model can have
            points.setdefault(spec.id, Point(arm, spec))
            begun = True
    if problems:
        lines = [
            f"{runs[0]}{f' and {len(runs) - 1} other runs' * (len(runs) > 1)}: {problem}"
            for problem, runs in problems.items()
        ]
        more = ["..."] * (len(lines) > MAX_PROBLEMS)
        raise SpecError("\n".join([*lines[:MAX_PROBLEMS], *more]))
    if not points:
        raise SpecError("the grid is empty: no arm has any run. Give each axis at least one value.")
    return list(points.values())


def assignments(axes: Axes) -> list[dict[str, Any]]:
    """Return the product of the axes, each a value or a list of values, as dicts: field -> value.

    A value that is a mapping sets several fields, and is expanded as a product:
    `cell: [{steps: 800, lr: [1e-3, 2e-3]}, {steps: 200, lr: [2e-3]}]` has three values. The
    exceptions are WHOLE.
    """
    parts = []
    for name, values in axes.items():
        part: list[dict[str, Any]] = []
        for value in values if isinstance(values, list) else [values]:
            is_product = isinstance(value, dict) and name not in WHOLE
            part += assignments(value) if is_product else [{name: value}]
        parts.append(part)
    if (size := math.prod(map(len, parts))) > MAX_RUNS:
        raise SpecError(
            f"an arm has {size} runs or more; the limit is {MAX_RUNS}. Give an axis fewer values."
        )
    return [
        {k: v for part in chosen for k, v in part.items()} for chosen in itertools.product(*parts)
    ]


def fields_of(axes: Axes) -> set[str]:
    """Return the fields that the axes set, including those in mappings."""
    found = set()
    for name, values in axes.items():
        given = values if isinstance(values, list) else [values]
        inner = [v for v in given if isinstance(v, dict) and name not in WHOLE]
        found |= set().union(*map(fields_of, inner)) if inner else {name}
    return found


def curve_key(point: Point) -> tuple[str, str]:
    """Return the key of a run's LR curve: its arm, and its spec without learning rate and seed."""
    return point.arm, dataclasses.replace(point.spec, lr=1.0, seed=0).canonical


# ---------------------------------------------------------------- later runs


def second_stage(
    points: Sequence[Point], replicate: Replicates, loss: Callable[[str], float | None]
) -> list[Point]:
    """Return runs with fresh seeds at the `n_lrs` learning rates around each curve's optimum.

    `loss`: run id -> loss (lower is better), None if the run diverged. Only first-stage runs select
    learning rates, so the selection does not change while the second stage runs.
    """
    curves: dict[tuple[str, str], dict[float, list[Point]]] = {}
    for p in points:
        curves.setdefault(curve_key(p), {}).setdefault(p.spec.lr, []).append(p)
    extra: dict[str, Point] = {}
    for (arm, _), by_lr in curves.items():
        if replicate.arms and arm not in replicate.arms:
            continue
        means = {  # LR -> mean loss, infinity if any run diverged
            lr: sum(math.inf if (v := loss(p.id)) is None else v for p in own) / len(own)
            for lr, own in by_lr.items()
        }
        for lr in lrs_around_optimum(means, replicate.n_lrs):
            for seed in replicate.seeds:
                spec = dataclasses.replace(by_lr[lr][0].spec, seed=seed)
                extra.setdefault(spec.id, Point(arm, spec))
    known = {p.id for p in points}
    return [p for p in extra.values() if p.id not in known]


def expected_second_stage(points: Sequence[Point], replicate: Replicates) -> list[Point]:
    """Return the second stage if each optimum is in the middle of its curve's learning rates.

    Used for plans: which learning rates get fresh seeds is not known before the first stage ends.
    """
    tried: dict[tuple[str, str], set[float]] = {}
    for p in points:
        tried.setdefault(curve_key(p), set()).add(p.spec.lr)
    ranks = {key: {lr: k for k, lr in enumerate(sorted(lrs))} for key, lrs in tried.items()}
    of_run = {p.id: (ranks[curve_key(p)], p.spec.lr) for p in points}
    from_middle = {i: abs(of[lr] - (len(of) - 1) / 2) for i, (of, lr) in of_run.items()}
    return second_stage(points, replicate, from_middle.get)


def lrs_around_optimum(losses: dict[float, float], n: int) -> list[float]:
    """Return `n` neighbouring learning rates around the best one; empty if no loss is finite.

    If `n` is even, one more lies above the best than below.
    """
    lrs = sorted(losses)
    if not any(map(math.isfinite, losses.values())):
        return []
    best = lrs.index(min(lrs, key=losses.__getitem__))
    first = min(max(0, best - (n - 1) // 2), max(0, len(lrs) - n))
    return lrs[first : first + n]


def planned_seeds(points: Sequence[Point], replicate: Replicates) -> int:
    """Return the number of seeds at the optimum after both stages, the largest of all arms."""
    seeds: dict[str, set[int]] = {}
    for p in points:
        fresh = replicate.seeds if not replicate.arms or p.arm in replicate.arms else []
        seeds.setdefault(p.arm, set(fresh)).add(p.spec.seed)
    return max(map(len, seeds.values()))


def added_points(rounds: Sequence[dict[str, Any]], known: Sequence[Point]) -> list[Point]:
    """Return the runs that recorded rounds (looks) added.

    Each is a run in `known` with another learning rate and seed. If that run is not in `known`, the
    sweep was edited or only a part of it was requested: then the added run is left out.
    """
    by_id = {p.id: p for p in known}
    extra: dict[str, Point] = {}
    for entry in (e for r in rounds for e in r["runs"]):
        like = by_id.get(entry["like"])
        if like is not None:
            spec = dataclasses.replace(like.spec, lr=entry["lr"], seed=entry["seed"])
            validate(spec)
            extra.setdefault(spec.id, Point(like.arm, spec))
    return [p for p in extra.values() if p.id not in by_id]


# ---------------------------------------------------------------- names, tables, counts


def settings_of(point: Point) -> dict[str, Any]:
    """Return all settings of a run, those of its method too, by name; model and data by theirs."""
    method = point.spec.method
    own = {f.key: getattr(method, f.name) for f in fields(type(method))}
    named = {"model": point.spec.model.name, "dataset": point.spec.dataset.name}
    return {**own, **dict(point.spec.values()), **named}


def run_names(points: Sequence[Point]) -> dict[str, str]:
    """Return the name of each run id: arm, the fields in which the runs differ, learning rate."""
    rows, found = [settings_of(p) for p in points], dict[str, set[Any]]()
    for row in rows:
        for key, value in row.items():
            if key not in ("lr", "method", "name", "config", "fields"):  # the arm says these
                found.setdefault(key, set()).add(value)
    varied = [k for k in dict.fromkeys((*FIRST, *found)) if len(found.get(k, ())) > 1]
    names = {}
    for p, row in zip(points, rows):
        shown = [
            f"r{row[k]}" if k == "rank" else f"{k}={row[k]}"
            for k in varied
            if k in row and k != "seed"
        ]
        seed = [f"seed={p.spec.seed}"] if "seed" in varied or len(points) == 1 else []
        names[p.id] = " ".join([p.arm, *shown, f"lr={p.spec.lr:g}", *seed])
    return names


def trained_by_set(method: Method, model: ModelSpec) -> list[dict[str, Any]]:
    """Count trained parameters by layer set, and of the rest; their sum is `method.n_trainable`.

    Counts are made from shapes alone; `matrices` counts those of all experts.
    """
    found, sets = list[dict[str, Any]](), method.target_layers()
    for layer_set in (*LAYER_SETS, *([ROUTER] if model.n_experts else [])):
        matrices = model.matrices((layer_set,))
        weights, ranks = sum(m.size for m in matrices), set[int | None]()
        trained = 0 if sets else weights  # a method without layer sets trains all weights
        if layer_set in sets:
            only: dict[str, Any] = {"layers": layer_set}
            trained = dataclasses.replace(method, **only).n_trainable(model)
            ranks = {method.rank_of(m) for m in matrices}
        experts = [f" of {m.n_experts} experts, {m.n_active} active" for m in matrices]
        shapes = [f"{m.d_in}x{m.d_out}{e * (m.n_experts > 1)}" for m, e in zip(matrices, experts)]
        names = {"layer_set": layer_set, "matrices": sum(m.count for m in matrices)}
        names |= {"shapes": [*dict.fromkeys(shapes)], "ranks": sorted(filter(None, ranks))}
        found.append({**names, "trained": trained, "weights": weights})
    trained = method.n_trainable(model) - sum(f["trained"] for f in found)
    weights = model.n_params - sum(f["weights"] for f in found)
    rest = {"layer_set": REST, "matrices": 0, "shapes": [], "ranks": []}
    return [*found, {**rest, "trained": trained, "weights": weights}]
