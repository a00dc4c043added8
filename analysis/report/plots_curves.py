"""Figures of whole sweeps: loss over learning rates with fits, and loss over updates."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from analysis.inference.estimate import rate, with_interval
from analysis.optimum.fit import Optimum
from analysis.optimum.valley import rate_means, without_shifts
from analysis.questions.base import by_group
from analysis.report.plots import BELOW, COLOURS, MARKERS, arrows, drawn, grid_of
from analysis.runs.learning_curves import by_run
from analysis.runs.lr_curves import full_names, runs_of, title

Panels = list[tuple[Axes, list[Optimum]]]


def lr_against_nll(optima: Sequence[Optimum], path: Path, inputs: str = "") -> None:
    """Draw the metric over learning rate with fits, optima and intervals, one panel per group.

    As in the fits, the seeds of a curve are shifted to their mean. Diverged and collapsed runs are
    crosses at the worse end of the y axis. A fitted line ends before the first LR with such a run.
    From there on, the other runs are hollow symbols.
    """
    names = dict(zip(map(id, optima), full_names([o.curve for o in optima])))
    with _panels(optima, path, inputs) as (fig, panels, _):
        for ax, members in panels:
            alike = [without_shifts(o.curve)[1] for o in optima if _scale(o) == _scale(members[0])]
            y, shown = np.concatenate(alike), members[0].curve.shown
            # The y value of diverged runs and the axis limit lie above all usable points.
            broken, limit = 1.0, 1.1
            if len(y):
                span = max(float(y.max() - y.min()), 1e-3)
                broken, limit = float(y.max()) + 0.08 * span, float(y.max()) + 0.14 * span
            for k, o in enumerate(members):
                _fitted(ax, o, names[id(o)], k, broken, limit)
            ax.set(
                xscale="log", xlabel="learning rate", ylabel=f"{shown.label}, seeds at their mean"
            )
            ax.set_title(title(members[0].curve), fontsize=10)
            ax.set_ylim(top=limit)
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.legend(**BELOW, bbox_to_anchor=(0.5, -0.16))
        _same_axes(panels)
        fig.tight_layout()


def _fitted(ax: Axes, o: Optimum, label: str, k: int, broken: float, limit: float) -> None:
    """Draw the k-th curve of a group: runs, fit up to `limit`, best LR, and broken runs."""
    index, again = _look(k)
    colour, marker = COLOURS[index], MARKERS[(index + again) % len(MARKERS)]
    c, e, height = o.curve, o.best_lr, o.best_nll
    known = any(v is not None for v in (e.value, e.low, e.high))
    if known:
        label += f": best {with_interval(e, rate)}"
    elif o.flags:
        label += f": {o.flags[-1].replace('_', ' ')}"
    x, y = without_shifts(c)
    rates = np.exp(c.unbroken)
    plain = np.isin(x, c.unbroken)
    look: dict[str, Any] = {"color": colour, "ms": 5, "alpha": 0.8}
    ax.plot(np.exp(x[plain]), y[plain], marker, label=label, **look)
    ax.plot(np.exp(x[~plain]), y[~plain], marker, mfc="none", **look)
    bad = np.exp(c.x[~c.usable])
    ax.plot(bad, np.full(len(bad), broken), "x", color=colour, ms=7, mew=2)
    if len(rates) > 1:
        span = np.geomspace(rates[0], rates[-1], 200)
        fitted = o.predict(span)
        if fitted is not None:
            shown = fitted <= limit
            ax.plot(span[shown], fitted[shown], "-", color=colour, lw=1.3)
    if not known or height is None:
        return
    look = {"color": colour, "ms": 14, "mew": 2, "capsize": 4, "zorder": 5}
    if e.low is not None and e.high is not None:
        at = e.value or math.sqrt(e.low * e.high)
        reach = [[at - e.low], [e.high - at]]
        ax.errorbar([at], [height], xerr=reach, fmt="|" if e.value else "none", **look)
    elif e.value is not None:
        ax.errorbar([e.value], [height], fmt="|", **look)
    elif e.low is not None:
        arrows(ax, [e.low], [height], (1, 0), colour)
    elif e.high is not None:
        arrows(ax, [e.high], [height], (-1, 0), colour)


def learning(table: pd.DataFrame, optima: Sequence[Optimum], path: Path, inputs: str = "") -> None:
    """Draw the held-out metric over updates, one panel per group; runs at the best LR are thick."""
    learned = by_run(table)
    names = dict(zip(map(id, optima), full_names([o.curve for o in optima])))
    with _panels(optima, path, inputs) as (fig, panels, height):
        for ax, members in panels:
            for k, o in enumerate(members):
                colour, again = _look(k)
                x, y = rate_means(o.curve)
                best = np.exp(x[np.argmin(y)]) if len(y) else None
                key, cut_from = o.curve.key, o.curve.cut_from
                if cut_from:  # the table has the full runs
                    whole = dataclasses.replace(o.curve, key={**key, "steps": cut_from})
                runs = runs_of(table, whole if cut_from else o.curve)
                labelled = False
                for run, lr in runs.loc[runs.index.isin(list(learned)), "lr"].items():
                    points = learned[run][learned[run]["step"] >= 1]
                    points = points[points["step"] <= key["steps"]] if cut_from else points
                    is_best = best is not None and np.isclose(lr, best, rtol=1e-6)
                    look: dict[str, Any] = {"lw": 2 if is_best else 0.5}
                    look |= {"alpha": 1.0 if is_best else 0.2, "ls": ("-", "--", ":")[again % 3]}
                    if is_best and not labelled:
                        look["label"], labelled = f"{names[id(o)]}, lr {rate(lr)}", True
                    ax.plot(points["step"], points["test_nll"], color=COLOURS[colour], **look)
            limit, shown = np.nanmax([o.curve.nll_start for o in members]), members[0].curve.shown
            if np.isfinite(limit):
                ax.axhline(limit, color="grey", lw=0.8, ls=":", label="before training")
                if shown.sign > 0:  # not for a negated reward
                    ax.set_ylim(top=limit * 1.05)
            ax.set(xscale="log", xlabel="updates", ylabel=shown.label)
            ax.set_title(title(members[0].curve), fontsize=10)
            ax.legend(**BELOW, bbox_to_anchor=(0.5, -0.16))
        _same_axes(panels)
        fig.suptitle(
            "thin: every run; thick: best tried rate (the last evaluation uses more held-out rows)",
            fontsize=9,
            y=1 - 0.08 / height,
            va="top",
        )
        fig.tight_layout(rect=(0, 0, 1, 1 - 0.3 / height))


@contextmanager
def _panels(
    optima: Sequence[Optimum], path: Path, inputs: str
) -> Iterator[tuple[Any, Panels, float]]:
    """Yield a figure, the axes of each group of curves, and the height in inches, with legends."""
    groups = by_group(optima)
    rows, columns = grid_of(len(groups))
    size = (7.4 * columns, (4.2 + 0.19 * max(map(len, groups.values()))) * rows)
    with drawn(path, inputs, rows, columns, size, len(groups)) as (fig, axes):
        yield fig, list(zip(axes, groups.values())), size[1]


def _look(k: int) -> tuple[int, int]:
    """Return (colour index, earlier uses of it) of the k-th curve; only the first is black."""
    again, colour = divmod(k - 1, len(COLOURS) - 1)
    return (0, 0) if k == 0 else (1 + colour, again)


def _scale(o: Optimum) -> tuple[Any, ...]:
    """Return the key of panels that share axes: metric, model, and for losses the data set."""
    key, shown = o.curve.key, o.curve.shown
    return (shown, key["model"]) if shown.sign < 0 else (shown, key["model"], key["dataset"])


def _same_axes(panels: Panels) -> None:
    """Give comparable panels the same limits; label negated metrics with the original values."""
    alike: dict[tuple[Any, ...], list[Axes]] = {}
    for ax, members in panels:
        alike.setdefault(_scale(members[0]), []).append(ax)
    for (metric, *_), mine in alike.items():
        x, y = (list(zip(*v)) for v in zip(*((a.get_xlim(), a.get_ylim()) for a in mine)))
        low, high = min(y[0]), max(y[1])
        room = 0.02 * (high - low) if len(mine) > 1 else 0.0
        for ax in mine:
            ax.set(xlim=(min(x[0]), max(x[1])), ylim=(low - room, high))
            if metric.sign < 0:
                ax.invert_yaxis()
                ax.yaxis.set_major_formatter(lambda loss, _: f"{0.0 - loss:g}")
