"""Render report.md: verdicts, the question's sections, optima, and conditions."""

import json
import shlex
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.inference.decide import look_level
from analysis.inference.estimate import (
    EXPLORATORY,
    WITHDRAWN,
    Verdict,
    number,
    rate,
    with_interval,
)
from analysis.optimum.optimum import WITHIN, Optimum
from analysis.questions.base import Analysis, Section
from analysis.report.text import markdown as table_of
from analysis.runs.lr_curves import LrCurve, full_names
from analysis.runs.metric import NLL
from analysis.runs.names import in_words

PRIMARY = "Primary claims are corrected for multiplicity within this report (Holm)."
CONDITIONS = {
    "batch_size": "sequences per update",
    "steps": "updates",
    "schedule": "schedule",
    "precision": "precision",
    "alpha": "LoRA alpha",
    "layers": "LoRA layer sets",
    "hidden_size": "hidden size",
    "seed": "seeds",
}
"""Columns of a table whose values a report lists."""


def markdown(
    found: Analysis,
    question: dict[str, Any],
    table: pd.DataFrame,
    claims_hash: str,
    has_curves: bool,
) -> str:
    """Render the report.

    Args:
        claims_hash: hash of the claims and margins.
        has_curves: whether there is a figure learning.png.
    """
    name, scale = question["name"], question["scale"]
    out = [f"# {name} at scale {scale}", "", f"**{question['question']}**", ""]
    if question["source"]:
        out += [f"Source of the claim: {question['source']}.", ""]
    out += ["## Verdicts", "", *_notes(found.verdicts, question)]
    out += [*table_of(verdict_rows(found.verdicts, question)), ""]
    if any(v.primary for v in found.verdicts):
        out += [PRIMARY, ""]
    if added := added_after(question):
        looks = f"{question['rounds']} looks, {_level(question)}"
        out += [f"Runs were added after a look, so intervals are those of {looks}:", ""]
        out += [*(f"- {line}" for line in added), ""]
    for section in found.sections:
        out += _section(section)
    if found.optima:
        out += ["## Optima", "", *table_of(optima_rows(found.optima)), ""]
        metrics = " or ".join(dict.fromkeys(o.curve.shown.name for o in found.optima))
        out += [f"![LR against {metrics}](lr_nll.png)", "", *_noise(found.optima)]
    if has_curves:
        out += ["## Learning curves", "", "![learning curves](learning.png)", ""]
    out += _conditions([o.curve for o in found.optima], table)
    out += [
        f"- runs: {len(table)} in table.parquet",
        f"- hash of claims and margins: {claims_hash}",
        f"- conclusions hold for scale {scale} only",
        "",
        f"Command: `{command_of(question)}`",
    ]
    return in_words("\n".join(out) + "\n")


def added_after(question: dict[str, Any]) -> list[str]:
    """Return one line for each arm to which runs were added after a look: what, and why."""
    return [f"arm {a['arm']}: {a['what']}; {a['why']}" for a in question.get("added_after", ())]


def _level(question: dict[str, Any]) -> str:
    """Return the level of a question's intervals, in percent."""
    return f"{100 * look_level(int(question.get('rounds', 1))):.3g}%"


def _notes(verdicts: Sequence[Verdict], question: dict[str, Any]) -> list[str]:
    """Say why the answer is withdrawn, and why verdicts are exploratory."""
    out = []
    if question.get("withdrawn"):
        out += [f"**{WITHDRAWN}**: {question['withdrawn']}.", ""]
    of_why: dict[str, list[str]] = {}
    for v in verdicts:
        if v.exploratory and v.claim not in of_why.setdefault(v.exploratory, []):
            of_why[v.exploratory].append(v.claim)
    for why, claims in of_why.items():
        out += [f"**{EXPLORATORY.capitalize()}** ({', '.join(claims)}): {why}.", ""]
    return out


def command_of(question: dict[str, Any]) -> str:
    """Return the command that asks a question, with the options that changed its runs."""
    words = [f"+sweep={question['name']}", f"scale={question['scale']}"]
    return shlex.join(["python", "-m", "lorasweep", *words, *question.get("changes", [])])


def verdict_rows(verdicts: Sequence[Verdict], question: dict[str, Any]) -> list[list[str]]:
    """Return one row per verdict, after the head."""
    level = _level(question)
    head = ["claim", "model and data", "verdict", f"measured [{level}]", "expected", "margin"]
    return [
        [*head, "why", "needed"],
        *(
            [
                v.claim + (" (primary)" if v.primary else ""),
                v.group,
                f"**{v.shown}**",
                with_interval(v.estimate),
                f"{v.expected:g}",
                f"[{v.margin[0]:g}, {v.margin[1]:g}]",
                "see above" if v.is_withdrawn else v.why,
                v.needed or "-",
            ]
            for v in verdicts
        ),
    ]


def optima_rows(optima: Sequence[Optimum]) -> list[list[str]]:
    """Return one row per curve, after the head: the optimum, the low-regret band, the best loss."""
    metrics = list(dict.fromkeys(o.curve.shown for o in optima)) or [NLL]
    unit = metrics[0].unit if len(metrics) == 1 else ""
    best = " or ".join(m.name for m in metrics)
    head = ["curve", "model and data", "best LR [95%]", f"within {WITHIN:g}{unit}", f"best {best}"]
    names = full_names([o.curve for o in optima])
    return [
        [*head, "runs", "not fitted", "flags"],
        *(
            [
                name,
                o.curve.group,
                with_interval(o.best_lr, rate),
                band_text(o.band(WITHIN)),
                number(as_shown(o, o.best_nll), 5),
                str(len(o.curve.x)),
                str(int((~o.curve.usable).sum())),
                ", ".join(o.flags) or "-",
            ]
            for o, name in zip(optima, names)
        ),
    ]


def as_shown(o: Optimum, loss: float | None) -> float | None:
    """Return a loss of a curve as the metric that it was made of."""
    return None if loss is None else o.curve.shown.sign * loss


def band_text(band: Sequence[float] | None) -> str:
    """Format a band of learning rates."""
    return "-" if not band else f"{rate(band[0])} to {rate(band[1])}"


def _section(section: Section) -> list[str]:
    out = [f"## {section.title}", ""]
    out += [*table_of(section.rows), ""] if section.rows else []
    out += [*section.text, ""] if section.text else []
    if section.panels:
        out += [f"![{section.caption or section.title}]({section.figure})", ""]
    return out


def _noise(optima: Sequence[Optimum]) -> list[str]:
    """Describe the noise of the first curve of each metric, and where runs without a fit lie."""
    out = []
    for metric, o in {o.curve.shown: o for o in reversed(optima) if o.pooled is not None}.items():
        what, side = (metric.unit, "top") if metric.sign > 0 else (f" of {metric.name}", "bottom")
        broke = "they diverged, " if metric.sign > 0 else "they collapsed, "
        noise = (
            f"Noise of one run, pooled over the sweep: {o.pooled.noise:.2g}{what} at the optimum, "
            f"{o.pooled.df} degrees of freedom. Model error of the curvature: "
            f"{100 * o.pooled.misfit:.0f}%. "
        )
        out += [
            f"{noise if o.pooled.df else ''}Crosses at the {side} are runs that were not fitted: "
            f"{broke}ended no better than the untrained model, or lie beyond such a rate. A line "
            "ends before the first rate with one of them; runs left there are hollow.",
            "",
        ]
    return out


def _conditions(curves: Sequence[LrCurve], table: pd.DataFrame) -> list[str]:
    """List the conditions under which the numbers hold."""
    out = ["## Conditions", ""]
    for column, label in CONDITIONS.items():
        if column in table:
            values = sorted(str(v) for v in table[column].dropna().unique())
            out.append(f"- {label}: {', '.join(values)}")
    out.append(
        "- LoRA's initialisation, unless stated otherwise: A uniform in +-1/sqrt(d_in), B zero; "
        "one learning rate for both; AdamW"
    )
    for (where, metric), c in {(_place(c), c.shown): c for c in curves}.items():
        start, floor = number(metric.sign * c.nll_start, 5), number(c.floor, 5)
        of_task = f", floor of the task {floor}" if metric.sign > 0 else ""
        out.append(f"- {where}: {metric.name} before training {start}{of_task}")
    rows = held_out(table)
    if rows:
        out.append(f"- held-out rows: {rows}")
    if "base_sha256" in table:
        bases = table[["model", "base_sha256"]].dropna().drop_duplicates().values
        out.append(f"- base weights, sha256: {', '.join(f'{m} {sha[:12]}' for m, sha in bases)}")
    if "data_sha256" in table:
        seen = table[["model", "dataset", "data_sha256"]].drop_duplicates().values
        shown = [
            f"{d} for {m} {sha[:12] if sha == sha and sha else 'unknown'}" for m, d, sha in seen
        ]
        out.append(f"- data, sha256: {', '.join(shown)}")
    return out


def _place(c: LrCurve) -> str:
    return f"{c.key['model']} on {c.key['dataset']}"


def held_out(table: pd.DataFrame) -> str:
    """Describe how many held-out rows the last evaluation and the earlier ones use.

    They are the same rows in all runs. Empty if unknown.
    """
    if not {"spec", "result"} <= set(table.columns):
        return ""
    pairs = set()
    for spec, result in zip(table["spec"], table["result"]):
        dataset, n_test = json.loads(spec)["dataset"], json.loads(result).get("n_test")
        if dataset["location"] != "facts" and n_test:  # facts are evaluated on the trained ones
            pairs.add((n_test, min(dataset["n_test_curve"], n_test)))
    if not pairs:
        return ""
    last, before = (" or ".join(f"{n:,}" for n in sorted(set(ns))) for ns in zip(*pairs))
    return f"{last} at the end, {before} for learning curves"
