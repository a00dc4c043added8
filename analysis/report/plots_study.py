"""Figures of the page over all answers: regret over rank and over LR, and the study's claims."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.inference.estimate import with_interval
from analysis.measures.regret import ALLOWED
from analysis.measures.rows import Setting
from analysis.report.plots import BELOW, COLOURS, LEGEND, MARKERS, drawn
from analysis.report.study.answers import where
from analysis.report.study.figures import Line, Placed, RateCurve

MARGIN = COLOURS[3]
DASHES = {Setting.IN_REGIME: "-", Setting.BEYOND: "--", Setting.REAL: ":"}

# ---------------------------------------------------------------- regret over rank

LOWEST = 0.1
"""Lower end of the y axis of `regret_map`, percent of the gain; triangles: lower values."""
APART = 0.015
"""Horizontal distance of neighbouring lines at one rank, as a share of that rank."""
STEP = 0.105
"""Vertical distance of neighbouring labels, as a share of the axis."""


def regret_map(lines: Sequence[Line], path: Path, inputs: str = "") -> None:
    """Draw a line per condition with its label; a regret below the axis is a triangle."""
    ranks = sorted({rank for line in lines for rank in line.regrets})
    with drawn(path, inputs, 1, 1, (9.0, 4.8)) as (fig, (ax,)):
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
        _labels(ax, sorted(ends, key=lambda end: (-end[0], end[1])))


def _labels(ax: Axes, ends: Sequence[tuple[float, float, str, str, Line]]) -> None:
    """Write the name of each line right of the axes, with a thin line to its last point."""
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


# ---------------------------------------------------------------- claims in units of margins

EDGE = 4.6
"""Values further from a claim than this many margins are drawn at the edge, as arrows."""
SYMBOLS = {"SUPPORTED": ("o", MARGIN), "REFUTED": ("X", COLOURS[2]), "UNDECIDED": ("o", "white")}
"""Outcome -> marker and its face."""
MEASURED, WITHIN, OUTCOME = 1.04, 2.17, 2.8
"""Places of the columns right of the axes, in widths of the axes."""


def forest(rows: Sequence[Placed], path: Path, inputs: str = "") -> None:
    """Draw a row per verdict in units of the claim's margin, with its numbers beside it."""
    height = 0.56 * len(rows)
    with drawn(path, inputs, 1, 1, (9.5, height + 1.1)) as (fig, (ax,)):
        for k, row in enumerate(rows):
            low, high = (min(max(end, -6), 6) for end in row.band)
            ax.fill_between([low, high], k - 0.5, k + 0.5, color=MARGIN, alpha=0.15, lw=0)
            ax.axhline(k + 0.5, color="0.85", lw=0.6)
            _mark(ax, row, k)
            middle: dict[str, Any] = {"va": "center", "transform": ax.get_yaxis_transform()}
            left: dict[str, Any] = {"ha": "right", "transform": ax.get_yaxis_transform()}
            says = textwrap.fill(row.row.says, 76)
            under = "\n".join(textwrap.shorten(t, 86) for t in (where(row.row), row.measure))
            ax.text(-0.04, k - 0.03, says, va="bottom", fontsize=7.5, **left)
            ax.text(-0.04, k + 0.02, under, va="top", fontsize=6.7, color="0.35", **left)
            measured = with_interval(row.row.estimate)
            texts = {MEASURED: measured, WITHIN: row.margin, OUTCOME: row.outcome}
            for x, text in texts.items():
                ax.text(x, k, text, fontsize=8, **middle)
        heads = {MEASURED: "measured", WITHIN: "margin", OUTCOME: "verdict"}
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


def _mark(ax: Axes, row: Placed, y: float) -> None:
    low, high, value = (min(max(x, -EDGE), EDGE) for x in (row.low, row.high, row.value))
    if math.isfinite(row.low):
        ax.plot([low, high], [y, y], color="black", lw=1.3)
    for side, beyond in (("<", row.low), (">", row.high)):
        sign = -1 if side == "<" else 1
        if sign * row.value > EDGE or (math.isfinite(row.low) and sign * beyond > EDGE):
            ax.plot([sign * EDGE], [y], side, color="black", ms=4)
    # A value outside the figure has its symbol next to its arrow.
    value -= math.copysign(0.5, value) * (abs(row.value) > EDGE)
    marker, face = SYMBOLS[row.outcome]
    ax.plot([value], [y], marker, mfc=face, mec="black", ms=8 if marker == "X" else 6, ls="none")


# ---------------------------------------------------------------- learning rates

HIGHEST = 40.0
"""Upper end of the y axis of `rates`, percent of the gain."""


def rates(curves: Sequence[RateCurve], path: Path, inputs: str = "") -> None:
    """Draw LoRA's regret over its LR, in multiples of full fine-tuning's best LR."""
    with drawn(path, inputs, 1, 1, (9.0, 4.2 + 0.2 * len(curves))) as (fig, (ax,)):
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
