"""Scaffold of a question: its estimands, the conditions on which they are measured, and a report.

A question's module defines `QUESTION`. The scaffold judges every claim on every condition to which
the claim's estimand applies. If an arm or all conditions are missing, the claim is UNDECIDED.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from analysis.inference.decide import LOOK_LEVELS, MIN_SEEDS, Gate, GateCode, Verdict, holm, judge
from analysis.inference.estimate import AT_LEAST, Estimate, number, rate, with_interval
from analysis.inference.rows import Row
from analysis.inference.where import Setting, Where
from analysis.measures import places
from analysis.measures.at_best import AtBest
from analysis.measures.next_runs import lines, suggest
from analysis.measures.ratio import MIN_RANK
from analysis.measures.regret import Gap
from analysis.optimum.fit import FEW_RATES, Optimum, fit_all, seeds_at_best
from analysis.runs.curves import LrCurve, lr_curves, task_problems, variants
from analysis.runs.table import GROUP_KEYS, TableError

UNKNOWN = Estimate(None)
NO_CELL = "no cell"
"""Group of the verdicts on claims that no condition of the table can answer."""
TASK = ("model", "dataset")


# ---------------------------------------------------------------- parts of a report


@dataclass(frozen=True)
class Series:
    """One line or set of points; `low` and `high`, the ends of error bars, may be empty."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    style: str = "o-"
    colour: int | str | None = None
    """Index into the palette, or a colour; None: the palette's next colour."""
    size: float = 5.5
    """Size of the markers, in points."""
    open: bool = False
    """Whether the markers are not filled."""
    bounds: Sequence[int] = ()
    """For each x: 1 if y is only a lower bound, -1 if an upper bound, 0 if a value; or empty."""

    @classmethod
    def of(
        cls, label: str, x: Iterable[float], estimates: Sequence[Estimate], **style: Any
    ) -> "Series":
        """Make a series of estimates with intervals over x; a bound is drawn as an arrow."""
        bounds = [
            int(AT_LEAST in e.flags)
            if e.value is not None or e.has_interval()
            else (e.low is not None) - (e.high is not None)
            for e in estimates
        ]
        y = [
            e.value if e.value is not None else e.low if b > 0 else e.high if b else None
            for e, b in zip(estimates, bounds)
        ]
        low, high = ([getattr(e, k) for e in estimates] for k in ("low", "high"))
        return cls(label, list(x), y, low, high, bounds=bounds, **style)


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    x: str
    y: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False
    band: tuple[float, float] | None = None
    """A claim's margin, drawn as a shaded band."""
    lines: dict[str, float] = field(default_factory=dict)
    """Label -> height of a dashed horizontal line."""
    ticks: list[tuple[float, str]] | None = None
    y_range: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Section:
    """A section of a report: a table (the first row is its head), lines of text, and a figure."""

    title: str
    rows: list[list[str]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    figure: str = ""
    """File name of the figure, in the report's folder."""
    panels: Sequence[Panel] = ()
    """Empty: the section has no figure."""
    caption: str = ""

    @classmethod
    def of(
        cls,
        title: str,
        head: str,
        rows: Iterable[Sequence[Any]],
        text: Sequence[str] = (),
        *figure: Any,
    ) -> "Section":
        """Make a section with a table of values; without rows there is no table.

        Args:
            head: names of the columns, with " | " between them.
            rows: text, numbers, estimates (shown with their intervals), or None.
            text: lines; empty ones are left out.
            figure: file name, panels and caption of the figure.
        """

        def cell(v: Any) -> str:
            if isinstance(v, str | int):
                return str(v)
            return with_interval(v) if isinstance(v, Estimate) else number(v)

        table = [[cell(v) for v in row] for row in rows]
        table = [head.split(" | "), *table] if table else []
        return cls(title, table, [line for line in text if line], *figure)


@dataclass(frozen=True)
class Analysis:
    """The answer of one question: optima, verdicts and the sections of its report."""

    optima: list[Optimum]
    verdicts: list[Verdict]
    sections: list[Section] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    """Measurements beside the curves and the verdicts."""
    search: dict[str, Any] = field(default_factory=dict)
    """What a search decides by, as plain values: see `tune`."""
    members: dict[str, list[Optimum]] = field(default_factory=dict)
    """Curves on which a verdict rests, by the verdict's group."""
    of_rates: bool = False
    """Whether the claims are about optimal learning rates themselves; see `next_runs`."""
    ratios: list[tuple[str, str, Estimate]] = field(default_factory=list)
    """(group, name, LoRA's optimal LR / full fine-tuning's), for the interactive page."""


def panel_over(
    x: str, title: str, y: str, estimates: Mapping[str, Mapping[Any, Estimate]], **look: Any
) -> Panel:
    """Draw lines of estimates (label -> x -> estimate) over a logarithmic x, with a tick at each x.

    `look`: other fields of `Panel`.
    """
    series = [Series.of(label, of, list(of.values())) for label, of in estimates.items()]
    ticks = [(float(v), f"{v:g}") for v in sorted({v for of in estimates.values() for v in of})]
    return Panel(title, x, y, series, log_x=True, **{"ticks": ticks, **look})


def best_lr(o: Optimum) -> str:
    """Format a curve's optimal learning rate with its interval."""
    return with_interval(o.best_lr, rate)


# ---------------------------------------------------------------- curves


def fit(runs: pd.DataFrame, few: int = FEW_RATES) -> list[Optimum]:
    """Fit the optimum of every LR curve of a table; `few`: see `fit_all`."""
    return fit_all(lr_curves(runs), few)


def by_group(optima: Iterable[Optimum]) -> dict[str, list[Optimum]]:
    """Return the optima by group (model, data set, batch and updates), in order."""
    found: dict[str, list[Optimum]] = {}
    for o in optima:
        found.setdefault(o.curve.group, []).append(o)
    return found


def by_variant(optima: Sequence[Optimum], group: str = "") -> dict[str, list[Optimum]]:
    """Return the optima by `group` and the settings in which they differ; see `variants`."""
    found: dict[str, list[Optimum]] = {}
    for o, variant in zip(optima, variants([o.curve for o in optima])):
        found.setdefault("; ".join(filter(None, (group, variant))), []).append(o)
    return found


def full_of(optima: Sequence[Optimum]) -> Optimum | None:
    """Return the first curve of full fine-tuning of all weights; TableError: a group has two."""
    return next(iter(check_one([o for o in optima if o.curve.is_full], *GROUP_KEYS)), None)


def lora_of(optima: Sequence[Optimum], min_rank: int = 0) -> list[Optimum]:
    """Return LoRA's curves, in the table's order (by rank)."""
    lora = [o for o in optima if o.curve.key["method"] == "lora"]
    return [o for o in lora if not min_rank or o.curve.key["rank"] >= min_rank]


def rank_of(o: Optimum) -> int:
    """Return the rank of a LoRA curve, or 0 for full fine-tuning."""
    return int(o.curve.key["rank"]) if o.curve.key["method"] == "lora" else 0


def check_one(optima: Sequence[Optimum], *by: str) -> Sequence[Optimum]:
    """Return the curves; TableError if two agree in method, in being controls, and in `by`."""
    seen: dict[Any, Optimum] = {}
    for o in optima:
        c = o.curve
        key = (c.key["method"], c.is_control, *(str(c.key.get(k)) for k in by))
        if (first := seen.setdefault(key, o)) is not o:
            refuse(first.curve, c)
    return optima


def check_same(curves: Iterable[LrCurve], *apart: str) -> None:
    """Raise TableError if two curves of a method differ in more than `apart`; controls may."""
    seen: dict[str, LrCurve] = {}
    for c in (c for c in curves if not c.is_control):
        first = seen.setdefault(c.key["method"], c)
        if any(str(v) != str(first.key[k]) for k, v in c.key.items() if k not in apart):
            refuse(first, c)


def one_value(table: pd.DataFrame, *columns: str) -> None:
    """Raise TableError if runs that are judged together differ in one of the columns."""
    for key in columns:
        if len(values := [*map(str, table[key].unique())]) > 1:
            raise TableError(f"{key}={', '.join(values)}: only one can be judged. Ask for one.")


def refuse(a: LrCurve, b: LrCurve) -> NoReturn:
    """Raise TableError: two curves cannot be compared as one."""
    names = [c.name + " (scope=matrices)" * c.is_control for c in (a, b)]
    one, two = (", ".join(filter(None, both)) for both in zip(names, variants([a, b])))
    elsewhere = "" if a.group == b.group else f" ({b.group})"
    text = "only one of them can be compared. Ask for one value at a time."
    raise TableError(f"{a.group}: {one}, and {two}{elsewhere}: {text}")


def distinct(optima: Iterable[Optimum]) -> list[Optimum]:
    """Return the optima in order, without duplicates."""
    return list({id(o): o for o in optima}.values())


def both(*gaps: Gap) -> list[Optimum]:
    """Return the curves that gaps compare."""
    return distinct(o for g in gaps for o in (g.lora, g.full))


def fewest_seeds(optima: Sequence[Optimum]) -> int:
    """Return the smallest number of seeds at any of the optima."""
    return min((seeds_at_best(o) for o in optima), default=0)


# ---------------------------------------------------------------- gates


STOPS = (
    *("at_edge", "bounded_by_divergence", "flat"),
    *("few_points", "no_usable_points", "no_variance"),
)
"""Flags of an optimum that forbid a verdict."""
MAX_ERROR = 0.0125
"""Largest standard error, as a share of the gain, of a gap that is judged."""


def missing(what: str) -> list[Gate]:
    """Return the gate that says which curve is missing."""
    return [Gate(GateCode.MISSING, what)]


def gates_on(optima: Sequence[Optimum]) -> list[Gate]:
    """List the gates (reasons that forbid a verdict) of a measurement on these optima."""
    found = []
    for o in optima:
        place = f"{o.curve.name}: "
        stops = tuple(f for f in o.flags if f in STOPS)
        if stops:
            found.append(Gate(GateCode.FLAGGED, place=place, flags=stops))
        seeds = seeds_at_best(o)
        if seeds < MIN_SEEDS:
            found.append(Gate(GateCode.FEW_SEEDS_AT_BEST, seeds, place))
    return found


def gates_on_ranks(optima: Sequence[Optimum]) -> list[Gate]:
    """Return the gate on a dependence on the rank that is measured at fewer than two ranks."""
    return [Gate(GateCode.ONE_RANK)] * (len(optima) < 2)


def gates_on_speed(optima: Sequence[Optimum]) -> list[Gate]:
    """List the gates of a claim about rho: gates on its optima, and an unfit task."""
    found = gates_on(optima)
    known = [o.best_nll for o in optima if o.best_nll is not None]
    if not known:
        return found
    one = full_of(optima) or optima[0]
    noise = one.pooled.noise if one.pooled else math.nan
    problems = task_problems(one.curve.nll_start, one.curve.floor, min(known), noise)
    return found + [Gate(GateCode.TASK, problem) for problem in problems]


def gates_on_pairs(values: AtBest[Any]) -> list[Gate]:
    """Return the gate on a difference by seed, if too few seeds are on both sides."""
    n = len(values.best)
    return [Gate(GateCode.FEW_SEEDS_OF_BOTH, n)] if n < MIN_SEEDS else []


def gates_on_gap(gap: Gap) -> list[Gate]:
    """List the gates of a gap: gates on its optima, and too much noise; an unfit task is no gate.

    A gap in nats with its own error is valid on a small or nearly solved task too.
    """
    found = gates_on([gap.full, gap.lora])
    found += [] if found else gates_on_pairs(gap.nats)
    if gap.planned_error > MAX_ERROR:
        known = math.isfinite(gap.planned_error)
        share = f"{100 * gap.planned_error:.2g}%" if known else "an unknown share"
        found.append(Gate(GateCode.NOISY, share))
    return found


# ---------------------------------------------------------------- conditions


@dataclass(frozen=True)
class Condition:
    """Runs that are judged together; subclasses add values that a question's estimands share."""

    name: str
    """The group of the condition's verdicts."""
    runs: pd.DataFrame = field(repr=False)
    optima: list[Optimum]

    @property
    def parts(self) -> Sequence["Condition"]:
        """The conditions that this condition joins; empty if it joins none."""
        return ()

    @property
    def keys(self) -> list[dict[str, Any]]:
        """The settings of its curves; without curves, model and data set of its runs."""
        if self.optima:
            return [o.curve.key for o in self.optima]
        each = self.runs[list(TASK)].drop_duplicates()
        return [dict(zip(TASK, values)) for values in each.itertuples(index=False)]

    @property
    def data(self) -> str:
        """The data sets in words."""
        return " and ".join(dict.fromkeys(places.short_name(k["dataset"]) for k in self.keys))

    @cached_property
    def place(self) -> Where:
        """Task, base, data and setting."""
        base = " and ".join(sorted({k["model"] for k in self.keys}))
        known, mine = places.settings_of(self.runs), [o.curve.key for o in self.optima]
        return Where(self.name, base, self.data, places.setting_of(mine or self.keys, known))

    def where(self, used: Sequence[Optimum] | None = None, at: str = "") -> Where:
        """Return the place of what is measured on some curves (None: on all).

        `at`: rank and updates in words; empty: those that the curves share.
        """
        keys = self.keys if used is None else [o.curve.key for o in used]
        found, is_full = places.shared(keys), {k.get("method") for k in keys} == {"fullft"}
        arm = f"rank {found['rank']}" if found["rank"] else "full fine-tuning" * is_full
        said = at or ", ".join(filter(None, (arm, places.length_of(keys))))
        return replace(self.place, **found, at=said)

    @property
    def missing(self) -> str:
        """The missing arm without which nothing can be measured; empty if no arm is missing."""
        return ""

    @property
    def shown(self) -> bool:
        """Whether the report shows the condition."""
        return not self.missing

    @property
    def rests(self) -> list[Optimum]:
        """The curves on which verdicts rest."""
        return self.optima

    @property
    def seeds(self) -> int:
        """Smallest number of seeds at the optima, for estimates without a known `spread`."""
        return fewest_seeds(self.rests)

    @cached_property
    def by_rank(self) -> dict[int, Optimum]:
        """Rank -> curve; 0: full fine-tuning, of several groups the first. See `check_one`."""
        check_one(self.optima, *GROUP_KEYS, "rank")
        full, lora = full_of(self.optima), {rank_of(o): o for o in lora_of(self.optima)}
        return lora if full is None else {0: full, **lora}

    @property
    def full(self) -> Optimum:
        """The curve of full fine-tuning; KeyError if it is missing."""
        return self.by_rank[0]

    @property
    def high(self) -> list[Optimum]:
        """LoRA's curves of the ranks from MIN_RANK up."""
        return lora_of(self.optima, MIN_RANK)

    @property
    def lora(self) -> dict[int, Optimum]:
        """LoRA's curves by rank."""
        return {r: o for r, o in self.by_rank.items() if r}

    @property
    def top(self) -> int:
        """The highest rank; 0 without any."""
        return max(map(rank_of, self.optima), default=0)


def whole(cls: type[Condition]) -> Callable[[pd.DataFrame], list[Condition]]:
    """Return what makes the one condition of a model and data set, with all of its curves."""

    def conditions(runs: pd.DataFrame) -> list[Condition]:
        return [cls(f"{runs['model'].iloc[0]} on {runs['dataset'].iloc[0]}", runs, fit(runs))]

    return conditions


@dataclass(frozen=True)
class TwoArms(Condition):
    """Full fine-tuning and LoRA at several ranks, both required, before the task is solved."""

    note: str
    """A sentence about the update at which runs were cut; empty without a cut."""

    def __post_init__(self) -> None:
        one_value(self.runs, "batch_size", "steps")
        check_one(self.optima, "rank")

    @property
    def missing(self) -> str:
        return "fullft" if 0 not in self.by_rank else "" if self.lora else "lora"

    @property
    def rests(self) -> list[Optimum]:
        return list(self.by_rank.values())


@dataclass(frozen=True)
class Estimand:
    """A quantity that claims can be about; most fields are functions of a condition."""

    name: str
    measure: Callable[[Any], Estimate | None]
    """Returns None if the curve that `absent` names is missing."""
    gates: Callable[[Any], Sequence[Gate]] = lambda c: ()
    """Gates that forbid a verdict on the measurement."""
    absent: str | Callable[[Any], str] = ""
    """The curve without which nothing can be measured, in words."""
    log: bool = False
    """Whether the estimand is a ratio, so that distances to the margin are in logarithms."""
    applies: Callable[[Any], bool] = lambda c: True
    """Whether the condition can answer claims about the estimand."""
    by_data: Callable[[Any], bool] = lambda c: False
    """Whether training shows if a condition `applies`: the plan does not know it."""
    unanswered: GateCode = GateCode.NO_CELL
    """Why there is no verdict if no condition can answer them."""
    seeds: Callable[[Any], int] = lambda c: c.seeds
    """Number of seeds behind the estimate."""
    margin_gates: Callable[[Any, float], Sequence[Gate]] = lambda c, high: ()
    """Gates that depend on the upper end of the claim's margin; listed last."""
    each: "Estimand | None" = None
    """A claim is SUPPORTED only if this one is SUPPORTED in each part, by the same margin."""
    used: Callable[[Any], Sequence[Optimum] | None] = lambda c: None
    """The curves on which it is measured, for its rank, batch and updates; None: all."""
    at: Callable[[Any], str] = lambda c: ""
    """Rank and updates in words, where the curves do not tell them."""
    by_seed: Callable[[Any], AtBest[float]] | None = None
    """The values by seed whose mean is the estimate, if it has such values."""
    final: bool = False
    """Whether losses at the end of runs are enough; other trainers' programs give no more."""


def over_allowed(name: str, gap: Callable[[Any], Gap | None], **more: Any) -> Estimand:
    """Declare a gap minus the allowed regret, in nats; `gap` returns None if a curve is missing."""
    return Estimand(
        name,
        lambda c: g.over_allowed() if (g := gap(c)) else None,
        lambda c: gates_on_gap(g) if (g := gap(c)) else [],
        used=lambda c: both(gap(c)),
        **more,
    )


Asked = dict[str, Any]
"""A question as in question.json."""


def level_of(asked: Asked) -> float:
    """Return the level of the intervals at the planned looks."""
    return LOOK_LEVELS[int(asked.get("rounds", 1))]


@dataclass(frozen=True)
class Question:
    """A question: estimands, conditions, and the contents of its report."""

    estimands: Sequence[Estimand]
    conditions: Callable[[pd.DataFrame], Sequence[Any]]
    """Split a table into conditions and fit their curves."""
    report: Callable[..., tuple[list[Row], list[Section]]]
    """Make further measurements and the report's sections, from the question as asked and the
    conditions that are shown."""
    ratios: Callable[[Any], list[tuple[str, Estimate]]] = lambda c: []
    """(name, LoRA's optimal LR / full fine-tuning's), for the interactive page."""
    split_by: tuple[str, ...] = ()
    """Columns; runs that differ in them are analysed separately, in separate sections."""
    by_base: bool = False
    """Whether a claim may leave out base models (`except_models`)."""
    of_rates: bool = False
    """Whether the claims are about optimal learning rates themselves."""
    search: Callable[[Asked, Any], dict[str, Any]] | None = None
    """Return what a search decides by, from the question as asked and its one condition."""

    @property
    def names(self) -> list[str]:
        """Names of the estimands."""
        return [e.name for e in self.estimands]

    @property
    def logs(self) -> list[str]:
        """Names of the estimands that are ratios."""
        return [e.name for e in self.estimands if e.log]

    def parts(self, table: pd.DataFrame) -> dict[str, Sequence[Any]]:
        """Return the conditions of a table by the values of `split_by`, in words."""
        if not self.split_by:
            return {"": self.conditions(table)}
        split = table.groupby(list(self.split_by), sort=False)
        return {" on ".join(map(str, of)): self.conditions(runs) for of, runs in split}

    def judge(self, conditions: Sequence[Any], asked: Asked) -> list[Verdict]:
        """Judge every claim on each condition that can answer it; `asked`: as in question.json."""
        claims, estimands = asked["claims"], {e.name: e for e in self.estimands}
        tests, level = [], level_of(asked)
        for c in conditions:
            model = c.optima[0].curve.key["model"] if c.optima else None
            for name, claim in claims.items():
                e = estimands[claim["estimand"]]
                if e.applies(c) and model not in claim.get("except_models", ()):
                    tests.append((c, e, name, claim))
        tested = [test[2] for test in tests]
        together = sum(max(tested.count(n), 1) for n, c in claims.items() if c.get("primary"))
        verdicts = [_judged(*test, level, together) for test in tests]
        for name, claim in claims.items():
            e = estimands[claim["estimand"]]
            if not any(map(e.applies, conditions)):
                by_data = Gate.BY_DATA * any(map(e.by_data, conditions))
                at, gates = (NO_CELL, UNKNOWN), [Gate(e.unanswered, by_data)]
                v = judge(name, claim, *at, gates, 0, e.log, level)
                verdicts.append(dataclasses.replace(v, where=_nowhere(conditions)))
        return holm(verdicts, 1 - level)

    def analyse(self, table: pd.DataFrame, asked: Asked, kept: Path | None = None) -> Analysis:
        """Fit and judge a sweep's runs; the metric is a loss.

        Args:
            asked: the sweep's question, as in question.json.
            kept: folder of kept results.

        Raises:
            TableError: the runs cannot be judged together, or a claim is about an estimand that
                this question does not measure.
        """
        claims, estimands = asked["claims"], {e.name: e for e in self.estimands}
        for name, claim in claims.items():
            if claim["estimand"] not in estimands:
                raise TableError(
                    f"claim {name!r}: {asked['analysis']} measures {', '.join(estimands)}, not "
                    f"{claim['estimand']!r}."
                )
        each = self.parts(table)
        conditions = [c for found in each.values() for c in found]
        rows, sections, search = list[Row](), [], dict[str, Any]()
        for k, (name, found) in enumerate(each.items(), 1):
            if shown := [c for c in found if c.shown]:
                search |= self.search(asked, *shown) if self.search else {}
                measured, parts = self.report(asked, *shown)
                rows += measured
                of_task = f": {name}" if len(each) > 1 else ""
                for s in parts:
                    figure = s.figure and k > 1 and f"{Path(s.figure).stem}_{k}.png"
                    title = s.title + of_task
                    sections.append(dataclasses.replace(s, title=title, figure=figure or s.figure))
        answer = Analysis(
            optima=distinct(o for c in conditions for o in c.optima),
            verdicts=self.judge(conditions, asked),
            sections=sections,
            rows=rows,
            search=search,
            members={c.name: c.rests for c in conditions if not c.missing},
            of_rates=self.of_rates,
            ratios=[(c.name, *ratio) for c in conditions if c.shown for ratio in self.ratios(c)],
        )
        if self.of_rates and (wanted := suggest(answer)):
            text = (
                "Runs most likely to decide the open claims (`action=extend` adds them as the "
                "sweep's next round):"
            )
            listed = [text, "", *(f"- {line}" for line in lines(wanted))]
            sections.append(Section("Next runs", text=listed))
        return answer


def _nowhere(conditions: Sequence[Any]) -> Where:
    """Return the place of a claim that no condition can answer."""
    bases = sorted({k["model"] for c in conditions for k in c.keys})
    setting = max((c.place.setting for c in conditions), default=Setting.BEYOND)
    return Where(NO_CELL, " and ".join(bases), NO_CELL, setting)


def _judged(
    c: Any, e: Estimand, name: str, claim: dict[str, Any], level: float, together: int
) -> Verdict:
    """Judge a claim on a condition, and on each of its parts if the estimand says so.

    If the parts differ, their outcomes are in the reason, and SUPPORTED becomes UNDECIDED.
    """
    estimate, gates, seeds = None, missing(c.missing), 0
    where = replace(c.where(at=places.length_of(c.keys)), rank=None)
    if not c.missing:
        if (estimate := e.measure(c)) is None:
            gates = missing(e.absent if isinstance(e.absent, str) else e.absent(c))
        else:
            gates = [*e.gates(c), *e.margin_gates(c, float(claim["margin"][1]))]
            seeds, where = e.seeds(c), c.where(e.used(c), e.at(c))
    v = judge(name, claim, c.name, estimate or UNKNOWN, gates, seeds, e.log, level, together)
    v = dataclasses.replace(v, where=where)
    each = (_judged(p, e.each, name, claim, level, together) for p in c.parts if e.each)
    outcomes = sorted(part.outcome for part in each)
    split = {"SUPPORTED", "REFUTED"} <= set(outcomes)
    if len(set(outcomes)) < 2 or (v.outcome == "UNDECIDED" and not split):
        return v
    counts = ", ".join(f"{o} on {outcomes.count(o)}" for o in sorted(set(outcomes)))
    gate = Gate(GateCode.BY_TASK, counts)
    outcome = "UNDECIDED" if v.outcome == "SUPPORTED" else v.outcome
    why = f"{gate.sentence}; {v.why}"
    return dataclasses.replace(v, why=why, outcome=outcome, gates=(gate, *v.gates))
