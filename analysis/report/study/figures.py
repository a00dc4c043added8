"""Compute the data of the study's figures, which `analysis.report.plots_study` draws."""

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.inference.decide import FAR, Verdict, scale_of
from analysis.inference.estimate import AT_LEAST, Estimate
from analysis.measures.batch_effect import EARLIEST
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import novelty_of
from analysis.measures.rows import Row, Setting, pick
from analysis.measures.speed import curves_at_best, rho
from analysis.optimum.fit import WITHIN, fit_all
from analysis.optimum.valley import rate_means
from analysis.questions.base import Panel, Series, by_group, full_of, lora_of, rank_of
from analysis.report.study.answers import WORDS, Answer, within
from analysis.runs.learning_curves import at_step, by_run, on_curve_rows
from analysis.runs.lr_curves import lr_curves

# ---------------------------------------------------------------- regret over rank

REGIME, BATCHES = "regime", "large_batches"
CONTROL = 32
"""Batch of the control of `large_batches`, which is a condition like those of `regime`."""
NOTHING = "nothing new"
"""What is new in a condition that has no gain."""


@dataclass(frozen=True)
class Line:
    """The regrets of all ranks in one condition: a base, a data set, a length."""

    name: str
    setting: Setting
    regrets: dict[int, Estimate]
    """Rank -> regret in percent of full fine-tuning's gain."""


def regret_lines(answers: Sequence[Answer]) -> list[Line]:
    """Return a line for each condition of `regime`, and for the control of `large_batches`."""
    found: dict[str, Line] = {}
    for a in (a for a in answers if a.sweep in (REGIME, BATCHES)):
        for r in pick(a.rows, "regret_percent"):
            data = r.data
            if a.sweep == BATCHES:
                if (r.batch_size, r.setting) != (CONTROL, Setting.IN_REGIME):
                    continue
                novelty = novelty_of(json.loads(a.runs["spec"].iloc[0])["dataset"])
                data = novelty.name if novelty else data
            if r.rank and r.estimate.value is not None and data != NOTHING:
                size = f" of {r.batch_size}" if r.batch_size else ""
                name = f"{r.base}, {r.updates} updates{size}:\n{data}"
                found.setdefault(name, Line(name, r.setting, {})).regrets[r.rank] = r.estimate
    return list(found.values())


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
class Placed:
    """One verdict of the figure of claims."""

    row: Row
    measure: str
    """The measured quantity and its unit."""
    margin: str
    outcome: str
    band: tuple[float, float]
    value: float
    low: float
    high: float
    """Ends of the interval; infinite where there is none."""


def claim_rows(answers: Sequence[Answer]) -> list[Placed]:
    """Return a row per verdict on a primary claim of the study that confirms or refutes it.

    Verdicts that are exploratory, withdrawn or without a value are left out.
    """
    rows: list[Placed] = []
    for r, v in (one for a in answers for one in a.single):
        e = v.estimate
        if not v.primary or v.exploratory or v.is_withdrawn or e.value is None:
            continue
        if r.asked.get("source") == "study":
            scale = scale_for(v)
            low = -math.inf if e.low is None else scale.at(e.low)
            high = math.inf if e.high is None or AT_LEAST in e.flags else scale.at(e.high)
            measure = re.split(";|, where ", r.asked.get("measure") or "")[0]
            far = [FAR if math.isinf(end) else 0.0 for end in scale.band]
            margin = (v.margin[0] - far[0], v.margin[1] + far[1])  # an open end is no number
            place = (scale.band, scale.at(e.value), low, high)
            rows.append(Placed(r, measure, within(margin), v.outcome, *place))
    return rows


# ---------------------------------------------------------------- learning rates

ALPHA = 32.0
"""The alpha of the figure; the study's."""
WIDTHS = "lr_scale"
"""The sweep with bases of several widths."""


@dataclass(frozen=True)
class RateCurve:
    """LoRA's regret on one base, over LoRA's LR / full fine-tuning's best LR."""

    row: Row
    """LoRA's best LR / full fine-tuning's, and where it was measured."""
    hidden: int
    times: np.ndarray
    percent: np.ndarray
    """Mean regret at each LR tried, in percent of LoRA's gain at LoRA's best LR."""
    fitted_times: np.ndarray
    fitted_percent: np.ndarray
    """Regret of the fitted curve at `fitted_times`, in percent as above."""

    @property
    def label(self) -> str:
        r = self.row
        arms = f"rank {r.rank}, alpha {r.alpha or ALPHA:g}, {r.updates} updates"
        return f"{r.base} (hidden size {self.hidden}), {arms}"


def rate_curves(answers: Sequence[Answer]) -> list[RateCurve]:
    """Return a curve per base and setting, at the highest rank and ALPHA, real models last.

    If there are several answers, confirmatory ones are preferred, then the one with the most runs.
    """
    chosen: dict[tuple[str, Setting], RateCurve] = {}
    mine = [a for a in answers if a.sweep in ("lr_ratio", WIDTHS)]
    for a in sorted(mine, key=lambda a: (a.sweep == WIDTHS, a.exploratory, -a.results["runs"])):
        arms = {(r.task, r.rank): r for r in pick(a.rows, "best_lr") if r.alpha in (None, ALPHA)}
        for group, optima in by_group(fit_all(lr_curves(a.runs))).items():
            full = full_of(optima)
            lora = [o for o in lora_of(optima) if o.curve.key.get("alpha", ALPHA) == ALPHA]
            if full is None or not lora:
                continue
            o = max(lora, key=lambda o: o.curve.key["rank"])
            r = arms[group, o.curve.key["rank"]]
            best, unit, rates = o.best_nll, full.best_lr.value, o.curve.unbroken
            where, known = (r.base, r.setting), best is not None and unit is not None
            if where in chosen or not known or not len(rates):
                continue
            lr = np.exp(np.linspace(rates[0], rates[-1], 200))
            if (fitted := o.predict(lr)) is not None:
                width = int(a.runs.loc[a.runs["model"] == r.base, "hidden_size"].max())
                (tried, losses), percent = rate_means(o.curve), 100 / (o.curve.nll_start - best)
                runs, fits = percent * (losses - best), percent * (fitted - best)
                row = replace(r, quantity="lr_ratio", estimate=ratio_of([o], full))
                shown = (np.exp(tried) / unit, runs, lr / unit, fits)
                chosen[where] = RateCurve(row, width, *shown)
    return sorted(chosen.values(), key=lambda c: (c.row.setting == Setting.REAL, c.hidden))


# ---------------------------------------------------------------- speed of each rank


def speed_answers(answers: Sequence[Answer]) -> dict[Setting, Answer]:
    """Return one answer of `rank` per setting: confirmatory if possible, on the largest base."""
    mine = [a for a in answers if a.sweep == "rank" and a.updates >= 2 * EARLIEST]
    found: dict[Setting, Answer] = {}
    for a in sorted(mine, key=lambda a: (a.exploratory, -a.size)):
        found.setdefault(a.judged[0][0].setting, a)
    return dict(sorted(found.items()))


def speed_rows(a: Answer) -> list[Row]:
    """Measure the speed (rho) of each rank of an answer after 8, 16, 32, ... and all updates.

    Each method is at its best LR for that length. `speed_rise`: percent by which a doubling of the
    rank raises the speed, from the rank below.
    """
    plain = (a.runs["method"] == "fullft") | (a.runs["init_seed"].fillna(0) == 0)
    table = on_curve_rows(a.runs[plain].reset_index(drop=True))
    evaluated = {int(s) for curve in by_run(table).values() for s in curve["step"]}
    doublings = {EARLIEST * 2**k for k in range(a.updates.bit_length())}
    one = replace(a.judged[0][0], quantity="speed", at="", verdict=None, asked={})
    found: list[Row] = []
    for step in sorted(s for s in (doublings | {a.updates}) & evaluated if s <= a.updates):
        part = at_step(table, step)
        optima = fit_all(lr_curves(part))
        points = dict(zip(map(id, optima), curves_at_best(part, optima)))
        full = full_of(optima)
        for o in lora_of(optima) if full is not None else ():
            e, rank = rho(points[id(o)], points[id(full)]), rank_of(o)
            if e.value is not None:
                place: dict[str, Any] = {"arm": f"lora r{rank}", "rank": rank, "updates": step}
                found.append(replace(one, **place, estimate=e))
    found.sort(key=lambda r: r.rank or 0)
    ends = [r for r in found if r.updates == a.updates]
    for low, high in itertools.pairwise(ends):
        times = float(high.estimate.value or 0.0) / float(low.estimate.value or math.nan)
        each = times ** (1 / math.log2((high.rank or 1) / (low.rank or 1)))
        found.append(replace(high, quantity="speed_rise", estimate=Estimate(100 * (each - 1))))
    return found


def speed_panels(rows: Sequence[Row]) -> list[Panel]:
    """Return a panel of rho over updates for each setting, from the rows of `speed_rows`."""
    out = []
    for setting in sorted({r.setting for r in rows}):
        mine = pick(rows, "speed", setting=setting)
        series = []
        for k, rank in enumerate(dict.fromkeys(r.rank for r in mine), 1):
            of = pick(mine, rank=rank)
            points = ([r.updates or 0 for r in of], [r.estimate for r in of])
            series.append(Series.of(f"rank {rank}", *points, colour=k))
        look: dict[str, Any] = {"log_x": True, "log_y": True, "lines": {"full fine-tuning": 1.0}}
        title = f"{mine[0].base}, {WORDS[setting]}"
        out.append(Panel(title, "updates", "speed (rho)", series, **look))
    return out
