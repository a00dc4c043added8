"""Is LoRA's best rate a larger multiple of full fine-tuning's in short runs, and does B outgrow A?

Horizons come from the prefixes of the same runs. Spectral norms are those at the end of runs at
each curve's best rate.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exp_of, from_draws, number, rate, with_interval
from analysis.inference.seeds import pooled_variance
from analysis.measures.at_best import AtBest, over_seeds, values_at_best
from analysis.measures.ratio import MIN_RANK, ratio_of
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    correct,
    fewest_seeds,
    gates_on,
    judge_claims,
)
from analysis.runs.lr_curves import lr_curves
from analysis.runs.prefixes import at_step, steps_seen, while_unsolved

ESTIMANDS = ("short_over_long", "sigma_b_over_a", "movement_ratio")
LOG_ESTIMANDS = ESTIMANDS
SHORT = 24
"""The short horizon is the longest one divided by this, or the next longer one that was evaluated.
"""
SHORTEST = 4
"""Updates below which no horizon is looked at."""


@dataclasses.dataclass(frozen=True)
class Horizon:
    """The optima of runs cut at one step. `lora` are the ranks that the claim is about."""

    step: int
    optima: list[Optimum]
    full: Optimum | None
    lora: list[Optimum]
    ratio: Estimate


def horizons(table: pd.DataFrame) -> list[Horizon]:
    """Fit the optima at every step seen, and at the end."""
    last = int(table["steps"].max())
    out = []
    for step in [s for s in steps_seen(table) if s >= SHORTEST] + [last]:
        optima = fit_all(lr_curves(at_step(table, step)))
        full = next((o for o in optima if o.curve.key["method"] == "fullft"), None)
        lora = [
            o for o in optima if o.curve.key["method"] == "lora" and o.curve.key["rank"] >= MIN_RANK
        ]
        out.append(
            Horizon(
                step, optima, full, lora, ratio_of(lora, full) if full and lora else Estimate(None)
            )
        )
    return out


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge the ratio of ratios, and the norms."""
    part, cut = while_unsolved(table)
    found = horizons(part)
    long = found[-1]
    short = next(h for h in found if h.step >= long.step / SHORT)
    group = long.optima[0].curve.group
    missing = "fullft" if long.full is None else "lora" if not long.lora else ""
    ratio = _over(short.ratio, long.ratio)
    rests = [] if missing else [o for h in (short, long) for o in (h.full, *h.lora)]
    whole = fit_all(lr_curves(table)) if cut else long.optima  # norms are those at the runs' ends
    lora = [o for o in whole if o.curve.key["method"] == "lora" and o.curve.key["rank"] >= MIN_RANK]
    full = [o for o in whole if o.curve.key["method"] == "fullft"]
    growth, movement, rows, panel = norms(table, whole)
    measured = {
        "short_over_long": (ratio, gates_on(rests, missing)),
        "sigma_b_over_a": (growth, gates_on(lora, missing)),
        "movement_ratio": (movement, gates_on([*full, *lora], missing)),
    }
    verdicts = judge_claims(question, measured, LOG_ESTIMANDS, group, fewest_seeds(rests))
    horizon_rows = [
        [
            "updates",
            "best FullFT LR",
            *(f"best LR, {o.curve.name}" for o in long.lora),
            "ratio [95%]",
        ]
    ]
    for h in found:
        horizon_rows.append(
            [
                str(h.step),
                with_interval(h.full.best_lr, rate) if h.full else "-",
                *(with_interval(o.best_lr, rate) for o in h.lora),
                with_interval(h.ratio),
            ]
        )
    text = [
        f"Short: {short.step} updates; long: {long.step}. Ratio over the ranks of {MIN_RANK} and more. Every shorter run "
        "is the beginning of the same longer one.",
        *([cut] if cut else []),
    ]
    known = [h for h in found if h.ratio.value is not None]
    line = Series(
        "ratio",
        [h.step for h in known],
        [h.ratio.value for h in known],
        [h.ratio.low for h in known],
        [h.ratio.high for h in known],
        colour=1,
    )
    ratios = Panel(
        group,
        "updates",
        "best LoRA LR / best FullFT LR",
        [line],
        log_x=True,
        log_y=True,
        lines={"the study, long runs: 10": 10, "the study, short runs: 15": 15},
    )
    sections = [
        Section(
            "The ratio by horizon",
            horizon_rows,
            text,
            "horizons.png",
            [ratios],
            "ratio of the best rates over the length of the run",
        ),
        Section(
            "Spectral norms at the best rates",
            rows,
            figure="norms.png",
            panels=panel,
            caption="spectral norms of the change, by matrix",
        ),
    ]
    ends = f"highest rank, after {table['steps'].max():g} updates"
    measures = {
        "horizons": [{"step": h.step, **h.ratio.plain()} for h in found],
        "read": {
            "short_over_long": f"{short.step} updates against {long.step}",
            "sigma_b_over_a": ends,
            "movement_ratio": ends,
        },
    }
    return Analysis(long.optima, correct(verdicts, question), sections, measures, {group: rests})


def _over(a: Estimate, b: Estimate) -> Estimate:
    if a.draws is None or b.draws is None:
        return Estimate(None)
    return from_draws(a.draws / b.draws, a.n + b.n)


def norms(
    table: pd.DataFrame, optima: Sequence[Optimum]
) -> tuple[Estimate, Estimate, list[list[str]], list[Panel]]:
    """Return B over A at the highest rank, LoRA's movement over full fine-tuning's there, a table,
    and panels by matrix."""
    spectra = [found.map(_by_matrix) for found in values_at_best(table, optima, _log_spectra)]
    none = AtBest({})
    full = next((v for o, v in zip(optima, spectra) if o.curve.key["method"] == "fullft"), none)
    lora = [v if o.curve.key["method"] == "lora" else none for o, v in zip(optima, spectra)]
    grown = [v.map(lambda m: _median_log(m, "b", m, "a")) for v in lora]
    moved = [v.paired(full, lambda m, f: _median_log(m, "delta", f, "delta")) for v in lora]
    of_growth, of_movement = (
        pooled_variance([list(v.best.values()) for v in mine]) for mine in (grown, moved)
    )
    rows = [
        [
            "curve",
            "spectral norm of A",
            "of B",
            "of the change",
            "B / A [95%]",
            "change / FullFT's [95%]",
        ]
    ]
    growth = movement = Estimate(None)
    names: list[str] = []
    shown: list[tuple[str, dict[str, dict[str, float]]]] = []
    for k, o in enumerate(optima):
        mine = spectra[k].best
        if not mine:
            continue
        middle = {
            n: float(np.median([v.get(n, math.nan) for m in mine.values() for v in m.values()]))
            for n in ("a", "b", "delta")
        }
        if o.curve.key["method"] == "lora":
            growth, movement = (
                exp_of(over_seeds(grown[k], of_growth)),
                exp_of(over_seeds(moved[k], of_movement)),
            )
        rows.append(
            [
                o.curve.name,
                number(middle["a"]),
                number(middle["b"]),
                number(middle["delta"]),
                with_interval(growth)
                if "a" in next(iter(next(iter(mine.values())).values()))
                else "-",
                with_interval(movement) if o.curve.key["method"] == "lora" else "-",
            ]
        )
        first = next(iter(mine.values()))
        names = (
            names or list(first) if o.curve.key["method"] == "lora" else names
        )  # the embedding is full fine-tuning's only
        shown.append((o.curve.name, first))
    names.sort(
        key=lambda n: ".layers." not in n
    )  # the unembedding last; the sort keeps the layers' order
    series = [
        Series(n, range(len(names)), [v.get(m, {}).get("delta") for m in names], style="o")
        for n, v in shown
    ]
    layers = [n.split(".layers.")[1].split(".")[0] if ".layers." in n else "head" for n in names]
    of_one = ", ".join(
        n.rsplit(".", 1)[-1].removesuffix("_proj")
        for n, layer in zip(names, layers)
        if layer == layers[0]
    )
    ticks = [
        (float(k), layer if layer == "head" else f"layer {layer}")
        for k, layer in enumerate(layers)
        if k == 0 or layer != layers[k - 1]
    ]
    panel = (
        [
            Panel(
                "one seed, interpolated to each curve's best rate",
                f"matrices of a layer from left to right: {of_one}",
                "spectral norm of the change",
                series,
                log_y=True,
                ticks=ticks,
            )
        ]
        if series
        else []
    )
    return growth, movement, rows, panel


def _log_spectra(row: pd.Series) -> dict[tuple[str, str], float]:
    """Logarithms of a run's spectral norms by (matrix, which): those are what interpolates well
    between rates."""
    told = json.loads(row["result"]).get("spectra") or {}
    return {
        (matrix, what): math.log(v)
        for matrix, norms_ in told.items()
        for what, v in norms_.items()
        if v > 0
    }


def _by_matrix(logs: dict[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    """Spectral norms by matrix and by which of the three."""
    out: dict[str, dict[str, float]] = {}
    for (matrix, what), v in logs.items():
        out.setdefault(matrix, {})[what] = math.exp(v)
    return out


def _median_log(
    a: dict[str, dict[str, float]], of: str, b: dict[str, dict[str, float]], over: str
) -> float:
    """Median over the matrices that both have of ln(a / b)."""
    return float(
        np.median(
            [
                math.log(a[n][of] / b[n][over])
                for n in a.keys() & b.keys()
                if b[n][over] > 0 and a[n][of] > 0
            ]
        )
    )
