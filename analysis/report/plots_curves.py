"""Figures of whole sweeps: loss over learning rates with fits, and loss over updates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from analysis.inference.estimate import rate, with_interval
from analysis.optimum.optimum import Optimum
from analysis.report.plots import COLOURS, MARKERS, drawn, grid_of
from analysis.runs.learning_curves import by_run
from analysis.runs.lr_curves import full_names, runs_of

BELOW = {"frameon": False, "fontsize": 8, "loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
"""A legend below its axes."""


def lr_against_nll(optima: Sequence[Optimum], path: Path, inputs: str = "") -> None:
    """Draw NLL over learning rate with fits, optima and intervals, one panel per group.

    Diverged runs are crosses at the top.
    """
    groups = _groups(optima)
    names = dict(zip(map(id, optima), full_names([o.curve for o in optima])))
    rows, columns, size = _layout(groups)
    with drawn(path, inputs, rows, columns, size, 150, len(groups)) as (fig, axes):
        for ax, (group, members) in zip(axes, groups.items()):
            top = _top(members)
            for k, o in enumerate(members):
                marker = MARKERS[(k + k // len(COLOURS)) % len(MARKERS)]
                _fitted(ax, o, names[id(o)], COLOURS[k % len(COLOURS)], marker, top)
            ax.set(xscale="log", xlabel="learning rate", ylabel="test NLL (nats per token)")
            ax.set_title(group, fontsize=10)
            ax.set_ylim(top=top[1])
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.legend(**BELOW)
        fig.tight_layout()


def _groups(optima: Sequence[Optimum]) -> dict[str, list[Optimum]]:
    found: dict[str, list[Optimum]] = {}
    for o in optima:
        found.setdefault(o.curve.group, []).append(o)
    return found


def _layout(groups: dict[str, list[Optimum]]) -> tuple[int, int, tuple[float, float]]:
    """Return rows, columns and the figure's size, with room for legends below the axes."""
    rows, columns = grid_of(len(groups))
    height = 4.2 + 0.19 * max(map(len, groups.values()))
    return rows, columns, (7.4 * columns, height * rows)


def _top(members: Sequence[Optimum]) -> tuple[float, float]:
    """Return the height for diverged runs and the axis limit, above all usable points."""
    y = np.concatenate([o.curve.y[o.curve.usable] for o in members])
    if not len(y):
        return 1.0, 1.1
    span = max(float(y.max() - y.min()), 1e-3)
    return float(y.max()) + 0.08 * span, float(y.max()) + 0.14 * span


def _fitted(
    ax: Axes, o: Optimum, label: str, colour: str, marker: str, top: tuple[float, float]
) -> None:
    c, e = o.curve, o.best_lr
    lr = np.exp(c.x)
    if e.value is not None:
        label += f": best {with_interval(e, rate)}"
    elif o.flags:
        label += f": {o.flags[0].replace('_', ' ')}"
    ax.plot(lr[c.usable], c.y[c.usable], marker, color=colour, ms=5, alpha=0.8, label=label)
    bad = ~c.usable
    ax.plot(lr[bad], np.full(bad.sum(), top[0]), "x", color=colour, ms=7, mew=2)
    if c.usable.sum() > 1:
        span = np.geomspace(lr[c.usable].min(), lr[c.usable].max(), 200)
        fitted = o.predict(span)
        if fitted is not None:
            shown = fitted <= top[1]
            ax.plot(span[shown], fitted[shown], "-", color=colour, lw=1.3)
    if e.value is not None and o.best_nll is not None:
        reach = None
        if e.low is not None and e.high is not None:
            reach = [[e.value - e.low], [e.high - e.value]]
        look: dict[str, Any] = {
            "fmt": "|",
            "color": colour,
            "ms": 14,
            "mew": 2,
            "capsize": 4,
            "zorder": 5,
        }
        ax.errorbar([e.value], [o.best_nll], xerr=reach, **look)


def learning(table: pd.DataFrame, optima: Sequence[Optimum], path: Path, inputs: str = "") -> None:
    """Draw held-out NLL over updates, one panel per group.

    Every run is a thin line; the run at each curve's best tried rate is thick.
    """
    learned = by_run(table)
    groups = _groups(optima)
    names = dict(zip(map(id, optima), full_names([o.curve for o in optima])))
    rows, columns, size = _layout(groups)
    with drawn(path, inputs, rows, columns, size, 110, len(groups)) as (fig, axes):
        for ax, (group, members) in zip(axes, groups.items()):
            for k, o in enumerate(members):
                dash = ("-", "--", ":")[k // len(COLOURS) % 3]
                _learned(ax, o, names[id(o)], table, learned, COLOURS[k % len(COLOURS)], dash)
            limit = np.nanmax([o.curve.nll_start for o in members])
            if np.isfinite(limit):
                ax.axhline(limit, color="grey", lw=0.8, ls=":", label="before training")
                ax.set_ylim(top=limit * 1.05)
            ax.set(xscale="log", xlabel="updates", ylabel="held-out NLL (nats per token)")
            ax.set_title(group, fontsize=10)
            ax.legend(**BELOW)
        fig.suptitle(
            "thin: every run; thick: best tried rate (the last evaluation uses more held-out rows)",
            fontsize=9,
        )
        fig.tight_layout()


def _learned(
    ax: Axes,
    o: Optimum,
    name: str,
    table: pd.DataFrame,
    learned: dict[object, pd.DataFrame],
    colour: str,
    dash: str,
) -> None:
    x, y = o.curve.x[o.curve.usable], o.curve.y[o.curve.usable]
    best = np.exp(x[np.argmin(y)]) if len(y) else None
    runs = runs_of(table, o.curve)
    labelled = False
    for run, lr in runs.loc[runs.index.isin(list(learned)), "lr"].items():
        points = learned[run][learned[run]["step"] >= 1]
        is_best = best is not None and np.isclose(lr, best, rtol=1e-6)
        look: dict[str, Any] = {"lw": 2, "alpha": 1.0} if is_best else {"lw": 0.5, "alpha": 0.2}
        if is_best and not labelled:
            look["label"], labelled = f"{name}, lr {rate(lr)}", True
        ax.plot(points["step"], points["test_nll"], color=colour, ls=dash, **look)
