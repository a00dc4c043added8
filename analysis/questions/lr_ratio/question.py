"""The report of `lr_ratio`: ratios against published laws, gaps, rho, drift, and the next runs."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.estimate import Estimate, Verdict, number, signed, with_interval
from analysis.inference.seeds import pooled_variance
from analysis.measures.at_rate import lost_at
from analysis.measures.efficiency import at_best, log_rho, of_curves, read_to, rho
from analysis.measures.next_runs import lines, suggest
from analysis.measures.qualify import stalled
from analysis.measures.regret import at_ten_times, gaps_of
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Measured,
    Rows,
    Section,
    claims_about,
    fewest_seeds,
    gates_on,
    gates_on_gap,
    gates_on_speed,
    judge_claims,
    pooled_over,
)
from analysis.questions.lr_ratio.answer import (
    NO_REGRET,
    OF_LOSSES,
    PARITY,
    TEN_TIMES,
    Answer,
    Ratio,
    answer_of,
)
from analysis.runs.lr_curves import runs_of

ESTIMANDS = ("lr_ratio", "lr_drift_per_doubling", *OF_LOSSES)
LOG_ESTIMANDS = ("lr_ratio", PARITY)
Rhos = list[Estimate | None]


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Fit and judge, and put the report's sections together."""
    found = answer_of(table, question)
    rhos = of_curves(table, found.optima)
    sections = [
        *_laws(found),
        Section("LoRA against full fine-tuning", _ratio_rows(found, rhos), _notes(found)),
    ]
    wanted = suggest(found)
    if wanted:
        sections.append(
            Section(
                "Next runs",
                text=[
                    "Runs most likely to decide the open claims (`action=extend` adds them as the "
                    "sweep's next round):",
                    "",
                    *(f"- {line}" for line in lines(wanted)),
                ],
            )
        )
    ratios = [
        (r.group, "ranks 4 and more" if r.rank is None else f"rank {r.rank}", r.ratio)
        for r in found.ratios
    ]
    verdicts = [*found.verdicts, *_of_losses(table, found, question)]
    measures = {**_plain(found, rhos), "read": _read(table, found, question)}
    return Analysis(found.optima, verdicts, sections, measures, found.members, True, ratios)


def _read(table: pd.DataFrame, found: Answer, question: dict[str, Any]) -> dict[str, str]:
    """Say of which rank and up to which update the losses were read; of one group."""
    if len(found.members) != 1:
        return {}
    ((full, *lora),) = found.members.values()
    top = _highest(lora)
    rank = f"rank {top.curve.key['rank']:g}"
    to = read_to(at_best(table, [full, top]))
    said = {PARITY: f"{rank}, to update {to}", NO_REGRET: rank, TEN_TIMES: rank}
    return {k: v for k, v in said.items() if claims_about(question, k)["claims"]}


def _highest(lora: Sequence[Optimum]) -> Optimum:
    return max(lora, key=lambda o: o.curve.key["rank"])


def _of_losses(table: pd.DataFrame, found: Answer, question: dict[str, Any]) -> list[Verdict]:
    """Judge the claims about the highest rank's losses and speed, in every group."""
    claims = {k: c for k, c in question["claims"].items() if c["estimand"] in OF_LOSSES}
    if not claims:
        return []
    question = {**question, "claims": claims}
    wanted = {c["estimand"] for c in claims.values()}
    ten = [float(c["margin"][1]) for c in claims.values() if c["estimand"] == TEN_TIMES]
    runs = dict(zip(map(id, found.optima), at_best(table, found.optima)))
    verdicts = []
    for group, (full, *lora) in found.members.items():
        top = _highest(lora)
        mine, its = runs[id(top)], runs[id(full)]
        pooled = pooled_variance([list(log_rho(runs[id(o)], its).best.values()) for o in lora])
        gates = gates_on_speed([full, top]) + stalled([full, top], [its.best, mine.best])
        measured: Measured = {PARITY: (rho(mine, its, pooled), gates)}
        if wanted - {PARITY}:
            measured |= _regrets(table, full, lora, max(ten, default=math.inf))
        seeds = fewest_seeds([full, top])
        verdicts += judge_claims(question, measured, [PARITY], group, seeds)
    judged = {o.curve.group for members in found.members.values() for o in members}
    nothing = (Estimate(None), gates_on([], "fullft and lora together"))
    for group in dict.fromkeys(o.curve.group for o in found.optima):
        if group not in judged:
            without = dict.fromkeys(OF_LOSSES, nothing)
            verdicts += judge_claims(question, without, [PARITY], group)
    return verdicts


def _regrets(
    table: pd.DataFrame, full: Optimum, lora: Sequence[Optimum], highest: float
) -> Measured:
    """Return what the highest rank gives up, and what 10 times full fine-tuning's rate costs it.

    Args:
        highest: upper end of the margin of what that rate costs.
    """
    mine = pd.concat([runs_of(table, o.curve) for o in (full, *lora)])
    gaps = gaps_of(mine, [full, *lora])
    costs = {g.rank: at_ten_times(g) for g in gaps}
    pooled = pooled_over(lost for _, lost in costs.values())
    top = max(gaps, key=lambda g: g.rank)
    ten, gates = lost_at(top.lora, *costs[top.rank], highest, pooled)
    rests = gates_on([full, top.lora])
    return {
        NO_REGRET: (top.over_allowed(), gates_on_gap(top)),
        TEN_TIMES: (ten, rests + gates),
    }


def _laws(found: Answer) -> list[Section]:
    head = ["law", "predicts", "inside the interval"]
    return [
        Section(
            f"Published laws of the ratio, {r.group}, alpha {r.alpha:g}",
            [head, *([k, number(v), _inside(v, r.ratio)] for k, v in r.rivals.items())],
        )
        for r in found.ratios
        if r.rank is None and r.rivals
    ]


def _inside(value: float, e: Estimate) -> str:
    if e.value is None or e.low is None or e.high is None:
        return "-"
    return "yes" if e.low <= value <= e.high else "no"


def _ratio_rows(found: Answer, rhos: Rhos) -> Rows:
    rows = [
        [
            "LoRA / FullFT",
            "model and data",
            "alpha",
            "ratio [95%]",
            "NLL gap",
            "rho [95%]",
            "regret of FullFT's LR",
            "regret of 10x FullFT's LR",
        ]
    ]
    for r in found.ratios:
        name = "ranks 4 and more" if r.rank is None else f"rank {r.rank}"
        one, ten = (r.regrets.get(k) for k in ("FullFT's best LR", "10 x FullFT's best LR"))
        rows.append(
            [
                name,
                r.group,
                f"{r.alpha:g}",
                with_interval(r.ratio),
                _gap(r.gap),
                with_interval(_rho(rhos, r)),
                signed(one),
                signed(ten),
            ]
        )
    return rows


def _rho(rhos: Rhos, r: Ratio) -> Estimate:
    return (None if r.at is None else rhos[r.at]) or Estimate(None)


def _gap(e: Estimate) -> str:
    return signed(e.value) + (f" [{signed(e.low)}, {signed(e.high)}]" if e.has_interval() else "")


def _notes(found: Answer) -> list[str]:
    out = []
    for g, d in found.drifts.items():
        tests = ""
        if d.p_slope is not None:
            tests = f" (no slope: p {d.p_slope:.2g}; all ranks equal: p {d.p_equal:.2g})"
        slope = with_interval(d.slope)
        out.append(f"Drift of ln(best LR) per doubling of the rank, {g}: {slope}{tests}.")
    if found.pooled is not None:
        p = found.pooled
        logs = (p.mean, p.low, p.high, p.tau, p.low_next, p.high_next)
        mean, low, high, between, low_next, high_next = (number(math.exp(v)) for v in logs)
        out += [
            "",
            f"Ratio pooled over {p.k} groups (random effects): {mean} [{low}, {high}]. Between "
            f"groups it varies by a factor {between}; the next group would lie in "
            f"[{low_next}, {high_next}].",
        ]
    return [
        *out,
        "",
        "Gap: best LoRA NLL minus best full fine-tuning NLL, nats per token. It has an interval "
        "where two fresh seeds are paired, each arm interpolated to its best rate. Regret: NLL "
        "lost by a rule of thumb against the tuned LoRA rate. rho: full fine-tuning's updates to "
        "LoRA's loss over LoRA's updates.",
    ]


def _plain(found: Answer, rhos: Rhos) -> dict[str, Any]:
    return {
        "ratios": [
            {
                **{f.name: getattr(r, f.name) for f in dataclasses.fields(r)},
                "ratio": r.ratio.plain(),
                "gap": r.gap.plain(),
                "rho": _rho(rhos, r).plain(),
            }
            for r in found.ratios
        ],
        "drift": {
            g: {"slope": d.slope.plain(), "p_slope": d.p_slope, "p_equal": d.p_equal}
            for g, d in found.drifts.items()
        },
        "pooled": None if found.pooled is None else dataclasses.asdict(found.pooled),
    }
