"""Turn a table and a question into a report with figures and machine-readable results.

One call writes everything from the same analysis. A question contributes sections; this module
knows no particular claim.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.estimate import Verdict, with_interval
from analysis.optimum.optimum import WITHIN, Optimum
from analysis.questions.base import Analysis
from analysis.questions.registry import analyse
from analysis.report import plots, plots_curves, report_page
from analysis.report.interactive import page
from analysis.report.text import aligned, plain, text_hash
from analysis.runs.learning_curves import by_run
from analysis.runs.metric import as_losses
from analysis.runs.table import write as write_table

NOT_JUDGED = (
    *("says", "whose", "measure", "beside", "sd", "units", "underpowered", "better"),
    *("exploratory", "stands"),
)
"""Fields of a claim that hold its wording, or what is known of its spread. They may change without
changing the claim, so they are left out of its hash."""


def judge_and_report(
    table: pd.DataFrame,
    question: dict[str, Any],
    folder: Path,
    as_json: bool = False,
    kept: Path | None = None,
) -> str:
    """Judge the runs, write the report into `folder`, and return the answer for the terminal.

    Writes report.md, report.html, figures, results.json, question.json and table.parquet.

    Args:
        as_json: return one JSON object instead of text.
        kept: folder of kept results, which some questions show together with their own.
    """
    found = analyse(table, question, kept)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "question.json").write_text(json.dumps(question, indent=1) + "\n")
    write_table(table, folder / "table.parquet")
    results = write_answer(found, table, question, folder)
    title = f"{question['name']} at scale {question['scale']}: {question['question']}"
    page.write(
        folder / "report.html",
        title,
        as_losses(table),
        found.optima,
        found.ratios,
        found.verdicts,
        WITHIN,
    )
    if as_json:
        return json.dumps({**results, "report": str(folder / "report.md")})
    return terminal(found, question, folder)


def write_answer(
    found: Analysis, table: pd.DataFrame, question: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Write results.json, report.md and the figures; returns the results."""
    results = results_of(found, question, table)
    text = json.dumps(results, indent=1) + "\n"
    (folder / "results.json").write_text(text)
    draw(found, as_losses(table), folder, inputs_hash(table, text))
    (folder / "report.md").write_text(render(found, question, table))
    return results


def draw(found: Analysis, table: pd.DataFrame, folder: Path, inputs: str) -> None:
    """Draw all figures of a report, each with the hash of its inputs.

    Args:
        table: the runs, their metrics as losses.
    """
    for section in found.sections:
        if section.panels:
            plots.panels(section.panels, folder / section.figure, inputs)
    if found.optima:
        plots_curves.lr_against_nll(found.optima, folder / "lr_nll.png", inputs)
        if by_run(table):
            plots_curves.learning(table, found.optima, folder / "learning.png", inputs)


def render(found: Analysis, question: dict[str, Any], table: pd.DataFrame) -> str:
    """Return the text of report.md."""
    has_curves = bool(found.optima) and bool(by_run(table))
    return report_page.markdown(found, question, table, question_hash(question), has_curves)


def inputs_hash(table: pd.DataFrame, results: str) -> str:
    """Hash what a report's figures are drawn from: the runs with their curves, and results.json."""
    return text_hash(table.to_csv(index=False) + results)


def question_hash(question: dict[str, Any]) -> str:
    """Hash the claims and their margins, as proof that they were not changed after the runs."""
    rounds = int(question.get("rounds", 1))
    claims: Any = {
        name: {k: v for k, v in claim.items() if k not in NOT_JUDGED and (k != "not_on" or v)}
        for name, claim in question["claims"].items()
    }
    asked = claims if rounds == 1 else {"claims": claims, "rounds": rounds}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def terminal(found: Analysis, question: dict[str, Any], folder: Path) -> str:
    """Format the answer for the terminal."""
    out = [question["question"], ""]
    if found.optima:
        out += [*aligned(report_page.optima_rows(found.optima)), ""]
    for section in found.sections:
        if section.rows:
            out += [section.title, *aligned(section.rows), ""]
    out += [_verdict_line(v) for v in found.verdicts]
    return "\n".join(
        [*out, "", f"report: {folder / 'report.html'} (interactive), {folder / 'report.md'}"]
    )


def _verdict_line(v: Verdict) -> str:
    measured, (low, high) = with_interval(v.estimate), v.margin
    primary = " (primary)" if v.primary else ""
    line = (
        f"{v.shown}: {v.claim} ({v.group}) {measured}, expected {v.expected:g} within "
        f"[{low:g}, {high:g}]{primary}: {v.why}"
    )
    return line + (f". Needed: {v.needed}" if v.needed else "")


def results_of(found: Analysis, question: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """Return an analysis as plain values.

    They contain no paths, so that kept results are the same on every machine.
    """
    figures = [[s.figure, s.caption or s.title] for s in found.sections if s.panels]
    return {
        "sweep": question["name"],
        "scale": question["scale"],
        "claims_hash": question_hash(question),
        "runs": len(table),
        "held_out": report_page.held_out(table),
        "figures": figures or ([["lr_nll.png", "LR against NLL"]] if found.optima else []),
        "curves": [_curve(o) for o in found.optima],
        **found.measures,
        "verdicts": [v.plain() for v in found.verdicts],
    }


def _curve(o: Optimum) -> dict[str, Any]:
    return {
        **{k: plain(v) for k, v in o.curve.key.items()},
        "n": o.best_lr.n,
        "best_lr": o.best_lr.value,
        "low": o.best_lr.low,
        "high": o.best_lr.high,
        "best_nll": o.best_nll,
        "flags": list(o.flags),
        "band": o.band(WITHIN),
    }
