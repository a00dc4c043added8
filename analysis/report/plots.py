"""Draw panels, loss over learning rates with fits, and loss over updates.

Colours, style and file format (with a hash of inputs) are those of all figures. Only the modules
`plots*.py` import matplotlib.
"""

import dataclasses
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from analysis.inference.estimate import rate, with_interval
from analysis.optimum.fit import Optimum, rate_means, without_shifts
from analysis.questions.base import Panel, by_group
from analysis.runs.curves import by_run, full_names, runs_of, title

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito's palette, distinguishable for colour-blind readers. Black is full fine-tuning."""
MARKERS = "osD^vP*"
DPI = 100
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8}
BELOW: dict[str, Any] = {**LEGEND, "loc": "upper center"}
"""A legend below its axes."""
MANY = 3
"""A legend with more entries, or in a panel with horizontal lines, goes below the axes."""
PLAIN = 1e5
"""Tick labels of a logarithmic axis from 1 up to this are plain numbers, not powers of ten."""
ARROW = 24
"""Length of an arrow, in points."""
INPUTS = "Inputs"
"""Name of the PNG text chunk with the hash of a figure's inputs."""
_STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


@contextmanager
def drawn(
    path: Path, inputs: str, n: int, size: tuple[float, float], **options: Any
) -> Iterator[tuple[Any, list[Axes]]]:
    """Yield a figure and n axes to draw on, then save it with the hash of its inputs.

    Args:
        size: width and height of one of the axes, inches; there are at most two in a row.
        options: `bbox_inches` for the file.
    """
    columns, rows = min(2, n), -(-n // 2)
    with plt.rc_context(cast(Any, _STYLE)):
        whole = (size[0] * columns, size[1] * rows)
        fig, axes = plt.subplots(rows, columns, figsize=whole, squeeze=False)
        for ax in axes.flat[n:]:
            ax.axis("off")
        yield fig, list(axes.flat)
        drawing = io.BytesIO()
        fig.savefig(drawing, dpi=DPI, **options)
        plt.close(fig)
    text = PngInfo()
    text.add_text(INPUTS, inputs)
    with Image.open(drawing) as image:  # a palette makes the file three times smaller
        few_colours = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few_colours.save(path, format="PNG", optimize=True, pnginfo=text)


def panels(parts: Sequence[Panel], path: Path, inputs: str = "") -> None:
    """Draw panels side by side; equal y labels share y limits, equal legends are drawn once."""
    size = (4.8 if len(parts) > 1 else 7.2, 4.1)
    with drawn(path, inputs, len(parts), size, bbox_inches="tight") as (fig, axes):
        used = list(zip(axes, parts))
        for ax, panel in used:
            _draw(ax, panel)
        for ax, panel in used:
            lows, highs = zip(*(other.get_ylim() for other, p in used if p.y == panel.y))
            ax.set_ylim(min(lows), max(highs))
            _label_ticks(ax, panel)
        labels = [ax.get_legend_handles_labels()[1] for ax, _ in used]
        shared = len(used) > 1 and all(mine == labels[0] for mine in labels)
        below = {**BELOW, "ncol": 2}
        for (ax, panel), mine in zip(used, labels) if not shared else ():
            if len(mine) > MANY or panel.lines:
                lines = max((t.count("\n") for _, t in panel.ticks or ()), default=0)
                ax.legend(bbox_to_anchor=(0.5, -0.19 - 0.07 * lines), **below)
            elif mine:
                ax.legend(**LEGEND)
        fig.tight_layout()
        if shared and labels[0]:
            handles = axes[0].get_legend_handles_labels()[0]
            fig.legend(handles, labels[0], bbox_to_anchor=(0.5, 0.0), **below)


def _draw(ax: Axes, panel: Panel) -> None:
    """Draw a panel's band, lines and series, and set its scales."""
    if panel.band is not None:
        low, high = panel.band
        look: dict[str, Any] = {"color": COLOURS[3], "alpha": 0.13, "lw": 0}
        ax.axhspan(low, high, label=f"margin {low:g} to {high:g}", **look)
    for (label, height), dash in zip(panel.lines.items(), itertools.cycle(("--", ":", "-."))):
        ax.axhline(height, color="grey", lw=1.2, ls=dash, label=label)
    for k, s in enumerate(panel.series):
        index = k if s.colour is None else s.colour
        colour = index if isinstance(index, str) else COLOURS[index % len(COLOURS)]
        x, y = np.asarray(s.x, float), np.array(s.y, float)  # None becomes NaN
        bounds = np.asarray(s.bounds, int) if len(s.bounds) else np.zeros(len(x), int)
        style = s.style.replace("o", MARKERS[k % len(MARKERS)])
        values = np.where(bounds == 0, y, np.nan)
        look = {"color": colour, "lw": 1.6, "ms": s.size, "mfc": "none" if s.open else colour}
        ax.plot(x, values, style, label=s.label or None, **look)
        for side in (-1, 1):
            arrows(ax, x[bounds == side], y[bounds == side], (0, side), colour)
        if len(s.low):
            low, high = np.array(s.low, float), np.array(s.high, float)
            # A range without a value has its error bar around the middle.
            middle = np.where(np.isfinite(y), y, (low + high) / 2)
            reach = np.clip(np.stack([middle - low, high - middle]), 0, None)
            bars = np.where(np.isfinite(reach), reach, 0)
            bars[:, (bounds != 0) & ~(np.isfinite(low) & np.isfinite(high))] = 0
            ax.errorbar(x, middle, yerr=bars, fmt="none", ecolor=colour, capsize=3, lw=1.2)
    ax.set(xlabel=panel.x, ylabel=panel.y)
    ax.set_title(panel.title, fontsize=10)
    positive = any(v is not None and v > 0 for s in panel.series for v in s.y)
    if positive:  # an empty panel cannot have a log scale
        ax.set_xscale("log" if panel.log_x else "linear")
        ax.set_yscale("log" if panel.log_y else "linear")
    if panel.y_range != (None, None):
        ax.set_ylim(*panel.y_range)


def _label_ticks(ax: Axes, panel: Panel) -> None:
    def plain(value: float, _: float) -> str:
        return f"{value:g}"

    low, high = ax.get_ylim()
    if ax.get_yscale() == "log" and high < 100 * low:
        # Less than two decades: label minor ticks with plain numbers too.
        ax.yaxis.set_major_formatter(plain)
        if high >= 6 * low:
            subs = (2, 3, 5, 7) if high < 20 * low else (2, 5)
            ax.yaxis.set_minor_locator(LogLocator(subs=subs))
        ax.yaxis.set_minor_formatter(plain)
    elif ax.get_yscale() == "log" and low >= 1 and high < PLAIN:
        ax.yaxis.set_major_formatter(plain)
    if panel.ticks is not None:
        ax.set_xticks([v for v, _ in panel.ticks], [t for _, t in panel.ticks])
        ax.xaxis.set_minor_locator(NullLocator())
    elif ax.get_xscale() == "log":
        left, right = ax.get_xlim()
        if right < 10 * left:  # else labels are powers of ten that overlap
            ax.xaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 5, 7)))
            ax.xaxis.set_minor_formatter(plain)
        else:
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(plain)


def arrows(
    ax: Axes, x: Sequence[float], y: Sequence[float], side: tuple[int, int], colour: str
) -> None:
    """Draw arrows from bounds towards the value; side (1, 0) is to the right, (0, -1) downwards."""
    way = {"arrowstyle": "<-", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    mark = "|" if side[0] else "_"
    ax.plot(x, y, mark, color=colour, ms=9, mew=1.6)
    for at in zip(x, y):
        if np.isfinite(at).all():
            end = (ARROW * side[0], ARROW * side[1])
            where: Any = {"xycoords": "data", "textcoords": "offset points"}
            ax.annotate("", at, end, arrowprops=way, **where)


# ---------------------------------------------------------------- figures of whole sweeps

Panels = list[tuple[Axes, list[Optimum]]]


def lr_against_nll(optima: Sequence[Optimum], path: Path, inputs: str = "") -> None:
    """Draw the metric over learning rate with fits, optima and intervals, one panel per group.

    As in the fits, the seeds of a curve are shifted to their mean. Diverged and collapsed runs are
    crosses at the worse end of the y axis. A fitted line ends before the first LR with such a run.
    From there on, the other runs are hollow symbols.
    """
    names = dict(zip(map(id, optima), full_names([o.curve for o in optima])))
    with _panels(optima, path, inputs) as (fig, panels):
        for ax, members in panels:
            alike = [without_shifts(o.curve)[1] for o in optima if _scale(o) == _scale(members[0])]
            y, shown = np.concatenate(alike), members[0].curve.shown
            # The y value of diverged runs and the axis limit lie above all usable points.
            broken, limit = 1.0, 1.1
            if len(y):
                span = max(float(y.max() - y.min()), 1e-3)
                broken, limit = float(y.max()) + 0.08 * span, float(y.max()) + 0.14 * span
            for k, o in enumerate(members):
                label = names[id(o)]
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
                    grid = np.geomspace(rates[0], rates[-1], 200)
                    if (fitted := o.predict(grid)) is not None:
                        inside = fitted <= limit
                        ax.plot(grid[inside], fitted[inside], "-", color=colour, lw=1.3)
                if not known or height is None:
                    continue
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
            ax.set(
                xscale="log", xlabel="learning rate", ylabel=f"{shown.label}, seeds at their mean"
            )
            ax.set_title(title(members[0].curve), fontsize=10)
            ax.set_ylim(top=limit)
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.legend(**BELOW, bbox_to_anchor=(0.5, -0.16))
        _same_axes(panels)
        fig.tight_layout()


def learning(table: pd.DataFrame, optima: Sequence[Optimum], path: Path, inputs: str = "") -> None:
    """Draw the held-out metric over updates, one panel per group; runs at the best LR are thick."""
    learned = by_run(table)
    names = dict(zip(map(id, optima), full_names([o.curve for o in optima])))
    with _panels(optima, path, inputs) as (fig, panels):
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
        height = fig.get_figheight()
        fig.suptitle(
            "thin: every run; thick: best tried rate (the last evaluation uses more held-out rows)",
            fontsize=9,
            y=1 - 0.08 / height,
            va="top",
        )
        fig.tight_layout(rect=(0, 0, 1, 1 - 0.3 / height))


@contextmanager
def _panels(optima: Sequence[Optimum], path: Path, inputs: str) -> Iterator[tuple[Any, Panels]]:
    """Yield a figure and the axes of each group of curves, with room for legends."""
    groups = by_group(optima)
    size = (7.4, 4.2 + 0.19 * max(map(len, groups.values())))
    with drawn(path, inputs, len(groups), size) as (fig, axes):
        yield fig, list(zip(axes, groups.values()))


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
