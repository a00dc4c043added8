"""Compute the data of the study's figures, which `analysis.report.plots_study` draws."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import scale_of
from analysis.inference.estimate import AT_LEAST, Estimate, Verdict
from analysis.measures.batch_effect import EARLIEST
from analysis.measures.speed import curves_at_best, rho
from analysis.optimum.fit import fit_all
from analysis.optimum.likelihood import rate_means
from analysis.optimum.optimum import WITHIN
from analysis.questions.base import Panel, Series, by_group, full_of, lora_of
from analysis.report.study.answers import WORDS, Answer, Pooled, Setting, estimate_of
from analysis.runs.learning_curves import at_step, by_run, on_curve_rows
from analysis.runs.lr_curves import lr_curves

# ---------------------------------------------------------------- regret over rank

REGIME, BATCHES = "regime", "large_batches"
CONTROL = 32
"""Batch of the control of `large_batches`, which is a condition like those of `regime`."""
NOTHING = "nothing new"
"""End of the name of a condition that has no gain."""


@dataclass(frozen=True)
class Line:
    """The regrets of all ranks in one condition: a base, a data set, a length."""

    base: str
    data: str
    batch_size: int | None
    """None in answers that did not record it."""
    updates: int
    regrets: dict[int, Estimate]
    """Rank -> regret in percent of full fine-tuning's gain."""

    @property
    def name(self) -> str:
        size = f" of {self.batch_size}" if self.batch_size else ""
        return f"{self.base}, {self.data}, {self.updates} updates{size}"


def regret_lines(answers: Sequence[Answer]) -> list[Line]:
    """Return a line for each condition of `regime`, and for the control of `large_batches`."""
    found = []
    for condition in conditions_of(answers):
        base, _, data = condition["cell"].partition(", ")
        size, updates = condition.get("batch_size"), int(condition["updates"])
        found.append(Line(base, data, size, updates, _by_rank(condition["ranks"])))
    return [line for line in [*found, *(c for c, _ in controls_of(answers))] if line.regrets]


def conditions_of(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return the conditions of `regime` in which something is new, as in results.json."""
    found = [c for a in answers if a.sweep == REGIME for c in a.results["cells"]]
    return [c for c in found if not c["cell"].endswith(NOTHING)]


def controls_of(answers: Sequence[Answer]) -> Iterator[tuple[Line, Answer]]:
    """Yield the control of every answer of `large_batches` where only rules are new."""
    for a in answers:
        mine = [r for r in a.results.get("regrets", ()) if r["batch_size"] == CONTROL]
        if a.sweep != BATCHES or not mine or len(a.bases) != 1:
            continue
        if a.setting(a.verdicts[0].group) == Setting.IN_REGIME:
            updates = mine[0]["updates"]
            yield Line(a.bases[0], "only rules new", CONTROL, updates, _by_rank(mine)), a


def _by_rank(rows: Sequence[dict[str, Any]]) -> dict[int, Estimate]:
    known = {int(r["rank"]): estimate_of(r["regret_percent"]) for r in rows}
    return {rank: e for rank, e in known.items() if e.value is not None}


# ---------------------------------------------------------------- claims in units of their margins

OPEN = 5.0
"""An end of a margin this many times further from the claim's value than the other end is open."""
DOUBLE = math.log(2)
"""Unit for a ratio if no end of the margin gives one; for a difference it is WITHIN nats."""


@dataclass(frozen=True)
class Scale:
    """The axis of one claim: 0 is the claim's value, -1 and 1 are the ends of its margin."""

    expected: float
    """The claim's value, in ln for a ratio."""
    units: tuple[float, float]
    """Lengths of the axis unit below and above `expected`, in ln for a ratio."""
    band: tuple[float, float]
    """The margin on this axis; infinite where it is open."""
    log: bool

    def at(self, value: float) -> float:
        """Return the position of a value on this axis."""
        away = scale_of(self.log)(value) - self.expected
        return away / (self.units[0] if away < 0 else self.units[1])


def scale_for(v: Verdict) -> Scale:
    """Return the axis of a claim, from its expected value and its margin."""
    to = scale_of(v.log)
    expected = to(v.expected)
    below, above = expected - to(v.margin[0]), to(v.margin[1]) - expected
    reaches: list[float | None] = []  # distances of the ends; None where the end is open
    for distance, other in ((below, above), (above, below)):
        # If the other end is at distance 0, an end is open beyond distance 1.
        is_open = distance > (OPEN * other if other else 1.0)
        reaches.append(None if is_open else distance)
    known = [r for r in reaches if r]
    unit = known[0] if known else DOUBLE if v.log else WITHIN
    units = (reaches[0] or unit, reaches[1] or unit)
    low, high = (math.inf if r is None else r / u for r, u in zip(reaches, units))
    return Scale(expected, units, (-low, high), v.log)


@dataclass(frozen=True)
class Mark:
    """One measured value in a row."""

    value: float
    low: float
    high: float
    """Ends of the interval; infinite where there is none."""
    outcome: str
    """SUPPORTED, REFUTED or UNDECIDED; empty for an average over bases."""
    exploratory: bool


@dataclass(frozen=True)
class Row:
    """One claim."""

    says: str
    band: tuple[float, float]
    marks: dict[Setting, list[Mark]]


def claim_rows(answers: Sequence[Answer], over_bases: Sequence[Pooled]) -> list[Row]:
    """Return a row per sentence of the study that has a measured value and is not withdrawn."""
    rows: dict[str, Row] = {}

    def add(a: Answer, v: Verdict, e: Estimate, outcome: str) -> None:
        scale, says = scale_for(v), a.says(v.claim)
        row = rows.setdefault(says, Row(says, scale.band, {}))
        low = -math.inf if e.low is None else scale.at(e.low)
        high = math.inf if e.high is None or AT_LEAST in e.flags else scale.at(e.high)
        mark = Mark(scale.at(float(e.value or 0.0)), low, high, outcome, bool(v.exploratory))
        row.marks.setdefault(a.setting(v.group), []).append(mark)

    for a in answers:
        for v in a.single:
            known = v.estimate.value is not None and not v.is_withdrawn
            if known and a.word(v.claim, "whose") == "study":
                add(a, v, v.estimate, v.outcome)
    for pool in over_bases:
        a, v = pool.one
        if a.says(v.claim) in rows and pool.estimate.value is not None:
            add(a, v, pool.estimate, "")
    return list(rows.values())


# ---------------------------------------------------------------- learning rates


@dataclass(frozen=True)
class RateCurve:
    """LoRA's regret on one base, over LoRA's LR / full fine-tuning's best LR."""

    label: str
    times: np.ndarray
    percent: np.ndarray
    """Mean regret at each LR tried, in percent of LoRA's gain at LoRA's best LR."""
    fitted_times: np.ndarray
    fitted_percent: np.ndarray
    """Regret of the fitted curve at `fitted_times`, in percent as above."""


def rate_curves(answers: Sequence[Answer]) -> list[RateCurve]:
    """Return a curve per base and setting, at the highest rank.

    If there are several answers, confirmatory ones are preferred, then the one with the most runs.
    """
    chosen: dict[tuple[str, Setting], RateCurve] = {}
    mine = [a for a in answers if a.sweep == "lr_ratio"]
    for a in sorted(mine, key=lambda a: (a.exploratory, -a.results["runs"])):
        for group, optima in by_group(fit_all(lr_curves(a.runs))).items():
            full, lora = full_of(optima), lora_of(optima)
            where = (str(optima[0].curve.key["model"]), a.setting(group))
            if full is None or not lora or where in chosen:
                continue
            o = max(lora, key=lambda o: o.curve.key["rank"])
            best, unit, rates = o.best_nll, full.best_lr.value, o.curve.unbroken
            if best is None or unit is None or not len(rates):
                continue
            lr = np.exp(np.linspace(rates[0], rates[-1], 200))
            if (fitted := o.predict(lr)) is not None:
                label = f"{where[0]}, rank {o.curve.key['rank']:g}, {WORDS[where[1]]}"
                (tried, losses), percent = rate_means(o.curve), 100 / (o.curve.nll_start - best)
                runs, fits = percent * (losses - best), percent * (fitted - best)
                chosen[where] = RateCurve(label, np.exp(tried) / unit, runs, lr / unit, fits)
    return list(chosen.values())


def has_rate_curves(answers: Sequence[Answer]) -> bool:
    """Return whether an answer has best LRs of both methods, without fitting the runs again."""
    return any(
        {c["method"] for c in a.results["curves"] if c["best_lr"] is not None} >= {"fullft", "lora"}
        for a in answers
        if a.sweep == "lr_ratio"
    )


# ---------------------------------------------------------------- speed of each rank

Speeds = dict[int, dict[int, Estimate]]
"""Rank -> number of updates -> rho."""


def speed_answers(answers: Sequence[Answer]) -> dict[Setting, Answer]:
    """Return one answer of `rank` per setting: confirmatory if possible, on the largest base."""
    mine = [a for a in answers if a.sweep == "rank" and _judged_to(a) >= 2 * EARLIEST]
    found: dict[Setting, Answer] = {}
    for a in sorted(mine, key=lambda a: (a.exploratory, -a.size)):
        found.setdefault(a.setting(a.verdicts[0].group), a)
    return dict(sorted(found.items()))


def _judged_to(a: Answer) -> int:
    """Return the number of updates after which an answer was judged; runs may be longer."""
    return max((int(c["steps"]) for c in a.results["curves"]), default=0)


def speed_panels(answers: Sequence[Answer]) -> list[Panel]:
    """Return a panel of rho over updates for each setting."""
    out = []
    for setting, a in speed_answers(answers).items():
        series = [
            Series.of(f"rank {rank}", list(mine), list(mine.values()), colour=k)
            for k, (rank, mine) in enumerate(sorted(speeds(a.runs, _judged_to(a)).items()), 1)
        ]
        title = f"{', '.join(a.bases)}, {WORDS[setting]}"
        look: dict[str, Any] = {"log_x": True, "log_y": True, "lines": {"full fine-tuning": 1.0}}
        out.append(Panel(title, "updates", "speed (rho)", series, **look))
    return out


def speeds(runs: pd.DataFrame, to: int) -> Speeds:
    """Measure rho after 8, 16, 32, ..., `to` updates, each method at its best LR there."""
    plain = (runs["method"] == "fullft") | (runs["init_seed"].fillna(0) == 0)
    table = on_curve_rows(runs[plain].reset_index(drop=True))
    evaluated = {int(s) for curve in by_run(table).values() for s in curve["step"]}
    doubled = [EARLIEST * 2**k for k in range(to.bit_length())]
    found: Speeds = {}
    for step in sorted({s for s in (*doubled, to) if s <= to} & evaluated):
        part = at_step(table, step)
        optima = fit_all(lr_curves(part))
        points = dict(zip(map(id, optima), curves_at_best(part, optima)))
        full = full_of(optima)
        for o in lora_of(optima) if full is not None else ():
            e = rho(points[id(o)], points[id(full)])
            if e.value is not None:
                found.setdefault(int(o.curve.key["rank"]), {})[step] = e
    return found
