"""Figures of the page over all answers: regret, claims, learning rates and speed of each rank.

Each figure's values are computed from the answers' rows and runs by the function before it.
"""

import itertools
import json
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.lines import Line2D

from analysis.inference.decide import FAR, Verdict, scale_of
from analysis.inference.estimate import AT_LEAST, Estimate, with_interval
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import ALLOWED, novelty_of
from analysis.measures.rows import Row, Setting, pick
from analysis.measures.speed import EARLIEST, curves_at_best, rho
from analysis.optimum.fit import WITHIN, fit_all
from analysis.optimum.valley import rate_means
from analysis.questions.base import Panel, Series, by_group, full_of, lora_of, rank_of
from analysis.report.plots import BELOW, COLOURS, LEGEND, MARKERS, drawn
from analysis.report.study.answers import WORDS, Answer, where, within
from analysis.runs.learning_curves import at_step, by_run, on_curve_rows
from analysis.runs.lr_curves import lr_curves

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
STEP = 0.105
"""Vertical distance of neighbouring labels, as a share of the axis."""


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
    """Draw a line per condition with its label; a regret below the axis is a triangle."""
    ranks = sorted({rank for line in lines for rank in line.regrets})
    with drawn(path, inputs, 1, (9.0, 4.8)) as (fig, (ax,)):
        limit = 100 * ALLOWED
        ax.axhspan(LOWEST, limit, color=MARGIN, alpha=0.13, lw=0)
        ax.text(ranks[0], 0.93 * limit, f"up to {limit:g}%: no regret", va="top", fontsize=9)
        ends = []
        for k, line in enumerate(lines, 1):
            colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
            shift = 1 + APART * (k - (len(lines) + 1) / 2)
            look: dict[str, Any] = {"color": colour, "lw": 1.4, "ms": 6}
            known = [(rank * shift, e, float(e.value or 0.0)) for rank, e in line.regrets.items()]
            for x, e, value in known:
                bar = [max(value if v is None else v, LOWEST) for v in (e.low, e.high)]
                ax.plot([x, x], bar, "-_", **look)
            shown = [(x, v) for x, _, v in known if v >= LOWEST]
            below = [x for x, _, v in known if v < LOWEST]
            ax.plot(*zip(*shown), marker, ls=DASHES[line.setting], **look)
            ax.plot(below, [LOWEST] * len(below), "v", mec=colour, mfc="white", ms=7, ls="none")
            ends.append((max(known[-1][2], LOWEST), known[-1][0], colour, marker, line))
        ax.set(xscale="log", yscale="log")
        highest = max(e.high or float(e.value or 0) for x in lines for e in x.regrets.values())
        ax.set_ylim(0.8 * LOWEST, 1.3 * max(highest, limit))
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if t < 1.3 * highest]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_xticks(ranks, [str(r) for r in ranks])
        ax.minorticks_off()
        ax.set_xlabel("rank")
        ax.set_ylabel("regret, % of full fine-tuning's gain")
        fig.subplots_adjust(left=0.08, right=0.61, top=0.97, bottom=0.12)
        # the name of each line right of the axes, with a thin line to its last point
        ends.sort(key=lambda end: (-end[0], end[1]))
        low, high = map(math.log, ax.get_ylim())
        at = [(math.log(y) - low) / (high - low) for y, *_ in ends]
        for k in range(1, len(at)):
            at[k] = min(at[k], at[k - 1] - STEP)
        at[-1] = max(at[-1], 0.03)
        for k in reversed(range(len(at) - 1)):
            at[k] = max(at[k], at[k + 1] + STEP)
        for (y, x, colour, marker, line), height in zip(ends, at):
            where: dict[str, Any] = {"xycoords": "data", "textcoords": "axes fraction"}
            arrow = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
            ax.annotate("", (x, y), (1.04, height), arrowprops=arrow, **where)
            mark: dict[str, Any] = {"transform": ax.transAxes, "clip_on": False, "color": colour}
            ls = DASHES[line.setting]
            ax.plot([1.04, 1.07, 1.10], [height] * 3, ls, lw=1.4, **mark)
            ax.plot([1.07], [height], marker, ms=6, **mark)
            ax.text(1.12, height, line.name, transform=ax.transAxes, va="center", fontsize=8)


# ---------------------------------------------------------------- claims in units of their margins

OPEN = 5.0
"""An end of a margin this many times further from the claim's value than the other end is open."""
DOUBLE = math.log(2)
"""Unit for a ratio if no end of the margin gives one; for a difference it is WITHIN nats."""


class Scale(NamedTuple):
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
        keys = [
            Line2D([], [], marker=m, mfc=face, mec="black", ls="none", label=outcome.lower())
            for outcome, (m, face) in SYMBOLS.items()
        ]
        fig.legend(handles=keys, loc="lower center", ncol=3, **LEGEND)


# ---------------------------------------------------------------- learning rates

ALPHA = 32.0
"""The alpha of the figure; the study's."""
WIDTHS = "lr_scale"
"""The sweep with bases of several widths."""


class RateCurve(NamedTuple):
    """LoRA's regret on one base, over LoRA's LR / full fine-tuning's best LR."""

    row: Row
    """LoRA's best LR / full fine-tuning's, and where it was measured."""
    hidden: int
    label: str
    times: np.ndarray
    percent: np.ndarray
    """Mean regret at each LR tried, in percent of LoRA's gain at LoRA's best LR."""
    fitted_times: np.ndarray
    fitted_percent: np.ndarray
    """Regret of the fitted curve at `fitted_times`, in percent as above."""


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
            place, known = (r.base, r.setting), best is not None and unit is not None
            if place in chosen or not known or not len(rates):
                continue
            lr = np.exp(np.linspace(rates[0], rates[-1], 200))
            if (fitted := o.predict(lr)) is not None:
                width = int(a.runs.loc[a.runs["model"] == r.base, "hidden_size"].max())
                (tried, losses), percent = rate_means(o.curve), 100 / (o.curve.nll_start - best)
                runs, fits = percent * (losses - best), percent * (fitted - best)
                row = replace(r, quantity="lr_ratio", estimate=ratio_of([o], full))
                shown = (np.exp(tried) / unit, runs, lr / unit, fits)
                label = f"{r.base} (hidden size {width}), rank {r.rank}, alpha "
                label += f"{r.alpha or ALPHA:g}, {r.updates} updates"
                chosen[place] = RateCurve(row, width, label, *shown)
    return sorted(chosen.values(), key=lambda c: (c.row.setting == Setting.REAL, c.hidden))


HIGHEST = 40.0
"""Upper end of the y axis of `rates`, percent of the gain."""


def rates(curves: Sequence[RateCurve], path: Path, inputs: str = "") -> None:
    """Draw LoRA's regret over its LR, in multiples of full fine-tuning's best LR."""
    with drawn(path, inputs, 1, (9.0, 4.2 + 0.2 * len(curves))) as (fig, (ax,)):
        ax.axvline(10, color="0.3", lw=1.4, ls="--")
        ax.text(10.3, 0.97 * HIGHEST, "10 times", va="top", fontsize=9)
        for k, c in enumerate(curves, 1):
            look: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "lw": 1.4, "ms": 6}
            marker = MARKERS[(k - 1 + (k - 1) // len(COLOURS)) % len(MARKERS)]
            ls = DASHES[c.row.setting]
            ax.plot(c.fitted_times, c.fitted_percent, ls, **look)
            ax.plot(c.times, c.percent, marker, **look)
            ax.plot([], [], marker, ls=ls, label=c.label, **look)
        ticks = (0.5, 1, 2, 5, 10, 20, 50)
        ax.set(xscale="log", ylim=(-2, HIGHEST), xlim=(0.4, 80))
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel("LoRA's learning rate / full fine-tuning's best learning rate")
        ax.set_ylabel("loss above LoRA's lowest, % of LoRA's gain")
        ax.legend(**{**BELOW, "fontsize": 9}, bbox_to_anchor=(0.5, -0.13))
        fig.tight_layout()


# ---------------------------------------------------------------- speed of each rank


def speed_answers(answers: Sequence[Answer]) -> dict[Setting, Answer]:
    """Return one answer of `rank` per setting: confirmatory if possible, on the largest base."""
    mine = [a for a in answers if a.sweep == "rank" and a.updates >= 2 * EARLIEST]
    found: dict[Setting, Answer] = {}
    for a in sorted(mine, key=lambda a: (a.exploratory, -a.runs["n_trainable"].max())):
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
