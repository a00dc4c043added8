"""The pages that are made of the study's table: analysis/results/README.md, a study's own page, the block in the README.

A page leads with the claims at a glance: what became of each one, base by base, those together that came out alike. The
questions follow with their verdicts and figures, the whole table is the end. No number in a page is typed by hand.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from analysis.results import Verdict, with_interval
from analysis.study import RESULTS, Part, parts_of, rows_of, within

BEGIN, END = "<!-- answers: made by `python -m analysis study` -->", "<!-- end of answers -->"
OUTCOMES = ("SUPPORTED", "REFUTED", "UNDECIDED")
WHOSE = {
    "study": "the study's own",
    "popular": "popular: summaries, defaults, other papers",
    "ours": "ours: certificates, controls",
}
SHOWN = ("lr_scale-tiny", "rank-tiny", "layers-tiny", "capacity-tiny")
"""Parts whose first figure the project's README shows."""

Asked = dict[str, tuple[Part, list[Verdict]]]
"""One claim: by scale, its answer and its verdicts, that over all tasks first."""


# ---------------------------------------------------------------- the claims at a glance


def claims(parts: Sequence[Part]) -> list[Asked]:
    """Put together what became of each claim at every scale that it was asked at."""
    found: dict[tuple[str, str], Asked] = {}
    for part in parts:
        for v in part.verdicts:
            at = found.setdefault((part.told["sweep"], v.claim), {})
            at.setdefault(part.told["scale"], (part, []))[1].append(v)
    return list(found.values())


def scales(asked: Sequence[Asked]) -> list[str]:
    """Return the scales that were asked at: the tiny ones first."""
    return sorted({s for at in asked for s in at}, key=lambda s: (not s.startswith("tiny"), len(s), s))


def glance(asked: Sequence[Asked], shown: Sequence[str]) -> list[str]:
    """Write claims as Markdown, one row each, a column a scale."""
    rows = [["claim", "lies within", *shown]]
    for at in asked:
        part, (v, *_) = next(iter(at.values()))
        name = f"`{part.told['sweep']}: {v.claim}`, {part.whose(v.claim)}{', primary' if v.primary else ''}"
        rows.append([f"{part.says(v.claim)} ({name})", within(v), *(_cell(*at[s]) if s in at else "" for s in shown)])
    return markdown(rows)


def _cell(part: Part, verdicts: Sequence[Verdict]) -> str:
    v, *by_task = verdicts
    bases = part.bases
    said = [f"**{v.outcome}**", with_interval(v.estimate), bases[0] if len(bases) == 1 else f"{len(bases)} bases"]
    if by_task:
        counts = {o: sum(w.outcome == o for w in by_task) for o in OUTCOMES}
        said.append("by task: " + ", ".join(f"{n} {o}" for o, n in counts.items() if n))
    if v.outcome == "UNDECIDED" and v.needed:
        said.append(f"needs {v.needed}")
    return "<br>".join(said)


FATES = (
    ("Refuted wherever they were asked", lambda o: o == {"REFUTED"}),
    ("Supported wherever they were asked", lambda o: o == {"SUPPORTED"}),
    ("Supported on one base, refuted on another", lambda o: {"SUPPORTED", "REFUTED"} <= o),
    ("Refuted on one base, open on another", lambda o: o == {"REFUTED", "UNDECIDED"}),
    ("Supported on one base, open on another", lambda o: o == {"SUPPORTED", "UNDECIDED"}),
    ("Open", lambda o: o == {"UNDECIDED"}),
)
"""What may become of a claim over all its scales; each claim has one fate."""


def by_fate(asked: Sequence[Asked]) -> dict[str, list[Asked]]:
    """Sort claims by what became of them over all their scales; a fate that none has is left out."""
    fates = {name: [at for at in asked if is_so({v.outcome for _, (v, *_) in at.values()})] for name, is_so in FATES}
    return {name: mine for name, mine in fates.items() if mine}


def tally(asked: Sequence[Asked]) -> list[str]:
    """Count verdicts by whose claim it is; a claim counts once for each scale, and not again for each task."""
    rows = [["claims", *OUTCOMES]]
    for whose, said in WHOSE.items():
        mine = [v.outcome for at in asked for part, (v, *_) in at.values() if part.whose(v.claim) == whose]
        if mine:
            rows.append([said, *(str(mine.count(o)) for o in OUTCOMES)])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write rows, their head first, as a table."""
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


# ---------------------------------------------------------------- pages


def page(parts: Sequence[Part], root: str = "") -> str:
    """Write the study's page; links to answers' folders begin with root."""
    asked = claims(parts)
    shown = scales(asked)
    runs = len(set().union(*(p.run_ids for p in parts))) if parts else 0
    out = ["# The study", "",
           f"{len(asked)} claims of {len({p.told['sweep'] for p in parts})} sweeps, some asked at several scales and on "
           f"several tasks, {runs:,} distinct runs. A verdict holds for the models, tasks and lengths of its runs, which stand "
           "at each question below. At tiny these are models of 0.2 to 3 million parameters on a synthetic language, some "
           "hundred updates, where LoRA mostly learns more slowly than full fine-tuning: outside of the regime in which the "
           "study finds them equal. Nothing there says what a model of billions would do.", "",
           *tally(asked), "",
           "## At a glance", "",
           "Does an answer hang on one base? tiny64 and tiny128 differ in width, tiny64-s1 is tiny64 of another pretraining "
           "seed, smollm2 a real pretrained model. rho is full fine-tuning's updates to a loss that both reach over LoRA's: "
           "0.5 means that LoRA needs twice as many. Intervals are of 95%, or wider by what further looks at a sweep cost.",
           ""]  # fmt: skip
    for name, mine in by_fate(asked).items():
        out += [f"### {name}", "", *glance(mine, [s for s in shown if any(s in at for at in mine)]), ""]
    out += [*_questions(parts, root),
            "## Every verdict", "",
            "Primary claims are corrected for their number over the whole table (Holm), so that one may be open here that its "
            "own report decides. Margins were stated before the runs, and each report prints their hash; what else of a "
            "question changed after a look is in DECISIONS (D34, D36, D41), and each look is paid for in the interval's level.",
            "", *table(parts)]  # fmt: skip
    return "\n".join(out).rstrip() + "\n"


def _questions(parts: Sequence[Part], root: str) -> list[str]:
    by_question: dict[str, list[Part]] = {}
    for part in parts:
        by_question.setdefault(part.question["question"], []).append(part)
    out = []
    for text, mine in by_question.items():
        asked = mine[0].question
        out += [f"## {text}", "", f"Source of the claim: {asked['source']}. {asked.get('how', '')}".strip(), ""]
        for part in mine:
            here = f"{root}{part.folder.name}"
            out += [f"At scale `{part.told['scale']}`, {part.told.get('runs', 0):,} runs, {part.trained} "
                    f"([report]({here}/report.md), "
                    f"[table]({here}/table.csv), `{part.command}`):", "",
                    *(_said(part, v) for v in part.verdicts), "", *_figures(part, root)]  # fmt: skip
    return out


def _said(part: Part, v: Verdict) -> str:
    where = f" ({v.group})" if len({w.group for w in part.verdicts}) > 1 else ""
    rest = f"; {v.why}" if v.outcome == "UNDECIDED" or v.why.startswith("by task") else ""
    told = f"measured {with_interval(v.estimate)}, to lie within {within(v)}"
    return f"- **{v.outcome}**: {part.says(v.claim)}{where}; {told}{rest}."


def _figures(part: Part, root: str) -> list[str]:
    out = []
    for name, caption in part.told.get("figures") or []:
        if (part.folder / name).is_file():
            out += [f"![{caption}]({root}{part.folder.name}/{name})", ""]
    return out


def table(parts: Sequence[Part]) -> list[str]:
    """Write the whole table as Markdown, claims in words, verdicts in bold."""
    head, *rows = rows_of(parts, words=True)
    return markdown([head, *([*r[:4], f"**{r[4]}**", *r[5:]] for r in rows)])


def block(parts: Sequence[Part], root: str, figures: Sequence[str] = ()) -> str:
    """Write what the project's README shows: the primary claims, and the first figure of the parts named."""
    asked = claims([replace(p, verdicts=[v for v in p.verdicts if v.primary]) for p in parts])
    out = [*glance(asked, scales(asked)), ""]
    for part in (p for p in parts if p.name in figures):
        out += _figures(part, root)[:2]
    return "\n".join(out).rstrip()


def readme(text: str) -> str:
    """Return the project's README with its block of answers made anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{block(parts_of([RESULTS]), 'analysis/results/', SHOWN)}\n{END}{tail}"


def write() -> None:
    """Write the kept results' page and the block of the project's README."""
    (RESULTS / "README.md").write_text(page(parts_of([RESULTS])))
    path = Path(__file__).parent.parent / "README.md"
    path.write_text(readme(path.read_text()))
