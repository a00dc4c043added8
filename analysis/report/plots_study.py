"""Figures of the page over all answers: claims in units of margins, regret over rank and LR."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D

from analysis.measures.regret import ALLOWED
from analysis.report.plots import COLOURS, MARKERS, drawn
from analysis.report.study.answers import WORDS, Setting
from analysis.report.study.figures import Line, Mark, RateCurve, Row

EDGE = 4.6
"""Values further from a claim than this many margins are drawn at the edge, as arrows."""
MARGIN = COLOURS[3]
SYMBOLS = {"SUPPORTED": "o", "REFUTED": "X", "UNDECIDED": "o", "": "D"}
TONES = {Setting.IN_REGIME: COLOURS[1], Setting.BEYOND: COLOURS[2], Setting.REAL: COLOURS[4]}
PALE = 0.6
"""Share of the colour that exploratory verdicts keep."""


def forest(rows: Sequence[Row], path: Path, inputs: str = "") -> None:
    """Draw one row per claim and one column per setting, in units of the claims' margins."""
    heights = [max(2.4, 0.75 + max(map(len, r.marks.values()))) for r in rows]
    tops = list(itertools.accumulate(heights, initial=0.0))
    size = (9.0, 1.1 + 0.17 * tops[-1])
    with drawn(path, inputs, 1, 3, size, sharey=True) as (fig, axes):
        for ax, setting in zip(axes, Setting):
            for row, top, height in zip(rows, tops, heights):
                low, high = (min(max(end, -6), 6) for end in row.band)
                y = [top, top + height]
                ax.fill_between([low, high], y[0], y[1], color=MARGIN, alpha=0.15, lw=0, zorder=0)
                ax.plot([0, 0], y, color=MARGIN, lw=0.8, zorder=0)
                marks = row.marks.get(setting, [])
                for k, mark in enumerate(marks):
                    _mark(ax, mark, top + height * (k + 0.5) / len(marks), TONES[setting])
            ax.set(xlim=(-5, 5), ylim=(tops[-1], 0), xticks=(-3, -1, 1, 3))
            ax.set_title(WORDS[setting], fontsize=10, color=TONES[setting], weight="bold")
            ax.grid(visible=False)
            ax.spines["left"].set_visible(False)
            ax.tick_params(axis="y", length=0)
            for top in tops:
                ax.axhline(top, color="0.85", lw=0.6, zorder=0)
        middles = [top + height / 2 for top, height in zip(tops, heights)]
        axes[0].set_yticks(middles, [textwrap.fill(r.says, 44) for r in rows], fontsize=8)
        axes[1].set_xlabel(
            "0: the claim's value; green: its margin, from -1 to 1 where it has ends"
        )
        fig.tight_layout(rect=(0, 0.35 / size[1], 1, 1), w_pad=0.6)
        keys = [
            Line2D([], [], label=k.lower() or "average over bases", **_symbol(k, COLOURS[0]))
            for k in SYMBOLS
        ]
        keys.append(Line2D([], [], lw=3, label="pale: exploratory", color=_paler(COLOURS[0])))
        fig.legend(handles=keys, loc="lower center", ncol=5, frameon=False, fontsize=8)


def _mark(ax: Axes, mark: Mark, y: float, tone: str) -> None:
    colour = tone if mark.outcome else COLOURS[0]
    colour = _paler(colour) if mark.exploratory else colour
    low, high, value = (min(max(x, -EDGE), EDGE) for x in (mark.low, mark.high, mark.value))
    if math.isfinite(mark.low):
        ax.plot([low, high], [y, y], color=colour, lw=1.3)
    if (math.isfinite(mark.low) and mark.low < -EDGE) or mark.value < -EDGE:
        ax.plot([-EDGE], [y], "<", color=colour, ms=4)
    if (math.isfinite(mark.low) and mark.high > EDGE) or mark.value > EDGE:
        ax.plot([EDGE], [y], ">", color=colour, ms=4)
    # A value outside the figure has its symbol next to its arrow.
    value -= math.copysign(0.5, value) * (abs(mark.value) > EDGE)
    ax.plot([value], [y], **_symbol(mark.outcome, colour))


def _symbol(outcome: str, colour: str) -> dict[str, Any]:
    face = "white" if outcome == "UNDECIDED" else colour
    return {
        "marker": SYMBOLS[outcome],
        "mfc": face,
        "mec": colour,
        "ms": 6 if outcome == "REFUTED" else 5,
        "ls": "none",
    }


def _paler(colour: str) -> str:
    red, green, blue = (1 - PALE * (1 - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))


LOWEST = 0.1
"""Lower end of the y axis of `regret_over_rank`, percent of the gain; triangles: lower values."""
APART = 0.015
"""Horizontal distance of neighbouring lines at one rank, as a share of that rank."""


def regret_over_rank(lines: Sequence[Line], path: Path, inputs: str = "") -> None:
    """Draw a line per condition, with a symbol per base; a regret below the axis is a triangle."""
    bases = list(dict.fromkeys(line.base for line in lines))
    ranks = sorted({rank for line in lines for rank in line.regrets})
    with drawn(path, inputs, 1, 1, (8.0, 6.0)) as (fig, (ax,)):
        limit = 100 * ALLOWED
        ax.axhspan(LOWEST, limit, color=MARGIN, alpha=0.13, lw=0, label=f"up to {limit:g}%: none")
        for k, line in enumerate(lines, 1):
            marker = MARKERS[bases.index(line.base) % len(MARKERS)]
            shift = 1 + APART * (k - (len(lines) + 1) / 2)
            look: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "lw": 1.2, "ms": 6}
            known = [(rank * shift, e, float(e.value or 0.0)) for rank, e in line.regrets.items()]
            for x, e, value in known:
                ends = (max(value if v is None else v, LOWEST) for v in (e.low, e.high))
                ax.plot([x, x], list(ends), "-_", **look)
            shown = [(x, v) for x, _, v in known if v >= LOWEST]
            below = [x for x, _, v in known if v < LOWEST]
            ax.plot(*zip(*shown), f"{marker}-", label=line.name, **look)
            end = {"mec": look["color"], "mfc": "white", "ms": 7, "ls": "none"}
            ax.plot(below, [LOWEST] * len(below), "v", **end)
        ax.set(xscale="log", yscale="log")
        highest = max(e.high or float(e.value or 0) for x in lines for e in x.regrets.values())
        ax.set_ylim(0.8 * LOWEST, 1.3 * max(highest, limit))
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if t < 1.3 * highest]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_xticks(ranks, [str(r) for r in ranks])
        ax.minorticks_off()
        ax.set_xlabel("rank")
        ax.set_ylabel("regret, % of full fine-tuning's gain")
        ax.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13))
        fig.tight_layout()


HIGHEST = 40.0
"""Upper end of the y axis of `rates`, percent of the gain."""


def rates(curves: Sequence[RateCurve], path: Path, inputs: str = "") -> None:
    """Draw LoRA's regret over its LR, in multiples of full fine-tuning's best LR."""
    with drawn(path, inputs, 1, 1, (8.0, 4.6)) as (fig, (ax,)):
        ax.axvline(10, color="0.3", lw=1.4, ls="--", label="10 times")
        for k, c in enumerate(curves, 1):
            colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
            ax.plot(c.fitted_times, c.fitted_percent, "-", color=colour, lw=1.4)
            ax.plot(c.times, c.percent, marker, color=colour, ms=6)
            ax.plot([], [], f"{marker}-", color=colour, ms=6, lw=1.4, label=c.label)
        ticks = (0.5, 1, 2, 5, 10, 20, 50)
        ax.set(xscale="log", ylim=(-2, HIGHEST), xlim=(0.4, 80))
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel("LoRA's learning rate / full fine-tuning's best learning rate")
        ax.set_ylabel("regret, % of LoRA's gain at its best learning rate")
        ax.legend(
            frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2
        )
        fig.tight_layout()
