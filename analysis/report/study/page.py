"""Write the pages over all answers: one of a screen, and beside it the details.

`python -m analysis study --write` renders all kept answers and pages again from the kept tables.
The texts are in `analysis/report/templates/study/`; no measured number is typed by hand.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.inference.estimate import (
    BETTER,
    EXPLORATORY,
    WITHDRAWN,
    Verdict,
    number,
    rate,
    row_interval,
    signed,
    with_interval,
)
from analysis.measures.regret import COUNTS
from analysis.questions.lr_ratio import ONE, TEN
from analysis.questions.registry import analyse, question_named, read_question
from analysis.report import plots, plots_study
from analysis.report.report import added_after, band_text, command_of, write_answer
from analysis.report.study import figures, findings
from analysis.report.study.answers import (
    Answer,
    Pooled,
    called,
    estimate_of,
    listed,
    pooled,
    read_answers,
    within,
)
from analysis.report.study.ledger import ledger
from analysis.report.text import Rows, rendered, text_hash, with_block
from analysis.runs.lr_curves import in_words
from analysis.runs.table import read as read_table

MAP, FOREST, RATES, SPEED = "map.png", "forest.png", "rates.png", "speed.png"
FIGURES = (MAP, FOREST, RATES, SPEED)
QUESTIONS = "questions"
"""Folder of the pages of the questions."""
LAW = "rate_law"
"""The question whose figure replaces RATES on the page once it has runs."""
MOST = 12
"""Largest number of rows of the figure of claims."""
ALPHA = "alpha (output times alpha / rank)"
MIXED = "mixed"
"""Outcome of a claim whose verdicts differ between its data sets or bases."""
BASES = Path(__file__).with_name("bases.yaml")
"""Base model -> what it is, in words."""
RATES_HEAD = (
    "base, data, batch, updates|method|best learning rate|regret under 0.01 nats|best NLL|"
    "ratio to full fine-tuning|regret at 10 times full fine-tuning's (nats)|"
    "regret at full fine-tuning's (nats)"
)


def write(answers: Sequence[Answer], path: Path, kept: bool = False) -> None:
    """Write the page and, beside it, its figures and the pages of details; see `pages`."""
    folder, inputs = path.parent, inputs_hash(answers)
    (folder / QUESTIONS).mkdir(parents=True, exist_ok=True)
    before = (folder / QUESTIONS).glob("*.md")
    mine = [old for old in before if "](../ledger.md" in old.read_text(errors="replace")]
    for old in [*(folder / f for f in FIGURES), *mine]:
        old.unlink(missing_ok=True)
    if lines := figures.regret_lines(answers):
        plots_study.regret_map(lines, folder / MAP, inputs)
    if rows := figures.claim_rows(answers):
        plots_study.forest(rows[:MOST], folder / FOREST, inputs)
    if figures.has_rate_curves(answers):
        plots_study.rates(figures.rate_curves(answers), folder / RATES, inputs)
    if figures.speed_answers(answers):
        plots.panels(figures.speed_panels(answers), folder / SPEED, inputs)
    for name, text in pages(answers, path, kept).items():
        (folder / name).write_text(text)


def inputs_hash(answers: Sequence[Answer]) -> str:
    """Hash the inputs of the page's figures: the answers, and which runs they have."""
    texts = [(a.folder / "results.json").read_text() for a in answers]
    return text_hash("".join(texts) + "".join(sorted(i for a in answers for i in a.run_ids)))


def pages(answers: Sequence[Answer], path: Path, kept: bool = False) -> dict[str, str]:
    """Render the page of answers and the pages beside it: name in the page's folder -> text.

    Args:
        path: the page; links are relative to its folder.
        kept: for kept answers, also list changes after a look, and what was not tested.
    """
    by_sweep: dict[str, list[Answer]] = {}
    for a in answers:
        by_sweep.setdefault(a.sweep, []).append(a)
    over_bases, folder = pooled(answers), path.parent
    ranked = findings.main(answers)
    main, rest = ranked[: findings.ON_PAGE], ranked[findings.ON_PAGE :]
    others = [*rest, *findings.others(answers)]
    shown = {
        MAP: bool(figures.regret_lines(answers)),
        FOREST: bool(n_rows := len(figures.claim_rows(answers))),
        RATES: figures.has_rate_curves(answers),
        SPEED: bool(figures.speed_answers(answers)),
    }
    runs = base_runs(answers)
    sizes = sizes_of(runs) / 1e6
    common: dict[str, Any] = {
        "kept": kept,
        "page": path.name,
        "n_claims": len({(a.sweep, v.claim) for a in answers for v in a.single}),
        "n_runs": len(set().union(*(a.run_ids for a in answers))),
        "figures": [name for name, there in shown.items() if there],
    }
    questions = [
        question_of(mine, over_bases, folder / QUESTIONS, [*main, *others])
        for mine in by_sweep.values()
    ]
    texts = {
        path.name: rendered(
            "study/page.md",
            **common,
            findings=main,
            loads=findings.first_pass_loads(answers),
            others=others,
            tally=tally(answers),
            spans=[sizes.min(), sizes.max(), runs["steps"].max()] if len(sizes) else [],
            withdrawn=[one for mine in by_sweep.values() for one in withdrawn_on(mine)],
            law=law_figure(by_sweep.get(LAW, []), folder),
            n_forest=(min(n_rows, MOST), n_rows),
            bases=base_rows(runs, main),
            questions=questions,
        ),
        "ledger.md": rendered("study/ledger.md", **common, ledger=ledger(answers)),
        f"{QUESTIONS}/README.md": rendered("study/questions.md", **common, questions=questions),
    }
    if kept:
        added = [(a.folder.name, line) for a in answers for line in added_after(a.question)]
        texts["changes.md"] = rendered("study/changes.md", added=added)
    tables = {"regime": (bits_rows, load_rows), "lr_ratio": (best_rates,)}
    for q in questions:
        more = [of(answers) for of in tables.get(q["sweep"], ())]
        more += [[]] * (2 - len(more))
        text = rendered("study/question.md", **common, q=q, tables=more)
        texts[f"{QUESTIONS}/{q['sweep']}.md"] = text
    return {name: in_words(text) for name, text in texts.items()}


def question_of(
    answers: Sequence[Answer],
    over_bases: Sequence[Pooled],
    folder: Path,
    found: Sequence[findings.Finding],
) -> dict[str, Any]:
    """Return the parts of a question's page, which is in `folder`."""
    asked, shown = answers[0].question, []
    mine = [f for f in found if answers[0].sweep in (f.sweep, *f.also)]
    for a in answers:
        here = os.path.relpath(a.folder, folder)
        # Early answers get no command, because the sweep file may have changed since.
        command = "" if "fingerprint_stamped" in a.question else f", `{command_of(a.question)}`"
        links = f"[report]({here}/report.md), [table]({here}/table.parquet){command}"
        runs = f"{a.results.get('runs', 0):,} runs, {a.trained}"
        shown.append(f"`{a.results['scale']}`: {runs} ({links})")
    averages = []
    for p in (p for p in over_bases if p.one[0].sweep == answers[0].sweep):
        says, margin = p.one[0].says(p.one[1].claim), within(p.one[1].margin)
        gated = f" ({len(p.left_out)} not to be judged: {', '.join(p.left_out)})"
        value = f"{says}; {with_interval(p.estimate)}, margin {margin}"
        averages.append(
            f"No average over bases{gated}: {says}"
            if p.estimate.value is None
            else f"Average over {', '.join(p.bases)}{gated if p.left_out else ''}: {value}"
        )
    outcomes = Counter(v.shown for a in answers for v in a.single)
    head = ["claim", "scale", "measured", "margin", "verdict", "notes"]
    return {
        "sweep": answers[0].sweep,
        "title": asked["question"],
        "source": f"Source of the claim: {asked['source']}. {asked.get('how', '')}".strip(),
        "withdrawn": withdrawn(answers),
        "found": [f"{f.text} {f.more}".strip() for f in mine],
        "outcomes": ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())),
        "answers": shown,
        "averages": averages,
        "verdicts": [head, *(verdict_row(a, v) for a in answers for v in a.verdicts)],
        "figures": [
            (caption[0].upper() + caption[1:], os.path.relpath(a.folder / name, folder))
            for a in answers
            for name, caption in a.results.get("figures") or []
            if (a.folder / name).is_file()
        ],
    }


def withdrawn(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """Return the scale of each withdrawn answer, and why it is withdrawn."""
    whys = [(a.results["scale"], a.question.get("withdrawn")) for a in answers]
    return [(scale, why) for scale, why in whys if why]


def withdrawn_on(answers: Sequence[Answer]) -> list[dict[str, str]]:
    """Return each withdrawn answer of a question, with its bases and those whose answer stands."""
    on = {a.folder: listed([called(b) for b in a.bases]) for a in answers}
    stands = listed([on[a.folder] for a in answers if not a.question.get("withdrawn")])
    return [
        {
            "sweep": a.sweep,
            "asked": a.question["question"],
            "on": on[a.folder],
            "why": a.question["withdrawn"].partition(", ")[0],
            "stands": stands,
        }
        for a in answers
        if a.question.get("withdrawn")
    ]


def tally(answers: Sequence[Answer]) -> str:
    """Count the claims by outcome, and the exploratory ones among them.

    A claim whose verdicts differ between conditions is counted as mixed. Withdrawn verdicts count
    only for claims that have no other.
    """
    claims: dict[tuple[str, str], list[Verdict]] = {}
    for a in answers:
        for v in a.single:
            claims.setdefault((a.sweep, v.claim), []).append(v)
    counts: dict[str, list[bool]] = {}
    for verdicts in claims.values():
        stand = [v for v in verdicts if not v.is_withdrawn]
        outcomes = {v.outcome.lower() for v in stand} or {WITHDRAWN.lower()}
        outcome = outcomes.pop() if len(outcomes) == 1 else MIXED
        explores = bool(stand) and all(v.exploratory for v in stand)
        counts.setdefault(outcome, []).append(explores)
    order = ("supported", "refuted", "undecided", MIXED, WITHDRAWN.lower())
    return ", ".join(
        f"{len(marks)} {outcome}{f' ({sum(marks)} {EXPLORATORY})' if any(marks) else ''}"
        for outcome in order
        if (marks := counts.get(outcome))
    )


def law_figure(answers: Sequence[Answer], folder: Path) -> str:
    """Return the path of the law's figure if it was judged on measured ratios; else nothing."""
    for a in (a for a in answers if any(v.estimate.value is not None for v in a.single)):
        for name, _ in a.results.get("figures") or []:
            if (a.folder / name).is_file():
                return os.path.relpath(a.folder / name, folder)
    return ""


def readme(text: str, kept: Path) -> str:
    """Return the project's README with its findings rendered again from kept results."""
    found = findings.main(read_answers([kept]))[: findings.ON_PAGE]
    return with_block(text, "answers", [f"{k}. {f.text}" for k, f in enumerate(found, 1)])


# ---------------------------------------------------------------- tables


def base_runs(answers: Sequence[Answer]) -> pd.DataFrame:
    """Return the columns of all runs that the table of base models is made of."""
    kept = ["model", "hidden_size", "method", "n_trainable", "rank", "alpha", "steps"]
    tables = [a.runs[kept] for a in answers if set(kept) <= set(a.runs.columns)]
    return pd.concat(tables) if tables else pd.DataFrame(columns=kept)


def sizes_of(runs: pd.DataFrame) -> pd.Series:
    """Return the number of parameters of each base model that full fine-tuning trained."""
    return runs[runs["method"] == "fullft"].groupby("model")["n_trainable"].max()


def base_rows(runs: pd.DataFrame, main: Sequence[findings.Finding]) -> Rows:
    """Return each base model's size, and the ranks, alphas and updates of its runs.

    The bases that the findings of the page name come first. Ranks and updates are ranges; alphas,
    of which there are few, are listed.
    """
    what = yaml.safe_load(BASES.read_text())
    head = ["base", "hidden size", "parameters", "what it is", "ranks", ALPHA, "updates"]
    sizes, named = sizes_of(runs), set(re.findall(r"[\w-]+", " ".join(f.text for f in main)))

    def place(base: str) -> tuple[bool, int, str]:
        return called(base) not in named, int(sizes.get(base, 0)), base

    rows = [head]
    for base in sorted(runs["model"].unique(), key=place):
        mine = runs[runs["model"] == base]
        lora = mine[mine["method"] == "lora"]
        alphas = ", ".join(f"{v:g}" for v in sorted(lora["alpha"].dropna().unique()))
        spans = [_span(lora["rank"]), alphas, _span(mine["steps"])]
        size = f"{sizes[base] / 1e6:.3g}M" if base in sizes else "-"
        width = f"{mine['hidden_size'].max():g}"
        rows.append([called(base), width, size, what.get(base, "-"), *spans])
    return rows if len(rows) > 1 else []


def _span(values: pd.Series) -> str:
    """Return the lowest and the highest value."""
    known = values.dropna()
    ends = (known.min(), known.max()) if len(known) else ()
    return " to ".join(dict.fromkeys(f"{v:,g}" for v in ends))


def bits_rows(answers: Sequence[Answer]) -> Rows:
    """Return each condition's bits and load at the needed rank, by each way of counting bits."""
    head = ["data set", "updates", "needed rank [95%]"]
    head += [f"{what} by {words}" for what in ("bits", "load") for words in COUNTS.values()]
    rows = [head]
    for c in (c for c in figures.conditions_of(answers) if c.get("bits")):
        bits = [c["bits"].get(count) for count in COUNTS]
        loads = [with_interval(estimate_of(c["loads_needed"][count])) for count in COUNTS]
        rank = with_interval(estimate_of(c["rank_interpolated"]))
        shown = ["-" if b is None else f"{b:,.0f}" for b in bits]
        rows.append([c["cell"], str(c["updates"]), rank, *shown, *loads])
    return rows if len(rows) > 1 else []


def load_rows(answers: Sequence[Answer]) -> Rows:
    """Return each rank's load, by each way of counting bits, and its regret, after the head."""
    head = [f"load by {words}" for words in COUNTS.values()]
    rows = [["data set", "updates", "rank", *head, "regret, % of the gain [95%]"]]
    for c in (c for c in figures.conditions_of(answers) if c.get("bits")):
        for r in c["ranks"]:
            loads = [number(r["loads"].get(count)) for count in COUNTS]
            regret = with_interval(estimate_of(r["regret_percent"]))
            rows.append([c["cell"], str(c["updates"]), str(r["rank"]), *loads, regret])
    return rows if len(rows) > 1 else []


def best_rates(answers: Sequence[Answer]) -> Rows:
    """Return the best learning rates of all answers with ratios, the largest model first."""
    rows = [RATES_HEAD.split("|")]
    for a in sorted((a for a in answers if a.results.get("ratios")), key=lambda a: -a.size):
        ratios = {(r["group"], r["rank"]): r for r in a.results["ratios"]}
        for c in a.results["curves"]:
            where = (c["model"], c["dataset"], c["batch_size"], c["steps"])
            group = "{} on {}, batch {}, steps {}".format(*where)
            lora = c["method"] == "lora"
            r = ratios.get((group, c["rank"])) if lora else None
            against = ["", "", ""]
            if r is not None:
                costs = [signed(r["regrets"].get(rule)) for rule in (TEN, ONE)]
                against = [with_interval(estimate_of(r["ratio"])), *costs]
            rows.append(
                [
                    f"{', '.join(map(str, where))} (`{a.results['scale']}`)",
                    f"LoRA r{c['rank']:g}" if lora else "full fine-tuning",
                    row_interval(c, "best_lr", rate),
                    band_text(c["band"]),
                    number(c["best_nll"], 4),
                    *against,
                ]
            )
    return rows if len(rows) > 1 else []


def verdict_row(a: Answer, v: Verdict) -> list[str]:
    """Return one verdict as a row of its question's table, with qualifications as notes."""
    where = f", {v.group}" if len({w.group for w in a.verdicts}) > 1 else ""
    marks = f"{a.word(v.claim, 'source') or 'ours'}{', primary' if v.primary else ''}"
    is_open = v.outcome == "UNDECIDED" and not v.is_withdrawn
    notes = [
        v.why if is_open else BETTER if v.is_better else "",
        f"needs {v.needed}" if is_open and v.needed else "",
        f"{EXPLORATORY}: {v.exploratory}" if v.exploratory else "",
        a.read(v),
        *(a.word(v.claim, k) for k in ("measure", "note")),
    ]
    return [
        f"{a.says(v.claim)}{where} (`{a.sweep}: {v.claim}`, {marks})",
        a.results["scale"],
        with_interval(v.estimate),
        within(v.margin),
        f"**{v.shown}**",
        "; ".join(filter(None, notes)),
    ]


# ---------------------------------------------------------------- render all kept answers


def in_order(kept: Path) -> list[Path]:
    """Return the folders of all kept answers, each after the answers that it shows as well."""
    question = {p.parent: read_question(p.parent) for p in sorted(kept.glob("*/question.json"))}
    folders = list(question)
    shows = {f: question_named(question[f]["analysis"]).shows for f in folders}
    graph = {f: [g for g in folders if question[g]["name"] in shows[f]] for f in folders}
    return list(TopologicalSorter(graph).static_order())


def render_answers(kept: Path) -> None:
    """Judge the kept tables again and write their results, reports and figures."""
    for folder in in_order(kept):
        table = read_table(folder / "table.parquet")
        question = read_question(folder)
        for figure in folder.glob("*.png"):
            figure.unlink()
        write_answer(analyse(table, question, kept), table, question, folder)


def render_all(kept: Path, front_page: Path) -> None:
    """Render the kept answers, the page over them, and the findings in the project's README."""
    render_answers(kept)
    write(read_answers([kept]), kept / "README.md", True)
    front_page.write_text(readme(front_page.read_text(), kept))
