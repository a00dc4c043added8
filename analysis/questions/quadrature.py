"""Ask whether the law of analysis/measures/laws.py predicts learning rates on new conditions.

The law's constants, its rivals and the rule were fixed before the first run. A condition is one
base model, data set, batch, number of updates and alpha, with the optima of full fine-tuning and of
LoRA. All estimands are functions of all conditions. Their intervals are Student's over the
jackknife's pseudo-values, which leave out one base model with all its conditions, as conditions of
one base share its optimum of full fine-tuning and its misfit. For ln of an rms error that held the
truth in 90 to 97% of simulations, of 97.1. With a third of the degrees of freedom, 97 to 99% (93
where errors have heavy tails). A law with an rms error of 0.1 is then SUPPORTED in 58%.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats

from analysis.inference.decide import Gate, GateCode
from analysis.inference.estimate import (
    BASES,
    PROBABILITIES,
    Estimate,
    Part,
    Spread,
    exp_of,
    from_draws,
    pseudo_values,
)
from analysis.inference.rows import Row, measured
from analysis.measures import laws, places
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.curves import lr_curves
from analysis.runs.table import GROUP_KEYS, as_losses, read

MIDDLE, ENDS = (0.5, 2.0), (0.2, 5.0)
"""Where the law and the linear law differ most: z in MIDDLE one way, z outside ENDS the other."""
NEAR = math.log(1.2)
"""With A frozen, ratios agree if they differ by at most this, in ln."""
MOVES, STILL = 1.0, 0.1
"""A moves if z is at least MOVES, and hardly moves if it is below STILL."""
TUNED = 32.0
"""The alpha from whose tuned learning rate others are computed."""
BEFORE = Path(__file__).parents[1] / "results" / "ratios_before.csv"
"""Ratios that were known before the first run; not in an installed package."""
NAME = "all new conditions"
COUNTED, FROZEN = 65, 10
"""Conditions that are judged, and those with A frozen."""


class Cell(NamedTuple):
    """One condition: the optima of full fine-tuning and of LoRA."""

    base: str
    unit: str
    """Base, data, batch and updates: conditions of one optimum of full fine-tuning."""
    hidden: int
    alpha: float
    steps: int
    b_ratio: float
    """B's learning rate over A's. Where it is large, A is frozen, and R counts B's."""
    full: Optimum
    lora: Optimum

    @property
    def full_lr(self) -> float:
        """Full fine-tuning's best learning rate."""
        return float(self.full.best_lr.value or math.nan)

    @property
    def lora_lr(self) -> float:
        """LoRA's best learning rate (of B, if A is frozen)."""
        return self.b_ratio * float(self.lora.best_lr.value or math.nan)

    @property
    def measured(self) -> Estimate:
        """The ratio with its interval."""
        draws = self.b_ratio * np.exp(self.lora.best_lr.log_draws - self.full.best_lr.log_draws)
        return from_draws(draws, self.full.best_lr.n + self.lora.best_lr.n)

    @property
    def at(self) -> tuple[float, float, float]:
        """Hidden size, alpha and updates."""
        return self.hidden, self.alpha, self.steps

    def by(self, law: str, full: Any = None) -> Any:
        """Return the ratio that a law predicts, at these learning rates of full fine-tuning."""
        return laws.ratio(*self.at, self.full_lr if full is None else full, law)

    @property
    def z(self) -> float:
        """A's movement over its start, as the law predicts it from full fine-tuning."""
        return float(laws.movement(self.hidden, self.by(laws.LAW) * self.full_lr, self.steps))

    @property
    def predicted(self) -> float:
        """The ratio that the law predicts."""
        return float(laws.ratio(*self.at, self.full_lr, b_ratio=self.b_ratio))

    def error(self, law: str) -> float:
        """Return ln(measured / predicted)."""
        return math.log(self.lora_lr / self.full_lr / self.by(law))

    def noise(self, law: str) -> float:
        """Return the variance of `error` by measurement: the prediction, too, is from a draw."""
        full, lora = self.full.best_lr.log_draws, self.lora.best_lr.log_draws
        return float(np.var(lora - full - np.log(self.by(law, np.exp(full)))))

    def cost(self, lr: float) -> float:
        """Return LoRA's regret at a learning rate, in percent of full fine-tuning's gain.

        Outside the learning rates tried, the regret at the nearest of them, which is less.
        """
        x = self.lora.curve.x[self.lora.curve.usable]
        return self.percent(self.lora.regret(float(np.clip(lr, *np.exp([x.min(), x.max()])))))

    def percent(self, nats: float | None) -> float:
        """Convert nats to percent of full fine-tuning's gain."""
        gain = self.full.curve.nll_start - (self.full.best_nll or math.nan)
        return 100 * (math.nan if nats is None else nats) / gain

    @property
    def loss(self) -> float:
        """LoRA's loss at its best learning rate, in percent of full fine-tuning's gain."""
        return self.percent(self.lora.best_nll)


Cells = Sequence[Cell]


def over_bases(cells: Cells, measure: Callable[[Cells], float], log: bool = False) -> Estimate:
    """Return a function of the conditions with its interval over bases; `log`: an rms error."""
    bases = list(dict.fromkeys(c.base for c in cells))
    # floats that are not finite: no condition of the kind that is measured
    of = (lambda c: math.log(v) if (v := measure(c)) > 0 else math.nan) if log else measure
    each = [of([c for c in cells if c.base != b]) for b in bases] if len(bases) > 1 else [math.nan]
    values = pseudo_values(of(cells), each) if cells else each
    if not np.isfinite(values).all():
        return Estimate(None, n=len(bases), spread=Spread(len(bases), BASES))
    share = 1 / 3 if log else 1.0
    part = Part(max(float(np.std(values, ddof=1)), 1e-12), share * (len(bases) - 1), share)
    draws = np.mean(values) + part.sd / len(bases) ** 0.5 * stats.t.ppf(PROBABILITIES, part.df)
    e = from_draws(draws, len(bases), spread=Spread(len(bases), BASES, (part,)))
    return exp_of(e) if log else e


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of nothing."""
    return float(np.mean(values)) if len(values) else math.nan


def rms(cells: Cells, law: str = laws.LAW, noise: bool = True) -> float:
    """Return the rms error of ln(ratio); `noise` False: without the variance by measurement."""
    squares = [c.error(law) ** 2 - (0.0 if noise else c.noise(law)) for c in cells]
    return max(mean(squares), 0.0) ** 0.5


def refitted(cells: Cells, law: str) -> float | None:
    """Return the rms error of ln(ratio) where g and k are fitted to the other bases, if any."""

    def off(logs: Sequence[float], of: Cells) -> list[float]:
        g, k = np.exp(logs)  # factors: g acts as 1 / alpha does, k as full fine-tuning's rate
        by = (c._replace(alpha=c.alpha / g).by(law, k * c.full_lr) for c in of)
        return [math.log(c.lora_lr / c.full_lr / r) for c, r in zip(of, by)]

    squares = []
    for left in dict.fromkeys(c.base for c in cells):
        rest, mine = ([c for c in cells if (c.base != left) == other] for other in (True, False))
        fit = optimize.least_squares(off, [0.0, 0.0], args=(rest,)).x if rest else [math.nan] * 2
        squares += [e * e for e in off(fit, mine)]
    return None if math.isnan(square := mean(squares)) else square**0.5


def form(cells: Cells) -> float:
    """Return the measured contrast between the middle and both ends of z over the law's contrast.

    The contrast is of mean ln(ratio / linear law): the middle minus the mean of the two ends.
    """
    low, high = ([c for c in cells if keep(c.z)] for keep in (ENDS[0].__gt__, ENDS[1].__lt__))
    parts = [[c for c in cells if MIDDLE[0] <= c.z <= MIDDLE[1]], low, high]
    if not all(parts):
        return math.nan
    contrast = np.array([1.0, -0.5, -0.5])
    seen = [mean([c.error(laws.LINEAR_LAW) for c in p]) for p in parts]
    said = [mean([c.error(laws.LINEAR_LAW) - c.error(laws.LAW) for c in p]) for p in parts]
    return float(contrast @ seen) / float(contrast @ said)


def by_unit(cells: Cells) -> Iterator[list[Cell]]:
    """Yield the conditions of each unit."""
    for unit in dict.fromkeys(c.unit for c in cells):
        yield [c for c in cells if c.unit == unit]


def rules(cell: Cell, tuned: Cell) -> dict[str, float]:
    """Return a condition's learning rate by each rule, from the one tuned at another alpha."""
    lr, less = tuned.lora_lr, tuned.alpha / cell.alpha
    by_law = float(laws.carried(cell.hidden, tuned.alpha, cell.alpha, cell.steps, lr))
    return {
        laws.LAW: by_law,
        "1/sqrt(alpha)": lr * math.sqrt(less),
        "1/alpha": lr * less,
        "kept": lr,
    }


def carried(cells: Cells, rule: str = laws.LAW) -> float:
    """Return the mean cost, in % of the gain, of carrying the rate tuned at TUNED to 4 and 256."""
    costs = [
        cell.cost(rules(cell, tuned)[rule])
        for unit in by_unit(cells)
        for tuned in unit
        for cell in unit
        if tuned.alpha == TUNED and cell.alpha in (4, 256)
    ]
    return mean(costs)


def from_full(cells: Cells, factor: float | None = None) -> float:
    """Return LoRA's mean cost at TUNED, in % of the gain, at `factor` times FullFT's best rate.

    None: the law's factor. No claim is about it.
    """
    mine = [c for c in cells if c.alpha == TUNED]
    return mean([c.cost((factor or c.predicted) * c.full_lr) for c in mine])


def full_from_lora(cells: Cells) -> float:
    """Return the rms of ln(full fine-tuning's best rate / the law's, from LoRA's at TUNED)."""
    mine = [c for c in cells if c.alpha == TUNED]
    return mean([math.log(laws.full_lr(*c.at, c.lora_lr) / c.full_lr) ** 2 for c in mine]) ** 0.5


def moving(cells: Cells) -> float:
    """Return the mean difference of LoRA's loss between two alphas where A moves, % of the gain."""
    mine = [[c.loss for c in unit if c.z >= MOVES] for unit in by_unit(cells)]
    return mean([abs(a - b) for own in mine for a, b in itertools.combinations(own, 2)])


def still(cells: Cells) -> float:
    """Return LoRA's mean loss where A hardly moves minus that where it moves, in % of the gain."""
    found = []
    for unit in by_unit(cells):
        at_rest = [c.loss for c in unit if c.z < STILL]
        moved = [c.loss for c in unit if c.z >= MOVES]
        found += [mean(at_rest) - mean(moved)] if at_rest and moved else []
    return mean(found)


@dataclass(frozen=True)
class AllCells(base.Condition):
    """All new conditions, of this table and of the other scale's kept answer."""

    cells: list[Cell]
    """Conditions in which A may move."""
    frozen: list[Cell]
    data = NAME
    others: list[Optimum] = field(repr=False)
    """The curves of the other scale's kept answer."""

    @property
    def keys(self) -> list[dict[str, Any]]:
        others = self.others if self.is_judged else []
        return [o.curve.key for o in (*self.optima, *others)]

    @cached_property
    def planned(self) -> list[tuple[int, int]]:
        """Conditions (A may move, frozen), known or not, of this table and of the others."""
        each = [[o.curve.key for _, o in pairs_of(of)] for of in (self.optima, self.others)]
        n_frozen = [sum(float(key.get("lr_b_ratio") or 1) > 1 for key in of) for of in each]
        return [(len(of) - n, n) for of, n in zip(each, n_frozen)]

    @property
    def missing(self) -> str:
        both = len({o.curve.is_full for o in self.optima}) == 2  # perhaps with optima at edges
        return "" if self.cells or both else "a base with both full fine-tuning and LoRA"

    @property
    def is_judged(self) -> bool:
        """Whether the verdict is this answer's: both scales are judged once."""
        return not self.others or sum(self.planned[0]) >= sum(self.planned[1])

    def gates(self, frozen: bool = False) -> list[Gate]:
        """List the gates on all curves; also if conditions are missing."""
        found = base.gates_on([*self.optima, *self.others])
        for of, asked in list(zip(zip(*self.planned), (COUNTED, FROZEN)))[: 1 + frozen]:
            if (n := sum(of)) < asked:
                found.append(Gate(GateCode.FEW_CONDITIONS, f"{n} of {asked}"))
        return found

    def worst_frozen(self) -> Estimate:
        """Combine: both means are within NEAR of 0. Each quantile is the largest of all sides."""
        free = {(c.unit, c.alpha): c for c in self.cells}

        def off_limit(cells: Cells) -> float:
            """Return the mean ln(ratio with A frozen / the law's)."""
            return mean([math.log(c.lora_lr / c.full_lr / c.predicted) for c in cells])

        def off_factor(cells: Cells) -> float:
            """Return the mean ln(ratio with A frozen / ratio without), minus the law's."""
            pairs = [(c, free[c.unit, c.alpha]) for c in cells if (c.unit, c.alpha) in free]
            return mean([math.log(f.lora_lr / c.lora_lr / math.hypot(1, c.z)) for f, c in pairs])

        both = [over_bases(self.frozen, off) for off in (off_limit, off_factor)]
        if any(e.draws is None for e in both):
            return Estimate(None, n=len(self.frozen), spread=both[0].spread)
        sides = [side * e.draws - NEAR for e in both for side in (1, -1) if e.draws is not None]
        worst = from_draws(np.max(np.sort(sides, axis=1), axis=0), len(self.frozen))
        return replace(worst, spread=both[0].spread)


def pairs_of(optima: Sequence[Optimum]) -> Iterator[tuple[Optimum, Optimum]]:
    """Yield full fine-tuning of its group, and LoRA, for every LoRA curve that has both."""
    full = {group: base.full_of(mine) for group, mine in base.by_group(optima).items()}
    yield from ((f, o) for o in base.lora_of(optima) if (f := full[o.curve.group]))


def cells_of(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Cell]:
    """Return the conditions of the pairs in which both optima have an interval."""
    hidden, found = dict(zip(table["model"], table["hidden_size"])), []
    for full, o in pairs_of(optima):
        key = o.curve.key
        if full.best_lr.draws is not None and o.best_lr.draws is not None:
            at = (int(hidden[key["model"]]), float(key["alpha"]), int(key["steps"]))
            b_ratio = float(key.get("lr_b_ratio") or 1)
            found.append(Cell(key["model"], o.curve.group, *at, b_ratio, full, o))
    return found


def conditions(table: pd.DataFrame, *others: pd.DataFrame) -> list[AllCells]:
    """Fit the curves of a table and of other scales' tables, and pair them."""
    optima, *elsewhere = map(base.fit, (table, *others))
    base.check_one(base.lora_of(optima), *GROUP_KEYS, "alpha", "lr_b_ratio")
    each = zip((table, *others), (optima, *elsewhere))
    cells = [c for t, found in each for c in cells_of(t, found)]
    free = [c for c in cells if c.b_ratio == 1]
    curves = [o for found in elsewhere for o in found]
    frozen = [c for c in cells if c.b_ratio > 1]
    runs = pd.concat([table, *others], ignore_index=True) if others else table
    return [AllCells(NAME, runs, optima, free, frozen, curves)]


class OverScales(base.Question):
    """A question with the conditions of every scale, of which each has a table of its own."""

    def analyse(
        self, table: pd.DataFrame, asked: base.Asked, kept: Path | None = None
    ) -> base.Analysis:
        """Fit and judge a sweep's runs, with the kept runs of other scales if its own are kept."""

        def curves(t: pd.DataFrame) -> set[tuple[str, str, str]]:
            keys = ("alpha", "lr_b_ratio")
            return {(c.group, c.name, str([c.key.get(k) for k in keys])) for c in lr_curves(t)}

        name = asked["analysis"]
        mine = curves(table)
        tables = [*map(read, sorted(kept.glob(f"{name}-*/table.parquet")))] if kept else []
        others = [t for t in tables if not mine <= curves(t)]
        others = others if len(others) < len(tables) else []  # none for a grid of the user's own
        joined = replace(self, conditions=lambda table: conditions(table, *map(as_losses, others)))
        return base.Question.analyse(joined, table, asked, kept)


def report(asked: base.Asked, c: AllCells) -> tuple[list[Row], list[base.Section]]:
    """Return the conditions with the ratios by the law, and the errors of all laws and rules."""
    if not c.cells or not c.is_judged:
        return [], []
    errors = {law: over_bases(c.cells, partial(rms, law=law), log=True) for law in laws.NAMES}
    rows: list[list[Any]] = [
        [law, e, rms(c.cells, law), rms(c.cells, law, noise=False)] for law, e in errors.items()
    ]
    for law in (laws.LAW, laws.LINEAR_LAW):
        errors[f"{law}, refitted"] = again = Estimate(refitted(c.cells, law))
        rows.append([f"{law}, refitted to the other bases", None, again.value, None])
    head = "prediction | rms error of ln(ratio), jackknife [95%] | plain | without noise"
    text = f"{len(c.cells)} of {COUNTED} new conditions; intervals over base models (jackknife)."
    sections = [base.Section.of("The law and its rivals", head, rows, [text])]
    costs = {
        rule: over_bases(c.cells, partial(carried, rule=rule))
        for rule in rules(c.cells[0], c.cells[0])
    }
    head = "learning rate at alpha 4 and 256, from the one tuned at 32 | cost, % of the gain [95%]"
    sections.append(base.Section.of("Another alpha", head, [[k, v] for k, v in costs.items()]))
    by_full = {
        rule: over_bases(c.cells, partial(from_full, factor=factor))
        for rule, factor in ((laws.LAW, None), ("10 times", 10.0))
    }
    head = (
        f"LoRA's learning rate at alpha {TUNED:g}, from FullFT's best | cost, % of the gain [95%]"
    )
    sections.append(base.Section.of("From FullFT", head, [[k, v] for k, v in by_full.items()]))
    head = "base, data, batch and updates | alpha | A | z | best FullFT LR | ratio | the law | L"
    rows = [
        [x.unit, f"{x.alpha:g}", "frozen" if x.b_ratio > 1 else "moves", x.z, f"{x.full_lr:.2e}"]
        + [x.measured, x.predicted, laws.limit(*x.at[:2])]
        for x in (*c.cells, *c.frozen)
    ]
    series = [_before()] if BEFORE.is_file() else []
    for width in sorted({x.hidden for x in c.cells}):
        mine = [x for x in c.cells if x.hidden == width]
        name = f"hidden size {width}" + (": SmolLM2" if width == 576 else "")
        series.append(base.Series.of(name, [x.z for x in mine], map_limit(mine), style="o"))
    y, z = map_limit(c.frozen), [float(v) for v in np.geomspace(0.005, 60, 60)]
    name = "A frozen (z: had it moved)"
    frozen = base.Series.of(name, [x.z for x in c.frozen], y, style="D", colour="black")
    series.append(replace(frozen, open=True))
    for label, f, style in (
        ("the law: 1 / sqrt(1 + z^2)", lambda v: 1 / math.hypot(1, v), "-"),
        ("A keeps its start: 1", lambda v: 1.0, ":"),
        ("A's movement alone: 1 / z", lambda v: 1 / v if v > 0.5 else math.nan, "--"),
    ):
        line = [f(v) for v in z]
        series.append(base.Series(label, z, line, style=style, colour="black"))
    x, y_name = "z: A's movement / A's random start", "R / L, measured"
    panel = base.Panel("", x, y_name, series, log_x=True, log_y=True, y_range=(0.015, 2))
    figure = ("quadrature.png", [panel], "R / L over z")
    sections.append(base.Section.of("New conditions", head, rows, [], *figure))
    each = {"rms_error": errors, "carried_cost": costs, "cost_from_full": by_full}
    found = [measured(c.place, k, e, arm=a) for k, of in each.items() for a, e in of.items()]
    at = places.places_of([*c.optima, *c.others], c.runs)
    for one in (*c.cells, *c.frozen):
        name = "measured_over_law" + ", A frozen" * (one.b_ratio > 1)
        ratio = one.lora_lr / one.full_lr / one.predicted
        found.append(measured(at[id(one.lora)], name, ratio))
    return found, sections


def map_limit(cells: Cells) -> list[Estimate]:
    """Return the measured ratios over L."""
    draws = [x.measured.draws for x in cells]
    found = [None if d is None else d / laws.limit(*x.at[:2]) for x, d in zip(cells, draws)]
    return [from_draws(d, 2) for d in found if d is not None]


def _before() -> base.Series:
    """Read the ratios of earlier sweeps, to which the law was fitted but for three."""
    old, at = pd.read_csv(BEFORE), []
    for r in old.itertuples():
        by_law = float(laws.ratio(r.hidden, r.alpha, r.steps, r.full_lr))
        at.append(float(laws.movement(r.hidden, by_law * r.full_lr, r.steps)))
    y = (old["ratio"] * old["alpha"] / old["hidden"] / laws.limit(1, 1)).tolist()
    return base.Series(
        f"{len(old)} ratios of earlier sweeps", at, y, style="s", colour="silver", size=4
    )


def _estimand(
    name: str, measure: Callable[[AllCells], Estimate], log: bool = False
) -> base.Estimand:
    return base.Estimand(
        name,
        measure,
        lambda c: c.gates(frozen=name == "worst_frozen"),
        log=log,
        applies=lambda c: c.is_judged,
        unanswered=GateCode.ELSEWHERE,
        seeds=lambda c: 0,
    )


QUESTION = OverScales(
    [
        _estimand("rms_error", lambda c: over_bases(c.cells, rms, log=True), log=True),
        _estimand("form", lambda c: over_bases(c.cells, form)),
        _estimand("worst_frozen", AllCells.worst_frozen),
        _estimand("carried_cost", lambda c: over_bases(c.cells, carried)),
        _estimand("full_error", lambda c: over_bases(c.cells, full_from_lora, log=True), log=True),
        _estimand("moving", lambda c: over_bases(c.cells, moving)),
        _estimand("still", lambda c: over_bases(c.cells, still)),
    ],
    conditions,
    report,
    ratios=lambda c: [(f"{x.unit}, alpha {x.alpha:g}", x.measured) for x in c.cells],
    of_rates=True,
)
