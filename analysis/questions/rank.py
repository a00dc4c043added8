"""Question: how does the speed of learning depend on the rank, and do all ranks start equally.

The speed is rho at each rank's best rate, and its slope over log2(rank) is judged: as 0 where the
rules alone are new, which any rank holds by the study's capacity, and as above 0 elsewhere.

Beside it: does the best rate depend on the rank, and when does each rank leave full fine-tuning's
learning curve. A rank departs at the step from which its loss stays above full fine-tuning's by
DEPARTED of what full fine-tuning gains in the
whole run. This is measured in two ways. The verdict uses runs at each rank's best rate, paired by
seed. The study's envelope, the lowest loss over all rates at each step, is shown too; no single run
follows it.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, number, rate, signed, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import AtBest
from analysis.measures.departure import (
    DEPARTED,
    Departure,
    departure,
    departures_of,
    envelope,
    slope_of,
)
from analysis.measures.efficiency import at_best, log_rho, read_to, rho, slope_by_rank
from analysis.measures.qualify import stalled
from analysis.measures.ratio import MIN_RANK, lr_drift, ratio_of
from analysis.measures.redraws import Start, start_of
from analysis.measures.regret import novelty_of
from analysis.measures.straight import SPAN, least_straight
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Measured,
    Panel,
    Rows,
    Section,
    Series,
    claims_about,
    correct,
    fewest_seeds,
    full_of,
    gates_on,
    gates_on_speed,
    judge_claims,
    lora_of,
    missing_arm,
    pooled_over,
    without_an_arm,
)
from analysis.questions.lr_ratio.answer import drift_gates
from analysis.runs.learning_curves import Points
from analysis.runs.lr_curves import lr_curves
from analysis.runs.prefixes import while_unsolved

ESTIMANDS = (
    "rho_slope_in_regime",
    "rho_slope_beyond",
    "departure_slope",
    "rho_top_rank",
    "identical_steps",
    "lr_drift_per_doubling",
    "difference_growth",
    "rate_over_rank_1",
    "straightness",
)
LOG_ESTIMANDS = ("rho_top_rank", "rate_over_rank_1", "straightness")
"""identical_steps is not judged on a log scale: it is 0 if a rank leaves at the first evaluation.
"""
Curves = dict[int, AtBest[Points]]
"""Learning curves at best rates, by the id of their optimum."""


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge departures, parity at the highest rank, and the common start."""
    plain, cut = while_unsolved(
        table[(table["method"] == "fullft") | (table["init_seed"].fillna(0) == 0)]
    )
    optima = fit_all(lr_curves(plain))
    full, lora, group = full_of(optima), lora_of(optima), optima[0].curve.group
    if full is None or not lora:
        missing = missing_arm(full, lora)
        return without_an_arm(question, optima, missing, ESTIMANDS, LOG_ESTIMANDS, group)
    top = lora[-1]
    runs: Curves = dict(zip(map(id, optima), at_best(plain, optima)))
    whole = runs[id(full)]
    departures = {
        int(o.curve.key["rank"]): departures_of(runs[id(o)], whole, full.curve.nll_start)
        for o in lora
    }
    start = start_of(table, int(top.curve.key["rank"]))
    logs = {int(o.curve.key["rank"]): log_rho(runs[id(o)], whole) for o in lora}
    pooled = pooled_over(logs.values())
    speed = {id(o): rho(runs[id(o)], whole, pooled) for o in lora}
    over = stalled([full, top], [whole.best, runs[id(top)].best])
    slope_gates = gates_on_speed([full, *lora]) + over + _unresolved(departures)
    slope, ranks = slope_by_rank(logs), gates_on_speed([full, *lora]) + over
    if slope.value is None:
        ranks.append(Gate(GateCode.ONE_RANK if len(logs) < 2 else GateCode.ONLY_BOUNDS))
    top_gates = gates_on_speed([full, top]) + over
    no_redraws = (Estimate(None), [Gate(GateCode.MISSING, "redraws of A at two ranks")])
    high = [o for o in lora if o.curve.key["rank"] >= MIN_RANK]
    measured = {
        **_by_regime(table, (slope, ranks)),
        "departure_slope": (slope_of(departures), slope_gates),
        "rho_top_rank": (speed[id(top)], top_gates),
        "identical_steps": (start.first, []) if start else no_redraws,
        "difference_growth": (start.growth, []) if start else no_redraws,
        "rate_over_rank_1": _over_rank_1(lora, high),
        "straightness": (least_straight(whole, runs[id(top)]), top_gates),
        "lr_drift_per_doubling": (lr_drift(high).slope, drift_gates(high)),
    }
    seeds = fewest_seeds([full, *lora])
    verdicts = correct(judge_claims(question, measured, LOG_ESTIMANDS, group, seeds), question)
    last = read_to([whole, runs[id(top)]])
    envelopes = {id(o): envelope(plain, o) for o in optima}
    notes, panels = [cut] if cut else [], _panels(optima, runs, envelopes)
    left = _departures(full, lora, departures, envelopes, speed, notes, last, panels)
    read = _read_at(table, list(logs), last)
    measures = {
        "departures": {
            str(r): [None if v.never else v.high for v in d.best.values()]
            for r, d in departures.items()
        },
        "read": {k: v for k, v in read.items() if claims_about(question, k)["claims"]},
    }
    return Analysis(optima, verdicts, [left, _start(start)], measures, {group: [full, *lora]})


def _read_at(table: pd.DataFrame, ranks: Sequence[int], last: int) -> dict[str, str]:
    """Return the ranks, updates or rate at which each estimand is measured, in words."""
    top, start = max(ranks), max(1, last // SPAN**2)
    return {
        **dict.fromkeys(ESTIMANDS[:2], f"ranks {min(ranks)} to {top}, to update {last}"),
        "departure_slope": f"to update {last}",
        "rho_top_rank": f"rank {top}, to update {last}",
        **dict.fromkeys(("identical_steps", "difference_growth"), _common_rate(table)),
        "straightness": f"rank {top} and full fine-tuning, from update {start} to {last}",
    }


def _over_rank_1(lora: Sequence[Optimum], high: Sequence[Optimum]) -> tuple[Estimate, list[Gate]]:
    """Return the mean best rate of the ranks from MIN_RANK up over that of rank 1."""
    ones = [o for o in lora if o.curve.key["rank"] == 1]
    if not ones or not high:
        return Estimate(None), [Gate(GateCode.MISSING, f"rank 1, or of ranks from {MIN_RANK} up")]
    return ratio_of(high, ones[0]), gates_on([*ones, *high])


def _by_regime(table: pd.DataFrame, slope: tuple[Estimate, list[Gate]]) -> Measured:
    """Return the slope as the estimand of the table's regime, and none for the other one.

    In regime means that the rules alone are new. Real data, of which this is not known, are not.
    """
    new = novelty_of(json.loads(table["spec"].iloc[0])["dataset"])
    here, there = "rho_slope_in_regime", "rho_slope_beyond"
    if new is None or not new.low:
        here, there = there, here
    return {here: slope, there: (Estimate(None), [Gate(GateCode.NO_CELL)])}


def _common_rate(table: pd.DataFrame) -> str:
    """Name the rate at which all ranks were run with more than one draw of A."""
    again = table.loc[
        (table["method"] == "lora") & (table["init_seed"].fillna(0) > 0), "lr"
    ].unique()
    return f"all ranks at {' and '.join(map(rate, sorted(again)))}" if len(again) else ""


def _step(value: float) -> str:
    return "never" if math.isinf(value) else number(value)


def _departed(d: Departure) -> str:
    """Format a departure, or the bound on it."""
    if d.never:
        return f"> {number(d.low)}"
    return f"< {number(d.high)}" if d.at_once else number(d.high)


def _unresolved(departures: dict[int, AtBest[Departure]]) -> list[Gate]:
    """Return a gate if at most one rank has not yet departed at the first evaluation.

    The order in which the others departed is then unknown.
    """
    gone = [
        str(r)
        for r, d in departures.items()
        if d.best and np.mean([v.at_once for v in d.best.values()]) > 0.5
    ]
    if len(departures) - len(gone) > 1:
        return []
    return [Gate(GateCode.NO_ORDER, ", ".join(gone))]


def _departures(
    full: Optimum,
    lora: Sequence[Optimum],
    departures: dict[int, AtBest[Departure]],
    envelopes: dict[int, Points],
    speed: dict[int, Estimate],
    notes: list[str],
    last: float,
    panels: list[Panel],
) -> Section:
    rows: Rows = [["rank", "departs at step, by seed", "of the envelopes", "rho [95%]"]]
    for o in lora:
        rank = int(o.curve.key["rank"])
        by_seed = ", ".join(map(_departed, departures[rank].best.values()))
        of_envelope = departure(envelopes[id(o)], envelopes[id(full)], full.curve.nll_start)
        rows.append([str(rank), by_seed, _departed(of_envelope), with_interval(speed[id(o)])])
    every = [d for by_rank in departures.values() for d in by_rank.best.values()]
    later, before = sum(d.never for d in every), sum(d.at_once for d in every)
    text = [
        f"Of {len(every)} curves {later} do not depart within the run, and {before} have departed "
        "at the first evaluation. The slope counts these as censored: later than the last "
        "evaluation, earlier than the first.",
        *notes,
        f"A rank departs at the update from which its loss stays above full fine-tuning's by "
        f"{DEPARTED:.0%} of what full fine-tuning gains in the whole run. rho: full fine-tuning's "
        f"updates to the rank's last loss, over the rank's own. Curves are read to update {last}.",
    ]
    caption = (
        "learning curves by rank: at each one's best rate, mean over seeds; and the lowest loss "
        "over rates"
    )
    return Section("Departures", rows, text, "departures.png", panels, caption)


def _panels(optima: Sequence[Optimum], runs: Curves, envelopes: dict[int, Points]) -> list[Panel]:
    single, envelope_lines = [], []
    for o in optima:
        curves = [dict(p) for p in runs[id(o)].best.values()]
        steps = sorted({s for c in curves for s in c})
        mean = [float(np.mean([c[s] for c in curves if s in c])) for s in steps]
        single.append(Series(o.curve.name, steps, mean))
        points = envelopes[id(o)]
        envelope_lines.append(Series(o.curve.name, [s for s, _ in points], [v for _, v in points]))
    y = "held-out NLL (nats per token)"
    return [
        Panel("runs at each curve's best rate, mean over seeds", "updates", y, single, log_x=True),
        Panel(
            "envelopes: lowest over all rates, one seed", "updates", y, envelope_lines, log_x=True
        ),
    ]


def _start(start: Start | None) -> Section:
    caption = "ranks against redraws of A, at one rate"
    if start is None:
        return Section("The start")
    rows = [
        ["rank", "leaves the band at step", "difference at the first step (nats)", "band there"]
    ]
    series = []
    for k, r in enumerate(start.ranks, 1):
        first, width = float(r.difference[0]), float(r.band[0])
        rows.append([str(r.rank), _step(r.leaves), signed(first), signed(width)])
        series += [
            Series(f"rank {r.rank}", start.steps, list(r.difference), colour=k),
            Series(
                f"95% of redraws, rank {r.rank}",
                [*start.steps, math.nan, *start.steps],
                [*r.band, math.nan, *-r.band],
                style=":",
                colour=k,
                alpha=0.7,
            ),
        ]
    title = f"one rate for all ranks ({start.lr:g}), mean over seeds and draws"
    panel = Panel(title, "updates", f"NLL - NLL of rank {start.top} (nats)", series, log_x=True)
    return Section("The start", rows, [], "start.png", [panel], caption)
