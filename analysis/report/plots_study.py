"""Figures of the page over all answers: regret and claims; and rows that it alone has.

Each figure's values are computed from the answers' rows and runs by the function before it.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, rate
from analysis.inference.rows import Row, pick
from analysis.inference.where import Setting
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import ALLOWED, novelty_of
from analysis.measures.speed import EARLIEST, curves_at_best, rho
from analysis.optimum.fit import Optimum, fit_all, rate_means
from analysis.questions.base import full_of, lora_of, rank_of
from analysis.report.plots import COLOURS, LEGEND, MARKERS, drawn
from analysis.report.study.answers import Answer, where
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
    found = [p for p in ratio_pairs(answers) if p.row.setting == Setting.REAL]
    return [
        replace(p.row, quantity=f"{k}, all runs", estimate=e)
        for p in found
        for k, e in (("lr_ratio", ratio_of([p.lora], p.full)), ("% lost at ten times", p.ten_times))
    ]


# ---------------------------------------------------------------- the ratio of learning rates


class Pair(NamedTuple):
    """Full fine-tuning and LoRA in one condition of `lr_ratio`."""

    row: Row
    """The ratio of their best learning rates."""
    full: Optimum
    lora: Optimum

    def percent(self, loss: Any) -> Any:
        """Return a loss above full fine-tuning's lowest, in percent of full fine-tuning's gain."""
        lowest = self.full.best_nll or math.nan
        return 100 * (loss - lowest) / (self.full.curve.nll_start - lowest)

    @property
    def ten_times(self) -> Estimate:
        """What LoRA loses at ten times full fine-tuning's best LR, in percent of the gain."""
        lost = self.lora.regret(10 * (self.full.best_lr.value or math.nan)) or math.nan
        return Estimate(self.percent((self.full.best_nll or math.nan) + lost))


def ratio_pairs(answers: Sequence[Answer]) -> list[Pair]:
    """Fit the two methods of the kept answers of `lr_ratio`; on a real model as `joined_rows`."""
    kept = Path(__file__).resolve().parents[1] / "results"
    mine = [a for a in answers if a.folder.resolve().parent == kept and "objective" not in a.runs]
    pairs = []
    for a in (a for a in mine if a.sweep == "lr_ratio"):
        row, runs = pick(a.rows, "lr_ratio", verdict=None)[0], a.runs
        if row.setting == Setting.REAL:
            runs = pd.concat([b.runs[b.runs["model"] == row.base] for b in mine], ignore_index=True)
            runs = runs.drop_duplicates("run_id").reset_index(drop=True)
        fits = sorted(fit_all(lr_curves(runs)), key=lambda o: o.best_lr.n)
        fits = [o for o in fits if o.curve.group == row.task]
        pairs.append(Pair(row, [o for o in fits if o.curve.is_full][-1], lora_of(fits)[-1]))
    return pairs


def ratio_figure(pairs: Sequence[Pair], path: Path, inputs: str = "") -> None:
    """Draw both methods' loss over learning rate, with both optima and ten times marked."""
    with drawn(path, inputs, len(pairs), (6.2, 4.0), bbox_inches="tight") as (fig, axes):
        for ax, p in zip(axes, pairs):
            ends = [float(o.best_lr.value or 0) for o in (p.full, p.lora)]
            names = ("full fine-tuning", f"LoRA, rank {rank_of(p.lora)}")
            for o, best, name, colour in zip((p.full, p.lora), ends, names, COLOURS):
                x, y = rate_means(o.curve)
                ax.plot(np.exp(x), p.percent(y), "o", color=colour, ms=5)
                grid = np.geomspace(np.exp(x[0]), np.exp(x[-1]), 300)
                ax.plot(grid, p.percent(o.predict(grid)), color=colour, lw=1.6, label=name)
                ax.plot([best, best], [-6, p.percent(o.best_nll)], color=colour, lw=1, ls=":")
                ax.text(best, -8.3, f"best: {rate(best)}", color=colour, fontsize=9, ha="center")
            ax.annotate("", (ends[1], -3.5), (ends[0], -3.5), arrowprops={"arrowstyle": "->"})
            times, middle = f"{ends[1] / ends[0]:.1f} times", math.sqrt(ends[0] * ends[1])
            ax.text(middle, -2.8, times, ha="center", weight="bold")
            ax.axvline(10 * ends[0], color=COLOURS[2], lw=1.2, ls="--")
            said = f" ten times: {p.ten_times.value:.1f}% worse\n than LoRA's best"
            ax.text(10 * ends[0], 31, said, color=COLOURS[2], fontsize=9, va="top")
            ax.set(xscale="log", xlabel="learning rate", ylim=(-9, 32))
            ax.set_ylabel("loss above full fine-tuning's lowest,\n% of what training gains")
            ax.set_xlim(right=2.2 * math.exp(max(p.lora.curve.x)))
            ax.set_title(where(p.row), fontsize=10)
            ax.minorticks_off()
            ax.legend(**LEGEND, loc="upper left")
        fig.tight_layout()
