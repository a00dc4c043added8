"""What all questions share: a sweep's arms, its verdicts, and the parts of its report.

Each question's module defines ESTIMANDS, LOG_ESTIMANDS (those with a margin for a ratio) and
`analyse(table, question, kept) -> Analysis`. `analysis.questions.registry` finds it by name.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.inference.decide import holm, judge, look_level
from analysis.inference.estimate import AT_LEAST, Estimate, Verdict
from analysis.inference.gates import MIN_SEEDS, Gate, GateCode
from analysis.inference.seeds import PooledVariance, pooled_variance
from analysis.measures.at_best import AtBest
from analysis.measures.regret import Gap
from analysis.optimum.optimum import Optimum, seeds_at_best
from analysis.runs.table import TableError
from analysis.runs.task import task_problems

Rows = list[list[str]]
Measured = dict[str, tuple[Estimate, list[Gate]]]
"""Estimand -> (estimate, what forbids a verdict)."""


# ---------------------------------------------------------------- what the report draws


@dataclass(frozen=True)
class Series:
    """One line or set of points of a panel.

    `low` and `high` are the ends of error bars: as long as x, or empty.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    style: str = "o-"
    colour: int | str | None = None
    """Index into the palette, or a colour; None: the next one."""
    width: float = 1.6
    size: float = 5.5
    """Size of the markers, in points."""
    alpha: float = 1.0
    bounds: Sequence[int] = ()
    """As long as x, or empty: 1 where y is only a lower bound, -1 an upper one, 0 a value."""

    @classmethod
    def of(
        cls, label: str, x: Iterable[float], estimates: Sequence[Estimate], **style: Any
    ) -> "Series":
        """Make a series of estimates with their intervals over x.

        A bound is drawn where it lies, as an arrow to the side on which the value is.
        """
        bounds = [_bound(e) for e in estimates]
        y = [
            e.value if e.value is not None else e.low if b > 0 else e.high if b else None
            for e, b in zip(estimates, bounds)
        ]
        low, high = ([getattr(e, k) for e in estimates] for k in ("low", "high"))
        return cls(label, list(x), y, low, high, bounds=bounds, **style)


def _bound(e: Estimate) -> int:
    """Return the side of a one-sided bound: 1 if the value is above, -1 below, 0 without one."""
    if e.value is not None or e.has_interval():
        return int(AT_LEAST in e.flags)
    return (e.low is not None) - (e.high is not None)


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
    """(x, label)."""
    y_range: tuple[float | None, float | None] = (None, None)
    linear_below: float = 0.0
    """With `log_y`: the axis is linear from 0 to this height, so that 0 has a place."""


@dataclass(frozen=True)
class Section:
    """A section of a report: a table (the first row is its head), lines of text, and a figure."""

    title: str
    rows: Rows = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    figure: str = ""
    """File name of the panels, in the report's folder."""
    panels: list[Panel] = field(default_factory=list)
    """Empty: the section has no figure."""
    caption: str = ""


@dataclass(frozen=True)
class Analysis:
    """The answer of one question: optima, verdicts and the sections of its report."""

    optima: list[Optimum]
    verdicts: list[Verdict]
    sections: list[Section] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    """Plain values for results.json. `read`: estimand -> the rank and the number of updates at
    which it was measured, in words."""
    members: dict[str, list[Optimum]] = field(default_factory=dict)
    """Curves on which a verdict rests, by the verdict's group."""
    of_rates: bool = False
    """Whether the claims are about best rates themselves, so that the rates' errors show which runs
    would narrow them."""
    ratios: list[tuple[str, str, Estimate]] = field(default_factory=list)
    """(group, name, LoRA's best rate / full fine-tuning's), for the interactive page."""


# ---------------------------------------------------------------- arms


def full_of(optima: Sequence[Optimum]) -> Optimum | None:
    """Return the first curve of full fine-tuning, or None."""
    return next((o for o in optima if o.curve.key["method"] == "fullft"), None)


def lora_of(optima: Sequence[Optimum], min_rank: int = 0) -> list[Optimum]:
    """Return LoRA's curves, in the table's order (by rank)."""
    lora = [o for o in optima if o.curve.key["method"] == "lora"]
    return [o for o in lora if not min_rank or o.curve.key["rank"] >= min_rank]


def pairs_of(optima: Sequence[Optimum]) -> list[tuple[Optimum, Optimum]]:
    """Pair every LoRA curve with its group's full fine-tuning curve.

    LoRA curves without one are left out.
    """
    full = {o.curve.group: o for o in reversed(optima) if o.curve.key["method"] == "fullft"}
    return [(o, full[o.curve.group]) for o in lora_of(optima) if o.curve.group in full]


def distinct(optima: Iterable[Optimum]) -> list[Optimum]:
    """Return the optima in order, without duplicates."""
    return list({id(o): o for o in optima}.values())


def missing_arm(full: Optimum | None, lora: Sequence[Optimum]) -> str:
    """Name the missing arm; empty if both are there."""
    return "fullft" if full is None else "" if lora else "lora"


def pooled_over(values: Iterable[AtBest[float]]) -> PooledVariance | None:
    """Pool the variance over seeds of one measure on many curves."""
    return pooled_variance([list(v.best.values()) for v in values])


# ---------------------------------------------------------------- verdicts


STOPS = (
    "at_edge",
    "bounded_by_divergence",
    "flat",
    "few_points",
    "no_usable_points",
    "no_variance",
)
"""Flags of an optimum that forbid a verdict."""
MAX_ERROR = 0.0125
"""Standard error of a gap, as a share of the gain, above which it is shown and not judged."""


def gates_on(optima: Sequence[Optimum], missing: str = "") -> list[Gate]:
    """List the gates (reasons that forbid a verdict) of a measurement on these optima.

    Args:
        missing: name of an arm that is missing; empty if none is.
    """
    if missing:
        return [Gate(GateCode.MISSING, missing)]
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


def gates_on_speed(optima: Sequence[Optimum]) -> list[Gate]:
    """List the gates of a claim about rho: those on its optima, and a task unfit for it."""
    found = gates_on(optima)
    known = [o.best_nll for o in optima if o.best_nll is not None]
    if not known:
        return found
    one = full_of(optima) or optima[0]
    noise = one.pooled.noise if one.pooled else math.nan
    problems = task_problems(one.curve.nll_start, one.curve.floor, min(known), noise)
    return found + [Gate(GateCode.TASK, problem) for problem in problems]


def gates_on_gap(gap: Gap) -> list[Gate]:
    """Return what forbids a verdict about a gap: its optima, and too much noise; never the task.

    A gap in nats with its own error is right on a small or a nearly solved task too.
    """
    found = gates_on([gap.full, gap.lora])
    if gap.planned_error > MAX_ERROR:
        known = math.isfinite(gap.planned_error)
        share = f"{100 * gap.planned_error:.2g}%" if known else "an unknown share"
        found.append(Gate(GateCode.NOISY, share))
    return found


def fewest_seeds(optima: Sequence[Optimum]) -> int:
    """Return the smallest number of seeds at any of the optima."""
    return min((seeds_at_best(o) for o in optima), default=0)


def claims_about(question: dict[str, Any], estimand: str) -> dict[str, Any]:
    """Return the question with only the claims about one estimand."""
    claims = {k: v for k, v in question["claims"].items() if v["estimand"] == estimand}
    return {**question, "claims": claims}


def claims_on(question: dict[str, Any], model: str) -> dict[str, Any]:
    """Return the question with only the claims that are asked of a base model."""
    claims = {k: v for k, v in question["claims"].items() if model not in v.get("not_on", ())}
    return {**question, "claims": claims}


def judge_claims(
    question: dict[str, Any],
    measured: Measured,
    logs: Sequence[str],
    group: str,
    seeds: int = 0,
) -> list[Verdict]:
    """Judge every claim of a question for one group of runs, at the level of the planned looks.

    Args:
        logs: estimands with a margin for a ratio.
        seeds: present number of seeds at the optima, for estimates that do not know their units.

    Raises:
        TableError: a claim is about an estimand that was not measured.
    """
    level = look_level(int(question.get("rounds", 1)))
    out = []
    for name, claim in question["claims"].items():
        estimand = claim["estimand"]
        if estimand not in measured:
            known = ", ".join(measured)
            raise TableError(
                f"claim {name!r}: {question['analysis']} measures {known}, not {estimand!r}."
            )
        estimate, gates = measured[estimand]
        out.append(judge(name, claim, group, estimate, gates, seeds, estimand in logs, level))
    return out


def correct(verdicts: Sequence[Verdict], question: dict[str, Any]) -> list[Verdict]:
    """Correct the primary claims of all groups for multiplicity (Holm)."""
    return holm(verdicts, 1 - look_level(int(question.get("rounds", 1))))


def without_an_arm(
    question: dict[str, Any],
    optima: list[Optimum],
    missing: str,
    estimands: Sequence[str],
    logs: Sequence[str],
    group: str,
) -> Analysis:
    """Return the analysis of a table that lacks an arm: every claim is UNDECIDED."""
    nothing = dict.fromkeys(estimands, (Estimate(None), gates_on([], missing)))
    return Analysis(optima, judge_claims(question, nothing, logs, group))
