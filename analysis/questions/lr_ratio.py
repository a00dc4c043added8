"""The report of `lr_ratio`: ratios against published laws, gaps, rho, drift, and the next runs."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.estimate import Estimate, Verdict, number, signed, with_interval
from analysis.inference.seeds import pooled_variance
from analysis.measures.efficiency import at_best, log_rho, of_curves, read_to, rho
from analysis.measures.next_runs import lines, suggest
from analysis.questions.base import (
    Analysis,
    Rows,
    Section,
    claims_about,
    fewest_seeds,
    gates_on,
    judge_claims,
)
from analysis.questions.qualify import stalled
from analysis.questions.ratio_answer import PARITY, Answer, Ratio, answer_of

ESTIMANDS = ("lr_ratio", "lr_drift_per_doubling", PARITY)
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
    verdicts = [*found.verdicts, *_parity(table, found, claims_about(question, PARITY))]
    measures = {**_plain(found, rhos), "read": _read(table, found)}
    return Analysis(found.optima, verdicts, sections, measures, found.members, True, ratios)


def _read(table: pd.DataFrame, found: Answer) -> dict[str, str]:
    """Say of which rank parity is, and up to which update the curves were read; of one group."""
    if len(found.members) != 1:
        return {}
    ((full, *lora),) = found.members.values()
    top = max(lora, key=lambda o: o.curve.key["rank"])
    return {
        PARITY: f"rank {top.curve.key['rank']:g}, to update {read_to(at_best(table, [full, top]))}"
    }


def _parity(table: pd.DataFrame, found: Answer, question: dict[str, Any]) -> list[Verdict]:
    """Judge whether the highest rank learns as fast as full fine-tuning, in every group."""
    if not question["claims"]:
        return []
    runs = dict(zip(map(id, found.optima), at_best(table, found.optima)))
    verdicts = []
    for group, (full, *lora) in found.members.items():
        top = max(lora, key=lambda o: o.curve.key["rank"])
        mine, its = runs[id(top)], runs[id(full)]
        pooled = pooled_variance([list(log_rho(runs[id(o)], its).best.values()) for o in lora])
        gates = gates_on([full, top]) + stalled([full, top], [its.best, mine.best])
        seeds = fewest_seeds([full, top])
        verdicts += judge_claims(
            question, {PARITY: (rho(mine, its, pooled), gates)}, [PARITY], group, seeds
        )
    judged = {o.curve.group for members in found.members.values() for o in members}
    for group in dict.fromkeys(o.curve.group for o in found.optima):
        if group not in judged:
            gate = gates_on([], "fullft and lora together")
            verdicts += judge_claims(question, {PARITY: (Estimate(None), gate)}, [PARITY], group)
    return verdicts


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
