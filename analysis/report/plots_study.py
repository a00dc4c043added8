"""Figures of the page over all answers: claims in units of their margins, the map, the rates."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D

from analysis.measures.regret import ALLOWED, BITS_PER_PARAMETER
from analysis.report.plots import COLOURS, MARKERS, drawn
from analysis.report.study.forest import Mark, Row
from analysis.report.study.load_map import Boundary, Point
from analysis.report.study.rates import RateCurve
from analysis.report.study.setting import WORDS, Setting

EDGE = 4.6
"""Values further from a claim than this many margins are drawn at the edge, as arrows."""
MARGIN = COLOURS[3]
SYMBOLS = {"SUPPORTED": "o", "REFUTED": "X", "UNDECIDED": "o", "": "D"}
LABELS = {
    "SUPPORTED": "supported",
    "REFUTED": "refuted",
    "UNDECIDED": "undecided",
    "": "average over bases",
}
TONES = {Setting.IN_REGIME: COLOURS[1], Setting.BEYOND: COLOURS[2], Setting.REAL: COLOURS[4]}
PALE = 0.6
"""How much of its colour is left to what does not confirm."""


def forest(rows: Sequence[Row], path: Path, inputs: str = "") -> None:
    """Draw one row per claim and one column per setting, in units of the claims' margins."""
    heights = [max(2.4, 0.75 + max(map(len, r.marks.values()))) for r in rows]
    tops = list(itertools.accumulate(heights, initial=0.0))
    size = (9.0, 1.1 + 0.17 * tops[-1])
    with drawn(path, inputs, 1, 3, size, 110, sharey=True) as (fig, axes):
        for ax, setting in zip(axes, Setting):
            for row, top, height in zip(rows, tops, heights):
                _claim(ax, row, setting, top, height)
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
        fig.legend(handles=_keys(), loc="lower center", ncol=5, frameon=False, fontsize=8)


def _claim(ax: Axes, row: Row, setting: Setting, top: float, height: float) -> None:
    low, high = (min(max(end, -6), 6) for end in row.band)
    ax.fill_between([low, high], top, top + height, color=MARGIN, alpha=0.15, lw=0, zorder=0)
    ax.plot([0, 0], [top, top + height], color=MARGIN, lw=0.8, zorder=0)
    marks = row.marks.get(setting, [])
    for k, mark in enumerate(marks):
        y = top + height * (k + 0.5) / len(marks)
        _mark(ax, mark, y, TONES[setting] if mark.outcome else COLOURS[0])


def _mark(ax: Axes, mark: Mark, y: float, colour: str) -> None:
    colour = _paler(colour) if mark.explores else colour
    low, high, value = (min(max(x, -EDGE), EDGE) for x in (mark.low, mark.high, mark.value))
    if math.isfinite(mark.low):
        ax.plot([low, high], [y, y], color=colour, lw=1.3)
    if (math.isfinite(mark.low) and mark.low < -EDGE) or mark.value < -EDGE:
        ax.plot([-EDGE], [y], "<", color=colour, ms=4)
    if (math.isfinite(mark.low) and mark.high > EDGE) or mark.value > EDGE:
        ax.plot([EDGE], [y], ">", color=colour, ms=4)
    # The symbol of a value that has left the figure stands beside its arrow.
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


def _keys() -> list[Line2D]:
    keys = [
        Line2D([], [], label=label, **_symbol(outcome, COLOURS[0]))
        for outcome, label in LABELS.items()
    ]
    return [*keys, Line2D([], [], lw=3, label="pale: exploratory", color=_paler(COLOURS[0]))]


def _paler(colour: str) -> str:
    red, green, blue = (1 - PALE * (1 - part) for part in to_rgb(colour))
    return to_hex((red, green, blue))


LINEAR = 10.0
"""Percent of the gain up to which the map's axis is linear."""


def load_map(
    points: Sequence[Point], boundary: Boundary | None, path: Path, inputs: str = ""
) -> None:
    """Draw regret over load, a colour per rank and a symbol per base, and where the regime ends."""
    ranks, bases = ({getattr(p, k): None for p in points} for k in ("rank", "base"))
    with drawn(path, inputs, 1, 1, (8.0, 4.8), 110) as (fig, (ax,)):
        ax.axhspan(
            -100,
            100 * ALLOWED,
            color=MARGIN,
            alpha=0.13,
            lw=0,
            label=f"gives up under {ALLOWED:.0%}",
        )
        ax.axhline(0, color=COLOURS[0], lw=1.2, label="full fine-tuning")
        if boundary is not None:
            label = (
                "the regime ends in here" if boundary.clean else "some keep up, some fall behind"
            )
            ax.axvspan(boundary.low, boundary.high, color="0.5", alpha=0.15, lw=0, label=label)
        for (k, rank), (b, base) in itertools.product(enumerate(ranks, 1), enumerate(bases)):
            mine = [p for p in points if (p.rank, p.base) == (rank, base)]
            if mine:
                _loads(ax, mine, COLOURS[k % len(COLOURS)], MARKERS[b % len(MARKERS)])
        for k, rank in enumerate(ranks, 1):
            ax.plot([], [], "o-", color=COLOURS[k % len(COLOURS)], label=f"rank {rank}")
        for b, base in enumerate(bases if len(bases) > 1 else ()):
            ax.plot([], [], MARKERS[b % len(MARKERS)], color="0.4", label=base)
        values = [v for p in points for v in (p.regret.low, p.regret.value, p.regret.high)]
        low, high = (f(v for v in values if v is not None) for f in (min, max))
        # Linear where it matters whether LoRA keeps up, logarithmic beyond.
        ax.set_yscale("symlog", linthresh=LINEAR)
        ax.set_ylim(min(low - 1, -2), max(high, LINEAR) * 1.15)
        ticks = [t for t in (-10, -5, 0, 5, 10, 20, 50, 100, 200, 500) if low - 1 < t < high * 1.15]
        ax.set_yticks(ticks, [f"{t}" for t in ticks])
        ax.set_xscale("log")
        ax.set_xlabel(
            f"load: bits of what is new / ({BITS_PER_PARAMETER:g} bits x trained parameters)"
        )
        ax.set_ylabel("regret, % of full fine-tuning's gain")
        ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        fig.tight_layout()


def _loads(ax: Axes, points: Sequence[Point], colour: str, marker: str) -> None:
    x, y = [p.load for p in points], [float(p.regret.value or 0.0) for p in points]
    reach = [
        (v - e.low, e.high - v) if e.low is not None and e.high is not None else (0.0, 0.0)
        for v, e in zip(y, (p.regret for p in points))
    ]
    bars = [[max(low, 0.0) for low, _ in reach], [max(high, 0.0) for _, high in reach]]
    ax.errorbar(x, y, yerr=bars, fmt=marker, color=colour, ms=6, capsize=3, lw=1.2)
    ax.plot(x, y, "-", color=colour, lw=0.8, alpha=0.5)


TEN = 10.0
HIGHEST = 40.0
"""Percent of the gain at which the figure of the rates ends."""


def rates(curves: Sequence[RateCurve], path: Path, inputs: str = "") -> None:
    """Draw what LoRA gives up over its rate, in multiples of full fine-tuning's best rate."""
    with drawn(path, inputs, 1, 1, (8.0, 4.6), 110) as (fig, (ax,)):
        ax.axvline(TEN, color="0.3", lw=1.4, ls="--", label="10 times")
        for k, c in enumerate(curves, 1):
            colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
            ax.plot(c.fitted_times, c.fitted_percent, "-", color=colour, lw=1.4)
            ax.plot(c.times, c.percent, marker, color=colour, ms=6)
            ax.plot([], [], f"{marker}-", color=colour, ms=6, lw=1.4, label=c.label)
        ticks = (0.5, 1, 2, 5, 10, 20, 50)
        ax.set(xscale="log", ylim=(-2, HIGHEST), xlim=(0.4, 80))
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel("LoRA's learning rate / full fine-tuning's best one")
        ax.set_ylabel("regret, % of LoRA's gain at its best rate")
        ax.legend(
            frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2
        )
        fig.tight_layout()
