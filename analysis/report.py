"""From a table and a question to the answer, the report (Markdown with figures) and the machine-readable results.

One call writes all of it from the same result objects; there is no sentence in it that does not come from them.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import interactive, plots
from analysis.design import lines, suggest
from analysis.lr_optimum import Optimum
from analysis.lr_ratio import Answer, Ratio, answer
from analysis.outside import WITHIN, aligned
from analysis.results import LEVEL, Estimate, Verdict, number, rate, with_interval
from analysis.step_efficiency import of_curves
from analysis.table import Curve, curves
from analysis.verdicts import look_level

Rhos = list[Estimate | None]


def judge_and_report(
    table: pd.DataFrame, question: dict[str, Any], folder: Path, as_json: bool = False
) -> str:
    """Judge the runs, write report.md, report.html, figures, results.json, table.parquet and table.csv into `folder`, and
    return the answer for the terminal (or as one JSON object)."""
    found = answer_of(table, question)
    parts = [o.curve for o in found.optima]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "question.json").write_text(json.dumps(question, indent=1) + "\n")
    table.to_parquet(folder / "table.parquet", index=False)
    table.to_csv(folder / "table.csv", index=False)
    plots.lr_against_nll(found.optima, folder / "lr_nll.png")
    interactive.write(folder / "report.html", f"{question['name']} at scale {question['scale']}: {question['question']}", table,
                      found.optima, [(r.group, "ranks 4 and more" if r.rank is None else f"rank {r.rank}", r.ratio)
                                     for r in found.ratios], found.verdicts, WITHIN)  # fmt: skip
    has_curves = plots.learning(table, found.optima, folder / "learning.png")
    rhos = of_curves(table, found.optima)
    told = to_plain(found, question, rhos)
    (folder / "results.json").write_text(json.dumps(told, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(found, question, parts, table, has_curves, rhos))
    return json.dumps({**told, "report": str(folder / "report.md")}) if as_json else terminal(found, question, folder, rhos)


def answer_of(table: pd.DataFrame, question: dict[str, Any]) -> Answer:
    """Fit and judge a sweep's runs under its claims, margins and planned rounds."""
    widths = {} if "hidden_size" not in table else dict(zip(table["model"], table["hidden_size"].fillna(0).astype(int)))
    return answer(curves(table), question["claims"], widths, look_level(int(question.get("rounds", 1))))


def _asked(question: dict[str, Any]) -> Any:
    rounds = int(question.get("rounds", 1))
    return question["claims"] if rounds == 1 else {"claims": question["claims"], "rounds": rounds}


def question_hash(question: dict[str, Any]) -> str:
    """Hash what was asked and with which margins: a report shows that they were not changed after the runs."""
    return hashlib.sha256(json.dumps(_asked(question), sort_keys=True).encode()).hexdigest()[:12]


def _flags(flags: Sequence[str]) -> str:
    return ", ".join(flags) or "-"


def _band(o: Optimum) -> str:
    band = o.band(WITHIN)
    return "-" if band is None else f"{rate(band[0])} to {rate(band[1])}"


def _curve_rows(found: Answer) -> list[list[str]]:
    rows = [["curve", "model and data", "best LR [95%]", f"within {WITHIN:g} nats", "best NLL", "runs", "not fitted",
             "flags"]]  # fmt: skip
    for o in found.optima:
        c = o.curve
        rows.append([c.name, c.group, with_interval(o.best_lr, rate), _band(o), number(o.best_nll, 5),
                     str(len(c.x)), str(int((~c.usable).sum())), _flags(o.flags)])  # fmt: skip
    return rows


def _ratio_rows(found: Answer, rhos: Rhos) -> list[list[str]]:
    rows = [["LoRA / FullFT", "model and data", "alpha", "ratio [95%]", "NLL gap", "rho [95%]",
             "regret of FullFT's LR", "regret of 10x FullFT's LR"]]  # fmt: skip
    for r in found.ratios:
        name = "ranks 4 and more" if r.rank is None else f"rank {r.rank}"
        one, ten = (r.regrets.get(k) for k in ("FullFT's best LR", "10 x FullFT's best LR"))
        rows.append([name, r.group, f"{r.alpha:g}", with_interval(r.ratio), _gap(r.gap), with_interval(_rho(rhos, r)),
                     _signed(one), _signed(ten)])
    return rows


def _rho(rhos: Rhos, r: Ratio) -> Estimate:
    return (None if r.at is None else rhos[r.at]) or Estimate(None)


def _gap(e: Estimate) -> str:
    return _signed(e.value) + (f" [{_signed(e.low)}, {_signed(e.high)}]" if e.has_interval() else "")


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _verdict_line(v: Verdict) -> str:
    line = f"{v.outcome}: {v.claim} ({v.group}) {with_interval(v.estimate)}, expected {v.expected:g} within "
    line += f"[{v.margin[0]:g}, {v.margin[1]:g}]{' (primary)' if v.primary else ''}: {v.why}"
    return line + (f". Needed: {v.needed}" if v.needed else "")


def terminal(found: Answer, question: dict[str, Any], folder: Path, rhos: Rhos) -> str:
    """Write the answer for the terminal."""
    out = [question["question"], "", *aligned(_curve_rows(found)), "", *aligned(_ratio_rows(found, rhos)), ""]
    out += [_verdict_line(v) for v in found.verdicts]
    return "\n".join([*out, "", f"report: {folder / 'report.html'} (interactive), {folder / 'report.md'}"])


def _table(rows: list[list[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return [line(rows[0]), "|" + "---|" * len(rows[0]), *(line(r) for r in rows[1:])]


def markdown(
    found: Answer, question: dict[str, Any], parts: Sequence[Curve], table: pd.DataFrame, has_curves: bool, rhos: Rhos
) -> str:
    """Write the report."""
    out = [f"# {question['name']} at scale {question['scale']}", "", f"**{question['question']}**", ""]
    out += [f"Source of the claim: {question['source']}.", ""] if question["source"] else []
    head = ["claim", "model and data", "verdict", f"measured [{_percent(found)}]", "expected", "margin", "why", "needed"]
    out += ["## Verdicts", "", *_table([head, *(_verdict_cells(v) for v in found.verdicts)]), ""]
    for r in found.ratios:
        if r.rank is None and r.rivals:
            out += [f"Laws of the ratio in print, at the width and alpha {r.alpha:g} of {r.group}:", "",
                    *_table([["law", "predicts", "inside the interval"],
                             *([k, number(v), _inside(v, r.ratio)] for k, v in r.rivals.items())]), ""]  # fmt: skip
    out += ["## Optima", "", *_table(_curve_rows(found)), "", "![LR against NLL](lr_nll.png)", ""]
    pooled = next((o.pooled for o in found.optima if o.pooled is not None), None)
    if pooled is not None:
        out += [f"Noise of one run, pooled over the sweep: {pooled.noise:.2g} nats at the bottom of a valley, {pooled.df} "
                f"degrees of freedom; misfit of the family's curvature {100 * pooled.misfit:.0f}%. Crosses on the top line: "
                "runs that diverged, ended no better than the untrained model, or lie beyond such a rate: no part of the "
                "fit.", ""]  # fmt: skip
    out += ["## LoRA against full fine-tuning", "", *_table(_ratio_rows(found, rhos)), ""]
    for g, d in found.drifts.items():
        tests = "" if d.p_slope is None else f" (no slope: p {d.p_slope:.2g}; all ranks equal: p {d.p_equal:.2g})"
        out.append(f"Drift of ln(best LR) per doubling of the rank, {g}: {with_interval(d.slope)}{tests}.")
    if found.pooled is not None:
        p = found.pooled
        out += ["", f"Ratio pooled over {p.k} groups (random effects): {number(math.exp(p.mean))} [{number(math.exp(p.low))}, "
                f"{number(math.exp(p.high))}]; between groups a factor {number(math.exp(p.tau))}; the next group would lie in "
                f"[{number(math.exp(p.low_next))}, {number(math.exp(p.high_next))}]."]  # fmt: skip
    out += ["", "Gap: best LoRA NLL minus best full fine-tuning NLL, nats per token; with an interval where fresh seeds are "
            "paired, each arm at its best tried rate. Regret: NLL lost by a rule of thumb against the tuned LoRA rate. rho: "
            "full fine-tuning's steps to LoRA's loss over LoRA's steps.", ""]  # fmt: skip
    wanted = suggest(found)
    if wanted:
        out += ["## Next runs", "", "What would decide most (`action=extend` adds them as the sweep's next round):", "",
                *(f"- {line}" for line in lines(wanted)), ""]  # fmt: skip
    if has_curves:
        out += ["## Learning curves", "", "![learning curves](learning.png)", ""]
    return "\n".join([*out, *_conditions(question, parts, table)]) + "\n"


def _percent(found: Answer) -> str:
    return f"{100 * next((v.estimate.level for v in found.verdicts), LEVEL):.3g}%"


def _verdict_cells(v: Verdict) -> list[str]:
    return [v.claim + (" (primary)" if v.primary else ""), v.group, f"**{v.outcome}**", with_interval(v.estimate),
            f"{v.expected:g}", f"[{v.margin[0]:g}, {v.margin[1]:g}]", v.why, v.needed or "-"]  # fmt: skip


def _inside(value: float, e: Estimate) -> str:
    if e.value is None or not e.has_interval():
        return "-"
    return "yes" if e.low <= value <= e.high else "no"


def _conditions(question: dict[str, Any], parts: Sequence[Curve], table: pd.DataFrame) -> list[str]:
    """State under which conditions the numbers hold."""
    out = ["## Conditions", ""]
    for column, label in (("batch_size", "sequences an update"), ("steps", "updates"), ("schedule", "schedule"),
                          ("precision", "precision"), ("alpha", "LoRA alpha"), ("layers", "LoRA layer sets"),
                          ("hidden_size", "hidden size"), ("seed", "seeds")):  # fmt: skip
        if column in table:
            values = sorted(str(v) for v in table[column].dropna().unique())
            out.append(f"- {label}: {', '.join(values)}")
    out.append("- LoRA start: A uniform in +-1/sqrt(d_in), B zero; one learning rate for both; AdamW")
    for where, c in {f"{c.key['model']} on {c.key['dataset']}": c for c in parts}.items():
        out.append(f"- {where}: NLL before training {number(c.nll_start, 5)}, floor of the task {number(c.floor, 5)}")
    if "base_sha256" in table:
        shas = ", ".join(f"{m} {s[:12]}" for m, s in table[["model", "base_sha256"]].dropna().drop_duplicates().values)
        out.append(f"- base weights, sha256: {shas}")
    out += [f"- runs: {len(table)} in table.parquet and table.csv; claims and margins, hash {question_hash(question)}",
            f"- what is measured at scale {question['scale']} is claimed for that scale only", "",
            f"Command: `python -m lorasweep +sweep={question['name']} scale={question['scale']}`"]  # fmt: skip
    return out


def to_plain(found: Answer, question: dict[str, Any], rhos: Rhos) -> dict[str, Any]:
    """Return the answer as plain values (no path, so that a kept one is the same on every machine)."""
    def curve(o: Any) -> dict[str, Any]:
        e = o.best_lr
        return {**{k: _plain(v) for k, v in o.curve.key.items()}, "n": e.n, "best_lr": e.value, "low": e.low,
                "high": e.high, "best_nll": o.best_nll, "flags": list(o.flags), "band": o.band(WITHIN)}  # fmt: skip

    return {
        "sweep": question["name"], "scale": question["scale"], "claims_hash": question_hash(question),
        "curves": [curve(o) for o in found.optima],
        "ratios": [{**{f.name: getattr(r, f.name) for f in dataclasses.fields(r)}, "ratio": r.ratio.plain(),
                    "gap": r.gap.plain(), "rho": _rho(rhos, r).plain()} for r in found.ratios],
        "drift": {g: {"slope": d.slope.plain(), "p_slope": d.p_slope, "p_equal": d.p_equal} for g, d in found.drifts.items()},
        "pooled": None if found.pooled is None else dataclasses.asdict(found.pooled),
        "verdicts": [v.plain() for v in found.verdicts],
    }  # fmt: skip


def _plain(value: Any) -> Any:
    if value is None or value != value:
        return None
    return value.item() if hasattr(value, "item") else value
