"""Figures of the page over all answers: regret and claims; and rows that it alone has.

Each figure's values are computed from the answers' rows and runs by the function before it.
"""

import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from analysis.inference.decide import FAR, Verdict, scale_of
from analysis.inference.estimate import AT_LEAST, Estimate, with_interval
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import ALLOWED, novelty_of
from analysis.measures.rows import Row, Setting, pick
from analysis.measures.speed import EARLIEST, curves_at_best, rho
from analysis.optimum.fit import WITHIN, fit_all
from analysis.questions.base import full_of, lora_of, rank_of
from analysis.report.plots import COLOURS, LEGEND, MARKERS, drawn
from analysis.report.study.answers import Answer, where, within
from analysis.runs.curves import at_step, by_run, lr_curves, on_curve_rows

MARGIN = COLOURS[3]
DASHES = {Setting.IN_REGIME: "-", Setting.BEYOND: "--", Setting.REAL: ":"}

# ---------------------------------------------------------------- regret over rank

REGIME, BATCHES = "regime", "large_batches"
CONTROL = 32
"""Batch of the control of `large_batches`, which is a condition like those of `regime`."""
NOTHING = "nothing new"
"""What is new in a condition that has no gain."""
LOWEST = 0.1
"""Lower end of the y axis of `regret_map`, percent of the gain; triangles: lower values."""
APART = 0.015
"""Horizontal distance of neighbouring lines at one rank, as a share of that rank."""


class Line(NamedTuple):
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


def regret_map(lines: Sequence[Line], path: Path, inputs: str = "") -> None:
    """Draw a line per condition, the worst first in the legend; a triangle is below the axis."""
    ranks = sorted({rank for line in lines for rank in line.regrets})
    with drawn(path, inputs, 1, (6.0, 4.8), bbox_inches="tight") as (_, (ax,)):
        limit = 100 * ALLOWED
        ax.axhspan(LOWEST, limit, color=MARGIN, alpha=0.13, lw=0)
        ax.text(ranks[0], 0.93 * limit, f"up to {limit:g}%: no regret", va="top", fontsize=9)
        worst = sorted(lines, key=lambda x: -float(list(x.regrets.values())[-1].value or 0.0))
        for k, line in enumerate(worst, 1):
            colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
            shift = 1 + APART * (k - (len(lines) + 1) / 2)
            look: dict[str, Any] = {"color": colour, "lw": 1.4, "ms": 6}
            known = [(rank * shift, e, float(e.value or 0.0)) for rank, e in line.regrets.items()]
            for x, e, value in known:
                bar = [max(value if v is None else v, LOWEST) for v in (e.low, e.high)]
                ax.plot([x, x], bar, "-_", **look)
            shown = [(x, v if v >= LOWEST else math.nan) for x, _, v in known]
            below = [x for x, _, v in known if v < LOWEST]
            ax.plot(*zip(*shown), marker, ls=DASHES[line.setting], label=line.name, **look)
            ax.plot(below, [LOWEST] * len(below), "v", mec=colour, mfc="white", ms=7, ls="none")
        ax.set(xscale="log", yscale="log", xlabel="rank")
        ax.set_ylabel("regret, % of full fine-tuning's gain")
        highest = max(e.high or float(e.value or 0) for x in lines for e in x.regrets.values())
        ax.set_ylim(0.8 * LOWEST, 1.3 * max(highest, limit))
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if t < 1.3 * highest]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_xticks(ranks, [str(r) for r in ranks])
        ax.minorticks_off()
        ax.legend(**LEGEND, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=4)


# ---------------------------------------------------------------- claims in units of their margins

OPEN = 5.0
"""An end of a margin this many times further from the claim's value than the other end is open."""
DOUBLE = math.log(2)
"""Unit for a ratio if no end of the margin gives one; for a difference it is WITHIN nats."""


def scale_for(v: Verdict) -> tuple[Callable[[float], float], tuple[float, float]]:
    """Return the place of a value on a claim's axis, and the claim's margin on that axis.

    0 is the claim's value, -1 and 1 are the ends of its margin; an open end is infinite.
    """
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
    return lambda value: (away := to(value) - expected) / units[away >= 0], (-low, high)


class Placed(NamedTuple):
    """One verdict of the figure of claims; values, ends of intervals and margins in its units."""

    row: Row
    measure: str
    """The measured quantity and its unit."""
    margin: str
    outcome: str
    band: tuple[float, float]
    value: float
    low: float
    high: float


def claim_rows(answers: Sequence[Answer]) -> list[Placed]:
    """Return a row per verdict on a primary claim, of the study or on a real model.

    Verdicts that are exploratory, withdrawn or without a value are left out.
    """
    rows: list[Placed] = []
    for r, v in (one for a in answers for one in a.single):
        e, counts = v.estimate, v.primary and not (v.exploratory or v.is_withdrawn)
        theirs = r.asked.get("source") == "study" or r.setting == Setting.REAL
        if counts and e.value is not None and theirs:
            at, band = scale_for(v)
            low = -math.inf if e.low is None else at(e.low)
            high = math.inf if e.high is None or AT_LEAST in e.flags else at(e.high)
            measure = re.split(";|, where ", r.asked.get("measure") or "")[0]
            far = [FAR if math.isinf(end) else 0.0 for end in band]
            margin = (v.margin[0] - far[0], v.margin[1] + far[1])  # an open end is no number
            of = (within(margin), v.outcome, band, at(e.value), low, high)
            rows.append(Placed(r, measure, *of))
    return sorted(rows, key=lambda placed: placed.row.setting != Setting.REAL)  # these first


EDGE = 4.6
"""Values further from a claim than this many margins are drawn at the edge, as arrows."""
SYMBOLS = {"SUPPORTED": ("o", MARGIN), "REFUTED": ("X", COLOURS[2]), "UNDECIDED": ("o", "white")}
"""Outcome -> marker and its face."""
MEASURED, MARGINS, OUTCOME = 1.04, 2.17, 2.8
"""Places of the columns right of the axes, in widths of the axes."""


def forest(rows: Sequence[Placed], path: Path, inputs: str = "") -> None:
    """Draw a row per verdict in units of the claim's margin, with its numbers beside it."""
    height = 0.56 * len(rows)
    with drawn(path, inputs, 1, (9.5, height + 1.1)) as (fig, (ax,)):
        for k, row in enumerate(rows):
            low, high = (min(max(end, -6), 6) for end in row.band)
            ax.fill_between([low, high], k - 0.5, k + 0.5, color=MARGIN, alpha=0.15, lw=0)
            ax.axhline(k + 0.5, color="0.85", lw=0.6)
            low, high, value = (min(max(x, -EDGE), EDGE) for x in (row.low, row.high, row.value))
            if math.isfinite(row.low):
                ax.plot([low, high], [k, k], color="black", lw=1.3)
            for side, beyond in (("<", row.low), (">", row.high)):
                sign = -1 if side == "<" else 1
                if sign * row.value > EDGE or (math.isfinite(row.low) and sign * beyond > EDGE):
                    ax.plot([sign * EDGE], [k], side, color="black", ms=4)
            # A value outside the figure has its symbol next to its arrow.
            value -= math.copysign(0.5, value) * (abs(row.value) > EDGE)
            marker, face = SYMBOLS[row.outcome]
            ax.plot(
                [value], [k], marker, mfc=face, mec="black", ms=8 if marker == "X" else 6, ls="none"
            )
            middle: dict[str, Any] = {"va": "center", "transform": ax.get_yaxis_transform()}
            left: dict[str, Any] = {"ha": "right", "transform": ax.get_yaxis_transform()}
            says = textwrap.fill(row.row.says, 76)
            under = "\n".join(textwrap.shorten(t, 86) for t in (where(row.row), row.measure))
            ax.text(-0.04, k - 0.03, says, va="bottom", fontsize=7.5, **left)
            ax.text(-0.04, k + 0.02, under, va="top", fontsize=6.7, color="0.35", **left)
            measured = with_interval(row.row.estimate)
            texts = {MEASURED: measured, MARGINS: row.margin, OUTCOME: row.outcome}
            for x, text in texts.items():
                ax.text(x, k, text, fontsize=8, **middle)
        heads = {MEASURED: "measured", MARGINS: "margin", OUTCOME: "verdict"}
        for x, text in heads.items():
            ax.text(x, -0.75, text, transform=ax.get_yaxis_transform(), fontsize=8, weight="bold")
        ax.axvline(0, color=MARGIN, lw=0.8, zorder=0)
        ax.set(xlim=(-5, 5), ylim=(len(rows) - 0.5, -0.5), yticks=[], xticks=(-3, -1, 1, 3))
        ax.set_xlabel("0: the claim's value; green: its margin", fontsize=9)
        ax.grid(visible=False)
        ax.spines["left"].set_visible(False)
        fig.subplots_adjust(
            left=0.45, right=0.61, top=1 - 0.35 / (height + 1.1), bottom=0.75 / (height + 1.1)
        )


# ---------------------------------------------------------------- measured for the page alone


def speed_rows(answers: Sequence[Answer]) -> list[Row]:
    """Measure the speed (rho) of each rank after 8, 16, 32, ... and all updates.

    Each method is at its best LR for that length. `speed_rise`: percent by which a doubling of the
    rank raises the speed, from the rank below. One answer of `rank` per setting is measured:
    confirmatory if possible, on the largest base.
    """
    mine = [a for a in answers if a.sweep == "rank" and a.updates >= 2 * EARLIEST]
    chosen: dict[Setting, Answer] = {}
    for a in sorted(mine, key=lambda a: (a.exploratory, -a.runs["n_trainable"].max())):
        chosen.setdefault(a.judged[0][0].setting, a)
    rows: list[Row] = []
    for _, a in sorted(chosen.items()):
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
        for low, high in itertools.pairwise([r for r in found if r.updates == a.updates]):
            times = float(high.estimate.value or 0.0) / float(low.estimate.value or math.nan)
            rise = 100 * (times ** (1 / math.log2((high.rank or 1) / (low.rank or 1))) - 1)
            found.append(replace(high, quantity="speed_rise", estimate=Estimate(rise)))
        rows += found
    return rows


def joined_rows(answers: Sequence[Answer]) -> list[Row]:
    """Measure the ratio of `lr_ratio` on a real model from the runs of all kept answers.

    The rule, written before it was applied: fit all as one table, each run once, so that runs
    which differ in learning rate and seed alone are one curve. The arms have the most runs.
    """
    kept = Path(__file__).resolve().parents[1] / "results"
    mine = [a for a in answers if a.folder.resolve().parent == kept and "objective" not in a.runs]
    rows = (r for a in mine for r in pick(a.rows, "lr_ratio", setting=Setting.REAL))
    if (one := next(rows, None)) is None:
        return []
    runs = pd.concat([a.runs[a.runs["model"] == one.base] for a in mine], ignore_index=True)
    fits = fit_all(lr_curves(runs.drop_duplicates("run_id").reset_index(drop=True)))
    fits = sorted((o for o in fits if o.curve.group == one.task), key=lambda o: o.best_lr.n)
    full, lora = next(o for o in fits[::-1] if o.curve.is_full), lora_of(fits)[-1]
    gain = full.curve.nll_start - (full.best_nll or math.nan)
    cost = 100 * (lora.regret(10 * (full.best_lr.value or math.nan)) or math.nan) / gain
    found = {"lr_ratio": ratio_of([lora], full), "% lost at ten times": Estimate(cost)}
    return [replace(one, quantity=f"{k}, all runs", estimate=e) for k, e in found.items()]
