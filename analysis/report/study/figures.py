"""Compute the data of the study's figures, which `analysis.report.plots_study` draws."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import scale_of
from analysis.inference.design import FAR
from analysis.inference.estimate import AT_LEAST, Estimate, Verdict, with_interval
from analysis.measures.batch_effect import EARLIEST
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import novelty_of
from analysis.measures.speed import curves_at_best, rho
from analysis.optimum.fit import fit_all
from analysis.optimum.likelihood import rate_means
from analysis.optimum.optimum import WITHIN
from analysis.questions.base import Panel, Series, by_group, full_of, lora_of
from analysis.report.study.answers import WORDS, Answer, Setting, estimate_of, within
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
    setting: Setting
    regrets: dict[int, Estimate]
    """Rank -> regret in percent of full fine-tuning's gain."""

    @property
    def name(self) -> str:
        size = f" of {self.batch_size}" if self.batch_size else ""
        return f"{self.base}, {self.updates} updates{size}:\n{self.data}"


def regret_lines(answers: Sequence[Answer]) -> list[Line]:
    """Return a line for each condition of `regime`, and for the control of `large_batches`."""
    found = []
    for a in answers:
        for c in conditions_of([a]):
            base, _, data = c["cell"].partition(", ")
            place = (c.get("batch_size"), int(c["updates"]), a.setting(c["cell"]))
            found.append(Line(base, data, *place, _by_rank(c["ranks"])))
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
        if (setting := a.setting(a.verdicts[0].group)) == Setting.IN_REGIME:
            novelty = novelty_of(json.loads(a.runs["spec"].iloc[0])["dataset"])
            place = (CONTROL, mine[0]["updates"], setting)
            yield Line(a.bases[0], novelty.name if novelty else "", *place, _by_rank(mine)), a


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
class Row:
    """One verdict of the figure of claims."""

    says: str
    where: str
    """Base, data, rank and number of updates."""
    measure: str
    """The measured quantity and its unit."""
    measured: str
    margin: str
    outcome: str
    band: tuple[float, float]
    value: float
    low: float
    high: float
    """Ends of the interval; infinite where there is none."""


def claim_rows(answers: Sequence[Answer]) -> list[Row]:
    """Return a row per verdict on a primary claim of the study that confirms or refutes it.

    Verdicts that are exploratory, withdrawn or without a value are left out.
    """
    rows: list[Row] = []
    for a in answers:
        for v in a.single:
            e, whose = v.estimate, a.word(v.claim, "source")
            if not v.primary or v.exploratory or v.is_withdrawn or e.value is None:
                continue
            if whose == "study":
                scale = scale_for(v)
                low = -math.inf if e.low is None else scale.at(e.low)
                high = math.inf if e.high is None or AT_LEAST in e.flags else scale.at(e.high)
                measure = re.split(";|, where ", a.word(v.claim, "measure"))[0]
                far = [FAR if math.isinf(end) else 0.0 for end in scale.band]
                margin = (v.margin[0] - far[0], v.margin[1] + far[1])  # an open end is no number
                rank = min if re.search(r"\brank 1\b", measure) else max
                texts = (
                    a.says(v.claim),
                    a.where(v, rank),
                    measure,
                    with_interval(e),
                    within(margin),
                )
                rows.append(Row(*texts, v.outcome, scale.band, scale.at(e.value), low, high))
    return rows


# ---------------------------------------------------------------- learning rates

ALPHA = 32.0
"""The alpha of the figure; the study's."""
WIDTHS = "lr_scale"
"""The sweep with bases of several widths."""


@dataclass(frozen=True)
class RateCurve:
    """LoRA's regret on one base, over LoRA's LR / full fine-tuning's best LR."""

    base: str
    hidden: int
    rank: int
    alpha: float
    updates: int
    setting: Setting
    exploratory: bool
    ratio: Estimate
    """LoRA's best LR / full fine-tuning's."""
    times: np.ndarray
    percent: np.ndarray
    """Mean regret at each LR tried, in percent of LoRA's gain at LoRA's best LR."""
    fitted_times: np.ndarray
    fitted_percent: np.ndarray
    """Regret of the fitted curve at `fitted_times`, in percent as above."""

    @property
    def label(self) -> str:
        arms = f"rank {self.rank}, alpha {self.alpha:g}, {self.updates} updates"
        return f"{self.base} (hidden size {self.hidden}), {arms}"


def rate_curves(answers: Sequence[Answer]) -> list[RateCurve]:
    """Return a curve per base and setting, at the highest rank and ALPHA, real models last.

    If there are several answers, confirmatory ones are preferred, then the one with the most runs.
    """
    chosen: dict[tuple[str, Setting], RateCurve] = {}
    mine = [a for a in answers if a.sweep in ("lr_ratio", WIDTHS)]
    for a in sorted(mine, key=lambda a: (a.sweep == WIDTHS, a.exploratory, -a.results["runs"])):
        for group, optima in by_group(fit_all(lr_curves(a.runs))).items():
            full, key = full_of(optima), optima[0].curve.key
            lora = [o for o in lora_of(optima) if o.curve.key.get("alpha", ALPHA) == ALPHA]
            where = (str(key["model"]), a.setting(group))
            if full is None or not lora or where in chosen:
                continue
            o = max(lora, key=lambda o: o.curve.key["rank"])
            best, unit, rates = o.best_nll, full.best_lr.value, o.curve.unbroken
            if best is None or unit is None or not len(rates):
                continue
            lr = np.exp(np.linspace(rates[0], rates[-1], 200))
            if (fitted := o.predict(lr)) is not None:
                width = a.runs.loc[a.runs["model"] == where[0], "hidden_size"].max()
                arms = (int(o.curve.key["rank"]), float(o.curve.key.get("alpha", ALPHA)))
                named = (where[0], int(width), *arms, int(key["steps"]), where[1], a.exploratory)
                (tried, losses), percent = rate_means(o.curve), 100 / (o.curve.nll_start - best)
                runs, fits = percent * (losses - best), percent * (fitted - best)
                shown = (np.exp(tried) / unit, runs, lr / unit, fits)
                chosen[where] = RateCurve(*named, ratio_of([o], full), *shown)
    return sorted(chosen.values(), key=lambda c: (c.setting == Setting.REAL, c.hidden))


def has_rate_curves(answers: Sequence[Answer]) -> bool:
    """Return whether an answer has best LRs of both methods, without fitting the runs again."""
    return any(
        {c["method"] for c in a.results["curves"] if c["best_lr"] is not None} >= {"fullft", "lora"}
        for a in answers
        if a.sweep in ("lr_ratio", WIDTHS)
    )


# ---------------------------------------------------------------- speed of each rank

Speeds = dict[int, dict[int, Estimate]]
"""Rank -> number of updates -> rho."""


def speed_answers(answers: Sequence[Answer]) -> dict[Setting, Answer]:
    """Return one answer of `rank` per setting: confirmatory if possible, on the largest base."""
    mine = [a for a in answers if a.sweep == "rank" and judged_to(a) >= 2 * EARLIEST]
    found: dict[Setting, Answer] = {}
    for a in sorted(mine, key=lambda a: (a.exploratory, -a.size)):
        found.setdefault(a.setting(a.verdicts[0].group), a)
    return dict(sorted(found.items()))


def judged_to(a: Answer) -> int:
    """Return the number of updates after which an answer was judged; runs may be longer."""
    return max((int(c["steps"]) for c in a.results["curves"]), default=0)


def speed_panels(answers: Sequence[Answer]) -> list[Panel]:
    """Return a panel of rho over updates for each setting."""
    out = []
    for setting, a in speed_answers(answers).items():
        by_rank = sorted(speeds(a.runs, doublings(judged_to(a))).items())
        series = [
            Series.of(f"rank {rank}", list(mine), list(mine.values()), colour=k)
            for k, (rank, mine) in enumerate(by_rank, 1)
        ]
        title = f"{', '.join(a.bases)}, {WORDS[setting]}"
        look: dict[str, Any] = {"log_x": True, "log_y": True, "lines": {"full fine-tuning": 1.0}}
        out.append(Panel(title, "updates", "speed (rho)", series, **look))
    return out


def doublings(to: int) -> list[int]:
    """Return 8, 16, 32, ... and `to` itself: the numbers of updates at which speed is shown."""
    return sorted({s for s in (*(EARLIEST * 2**k for k in range(to.bit_length())), to) if s <= to})


def speeds(runs: pd.DataFrame, steps: Sequence[int]) -> Speeds:
    """Measure rho after some numbers of updates, each method at its best LR there."""
    plain = (runs["method"] == "fullft") | (runs["init_seed"].fillna(0) == 0)
    table = on_curve_rows(runs[plain].reset_index(drop=True))
    evaluated = {int(s) for curve in by_run(table).values() for s in curve["step"]}
    found: Speeds = {}
    for step in sorted(set(steps) & evaluated):
        part = at_step(table, step)
        optima = fit_all(lr_curves(part))
        points = dict(zip(map(id, optima), curves_at_best(part, optima)))
        full = full_of(optima)
        for o in lora_of(optima) if full is not None else ():
            e = rho(points[id(o)], points[id(full)])
            if e.value is not None:
                found.setdefault(int(o.curve.key["rank"]), {})[step] = e
    return found
