"""Question: is LoRA's best rate a larger multiple in short runs, and does B outgrow A.

Shorter horizons are prefixes of the same runs. Spectral norms are those at the end of the runs, at
each curve's best rate.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.estimate import Estimate, from_draws, number, rate, with_interval
from analysis.measures.ratio import MIN_RANK, ratio_of
from analysis.measures.spectra import Spectra, spectra_of
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Rows,
    Section,
    Series,
    correct,
    fewest_seeds,
    full_of,
    gates_on,
    judge_claims,
    lora_of,
    missing_arm,
)
from analysis.runs.lr_curves import lr_curves, title
from analysis.runs.prefixes import at_step, steps_seen, while_unsolved

ESTIMANDS = ("short_over_long", "sigma_b_over_a", "movement_ratio")
LOG_ESTIMANDS = ESTIMANDS
SHORT = 24
"""The short horizon is the first evaluated step from the longest horizon divided by this."""
SHORTEST = 4
"""Horizons of fewer updates are ignored."""


@dataclasses.dataclass(frozen=True)
class Horizon:
    """The optima of runs cut at one step; `lora` holds the ranks that the claim is about."""

    step: int
    optima: list[Optimum]
    full: Optimum | None
    lora: list[Optimum]
    ratio: Estimate


def horizons(table: pd.DataFrame) -> list[Horizon]:
    """Fit the optima at every step at which all runs were evaluated, and at the end."""
    last = int(table["steps"].max())
    out = []
    for step in [s for s in steps_seen(table) if s >= SHORTEST] + [last]:
        optima = fit_all(lr_curves(at_step(table, step)))
        full, lora = full_of(optima), lora_of(optima, MIN_RANK)
        ratio = ratio_of(lora, full) if full and lora else Estimate(None)
        out.append(Horizon(step, optima, full, lora, ratio))
    return out


NORMS = (
    "curve",
    "spectral norm of A",
    "of B",
    "of the change",
    "B / A [95%]",
    "change / FullFT's [95%]",
)


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge the ratio of the short and the long horizon's ratios, and the spectral norms."""
    part, cut = while_unsolved(table)
    found = horizons(part)
    long = found[-1]
    short = next(h for h in found if h.step >= long.step / SHORT)
    group = long.optima[0].curve.group
    missing = missing_arm(long.full, long.lora)
    rests = [o for h in (short, long) for o in (*([h.full] if h.full else []), *h.lora)]
    rests = [] if missing else rests
    whole = fit_all(lr_curves(table)) if cut else long.optima  # norms are those at the runs' ends
    lora = lora_of(whole, MIN_RANK)
    full = [o for o in whole if o.curve.key["method"] == "fullft"]
    spectra = spectra_of(table, whole)
    of_lora = [s for o, s in zip(whole, spectra) if o.curve.key["method"] == "lora" and s.by_seed]
    growth, movement = (
        (of_lora[-1].growth, of_lora[-1].movement) if of_lora else (Estimate(None), Estimate(None))
    )
    measured = {
        "short_over_long": (_over(short.ratio, long.ratio), gates_on(rests, missing)),
        "sigma_b_over_a": (growth, gates_on(lora, missing)),
        "movement_ratio": (movement, gates_on([*full, *lora], missing)),
    }
    seeds = fewest_seeds(rests)
    verdicts = correct(judge_claims(question, measured, LOG_ESTIMANDS, group, seeds), question)
    ends = f"highest rank, after {table['steps'].max():g} updates"
    measures = {
        "horizons": [{"step": h.step, **h.ratio.plain()} for h in found],
        "read": {
            "short_over_long": f"{short.step} updates against {long.step}",
            "sigma_b_over_a": ends,
            "movement_ratio": ends,
        },
    }
    sections = [
        _horizons(found, short, [cut] if cut else []),
        _norms(whole, spectra),
    ]
    return Analysis(long.optima, verdicts, sections, measures, {group: rests})


def _horizons(found: Sequence[Horizon], short: Horizon, notes: list[str]) -> Section:
    long = found[-1]
    of_lora = [f"best LR, {o.curve.name}" for o in long.lora]
    rows: Rows = [["updates", "best FullFT LR", *of_lora, "ratio [95%]"]]
    for h in found:
        of_full = with_interval(h.full.best_lr, rate) if h.full else "-"
        rates = [with_interval(o.best_lr, rate) for o in h.lora]
        rows.append([str(h.step), of_full, *rates, with_interval(h.ratio)])
    text = (
        f"Short: {short.step} updates; long: {long.step}. The ratio is over the ranks of "
        f"{MIN_RANK} and more. Shorter runs are the first updates of the longer ones."
    )
    line = Series.of("ratio", [h.step for h in found], [h.ratio for h in found], colour=1)
    study = {"the study, long runs: 10": 10.0, "the study, short runs: 15": 15.0}
    y = "best LoRA LR / best FullFT LR"
    of = f"{title(long.optima[0].curve, length=False)}: beginnings of the same runs"
    panel = Panel(of, "updates", y, [line], log_x=True, log_y=True, lines=study)
    caption = "ratio of the best rates over the length of the run"
    return Section("The ratio by horizon", rows, [text, *notes], "horizons.png", [panel], caption)


def _over(a: Estimate, b: Estimate) -> Estimate:
    if a.draws is None or b.draws is None:
        return Estimate(None)
    return from_draws(a.draws / b.draws, a.n + b.n)


def _norms(optima: Sequence[Optimum], spectra: Sequence[Spectra]) -> Section:
    rows: Rows = [list(NORMS)]
    for o, s in zip(optima, spectra):
        if s.by_seed:
            norms = [number(s.median(part)) for part in ("a", "b", "delta")]
            rows.append([o.curve.name, *norms, with_interval(s.growth), with_interval(s.movement)])
    caption = "spectral norms of the change, by matrix"
    panels = _by_matrix([(o, s) for o, s in zip(optima, spectra) if s.by_seed])
    title = "Spectral norms at the best rates"
    return Section(title, rows, figure="norms.png", panels=panels, caption=caption)


def _by_matrix(known: Sequence[tuple[Optimum, Spectra]]) -> list[Panel]:
    """Draw the change of every matrix that LoRA adapts, for one seed."""
    first = [(o, next(iter(s.by_seed.values()))) for o, s in known]
    lora = [norms for o, norms in first if o.curve.key["method"] == "lora"]
    if not first:
        return []
    names = sorted(lora[0] if lora else [], key=lambda n: ".layers." not in n)  # the head is last
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
    series = [
        Series(
            o.curve.name, range(len(names)), [v.get(m, {}).get("delta") for m in names], style="o"
        )
        for o, v in first
    ]
    title = "one seed, interpolated to each curve's best rate"
    x = f"matrices of a layer from left to right: {of_one}"
    return [Panel(title, x, "spectral norm of the change", series, log_y=True, ticks=ticks)]
