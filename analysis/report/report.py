"""Turn a table of runs and a question into a report: text, figures, machine-readable results.

Questions contribute sections; this module knows no particular claim.
"""

import hashlib
import importlib.resources
import itertools
import json
import math
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import Verdict
from analysis.inference.estimate import Estimate, number, rate, with_interval
from analysis.measures import laws
from analysis.measures.places import places_of
from analysis.measures.ratio import ratio_of
from analysis.optimum.fit import WITHIN, Optimum
from analysis.questions.base import NO_CELL, Analysis, by_group, level_of
from analysis.questions.registry import analyse
from analysis.report.sentences import cautions_of, lines_of, sentences_of, worded
from analysis.report.text import aligned, check_installed, missing, plain, rendered, text_hash
from analysis.runs.curves import by_run, full_names, in_words, learning_curves, runs_of
from analysis.runs.table import NLL, as_losses, own, whole, write

NOT_JUDGED = (
    *("text", "source", "measure", "note", "planning", "underpowered", "better"),
    *("exploratory", "not_withdrawn", "cost", "if_supported", "if_refuted", "if_open"),
)
"""Fields of a claim that are left out of its hash: wording, planned power, and marks."""
NEEDED = ("matplotlib", "jinja2", "plotly")
"""Packages that a report's pages and figures are made with."""
PLACE = "model and data"  # head of the column of groups
CONDITIONS = {
    "batch_size": "sequences per update",
    "steps": "updates",
    "schedule": "schedule",
    "precision": "precision",
    "alpha": "LoRA alpha",
    "layers": "LoRA layer sets",
    "hidden_size": "hidden size",
    "seed": "seeds",
    "packages": "from packages",
}
"""Columns of which a report lists the values -> their names in the report."""


def judge_and_report(
    table: pd.DataFrame,
    question: dict[str, Any],
    folder: Path | None,
    as_json: bool = False,
    kept: Path | None = None,
) -> str:
    """Judge the runs, write the report into `folder`, and return the answer for the terminal.

    Writes report.md, report.html, figures, results.json, question.json and table.parquet, which
    replace earlier ones once all can be written. Without a package of NEEDED, the pages and figures
    are left out, and the answer says so.

    Args:
        folder: None: write nothing.
        as_json: return one JSON object instead of text.
        kept: folder of kept results, which some questions show together with their own.
    """
    found = analyse(table, question, kept)
    results, left_out = results_of(found, question, table), ""
    answer = sentences_of(found, question, results)
    said = [*lines_of(answer, question), *results.get("cautions", ())]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as made:
            new = Path(made)
            (new / "question.json").write_text(json.dumps(question, indent=1) + "\n")
            write(table, new / "table.parquet")
            if left_out := write_answer(found, table, question, new):
                for page in ("report.md", "report.html"):  # they may be of earlier runs
                    (folder / page).unlink(missing_ok=True)
            else:
                title = f"{question['name']} at scale {question['scale']}: {question['question']}"
                shown = (found.optima, found.ratios, found.verdicts, WITHIN)
                write_html(new / "report.html", title, as_losses(table), *shown, said, question)
            for file in [*new.iterdir()]:
                file.replace(folder / file.name)
    if as_json:
        report = None if folder is None or left_out else str(folder / "report.md")
        left = [left_out] if left_out else []
        return json.dumps({"answer": answer, **results, "report": report, "left_out": left})
    out = [*said, "", f"Question: {question['question']}", ""]
    if found.optima:
        place, rows = apart(optima_rows(found.optima))
        out += [*map(in_words, place), *aligned(rows), ""]
    for section in found.sections:
        if section.rows:
            out += [section.title, *aligned(section.rows), ""]
    if question.get("withdrawn"):
        out += [f"WITHDRAWN: {question['withdrawn']}", ""]
    place, (_, *rows) = apart(verdict_rows(found.verdicts, question))
    out += [line for line in map(in_words, place) if line not in out]
    for claim, *at, verdict, measured, expected, margin, why, needed in rows:
        begin = f"{verdict.strip('*')}: {' on '.join([claim, *at])}: {measured}"
        more = f". Needed: {needed}" if needed != "-" else ""
        out.append(f"{begin}, expected {expected}, agreement {margin}: {why}{more}")
    if left_out:
        out += ["", f"left out: {left_out}", f"report: {folder / 'results.json'}"]
    elif folder is not None:
        figure = [f"figure: {folder / 'lr_nll.png'}"] if found.optima else []
        pages = f"report: {folder / 'report.html'} (interactive), {folder / 'report.md'}"
        out += ["", *said[:1], *figure, pages]
    return "\n".join(out)


def write_answer(
    found: Analysis, table: pd.DataFrame, question: dict[str, Any], folder: Path
) -> str:
    """Write results.json, report.md and the figures; return why pages are left out, or nothing."""
    text = json.dumps(results_of(found, question, table), indent=1) + "\n"
    (folder / "results.json").write_text(text)
    if why := missing("the report", *NEEDED):
        return why
    (folder / "report.md").write_text(render(found, question, table))
    from analysis.report import plots

    inputs = inputs_hash(table, text)
    for section in found.sections:
        if section.panels:
            plots.panels(section.panels, folder / section.figure, inputs)
    if found.optima:
        losses = as_losses(table)
        plots.lr_against_nll(found.optima, folder / "lr_nll.png", inputs)
        if by_run(losses):
            plots.learning(losses, found.optima, folder / "learning.png", inputs)
    return ""


def results_of(found: Analysis, question: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """Return an analysis as plain values, without paths: the same on every machine."""
    figures = [[s.figure, s.caption or s.title] for s in found.sections if s.panels]
    at = places_of(found.optima, table)
    return {
        "sweep": question["name"],
        "scale": question["scale"],
        "claims_hash": question_hash(question),
        "runs": len(table),
        "held_out": _held_out(table),
        "figures": figures or ([["lr_nll.png", "LR against NLL"]] if found.optima else []),
        "curves": [
            {
                **{k: plain(v) for k, v in o.curve.key.items()},
                "n": o.best_lr.n,
                "best_lr": o.best_lr.value,
                "low": o.best_lr.low,
                "high": o.best_lr.high,
                "best_nll": o.best_nll,
                "flags": list(o.flags),
                "band": o.band(WITHIN),
                "where": at[id(o)].plain(),
            }
            for o in found.optima
        ],
        "rows": [r.measurement() for r in found.rows],
        **found.search,
        **({"cautions": cautions} if (cautions := cautions_of(found, table)) else {}),
        "verdicts": [v.plain() for v in found.verdicts],
    }


def answer_lines(found: Analysis, question: dict[str, Any], table: pd.DataFrame) -> list[str]:
    """Return the answer as sentences, the first lines of every text."""
    results = results_of(found, question, table)
    answer = sentences_of(found, question, results)
    return [*lines_of(answer, question), *results.get("cautions", ())]


def inputs_hash(table: pd.DataFrame, results: str) -> str:
    """Hash the inputs of a report's figures: the table of runs, and results.json."""
    return text_hash(table.to_csv(index=False) + results)


def question_hash(question: dict[str, Any]) -> str:
    """Hash the claims and their margins, as proof that they were not changed after the runs."""
    rounds = int(question.get("rounds", 1))
    claims: Any = {}
    for name, claim in question["claims"].items():
        judged = {k: v for k, v in claim.items() if k not in NOT_JUDGED}
        # hashes that are kept have older names for two of the keys
        if "alternatives" in judged:
            judged["rivals"] = judged.pop("alternatives")
        if models := judged.pop("except_models", None):
            judged["not_on"] = models
        claims[name] = judged
    asked = claims if rounds == 1 else {"claims": claims, "rounds": rounds}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- report.md


def render(found: Analysis, question: dict[str, Any], table: pd.DataFrame) -> str:
    """Return the text of report.md."""
    exploratory: dict[str, dict[str, None]] = {}
    for v in found.verdicts:
        if v.exploratory:
            exploratory.setdefault(v.exploratory, {})[v.claim] = None
    pooled = [o for o in found.optima if o.pooled is not None]
    noise = {o.curve.shown: o.pooled for o in reversed(pooled)}  # of each metric's first curve
    text = rendered(
        "report.md",
        question={"source": "", "withdrawn": "", "rounds": 1, **question},
        answer=answer_lines(found, question, table),
        exploratory=exploratory,
        verdicts=apart(verdict_rows(found.verdicts, question)),
        has_primary=any(v.primary for v in found.verdicts),
        added=added_after(question),
        level=f"{100 * level_of(question):.3g}%",
        sections=found.sections,
        optima=apart(optima_rows(found.optima)) if found.optima else None,
        law=apart(rows) if (rows := law_rows(found.optima, table)) else None,
        metrics=" or ".join(dict.fromkeys(o.curve.shown.name for o in found.optima)),
        noise=noise,
        has_curves=bool(found.optima) and bool(by_run(table)),
        conditions=_conditions(found.optima, table),
        runs=len(table),
        claims_hash=question_hash(question),
        command=command_of(question),
    )
    return in_words(text)


def _conditions(optima: Sequence[Optimum], table: pd.DataFrame) -> list[str]:
    """List the conditions under which the numbers hold."""
    out = [
        f"{label}: {', '.join(sorted(str(v) for v in table[column].dropna().unique()))}"
        for column, label in CONDITIONS.items()
        if column in table
    ]
    out.append(
        "LoRA's initialisation, unless stated otherwise: A uniform in +-1/sqrt(d_in), B zero; "
        "one learning rate for both; AdamW"
    )
    where = "{model} on {dataset}"
    tasks = {(where.format(**o.curve.key), o.curve.shown): o.curve for o in optima}
    for (task, metric), c in tasks.items():
        start, floor = number(metric.sign * c.nll_start, 5), number(c.floor, 5)
        of_task = f", floor of the task {floor}" if metric.sign > 0 else ""
        out.append(f"{task}: {metric.name} before training {start}{of_task}")
    if rows := _held_out(table):
        out.append(f"held-out rows: {rows}")
    if "base_sha256" in table:
        bases = table[["model", "base_sha256"]].dropna().drop_duplicates().values
        out.append(f"base weights, sha256: {', '.join(f'{m} {sha[:12]}' for m, sha in bases)}")
    if "data_sha256" in table:
        seen = table[["model", "dataset", "data_sha256"]].dropna().drop_duplicates().values
        if len(seen):
            out.append("data, sha256: " + ", ".join(f"{d} for {m} {s[:12]}" for m, d, s in seen))
    return out


def added_after(question: dict[str, Any]) -> list[str]:
    """Return a line for each arm to which runs were added after a look: which runs, and why."""
    return [f"arm {a['arm']}: {a['what']}; {a['why']}" for a in question.get("added_after", ())]


def command_of(question: dict[str, Any]) -> str:
    """Return the command that asks a question, with the options that changed its runs."""
    words = [f"+sweep={question['name']}", f"scale={question['scale']}"]
    return shlex.join(["python", "-m", "lorasweep", *words, *question.get("changes", [])])


def verdict_rows(verdicts: Sequence[Verdict], question: dict[str, Any]) -> list[list[str]]:
    """Return one row per verdict, after the head."""
    level, claims = f"{100 * level_of(question):.3g}%", worded(question)
    head = ["claim", PLACE, "verdict", f"measured [{level}]", "expected"]
    return [
        [*head, "margin", "why", "needed"],
        *(
            [
                f"{claims[v.claim]['text']} ({v.claim}{', primary' if v.primary else ''})",
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


def apart(rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return what a table's rows share of model, data, batch and updates, and the other cells."""
    head, *cells = map(list, rows)
    k = head.index(PLACE)
    parts = [re.split(r", (?![^(]*\))", row[k]) for row in cells]  # not inside brackets
    known = [mine for mine in parts if mine != [NO_CELL]] or [[]]
    shared = [p for p in known[0] if all(p in mine for mine in known)]
    rest = [", ".join(p for p in mine if p not in shared) for mine in parts]
    column = [[PLACE], *([r or "-"] for r in rest)] if any(rest) else itertools.repeat([])
    left = [row[:k] + of + row[k + 1 :] for row, of in zip((head, *cells), column)]
    return [f"All rows: {', '.join(shared)}."] if shared else [], left


def optima_rows(optima: Sequence[Optimum]) -> list[list[str]]:
    """Return one row per curve, after the head: the optimum, the low-regret band, the best loss."""
    metrics = list(dict.fromkeys(o.curve.shown for o in optima)) or [NLL]
    unit = metrics[0].unit if len(metrics) == 1 else ""
    best = " or ".join(m.name for m in metrics)
    head = ["curve", PLACE, "best LR [95%]", f"within {WITHIN:g}{unit}", f"best {best}"]
    return [
        [*head, "runs", "not fitted", "flags"],
        *(
            [
                name,
                o.curve.group,
                with_interval(o.best_lr, rate),
                " to ".join(map(rate, o.band(WITHIN) or ())) or "-",
                number(None if o.best_nll is None else o.curve.shown.sign * o.best_nll, 5),
                str(len(o.curve.x)),
                str(int((~o.curve.usable).sum())),
                ", ".join(o.flags) or "-",
            ]
            for o, name in zip(optima, full_names([o.curve for o in optima]))
        ),
    ]


def law_rows(optima: Sequence[Optimum], table: pd.DataFrame) -> list[list[str]]:
    """Return ratios of best LRs beside the law's, after the head; empty if it covers none."""
    hidden = dict(zip(table["model"], table["hidden_size"])) if "hidden_size" in table else {}
    groups, found = by_group(optima), []
    for o, name in zip(optima, full_names([o.curve for o in optima])):
        key, at = o.curve.key, o.curve.key.get("schedule")
        of = [v for v in groups[o.curve.group] if v.curve.is_full]
        of = [v for v in of if v.curve.key.get("schedule") == at]
        full = of[0] if len(of) == 1 else None
        width, steps, best = hidden.get(key["model"]), key.get("steps"), full and full.best_lr.value
        if key["method"] == "lora" and best and o.best_lr.value and width and steps:
            by_law = float(laws.ratio(width, laws.alpha_of(key), steps, best))
            z = laws.movement(width, by_law * best, steps)
            known = z >= laws.AT_REST or key["rank"] == laws.REST_RANK
            if full and known and not laws.outside(key) and not laws.outside(full.curve.key):
                cells = [name, o.curve.group, with_interval(ratio_of([o], full))]
                found.append([*cells, number(by_law), number(z, 2)])
    head = ["curve", PLACE, "best LR / full fine-tuning's [95%]", "the law", "z"]
    return [head, *found] if found else []


def _held_out(table: pd.DataFrame) -> str:
    """Say how many held-out rows the last evaluation and the earlier ones use; empty if unknown."""
    if not {"spec", "result"} <= set(table.columns):
        return ""
    pairs = set()
    for spec, result in zip(table["spec"], table["result"]):
        dataset, n_test = json.loads(spec)["dataset"], json.loads(result).get("n_test")
        if dataset["location"] != "facts" and n_test:  # facts are evaluated on training rows
            pairs.add((n_test, min(dataset["n_test_curve"], n_test)))
    if not pairs:
        return ""
    last, before = (" or ".join(f"{n:,}" for n in sorted(set(ns))) for ns in zip(*pairs))
    return f"{last} at the end, {before} for learning curves"


# ---------------------------------------------------------------- report.html


def write_html(
    path: Path,
    title: str,
    table: pd.DataFrame,
    optima: Sequence[Optimum],
    ratios: Sequence[tuple[str, str, Estimate]] = (),
    verdicts: Sequence[Verdict] = (),
    within: float = WITHIN,
    answer: Sequence[str] = (),
    question: dict[str, Any] | None = None,
) -> None:
    """Write the interactive report: one HTML file with its data and its plotting library inside.

    `templates/report.js` draws and filters the numbers with plotly. Text from a table is shown as
    text, never as markup.

    Args:
        table: runs to which the optima were fitted, one per row, with the metric as a loss.
        ratios: (group, name, LoRA / FullFT) for the forest plot.
        within: extra loss allowed in the low-regret band.
        answer: sentences at the top of the page.
        question: the question of the verdicts.

    Raises:
        TableError: plotly or jinja2 is not installed, or `path` is a file of the user's.
    """
    check_installed("the interactive page", "plotly", "jinja2")
    learned = learning_curves(table).query("step >= 1").dropna(subset="test_nll")
    points = {
        run: list(zip(c["step"].tolist(), c["test_nll"].tolist()))
        for run, c in learned.groupby("run")
    }
    where: dict[Any, int] = {}
    curves, used = [], []
    for k, o in enumerate(optima):
        where |= dict.fromkeys(runs_of(table, o.curve).index, k)
        used.append({round(float(v), 9) for v in o.curve.x[o.curve.usable]})
        key, e, sign, x = o.curve.key, o.best_lr, o.curve.shown.sign, o.curve.unbroken
        fit: dict[str, list[float]] | None = None
        if o.shape is not None and len(x):
            lr = np.exp(np.linspace(x.min(), x.max(), 80))
            nll = [float(f"{sign * v:.6g}") for v in o.predict(lr)]
            fit = {"lr": [float(f"{v:.5g}") for v in lr], "nll": nll}
        best = o.best_nll
        curves.append(
            {
                **{"name": o.curve.name, "group": o.curve.group, "metric": o.curve.shown.label},
                **{"sign": sign, "model": str(key["model"]), "rank": plain(key.get("rank"))},
                **{"method": str(key["method"]), "batch_size": plain(key.get("batch_size"))},
                **{"best_lr": e.value, "low": e.low, "high": e.high},
                "best_nll": None if best is None or not math.isfinite(best) else sign * best,
                **{"flags": list(o.flags), "band": o.band(within), "fit": fit},
            }
        )
    runs = []
    for run, row in zip(table.index, table.to_dict("records")):
        curve = where.get(run)
        sign = 1 if curve is None else optima[curve].curve.shown.sign
        nll, is_used = plain(row.get("test_nll")), False
        if curve is not None and row["status"] == "done":
            is_used = round(math.log(row["lr"]), 9) in used[curve]
        details = {k: plain(v) for k, v in row.items() if k not in ("spec", "result", "block")}
        runs.append(
            {
                "curve": curve,
                "lr": float(row["lr"]),
                "seed": plain(row.get("seed")),
                "status": str(row["status"]),
                "nll": None if nll is None else sign * nll,
                "fitted": is_used,
                "learned": [[step, sign * value] for step, value in points.get(run, ())],
                "details": {k: v for k, v in details.items() if v is not None},
            }
        )
    data = {
        **{"title": title, "within": within, "curves": curves, "runs": runs},
        "ratios": [
            {"group": g, "name": n, "value": e.value, "low": e.low, "high": e.high}
            for g, n, e in ratios
        ],
        "verdicts": [
            {
                **{k: getattr(v, k) for k in ("claim", "group", "why", "needed")},
                **{k: worded(question)[v.claim].get(k) for k in ("text", "estimand")},
                "outcome": v.shown,
                **{k: getattr(v.estimate, k) for k in ("value", "low", "high")},
                "margin": list(v.margin),
            }
            for v in verdicts
        ],
    }
    files = importlib.resources.files
    library = files("plotly").joinpath("package_data/plotly.min.js").read_text()
    style, code = (
        files("analysis.report").joinpath("templates", name).read_text()
        for name in ("report.css", "report.js")
    )
    page = rendered(
        "report.html", answer=answer, data=data, style=style, code=code, library=library
    )
    with whole(path) as part:
        part.write_bytes(own(path, page))
