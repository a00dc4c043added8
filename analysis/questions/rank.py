"""When does each rank leave full fine-tuning's learning curve, and do all ranks start alike?

A rank departs at the step from which its loss stays above full fine-tuning's by more than DEPARTED
of what full fine-tuning gains in the whole run: one height in nats for all steps, as an eye on the
plot would have it. Two readings stand side by side: runs at each rank's best rate, paired by seed,
which carry the verdict; and the study's envelope, the lowest loss over all rates at every step,
which no single run follows.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, from_draws, number, rate, signed, with_interval
from analysis.inference.seeds import pooled_variance
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.efficiency import at_best, log_rho, read_to, rho
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
from analysis.questions.qualify import stalled
from analysis.runs.learning_curves import Points, by_run, same_rows
from analysis.runs.lr_curves import lr_curves, runs_of
from analysis.runs.prefixes import while_unsolved

ESTIMANDS = ("departure_slope", "rho_top_rank", "identical_steps")
LOG_ESTIMANDS = ("rho_top_rank",)
"""identical_steps may start at 0: a rank that has left at the first evaluation."""
DEPARTED = 0.05
"""Share of full fine-tuning's gain over the run (loss at the start less its last) that a rank must
lack to have departed."""


def departure(lora: Points, full: Points, start: float) -> float:
    """Return the step from which LoRA's loss stays above full fine-tuning's by DEPARTED of the
    latter's whole gain, interpolated in ln(step); infinite if it is not above at the end, the first
    step seen if it always is."""
    other = dict(full)
    steps = [s for s, _ in lora if s in other]
    gain = max(start - full[-1][1], 1e-12)
    lack = [(nll - other[s]) / gain for s, nll in lora if s in other]
    if not steps or lack[-1] <= DEPARTED:
        return math.inf
    inside = [k for k, v in enumerate(lack) if v <= DEPARTED]
    if not inside:
        return steps[0]
    k = inside[-1]
    share = (DEPARTED - lack[k]) / (lack[k + 1] - lack[k])
    return math.exp(math.log(steps[k]) + share * (math.log(steps[k + 1]) - math.log(steps[k])))


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge departures, parity at the highest rank, and the common start."""
    plain, cut = while_unsolved(
        table[(table["method"] == "fullft") | (table["init_seed"].fillna(0) == 0)]
    )
    optima = fit_all(lr_curves(plain))
    full = next((o for o in optima if o.curve.key["method"] == "fullft"), None)
    lora = [o for o in optima if o.curve.key["method"] == "lora"]
    group = optima[0].curve.group
    if full is None or not lora:
        gate = [f"no curve of {'fullft' if full is None else 'lora'}"]
        none = dict.fromkeys(ESTIMANDS, (Estimate(None), gate))
        return Analysis(optima, judge_claims(question, none, LOG_ESTIMANDS, group))
    runs = at_best(plain, optima)
    mine = {id(o): r for o, r in zip(optima, runs)}
    top = lora[-1]
    departures = {
        int(o.curve.key["rank"]): _departures(mine[id(o)], mine[id(full)], full.curve.nll_start)
        for o in lora
    }
    slope, note = _slope(departures)
    left = {r: d.best for r, d in departures.items()}
    first = min((p[0][0] for p in mine[id(full)].best.values() if p), default=1.0)
    alike, band_rows, band_panel = _start(table, lora)
    logs = {id(o): log_rho(mine[id(o)], mine[id(full)]) for o in lora}
    pooled = pooled_variance([list(v.best.values()) for v in logs.values()])
    speed = rho(mine[id(top)], mine[id(full)], pooled)
    over = stalled([full, top], [mine[id(full)].best, mine[id(top)].best])
    measured = {
        "departure_slope": (slope, gates_on([full, *lora]) + over + _at_once(left, first)),
        "rho_top_rank": (speed, gates_on([full, top]) + over),
        "identical_steps": (alike, [] if alike.n else ["no curve of redraws of A at two ranks"]),
    }
    found = correct(
        judge_claims(question, measured, LOG_ESTIMANDS, group, fewest_seeds([full, *lora])),
        question,
    )
    last = read_to([mine[id(full)], mine[id(top)]])
    read = {
        "rho_top_rank": f"rank {top.curve.key['rank']:g}, to update {last}",
        "departure_slope": f"to update {last}",
        "identical_steps": _common_rate(table),
    }
    envelopes = {o.curve.name: _envelope(plain, o) for o in optima}
    rows = [["rank", "departs at step, by seed", "of the envelopes", "rho [95%]"]]
    for o in lora:
        r = int(o.curve.key["rank"])
        each = rho(mine[id(o)], mine[id(full)], pooled)
        rows.append(
            [
                str(r),
                ", ".join(_step(v) for v in left[r].values()),
                _step(
                    departure(
                        envelopes[o.curve.name], envelopes[full.curve.name], full.curve.nll_start
                    )
                ),
                with_interval(each),
            ]
        )
    text = [
        note,
        *([cut] if cut else []),
        f"A rank departs when its loss is above full fine-tuning's, for good, by {DEPARTED:.0%} of the latter's gain in "
        "the whole run. rho: full fine-tuning's steps to the rank's last loss over the rank's own; curves are read to "
        f"update {last}.",
    ]
    singles = [r.best for r in runs]
    sections = [
        Section(
            "Departures",
            rows,
            text,
            "departures.png",
            _panels(optima, singles, envelopes),
            "learning curves by rank: at each one's best rate, mean over seeds; and the lowest loss over rates",
        ),
        Section(
            "The start",
            band_rows,
            figure="start.png",
            panels=[band_panel] if band_panel else [],
            caption="ranks against redraws of A, at one rate",
        ),
    ]
    return Analysis(
        optima,
        found,
        sections,
        {"departures": {str(k): _plain(v) for k, v in left.items()}, "read": read},
        {group: [full, *lora]},
    )


def _common_rate(table: pd.DataFrame) -> str:
    """Say at which rate A was drawn again."""
    again = table.loc[
        (table["method"] == "lora") & (table["init_seed"].fillna(0) > 0), "lr"
    ].unique()
    return f"all ranks at {' and '.join(map(rate, sorted(again)))}" if len(again) else ""


def _plain(values: dict[int, float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.values()]


def _step(value: float) -> str:
    return "never" if math.isinf(value) else number(value)


def _departures(lora: AtBest[Points], full: AtBest[Points], start: float) -> AtBest[float]:
    return lora.paired(full, lambda a, b: departure(a, b, start))


def _slope(left: dict[int, AtBest[float]]) -> tuple[Estimate, str]:
    """Fit ln(departure) over log2(rank) for each seed, ranks that never depart left out; full
    fine-tuning's rate, which is common to all ranks, counts: a higher one is ahead at first."""
    ranks = sorted(left)
    gone = sum(math.isinf(v) for d in left.values() for v in d.best.values())
    note = (
        f"{gone} of {sum(len(d.best) for d in left.values())} curves never depart and are left out of the slope."
        if gone
        else "Every rank departs within the run."
    )
    together = left[ranks[0]].map(lambda v: {ranks[0]: v})
    for r in ranks[1:]:
        together = together.paired(left[r], lambda a, v, r=r: {**a, r: v})
    return over_seeds(_known(together.map(_slope_of)), flags=("censored",) if gone else ()), note


def _slope_of(left: dict[int, float]) -> float:
    there = [(math.log2(r), math.log(v)) for r, v in left.items() if math.isfinite(v)]
    return float(np.polyfit(*zip(*there), 1)[0]) if len(there) >= 2 else math.nan


def _known(values: AtBest[float]) -> AtBest[float]:
    """Leave out the seeds that have no value."""

    def known(by_seed: dict[int, float]) -> dict[int, float]:
        return {s: v for s, v in by_seed.items() if math.isfinite(v)}

    return AtBest(known(values.best), tuple(map(known, values.likely)))


def _at_once(left: dict[int, dict[int, float]], first: float) -> list[str]:
    """Say, as a gate, that the ranks' order cannot be told: fewer than two of them are with full
    fine-tuning at the first evaluation."""
    gone = [str(r) for r, mine in left.items() if mine and np.median(list(mine.values())) <= first]
    return (
        []
        if len(left) - len(gone) > 1
        else [
            f"rank(s) {', '.join(gone)} have left at the first evaluation: their order is "
            "not resolved"
        ]
    )


def _envelope(table: pd.DataFrame, o: Optimum) -> Points:
    """The lowest loss over the rates at every step, of the seed that was tried at most rates."""
    seeds, counts = np.unique(o.curve.seed, return_counts=True)
    seed = seeds[np.argmax(counts)]
    rows = runs_of(table, o.curve)
    lowest: dict[float, float] = {}
    for points in by_run(rows[rows["seed"] == seed]).values():
        for step, nll in same_rows(points):
            lowest[step] = min(nll, lowest.get(step, math.inf))
    return sorted(lowest.items())


def _panels(
    optima: Sequence[Optimum], runs: Sequence[dict[int, Points]], envelopes: dict[str, Points]
) -> list[Panel]:
    single, envelope = [], []
    for o, mine in zip(optima, runs):
        steps = sorted({s for p in mine.values() for s, _ in p})
        mean = [float(np.mean([dict(p)[s] for p in mine.values() if s in dict(p)])) for s in steps]
        single.append(Series(o.curve.name, steps, mean))
        env = envelopes[o.curve.name]
        envelope.append(Series(o.curve.name, [s for s, _ in env], [v for _, v in env]))
    y = "held-out NLL (nats per token)"
    return [
        Panel("runs at each curve's best rate, mean over seeds", "step", y, single, log_x=True),
        Panel("envelopes: lowest over all rates, one seed", "step", y, envelope, log_x=True),
    ]


def _start(
    table: pd.DataFrame, lora: Sequence[Optimum]
) -> tuple[Estimate, list[list[str]], Panel | None]:
    """Compare ranks with the highest one, at the rate at which A was drawn again: until which step
    does a rank's mean curve lie within what another draw of A makes of one and the same rank?"""
    top = int(lora[-1].curve.key["rank"])
    part = table[table["method"] == "lora"]
    rates = part.loc[part["init_seed"].fillna(0) > 0, "lr"].unique()
    found: dict[int, dict[int, list[dict[float, float]]]] = {}
    for run, points in by_run(part[part["lr"].isin(rates)]).items():
        rank, seed = int(part.at[run, "rank"]), int(part.at[run, "seed"])
        found.setdefault(rank, {}).setdefault(seed, []).append(dict(same_rows(points)))
    again = {
        r: {s: draws for s, draws in seeds.items() if len(draws) > 1} for r, seeds in found.items()
    }
    drawn = {r: seeds for r, seeds in again.items() if seeds}
    if top not in drawn or len(drawn) < 2:
        return Estimate(None), [], None
    steps = sorted(
        set.intersection(
            *(set(c) for seeds in drawn.values() for draws in seeds.values() for c in draws)
        )
    )
    mean = {
        r: {s: np.mean([[c[t] for t in steps] for c in draws], 0) for s, draws in seeds.items()}
        for r, seeds in drawn.items()
    }
    spread = {
        r: np.mean(
            [np.var([[c[t] for t in steps] for c in draws], 0, ddof=1) for draws in seeds.values()],
            0,
        )
        for r, seeds in drawn.items()
    }
    band = {
        r: 1.96 * np.sqrt(spread[r] + spread[top]) for r in drawn
    }  # of the difference of two single runs
    series, rows = (
        [],
        [["rank", "leaves the band at step", "difference at the first step (nats)", "band there"]],
    )
    for k, rank in enumerate(sorted(drawn.keys() - {top}), 1):
        apart = np.mean(
            [mean[rank][s] - mean[top][s] for s in sorted(drawn[rank].keys() & drawn[top].keys())],
            0,
        )
        at = _leaves(apart, band[rank], steps)
        rows.append([str(rank), _step(at), signed(float(apart[0])), signed(float(band[rank][0]))])
        half = list(band[rank])
        series += [
            Series(f"rank {rank}", steps, list(apart), colour=k),
            Series(
                f"95% of redraws, rank {rank}",
                [*steps, math.nan, *steps],
                [*half, math.nan, *(-v for v in half)],
                style=":",
                colour=k,
                alpha=0.7,
            ),
        ]
    panel = Panel(
        f"one rate for all ranks ({rates[0]:g}), mean over seeds and draws",
        "updates",
        f"NLL - NLL of rank {top} (nats)",
        series,
        log_x=True,
    )
    return _first_to_leave(drawn, band, steps), rows, panel


def _leaves(apart: np.ndarray, band: np.ndarray, steps: Sequence[float]) -> float:
    """Return the first step from which two evaluations in turn (or the last one) lie outside of the
    band; infinite if none."""
    out = np.abs(apart) > band
    twice = [i for i in range(len(steps)) if out[i] and (i + 1 == len(steps) or out[i + 1])]
    return steps[twice[0]] if twice else math.inf


RESAMPLES = 2000


def _first_to_leave(
    drawn: dict[int, dict[int, list[dict[float, float]]]],
    band: dict[int, np.ndarray],
    steps: Sequence[float],
) -> Estimate:
    """Return the step at which the first rank leaves, its interval by a bootstrap over seeds and,
    within them, draws of A. A rank that never leaves counts as twice the last step."""
    top, rng = max(drawn), np.random.default_rng(20251126)
    seeds = sorted(set.intersection(*(set(v) for v in drawn.values())))
    curves_of = {
        r: {s: np.array([[c[t] for t in steps] for c in drawn[r][s]]) for s in seeds} for r in drawn
    }
    found = []
    for _ in range(RESAMPLES):
        mine = rng.choice(seeds, len(seeds))
        mean = {
            r: np.mean([c[s][rng.integers(0, len(c[s]), len(c[s]))].mean(0) for s in mine], 0)
            for r, c in curves_of.items()
        }
        found.append(min(_leaves(mean[r] - mean[top], band[r], steps) for r in drawn if r != top))
    n = sum(len(draws) for by_seed in drawn.values() for draws in by_seed.values())
    return from_draws(np.minimum(np.array(found), 2.0 * steps[-1]), n)
