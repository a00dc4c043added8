"""Figures. The only importer of matplotlib; draws result objects and computes nothing."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from analysis.inference.estimate import rate, with_interval
from analysis.optimum.optimum import Optimum
from analysis.questions.base import Panel
from analysis.runs.learning_curves import by_run
from analysis.runs.lr_curves import full_names, runs_of

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe & Ito: told apart by colour-blind eyes. Black is full fine-tuning."""
MARKERS = "osD^vP*"
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.hashsalt": "lorasweep",
}


def lr_against_nll(optima: Sequence[Optimum], path: Path) -> None:
    """Draw NLL over learning rate with fits, optima and intervals, a panel a group, two side by
    side; runs that diverged stand on the top line. Curves are named by what tells them apart; the
    legend stands below."""
    groups = list(dict.fromkeys(o.curve.group for o in optima))
    names = dict(zip(map(id, optima), full_names([o.curve for o in optima])))
    columns = min(2, len(groups))
    most = max(sum(o.curve.group == g for o in optima) for g in groups)
    height = 4.2 + 0.19 * most  # of the axes, and of the legend below
    rows = -(-len(groups) // columns)
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(
            rows, columns, figsize=(7.4 * columns, height * rows), squeeze=False
        )
        for ax in axes.flat[len(groups) :]:
            ax.axis("off")
        for ax, group in zip(axes.flat, groups):
            members = [o for o in optima if o.curve.group == group]
            top = _top(members)
            for k, o in enumerate(members):
                _one_curve(
                    ax,
                    o,
                    names[id(o)],
                    COLOURS[k % len(COLOURS)],
                    MARKERS[(k + k // len(COLOURS)) % len(MARKERS)],
                    top,
                )
            ax.set(xscale="log", xlabel="learning rate", ylabel="test NLL (nats per token)")
            ax.set_title(group, fontsize=10)
            ax.set_ylim(top=top[1])
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        fig.tight_layout()
        fig.savefig(path, dpi=150)
        plt.close(fig)


def _top(members: Sequence[Optimum]) -> tuple[float, float]:
    """Return the height for diverged runs and the axis limit: above every point worth comparing."""
    y = np.concatenate([o.curve.y[o.curve.usable] for o in members])
    if not len(y):
        return 1.0, 1.1
    span = max(float(y.max() - y.min()), 1e-3)
    return float(y.max()) + 0.08 * span, float(y.max()) + 0.14 * span


def _one_curve(
    ax: Any, o: Optimum, label: str, colour: str, marker: str, top: tuple[float, float]
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
        reach = [[e.value - e.low], [e.high - e.value]] if e.has_interval() else None
        ax.errorbar(
            [e.value],
            [o.best_nll],
            xerr=reach,
            fmt="|",
            color=colour,
            ms=14,
            mew=2,
            capsize=4,
            zorder=5,
        )


def learning(table: pd.DataFrame, optima: Sequence[Optimum], path: Path) -> bool:
    """Draw held-out NLL over updates, a panel a group: every run thin, the run at each curve's best
    tried rate thick.

    Returns False, drawing nothing, if the table carries no learning curves.
    """
    learned = by_run(table)
    if not learned or not optima:
        return False
    groups = list(dict.fromkeys(o.curve.group for o in optima))
    names = dict(zip(map(id, optima), full_names([o.curve for o in optima])))
    columns, most = (
        min(2, len(groups)),
        max(sum(o.curve.group == g for o in optima) for g in groups),
    )
    rows = -(-len(groups) // columns)
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(
            rows, columns, figsize=(7.4 * columns, (4.2 + 0.19 * most) * rows), squeeze=False
        )
        for ax in axes.flat[len(groups) :]:
            ax.axis("off")
        for ax, group in zip(axes.flat, groups):
            members = [o for o in optima if o.curve.group == group]
            for k, o in enumerate(members):
                _learned(
                    ax,
                    o,
                    names[id(o)],
                    runs_of(table, o.curve),
                    learned,
                    COLOURS[k % len(COLOURS)],
                    ("-", "--", ":")[k // len(COLOURS) % 3],
                )
            limit = np.nanmax([o.curve.nll_start for o in members])
            if np.isfinite(limit):
                ax.axhline(limit, color="grey", lw=0.8, ls=":", label="before training")
                ax.set_ylim(top=limit * 1.05)
            ax.set(xscale="log", xlabel="updates", ylabel="held-out NLL (nats per token)")
            ax.set_title(group, fontsize=10)
            ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        fig.suptitle(
            "thin: every run; thick: best tried rate (the last evaluation uses more held-out rows)",
            fontsize=9,
        )
        fig.tight_layout()
        fig.savefig(path, dpi=110)
        plt.close(fig)
    return True


def _learned(
    ax: Any,
    o: Optimum,
    name: str,
    runs: pd.DataFrame,
    learned: dict[object, pd.DataFrame],
    colour: str,
    dash: str,
) -> None:
    x, y = o.curve.x[o.curve.usable], o.curve.y[o.curve.usable]
    best = np.exp(x[np.argmin(y)]) if len(y) else None
    labelled = False
    for run, lr in runs.loc[runs.index.isin(list(learned)), "lr"].items():
        points = learned[run][learned[run]["step"] >= 1]
        is_best = best is not None and np.isclose(lr, best, rtol=1e-6)
        label = f"{name}, lr {rate(lr)}" if is_best and not labelled else None
        labelled |= is_best
        ax.plot(
            points["step"],
            points["test_nll"],
            color=colour,
            lw=2 if is_best else 0.5,
            ls=dash,
            alpha=1.0 if is_best else 0.2,
            label=label,
        )


def panels(parts: Sequence[Panel], path: Path, columns: int = 2) -> None:
    """Draw panels side by side; values that are None or not finite are left out."""
    columns = min(columns, len(parts))
    rows = -(-len(parts) // columns)
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(
            rows,
            columns,
            figsize=(4.8 * columns if columns > 1 else 7.2, 4.1 * rows),
            squeeze=False,
        )
        for ax in axes.flat[len(parts) :]:
            ax.axis("off")
        for ax, panel in zip(axes.flat, parts):
            _panel(ax, panel)
        fig.tight_layout()
        fig.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(fig)


MANY = 3
"""A legend of more entries finds no room among the points, so it stands below them; so does one
that a line would cross."""


def _panel(ax: Any, panel: Panel) -> None:
    if panel.band is not None:
        ax.axhspan(
            *panel.band,
            color=COLOURS[3],
            alpha=0.13,
            lw=0,
            label=f"margin {panel.band[0]:g} to {panel.band[1]:g}",
        )
    for (label, height), dash in zip(panel.lines.items(), itertools.cycle(("--", ":", "-."))):
        ax.axhline(height, color="grey", lw=1.2, ls=dash, label=label)
    for k, s in enumerate(panel.series):
        colour = (
            COLOURS[(k if s.colour is None else s.colour) % len(COLOURS)]
            if not isinstance(s.colour, str)
            else s.colour
        )
        x, y = np.asarray(s.x, float), np.array([np.nan if v is None else v for v in s.y], float)
        style = s.style.replace("o", MARKERS[k % len(MARKERS)])
        ax.plot(
            x, y, style, color=colour, lw=s.width, ms=s.size, alpha=s.alpha, label=s.label or None
        )
        if len(s.low):
            low, high = (
                np.array([np.nan if v is None else v for v in e], float) for e in (s.low, s.high)
            )
            reach = np.clip(np.stack([y - low, high - y]), 0, None)
            ax.errorbar(
                x,
                y,
                yerr=np.where(np.isfinite(reach), reach, 0),
                fmt="none",
                ecolor=colour,
                capsize=3,
                lw=1.2,
            )
    ax.set(xlabel=panel.x, ylabel=panel.y)
    ax.set_title(panel.title, fontsize=10)
    there = any(
        v is not None and v > 0 for s in panel.series for v in s.y
    )  # nothing to draw has no logarithm
    if panel.log_x and there:
        ax.set_xscale("log")
    if panel.log_y and there:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        if high < 60 * low:  # less than two decades: say plain numbers at the lesser ticks too
            ax.yaxis.set_major_formatter(_plain_number)
            if high >= 6 * low:
                ax.yaxis.set_minor_locator(
                    LogLocator(subs=(2, 3, 5, 7) if high < 20 * low else (2, 5))
                )
            ax.yaxis.set_minor_formatter(_plain_number)
    if panel.y_range != (None, None):
        ax.set_ylim(*panel.y_range)
    if panel.ticks is not None:
        ax.set_xticks([v for v, _ in panel.ticks], [t for _, t in panel.ticks])
        ax.xaxis.set_minor_locator(NullLocator())
    told = ax.get_legend_handles_labels()[1] if panel.legend else []
    if len(told) > MANY or panel.lines:
        lines = max((t.count("\n") for _, t in panel.ticks or ()), default=0)
        ax.legend(
            frameon=False,
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.19 - 0.07 * lines),
            ncol=2,
        )
    elif told:
        ax.legend(frameon=False, fontsize=8)


def _plain_number(value: float, _: int) -> str:
    return f"{value:g}"


def packing(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a LoRA step's time a run over the pack size, as a share of a full fine-tuning step of
    the same batch."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(
            1, len(models), figsize=(4.4 * len(models), 3.8), squeeze=False, sharey=True
        )
        for ax, model in zip(axes[0], models):
            mine = [r for r in rows if r["model"] == model]
            batches = list(dict.fromkeys(r["batch_size"] for r in mine))
            for batch, colour, marker in zip(batches, COLOURS[1:], MARKERS):
                whole = next(
                    r["step_s"]
                    for r in mine
                    if r["batch_size"] == batch and r["method"] == "fullft"
                )
                lora = [r for r in mine if r["batch_size"] == batch and r["method"] == "lora"]
                ax.plot(
                    [r["pack"] for r in lora],
                    [r["step_s"] / whole for r in lora],
                    marker=marker,
                    color=colour,
                    label=f"batch {batch}",
                )
            ax.axhline(1, color=COLOURS[0], lw=1, ls="--", label="full fine-tuning")
            ax.set(xscale="log", xlabel="runs in a pack", title=model, ylim=(0, None))
            ax.set_xticks(
                sorted({r["pack"] for r in mine}),
                [str(n) for n in sorted({r["pack"] for r in mine})],
            )
            ax.minorticks_off()
            ax.legend(frameon=False, fontsize=9)
        axes[0][0].set_ylabel("LoRA r16 step a run / FullFT step")
        fig.tight_layout()
        fig.savefig(path, dpi=150)
        plt.close(fig)


def coverage(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw how often intervals hold the truth, a column a family: ours by noise, and what others do
    as crosses."""
    families = list(dict.fromkeys(r["family"] for r in rows))
    noises = sorted({r["noise"] for r in rows})
    with plt.rc_context(_STYLE):
        fig, ax = plt.subplots(figsize=(8.6, 4.6))
        ax.axhspan(94, 97, color=COLOURS[3], alpha=0.12, lw=0, label="asked on average: 94 to 97%")
        ax.axhline(93, color=COLOURS[3], lw=1, ls="--", label="asked in each family: 93%")
        for k, (noise, colour, marker) in enumerate(zip(noises, COLOURS[1:], MARKERS)):
            y = [
                100
                * np.mean([r["coverage"] for r in rows if r["family"] == f and r["noise"] == noise])
                for f in families
            ]
            ax.plot(
                np.arange(len(families)) + 0.12 * (k - 1),
                y,
                marker,
                color=colour,
                ms=6,
                label=f"noise {noise:g}",
            )
        for key, label, marker in (
            ("parabola_coverage", "5-point parabola, bootstrap", "x"),
            ("global_coverage", "one parabola", "+"),
        ):
            y = [_mean_of([r[key] for r in rows if r["family"] == f]) for f in families]
            ax.plot(np.arange(len(families)), y, marker, color="grey", ms=8, mew=1.6, label=label)
        ax.set_xticks(
            np.arange(len(families)),
            [f.replace("_", " ") for f in families],
            rotation=30,
            ha="right",
        )
        ax.set(ylabel="intervals that hold the truth (%)", ylim=(0, 103))
        ax.legend(frameon=False, fontsize=8, ncol=2, loc="lower left", bbox_to_anchor=(0, 1.0))
        fig.tight_layout()
        fig.savefig(path, dpi=150)
        plt.close(fig)


def _mean_of(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return 100 * float(np.mean(known)) if known else float("nan")


def verdict_shares(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the share of each verdict over the true ratio, a panel a noise."""
    noises = sorted({r["noise"] for r in rows})
    ratios = sorted({r["ratio"] for r in rows})
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(
            1, len(noises), figsize=(4.6 * len(noises), 3.6), squeeze=False, sharey=True
        )
        for ax, noise in zip(axes[0], noises):
            base = np.zeros(len(ratios))
            for kind, colour, hatch in (
                ("supported", COLOURS[3], ""),
                ("undecided", "#c8ced4", ""),
                ("refuted", COLOURS[2], "//"),
            ):
                y = np.array(
                    [
                        _mean_of([r[kind] for r in rows if r["ratio"] == v and r["noise"] == noise])
                        for v in ratios
                    ]
                )
                ax.bar(
                    np.arange(len(ratios)),
                    y,
                    bottom=base,
                    color=colour,
                    hatch=hatch,
                    edgecolor="white",
                    width=0.8,
                    label=kind.upper(),
                )
                base += y
            ax.set_xticks(np.arange(len(ratios)), [f"{v:g}" for v in ratios])
            ax.set(xlabel="true ratio (margin 7.1 to 14.1)", title=f"noise {noise:g} nats")
            ax.grid(False)
        axes[0][0].set_ylabel("sweeps (%)")
        handles, names = axes[0][0].get_legend_handles_labels()
        fig.legend(handles, names, frameon=False, fontsize=9, ncol=3, loc="upper center")
        fig.tight_layout(rect=(0, 0, 1, 0.93))
        fig.savefig(path, dpi=150)
        plt.close(fig)
