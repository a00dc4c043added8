"""Figures of the benchmark and of the calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.report.plots import COLOURS, MARKERS, drawn

Row = dict[str, Any]


def packing(rows: Sequence[Row], path: Path, inputs: str = "") -> None:
    """Draw a LoRA step's time per run over the pack size, relative to full fine-tuning."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    size = (4.4 * len(models), 3.8)
    with drawn(path, inputs, 1, len(models), size, sharey=True) as (fig, axes):
        for ax, model in zip(axes, models):
            mine = [r for r in rows if r["model"] == model]
            batches = list(dict.fromkeys(r["batch_size"] for r in mine))
            for batch, colour, marker in zip(batches, COLOURS[1:], MARKERS):
                of_batch = [r for r in mine if r["batch_size"] == batch]
                whole = next(r["step_s"] for r in of_batch if r["method"] == "fullft")
                lora = [r for r in of_batch if r["method"] == "lora"]
                x, y = [r["pack"] for r in lora], [r["step_s"] / whole for r in lora]
                ax.plot(x, y, marker=marker, color=colour, label=f"batch {batch}")
            ax.axhline(1, color=COLOURS[0], lw=1, ls="--", label="full fine-tuning")
            ax.set(xscale="log", xlabel="runs in a pack", title=model, ylim=(0, None))
            packs = sorted({r["pack"] for r in mine})
            ax.set_xticks(packs, [str(n) for n in packs])
            ax.minorticks_off()
            ax.legend(frameon=False, fontsize=9)
        axes[0].set_ylabel("LoRA r16 step a run / FullFT step")
        fig.tight_layout()


def coverage(conditions: pd.DataFrame, path: Path, inputs: str = "") -> None:
    """Draw how often intervals contain the truth by family; crosses: simpler estimators."""
    keys = ["parabola_coverage", "global_coverage"]
    simpler = 100 * conditions.groupby("family", sort=False)[keys].mean()
    by_noise = 100 * conditions.groupby(["noise", "family"])["coverage"].mean()
    families = list(simpler.index)
    at = np.arange(len(families))
    with drawn(path, inputs, 1, 1, (8.6, 4.6)) as (fig, (ax,)):
        ax.axhspan(94, 97, color=COLOURS[3], alpha=0.12, lw=0, label="asked on average: 94 to 97%")
        ax.axhline(93, color=COLOURS[3], lw=1, ls="--", label="asked in each family: 93%")
        noises = sorted(conditions["noise"].unique())
        for k, (noise, colour, marker) in enumerate(zip(noises, COLOURS[1:], MARKERS)):
            y = by_noise[noise].reindex(families)
            ax.plot(at + 0.12 * (k - 1), y, marker, color=colour, ms=6, label=f"noise {noise:g}")
        for key, label, marker in zip(
            keys, ("5-point parabola, bootstrap", "one parabola"), ("x", "+")
        ):
            ax.plot(at, simpler[key], marker, color="grey", ms=8, mew=1.6, label=label)
        ax.set_xticks(at, [f.replace("_", " ") for f in families], rotation=30, ha="right")
        ax.set(ylabel="intervals that hold the truth (%)", ylim=(0, 103))
        ax.legend(frameon=False, fontsize=8, ncol=2, loc="lower left", bbox_to_anchor=(0, 1.0))
        fig.tight_layout()


def verdict_shares(verdicts: pd.DataFrame, path: Path, inputs: str = "") -> None:
    """Draw the share of each verdict over the true ratio, one panel per noise level."""
    noises, ratios = (sorted(verdicts[k].unique()) for k in ("noise", "ratio"))
    shares = 100 * verdicts.drop(columns="family").groupby(["noise", "ratio"]).mean()
    at = np.arange(len(ratios))
    size = (4.6 * len(noises), 3.6)
    with drawn(path, inputs, 1, len(noises), size, sharey=True) as (fig, axes):
        for ax, noise in zip(axes, noises):
            base = np.zeros(len(ratios))
            for kind, colour, hatch in (
                ("supported", COLOURS[3], ""),
                ("undecided", "#c8ced4", ""),
                ("refuted", COLOURS[2], "//"),
            ):
                y = shares.loc[noise][kind].to_numpy()
                look: Row = {"color": colour, "hatch": hatch, "edgecolor": "white", "width": 0.8}
                ax.bar(at, y, bottom=base, label=kind.upper(), **look)
                base += y
            ax.set_xticks(at, [f"{v:g}" for v in ratios])
            ax.set(xlabel="true ratio (margin 7.1 to 14.1)", title=f"noise {noise:g} nats")
            ax.grid(False)
        axes[0].set_ylabel("sweeps (%)")
        handles, names = axes[0].get_legend_handles_labels()
        fig.legend(handles, names, frameon=False, fontsize=9, ncol=3, loc="upper center")
        fig.tight_layout(rect=(0, 0, 1, 0.93))
