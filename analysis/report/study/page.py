"""Write the pages over all answers: one of a screen, and beside it the details.

`lorasweep answer study out=analysis/results` renders all of them again
from the kept tables.
The texts are in `analysis/report/templates/study/`; no measured number is typed by hand.
"""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.inference.decide import BETTER, EXPLORATORY, WITHDRAWN, Verdict
from analysis.inference.estimate import number, with_interval
from analysis.inference.rows import Row, csv_of, pick
from analysis.measures.regret import FIRST_PASS
from analysis.questions.registry import analyse, read_question
from analysis.report import plots_study
from analysis.report.report import added_after, command_of, write_answer
from analysis.report.study.answers import (
    ON_PAGE,
    Answer,
    Finding,
    called,
    findings,
    ledger,
    listed,
    read_answers,
    settings,
    where,
    within,
)
from analysis.report.text import Rows, markdown, rendered, text_hash, with_block
from analysis.runs.curves import in_words
from analysis.runs.table import read as read_table

FIGURES = (MAP, RATIO) = ("map.png", "ratio.png")
LAW = "quadrature.png"
"""Figure of the law of learning rates, in the folder of its answer."""
QUESTIONS = "questions"
"""Folder of the pages of the questions."""
TABLE = "rows.csv"
"""All rows: verdicts, and the measurements that the pages show."""
USED = ["model", "hidden_size", "method", "n_trainable", "rank", "alpha", "steps"]
"""Columns of runs of which the table of base models is made."""
ALPHA = "alpha (output times alpha / rank)"
MIXED = "mixed"
"""Outcome of a claim whose verdicts differ between its data sets or bases."""
BASES = Path(__file__).with_name("bases.yaml")
"""Base model -> what it is, in words."""


def rows_of(answers: Sequence[Answer]) -> list[Row]:
    """Return the rows of the answers, and those that only the pages measure."""
    rows = [*(r for a in answers for r in a.rows), *plots_study.speed_rows(answers)]
    rows += plots_study.joined_rows(answers)
    return sorted(rows, key=lambda r: (r.sweep, r.scale))


def figures_of(answers: Sequence[Answer]) -> dict[str, Callable[[Path, str], None]]:
    """Return the name of each figure that there is -> the function that draws it."""
    found: dict[str, tuple[Sequence[Any], Callable[..., None]]] = {
        MAP: (plots_study.regret_lines(answers), plots_study.regret_map),
        RATIO: (plots_study.ratio_pairs(answers), plots_study.ratio_figure),
    }
    return {name: partial(draw, of) for name, (of, draw) in found.items() if of}


def write(answers: Sequence[Answer], path: Path, kept: bool = False) -> None:
    """Write the page and, beside it, its figures and the pages of details; see `pages`.

    Earlier pages are replaced only once all new pages and figures are there.
    """
    folder, texts = path.parent, pages(answers, path, kept)
    (folder / QUESTIONS).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as made:
        (new := Path(made)).joinpath(QUESTIONS).mkdir()
        for name, draw in figures_of(answers).items():
            draw(new / name, inputs_hash(answers))
        for name, text in texts.items():
            (new / name).write_text(text)
        for name in FIGURES:
            (folder / name).unlink(missing_ok=True)
        for old in (folder / QUESTIONS).glob("*.md"):
            if "](../ledger.md" in old.read_text(errors="replace"):  # a page of ours
                old.unlink()
        for file in filter(Path.is_file, [*new.rglob("*")]):
            file.replace(folder / file.relative_to(new))


def inputs_hash(answers: Sequence[Answer]) -> str:
    """Hash the inputs of the page's figures: the answers, and which runs they have."""
    texts = [(a.folder / "results.json").read_text() for a in answers]
    return text_hash("".join(texts) + "".join(sorted(i for a in answers for i in a.run_ids)))


def pages(answers: Sequence[Answer], path: Path, kept: bool = False) -> dict[str, str]:
    """Render the page of answers and the pages beside it: name in the page's folder -> text.

    Args:
        path: the page; links are relative to its folder.
        kept: for kept answers, also the findings, changes after a look, and what was not tested.
    """
    rows = rows_of(answers)
    by_sweep: dict[str, list[Answer]] = {}
    for a in answers:
        by_sweep.setdefault(a.sweep, []).append(a)
    folder = path.parent
    found = findings(rows) if kept else []
    tables = [a.runs.reindex(columns=USED) for a in answers]
    runs = pd.concat(tables) if tables else pd.DataFrame(columns=USED)
    sizes = sizes_of(runs) / 1e6
    primary = [
        f"**{r.says[0].upper()}{r.says[1:]}**: {v.shown}, {with_interval(v.estimate)} on "
        f"{where(r)}. [Details]({QUESTIONS}/{r.sweep}.md)"
        for a in answers
        for r, v in a.single
        if v.primary and not v.is_withdrawn and v.estimate.value is not None
    ]
    withdrawn = []  # a line for each such answer: its bases, and whose answer stands
    for a in (a for a in answers if a.question.get("withdrawn")):
        mine = [other for other in by_sweep[a.sweep] if not other.question.get("withdrawn")]
        bases, stands = (listed([called(b) for x in of for b in x.bases]) for of in ([a], mine))
        why = a.question["withdrawn"].partition(", ")[0]
        link = f"[{a.question['question']}]({QUESTIONS}/{a.sweep}.md)"
        rest = f" The answer on {stands} stands." if stands else ""
        withdrawn.append(f"**Withdrawn on {bases}**: {link} {why[0].upper()}{why[1:]}.{rest}")
    common: dict[str, Any] = {
        "kept": kept,
        "page": path.name,
        "n_claims": len({(r.sweep, v.claim) for a in answers for r, v in a.single}),
        "n_runs": len(set().union(*(a.run_ids for a in answers))),
        "figures": list(figures_of(answers)),
        "bases": base_rows(runs, " ".join(f.text for f in found[:ON_PAGE])),
    }
    law = [os.path.relpath(a.folder / LAW, folder) for a in answers if (a.folder / LAW).is_file()]
    questions = [question_of(mine, folder / QUESTIONS, found) for mine in by_sweep.values()]
    texts = {
        path.name: rendered(
            "study/page.md",
            **common,
            settings=settings(rows) if kept else [],
            pages=partial(links, rows),
            law=law if kept else [],
            findings=found[:ON_PAGE],
            claims=[] if kept else primary,
            loads=first_pass_loads(rows),
            others=found[ON_PAGE:],
            tally=tally(answers),
            spans=[sizes.min(), sizes.max(), runs["steps"].max()] if len(sizes) else [],
            withdrawn=withdrawn,
            questions=questions,
        ),
        "ledger.md": rendered("study/ledger.md", **common, ledger=ledger(answers)),
        f"{QUESTIONS}/README.md": rendered("study/questions.md", **common, questions=questions),
    }
    if kept:
        added = [(a.folder.name, line) for a in answers for line in added_after(a.question)]
        texts["changes.md"] = rendered("study/changes.md", added=added)
    for q in questions:
        texts[f"{QUESTIONS}/{q['sweep']}.md"] = rendered("study/question.md", **common, q=q)
    return {**{name: in_words(text) for name, text in texts.items()}, TABLE: csv_of(rows)}


def first_pass_loads(rows: Sequence[Row]) -> str:
    """Say how often the data fill the adapter of claim `low` by the study's count of bits."""
    for r in (r for r in pick(rows, sweep=plots_study.REGIME, claim="low") if r.rank):
        loads = pick(rows, f"load, {FIRST_PASS}", rank=r.rank, base=r.base, setting=r.setting)
        known = [x.estimate.value or 0.0 for x in loads if x.data != plots_study.NOTHING]
        if known:
            ends = dict.fromkeys(number(v, 2) for v in (min(known), max(known)))
            return f"{' to '.join(ends)} times what rank {r.rank} can hold"
    return ""


def question_of(
    answers: Sequence[Answer], folder: Path, found: Sequence[Finding]
) -> dict[str, Any]:
    """Return the parts of a question's page, which is in `folder`."""
    asked, shown = answers[0].question, []
    verdicts = [["claim", "scale", "measured", "margin", "verdict", "notes"]]
    mine = [f for f in found if answers[0].sweep in (f.sweep, *f.also)]
    for a in answers:
        here = os.path.relpath(a.folder, folder)
        # Early answers get no command, because the sweep file may have changed since.
        command = "" if "fingerprint_stamped" in a.question else f", `{command_of(a.question)}`"
        links = f"[report]({here}/report.md), [table]({here}/table.parquet){command}"
        runs = f"{a.results.get('runs', 0):,} runs, {a.trained}"
        shown.append(f"`{a.scale}`: {runs} ({links})")
        many = len({r.task for r, _ in a.judged}) > 1
        for r, v in a.judged:
            marks = f"{r.asked.get('source') or 'ours'}{', primary' if v.primary else ''}"
            is_open = v.outcome == "UNDECIDED" and not v.is_withdrawn
            notes = [
                v.why if is_open else BETTER if v.is_better else "",
                f"needs {v.needed}" if is_open and v.needed else "",
                f"{EXPLORATORY}: {v.exploratory}" if v.exploratory else "",
                r.at,
                *(r.asked.get(k) or "" for k in ("measure", "note")),
            ]
            task = f", {r.task}" if many else ""
            says = f"{r.says}{task} (`{a.sweep}: {v.claim}`, {marks})"
            row = [says, a.scale, with_interval(v.estimate), within(v.margin), f"**{v.shown}**"]
            verdicts.append([*row, "; ".join(filter(None, notes))])
    outcomes = Counter(v.shown for a in answers for _, v in a.single)
    return {
        "sweep": answers[0].sweep,
        "title": asked["question"],
        "source": f"Source of the claim: {asked['source']}. {asked.get('how', '')}".strip(),
        "withdrawn": [(a.scale, why) for a in answers if (why := a.question.get("withdrawn"))],
        "found": [f"{f.text} {f.more}".strip() for f in mine],
        "outcomes": ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())),
        "answers": shown,
        "verdicts": verdicts,
        "figures": [
            (caption[0].upper() + caption[1:], os.path.relpath(a.folder / name, folder))
            for a in answers
            for name, caption in a.results.get("figures") or []
            if (a.folder / name).is_file()
        ],
    }


def tally(answers: Sequence[Answer]) -> str:
    """Count the claims by outcome, and the exploratory ones among them.

    A claim whose verdicts differ between conditions is counted as mixed. Withdrawn verdicts count
    only for claims that have no other. Verdicts on claims that are not asked are counted apart.
    """
    claims: dict[tuple[str, str], list[Verdict]] = {}
    for a in answers:
        for _, v in a.single:
            claims.setdefault((a.sweep, v.claim), []).append(v)
    counts: dict[str, list[bool]] = {}
    for verdicts in claims.values():
        stand = [v for v in verdicts if not v.is_withdrawn]
        outcomes = {v.outcome.lower() for v in stand} or {WITHDRAWN.lower()}
        outcome = outcomes.pop() if len(outcomes) == 1 else MIXED
        explores = bool(stand) and all(v.exploratory for v in stand)
        counts.setdefault(outcome, []).append(explores)
    apart = Counter(v.not_asked for a in answers for _, v in a.judged if v.not_asked)
    order = ("supported", "refuted", "undecided", MIXED, WITHDRAWN.lower())
    said = ", ".join(
        f"{len(marks)} {outcome}{f' ({sum(marks)} {EXPLORATORY})' if any(marks) else ''}"
        for outcome in order
        if (marks := counts.get(outcome))
    )
    rest = " or ".join(f"{n} {outcome}" for outcome, n in sorted(apart.items()))
    return f"{said} (apart: {rest}, on other scales or bases)" if rest else said


def readme(text: str, kept: Path) -> str:
    """Return the project's README with its table and findings rendered again from kept results."""
    rows = rows_of(read_answers([kept]))
    folder = os.path.relpath(kept, kept.parents[1])
    table = [["setting", "start with", "why"]]
    table += [[s.setting, s.start, f"{s.why} <sub>({s.tag})</sub>"] for s in settings(rows)]
    found = [
        f"{k}. {f.short} [More]({folder}/{QUESTIONS}/{f.sweep}.md) <sub>({f.tag})</sub>"
        for k, f in enumerate(findings(rows)[:ON_PAGE], 1)
    ]
    return with_block(with_block(text, "settings", markdown(table)), "answers", found)


# ---------------------------------------------------------------- tables


def links(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Link the pages of questions, or of folders of the kept results."""
    sweeps = {r.sweep for r in rows}
    paths = (f"{QUESTIONS}/{n}" if n in sweeps else f"{n}/README" for n in names)
    return ", ".join(f"[{name}]({path}.md)" for name, path in zip(names, paths))


def sizes_of(runs: pd.DataFrame) -> pd.Series:
    """Return the number of parameters of each base model that full fine-tuning trained."""
    return runs[runs["method"] == "fullft"].groupby("model")["n_trainable"].max()


def base_rows(runs: pd.DataFrame, text: str) -> Rows:
    """Return each base model's size, and the ranks, alphas and updates of its runs.

    The bases that `text` (the findings of the page) names come first. Ranks and updates are ranges;
    alphas, of which there are few, are listed.
    """
    what = yaml.safe_load(BASES.read_text())
    head = ["base", "hidden size", "parameters", "what it is", "ranks", ALPHA, "updates"]
    sizes, named = sizes_of(runs), set(re.findall(r"[\w-]+", text))

    def place(base: str) -> tuple[bool, int, str]:
        return called(base) not in named, int(sizes.get(base, 0)), base

    def span(values: pd.Series) -> str:
        ends = values.dropna().agg(["min", "max"]).dropna()
        return " to ".join(dict.fromkeys(f"{v:,g}" for v in ends))

    rows = [head]
    for base in sorted(runs["model"].unique(), key=place):
        mine = runs[runs["model"] == base]
        lora = mine[mine["method"] == "lora"]
        alphas = ", ".join(f"{v:g}" for v in sorted(lora["alpha"].dropna().unique()))
        spans = [span(lora["rank"]), alphas, span(mine["steps"])]
        size = f"{sizes[base] / 1e6:.3g}M" if base in sizes else "-"
        width = f"{mine['hidden_size'].max():g}"
        rows.append([called(base), width, size, what.get(base, "-"), *spans])
    return rows if len(rows) > 1 else []


# ---------------------------------------------------------------- render all kept answers


def render_all(kept: Path, front_page: Path) -> None:
    """Judge the kept tables again; write their answers, the pages, and the project's findings."""
    for folder in sorted(p.parent for p in kept.glob("*/question.json")):
        table = read_table(folder / "table.parquet")
        question = read_question(folder)
        write_answer(analyse(table, question, kept), table, question, folder)
        shown = re.findall(r"\]\((\w+\.png)\)", (folder / "report.md").read_text())
        for figure in (f for f in folder.glob("*.png") if f.name not in shown):
            figure.unlink()
    write(read_answers([kept]), kept / "README.md", True)
    front_page.write_text(readme(front_page.read_text(), kept))
