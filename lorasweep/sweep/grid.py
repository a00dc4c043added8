"""Expand the arms and axes of a sweep into runs."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorasweep.errors import RankTooLarge, SpecError
from lorasweep.methods.registry import method_class
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec, validate, with_axes
from lorasweep.sweep.question import Sweep, axes_of

MAX_RUNS = 100_000
MAX_PROBLEMS = 5
"""Problems of runs that one message lists."""
GENERATOR_PARAMS = "generator_params"
"""The axis whose values are mappings, each with parameters of a synthetic data set."""
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
        raise SpecError(
            f"geom:{low},{high},{per_decade}: expected 0 < low <= high and a positive count per "
            "decade, for example geom:1e-4,1e-2,4."
        )
    n = math.floor(math.log10(high / low) * per_decade + 1e-6)
    return [float(f"{low * 10 ** (i / per_decade):.2e}") for i in range(n + 1)]


def around(centre: float, n: int, factor: float) -> list[float]:
    """List `n` learning rates a `factor` apart, with `centre` in the middle, to 3 digits."""
    if not (centre > 0 and n >= 1 and factor > 1):
        raise SpecError(
            f"around:{centre},{n},{factor}: expected centre > 0, n >= 1 and factor > 1, for "
            "example around:1e-3,7,2."
        )
    return [float(f"{centre * factor ** (i - (n - 1) / 2):.2e}") for i in range(int(n))]


def expand(
    base: RunSpec,
    sweep: Sweep,
    model: Callable[[str], ModelSpec],
    dataset: Callable[[str], DatasetSpec],
) -> list[Point]:
    """Return the distinct runs of a sweep over `base`, in the order of arms and axes.

    `model` and `dataset` turn names on the axes model and dataset into specs.

    Raises:
        SpecError: runs are not valid; the message has up to MAX_PROBLEMS problems, each with its
            first run.
    """
    points: dict[str, Point] = {}
    problems: dict[str, list[str]] = {}
    look_up: dict[str, Callable[[str], Any]] = {"model": model, "dataset": dataset}
    # one spec per name, so that it is checked and encoded once for thousands of runs
    with_params: dict[str, DatasetSpec] = {}

    def named(start: RunSpec, values: Axes) -> Axes:
        """Replace names and generator parameters by specs."""
        values = {k: look_up[k](v) if k in look_up else v for k, v in values.items()}
        params = values.pop(GENERATOR_PARAMS, None)
        if params:
            data = values.get("dataset", start.dataset)
            name = f"{data.name}({', '.join(f'{k}={v:g}' for k, v in sorted(params.items()))})"
            if name not in with_params:
                merged = {**data.generator_params, **params}
                with_params[name] = dataclasses.replace(data, name=name, generator_params=merged)
            values["dataset"] = with_params[name]
        return values

    for arm, axes in sweep.arms.items():
        cls = method_class(axes["method"])
        same = type(base.method) is cls
        start = base if same else dataclasses.replace(base, method=cls())
        found = assignments({**sweep.axes, **axes_of(axes)})
        if len(found) > MAX_RUNS:
            raise SpecError(
                f"arm {arm!r} has {len(found)} runs; the limit is {MAX_RUNS}. Give an axis fewer "
                "values."
            )
        for values in found:
            try:
                spec = with_axes(start, named(start, values))
                validate(spec)
            except SpecError as error:
                begun = any(p.arm == arm for p in points.values())
                if sweep.search and begun and isinstance(error, RankTooLarge):
                    continue  # a search compares the ranks that the model can have
                shown = ", ".join(f"{k}={v}" for k, v in values.items())
                problems.setdefault(str(error), []).append(f"arm {arm!r}, point {shown}")
                if len(problems) >= MAX_PROBLEMS:
                    raise SpecError("\n".join([*_listed(problems), "..."])) from None
                continue
            points.setdefault(spec.id, Point(arm, spec))
    if problems:
        raise SpecError("\n".join(_listed(problems)))
    if not points:
        raise SpecError("the grid is empty: no arm has any run. Give each axis at least one value.")
    return list(points.values())


def _listed(problems: dict[str, list[str]]) -> list[str]:
    """Return a line for each problem, with the first run that has it and the number of others."""
    others = [f" and {len(runs) - 1} other runs" * (len(runs) > 1) for runs in problems.values()]
    return [f"{runs[0]}{more}: {p}" for (p, runs), more in zip(problems.items(), others)]


def assignments(axes: Axes) -> list[dict[str, Any]]:
    """Return the product of the axes, each a value or a list of values, as dicts: field -> value.

    A value that is a mapping sets several fields, and is expanded as a product:
    `cell: [{steps: 800, lr: [1e-3, 2e-3]}, {steps: 200, lr: [2e-3]}]` has three values. The
    exception is the axis `generator_params`.
    """
    size = math.prod(len(v) if isinstance(v, list) else 1 for v in axes.values())
    if size > MAX_RUNS:
        raise SpecError(
            f"an arm has {size} runs or more; the limit is {MAX_RUNS}. Give an axis fewer values."
        )
    parts = []
    for name, values in axes.items():
        part: list[dict[str, Any]] = []
        for value in values if isinstance(values, list) else [values]:
            is_product = isinstance(value, dict) and name != GENERATOR_PARAMS
            part += assignments(value) if is_product else [{name: value}]
        parts.append(part)
    return [
        {k: v for part in chosen for k, v in part.items()} for chosen in itertools.product(*parts)
    ]


def fields_of(axes: Axes) -> set[str]:
    """Return the fields that the axes set, including those in mappings."""
    found = set()
    for name, values in axes.items():
        given = values if isinstance(values, list) else [values]
        inner = [v for v in given if isinstance(v, dict) and name != GENERATOR_PARAMS]
        found |= set().union(*map(fields_of, inner)) if inner else {name}
    return found


def curve_key(point: Point) -> tuple[str, str]:
    """Return the key of a run's LR curve: its arm, and its spec without learning rate and seed."""
    return point.arm, dataclasses.replace(point.spec, lr=1.0, seed=0).canonical
