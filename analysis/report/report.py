"""From a table and a question to the answer, the report (Markdown with figures) and the
machine-readable results.

One call writes all of it from the same findings; there is no sentence in it that does not come from
them. What a question's own analysis adds comes as sections; this module knows no claim.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.decide import look_level
from analysis.inference.estimate import Verdict, number, rate, with_interval
from analysis.optimum.optimum import Optimum
from analysis.questions.base import Analysis, Section
from analysis.questions.registry import analyse
from analysis.report import plots
from analysis.report.commands import WITHIN
from analysis.report.interactive import page
from analysis.report.text import aligned, plain
from analysis.report.text import markdown as table_of
from analysis.runs.lr_curves import LrCurve, full_names


def judge_and_report(
    table: pd.DataFrame,
    question: dict[str, Any],
    folder: Path,
    as_json: bool = False,
    kept: Path | None = None,
) -> str:
    """Judge the runs, write report.md, report.html, figures, results.json, table.parquet and
    table.csv into `folder`, and return the answer for the terminal (or as one JSON object)."""
    found = analyse(table, question, kept)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "question.json").write_text(json.dumps(question, indent=1) + "\n")
    table.to_parquet(folder / "table.parquet", index=False)
    table.drop(columns=["spec", "result"], errors="ignore").to_csv(
        folder / "table.csv", index=False
    )
    for section in found.sections:
        if section.panels:
            plots.panels(section.panels, folder / section.figure)
    if found.optima:
        plots.lr_against_nll(found.optima, folder / "lr_nll.png")
    page.write(
        folder / "report.html",
        f"{question['name']} at scale {question['scale']}: {question['question']}",
        table,
        found.optima,
        found.ratios,
        found.verdicts,
        WITHIN,
    )
    has_curves = bool(found.optima) and plots.learning(table, found.optima, folder / "learning.png")
    told = results_of(found, question, table)
    (folder / "results.json").write_text(json.dumps(told, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(found, question, table, has_curves))
    return (
        json.dumps({**told, "report": str(folder / "report.md")})
        if as_json
        else terminal(found, question, folder)
    )


def _asked(question: dict[str, Any]) -> Any:
    rounds = int(question.get("rounds", 1))
    words = ("says", "whose", "measure", "beside")
    claims = {
        name: {k: v for k, v in claim.items() if k not in words}
        for name, claim in question["claims"].items()
    }
    return claims if rounds == 1 else {"claims": claims, "rounds": rounds}


def question_hash(question: dict[str, Any]) -> str:
    """Hash what was asked and with which margins: a report shows that they were not changed after
    the runs."""
    return hashlib.sha256(json.dumps(_asked(question), sort_keys=True).encode()).hexdigest()[:12]


def _band(o: Optimum) -> str:
    band = o.band(WITHIN)
    return "-" if band is None else f"{rate(band[0])} to {rate(band[1])}"


def _curve_rows(optima: Sequence[Optimum]) -> list[list[str]]:
    rows = [
        [
            "curve",
            "model and data",
            "best LR [95%]",
            f"within {WITHIN:g} nats",
            "best NLL",
            "runs",
            "not fitted",
            "flags",
        ]
    ]
    names = full_names([o.curve for o in optima])
    for o, name in zip(optima, names):
        c = o.curve
        rows.append(
            [
                name,
                c.group,
                with_interval(o.best_lr, rate),
                _band(o),
                number(o.best_nll, 5),
                str(len(c.x)),
                str(int((~c.usable).sum())),
                ", ".join(o.flags) or "-",
            ]
        )
    return rows


def _verdict_line(v: Verdict) -> str:
    line = f"{v.outcome}: {v.claim} ({v.group}) {with_interval(v.estimate)}, expected {v.expected:g} within "
    line += f"[{v.margin[0]:g}, {v.margin[1]:g}]{' (primary)' if v.primary else ''}: {v.why}"
    return line + (f". Needed: {v.needed}" if v.needed else "")


def terminal(found: Analysis, question: dict[str, Any], folder: Path) -> str:
    """Write the answer for the terminal."""
    out = [question["question"], ""]
    if found.optima:
        out += [*aligned(_curve_rows(found.optima)), ""]
    for section in found.sections:
        if section.rows:
            out += [section.title, *aligned(section.rows), ""]
    out += [_verdict_line(v) for v in found.verdicts]
    return "\n".join(
        [*out, "", f"report: {folder / 'report.html'} (interactive), {folder / 'report.md'}"]
    )


def markdown(
    found: Analysis, question: dict[str, Any], table: pd.DataFrame, has_curves: bool
) -> str:
    """Write the report."""
    out = [
        f"# {question['name']} at scale {question['scale']}",
        "",
        f"**{question['question']}**",
        "",
    ]
    out += [f"Source of the claim: {question['source']}.", ""] if question["source"] else []
    head = [
        "claim",
        "model and data",
        "verdict",
        f"measured [{_percent(question)}]",
        "expected",
        "margin",
        "why",
        "needed",
    ]
    out += ["## Verdicts", "", *table_of([head, *(_verdict_cells(v) for v in found.verdicts)]), ""]
    if any(v.primary for v in found.verdicts):
        out += [
            "Primary claims are corrected for their number in this report. The study's table corrects them over all its "
            "sweeps: one that is decided here may be open there.",
            "",
        ]
    for section in found.sections:
        out += _section(section)
    if found.optima:
        out += [
            "## Optima",
            "",
            *table_of(_curve_rows(found.optima)),
            "",
            "![LR against NLL](lr_nll.png)",
            "",
        ]
    pooled = next((o.pooled for o in found.optima if o.pooled is not None), None)
    if pooled is not None:
        out += [
            f"Noise of one run, pooled over the sweep: {pooled.noise:.2g} nats at the bottom of a valley, {pooled.df} "
            f"degrees of freedom; misfit of the family's curvature {100 * pooled.misfit:.0f}%. Crosses on the top line: "
            "runs that diverged, ended no better than the untrained model, or lie beyond such a rate: no part of the "
            "fit.",
            "",
        ]
    if has_curves:
        out += ["## Learning curves", "", "![learning curves](learning.png)", ""]
    return "\n".join([*out, *_conditions(question, [o.curve for o in found.optima], table)]) + "\n"


def _section(section: Section) -> list[str]:
    out = [f"## {section.title}", ""]
    out += [*table_of(section.rows), ""] if section.rows else []
    out += [*section.text, ""] if section.text else []
    out += (
        [f"![{section.caption or section.title}]({section.figure})", ""] if section.panels else []
    )
    return out


def _percent(question: dict[str, Any]) -> str:
    return f"{100 * look_level(int(question.get('rounds', 1))):.3g}%"


def _verdict_cells(v: Verdict) -> list[str]:
    return [
        v.claim + (" (primary)" if v.primary else ""),
        v.group,
        f"**{v.outcome}**",
        with_interval(v.estimate),
        f"{v.expected:g}",
        f"[{v.margin[0]:g}, {v.margin[1]:g}]",
        v.why,
        v.needed or "-",
    ]


def _conditions(
    question: dict[str, Any], parts: Sequence[LrCurve], table: pd.DataFrame
) -> list[str]:
    """State under which conditions the numbers hold."""
    out = ["## Conditions", ""]
    for column, label in (
        ("batch_size", "sequences an update"),
        ("steps", "updates"),
        ("schedule", "schedule"),
        ("precision", "precision"),
        ("alpha", "LoRA alpha"),
        ("layers", "LoRA layer sets"),
        ("hidden_size", "hidden size"),
        ("seed", "seeds"),
    ):
        if column in table:
            values = sorted(str(v) for v in table[column].dropna().unique())
            out.append(f"- {label}: {', '.join(values)}")
    out.append(
        "- LoRA start, unless said otherwise: A uniform in +-1/sqrt(d_in), B zero; one learning rate for both; AdamW"
    )
    for where, c in {f"{c.key['model']} on {c.key['dataset']}": c for c in parts}.items():
        out.append(
            f"- {where}: NLL before training {number(c.nll_start, 5)}, floor of the task {number(c.floor, 5)}"
        )
    rows = held_out(table)
    if rows:
        out.append(f"- held-out rows: {rows}")
    if "base_sha256" in table:
        shas = ", ".join(
            f"{m} {s[:12]}"
            for m, s in table[["model", "base_sha256"]].dropna().drop_duplicates().values
        )
        out.append(f"- base weights, sha256: {shas}")
    out += [
        f"- runs: {len(table)} in table.parquet and table.csv; claims and margins, hash {question_hash(question)}",
        f"- what is measured at scale {question['scale']} is claimed for that scale only",
        "",
        f"Command: `python -m lorasweep +sweep={question['name']} scale={question['scale']}`",
    ]
    return out


def held_out(table: pd.DataFrame) -> str:
    """Say how many held-out rows the last evaluation and those before it use, the same ones in all
    runs; empty if unknown."""
    if not {"spec", "result"} <= set(table.columns):
        return ""
    pairs = set()
    for spec, result in zip(table["spec"], table["result"]):
        asked, there = json.loads(spec)["dataset"], json.loads(result).get("n_test")
        if asked["location"] != "facts" and there:  # what is read of facts are trained ones
            pairs.add((there, min(asked["n_test_curve"], there)))
    last, before = (
        (" or ".join(f"{n:,}" for n in sorted(set(found))) for found in zip(*pairs))
        if pairs
        else ("", "")
    )
    return f"{last} at the end, {before} for learning curves" if pairs else ""


def results_of(found: Analysis, question: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """Return the findings as plain values (no path, so that kept ones are the same on every
    machine)."""

    def curve(o: Any) -> dict[str, Any]:
        e = o.best_lr
        return {
            **{k: plain(v) for k, v in o.curve.key.items()},
            "n": e.n,
            "best_lr": e.value,
            "low": e.low,
            "high": e.high,
            "best_nll": o.best_nll,
            "flags": list(o.flags),
            "band": o.band(WITHIN),
        }

    figures = [[s.figure, s.caption or s.title] for s in found.sections if s.panels]
    return {
        "sweep": question["name"],
        "scale": question["scale"],
        "claims_hash": question_hash(question),
        "runs": len(table),
        "held_out": held_out(table),
        "figures": figures or ([["lr_nll.png", "LR against NLL"]] if found.optima else []),
        "curves": [curve(o) for o in found.optima],
        **found.measures,
        "verdicts": [v.plain() for v in found.verdicts],
    }
