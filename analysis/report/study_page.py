"""The pages that are made of the study's table: analysis/results/README.md, a study's own page, the
block in the README.

A page leads with the claims at a glance: what became of each one, base by base, those together that
came out alike. The questions follow with their verdicts and figures, the whole table is the end. No
measured number is typed by hand.
"""

from collections.abc import Sequence
from pathlib import Path

from analysis.inference.estimate import Estimate, Verdict, number, rate, signed, with_interval
from analysis.report.study import Part, estimate_of, parts_of, rows_of, within
from analysis.report.text import markdown

BEGIN, END = "<!-- answers: made by `python -m analysis study` -->", "<!-- end of answers -->"
OUTCOMES = ("SUPPORTED", "REFUTED", "UNDECIDED")
WHOSE = {"study": "the study's own", "popular": "popular: summaries, defaults, other papers"}
SHOWN = ("lr_scale-tiny", "rank-tiny", "layers-tiny", "capacity-tiny")
"""Parts whose first figure the project's README shows."""
VARIANTS = ("-skills", "-knows", "-facts")
"""Bases of one shape and seed that were pretrained on another task stand in one column."""
SEVERAL = "several bases"

Asked = list[tuple[Part, list[Verdict]]]
"""One claim: the answers that judge it, each with its verdicts, that over all tasks first."""


# ---------------------------------------------------------------- the claims at a glance


def claims(parts: Sequence[Part]) -> list[Asked]:
    """Put together what became of each claim everywhere that it was asked."""
    found: dict[tuple[str, str], Asked] = {}
    for part in parts:
        for name in dict.fromkeys(v.claim for v in part.verdicts):
            mine = [v for v in part.verdicts if v.claim == name]
            found.setdefault((part.told["sweep"], name), []).append((part, mine))
    return list(found.values())


def base_of(part: Part) -> str:
    """Return the base that an answer rests on, as a column's head."""
    stems = {next((b.removesuffix(v) for v in VARIANTS if b.endswith(v)), b) for b in part.bases}
    return stems.pop() if len(stems) == 1 else SEVERAL


def bases(asked: Sequence[Asked]) -> list[str]:
    """Return the bases that were asked about: the largest first, answers about several of them
    last."""
    size = {base_of(part): part.size for at in asked for part, _ in at}
    return sorted(size, key=lambda b: (b == SEVERAL, -size[b], b))


def glance(asked: Sequence[Asked], shown: Sequence[str], needs: bool = True) -> list[str]:
    """Write claims as Markdown, one row each, a column a base.

    needs: say as well what is measured, what has to be said beside it, and what would decide.
    """
    rows = [["claim", "counts as yes", *shown]]
    for at in asked:
        part, (v, *_) = at[0]
        said = f"{part.says(v.claim)} (`{part.told['sweep']}: {v.claim}`)"
        if needs:
            beside = [part.word(v.claim, k) for k in ("measure", "beside")]
            said = "<br>".join([said, *(f"*{b}*" for b in beside if b)])
        rows.append([said, within(v), *("<br>".join(_cells(at, base, needs)) for base in shown)])
    return markdown(rows)


def _cells(at: Asked, base: str, needs: bool) -> list[str]:
    here = [(part, verdicts) for part, verdicts in at if base_of(part) == base]
    out = []
    told_of = [
        (part, v, by_task) for part, verdicts in here for v, by_task in _heads(part, verdicts)
    ]
    for part, v, by_task in told_of:
        where = f" (`{part.told['scale']}`)" if len(told_of) > 1 else ""
        alone = next(
            (f", {o} before Holm's correction" for o in OUTCOMES if v.why.startswith(f"{o} alone")),
            "",
        )
        out.append(f"**{v.outcome}**{alone}{where}")
        if by_task:
            told = {
                o: [number(w.estimate.value) for w in by_task if w.outcome == o] for o in OUTCOMES
            }
            out.append(
                "by task: "
                + "; ".join(f"{o} at {', '.join(sorted(n))}" for o, n in told.items() if n)
            )
        else:
            out.append(with_interval(v.estimate))
        if part.read(v):
            out.append(f"*{part.read(v)}*")
        if needs and v.outcome == "UNDECIDED" and v.needed:
            out.append(f"needs {v.needed}")
    return out


FATES = (
    ("Refuted on every base that was asked", lambda o: o == {"REFUTED"}),
    ("Supported on every base that was asked", lambda o: o == {"SUPPORTED"}),
    ("Supported in one answer, refuted in another", lambda o: {"SUPPORTED", "REFUTED"} <= o),
    ("Refuted in one answer, undecided in another", lambda o: o == {"REFUTED", "UNDECIDED"}),
    ("Supported in one answer, undecided in another", lambda o: o == {"SUPPORTED", "UNDECIDED"}),
    ("Undecided", lambda o: o == {"UNDECIDED"}),
)
"""What may become of a claim in all its answers; each claim has one fate."""
OURS = "Checks of the instrument, and controls of our own"


def by_fate(asked: Sequence[Asked]) -> dict[str, list[Asked]]:
    """Sort claims by what became of them in all their answers, our own apart; a fate that none has
    is left out. A verdict over several tasks stands for those on each of them."""
    ours = [at for at in asked if _whose(at) not in WHOSE]
    others = [at for at in asked if _whose(at) in WHOSE]
    fates = {name: [at for at in others if is_so(_outcomes(at))] for name, is_so in FATES}
    return {name: mine for name, mine in {**fates, OURS: ours}.items() if mine}


def _outcomes(at: Asked) -> set[str]:
    return {v.outcome for part, verdicts in at for v, _ in _heads(part, verdicts)}


def _heads(part: Part, verdicts: Sequence[Verdict]) -> list[tuple[Verdict, Sequence[Verdict]]]:
    """Return the verdict over all tasks with those by task; or each verdict alone, where there is
    none over all."""
    overall = part.overall(verdicts[0].claim)
    return [(overall, verdicts[1:])] if overall else [(v, ()) for v in verdicts]


def _whose(at: Asked) -> str:
    part, (v, *_) = at[0]
    return part.word(v.claim, "whose") or "ours"


def tally(asked: Sequence[Asked]) -> list[str]:
    """Count claims, each once, by whose they are and by what became of them."""
    fates = {name: mine for name, mine in by_fate(asked).items() if name != OURS}
    rows = [["claims", *(name.lower() for name in fates)]]
    for whose, said in WHOSE.items():
        rows.append(
            [said, *(str(sum(_whose(at) == whose for at in mine)) for mine in fates.values())]
        )
    return markdown(rows)


# ---------------------------------------------------------------- pages

HOW_TO_READ = """\
- **A claim** is a sentence with a number, and a margin (stated before the runs; what changed later is told below): SUPPORTED
  if the measured interval lies inside, REFUTED if the two do not meet, else UNDECIDED; also where an optimum lies at an edge of
  the rates tried, seeds are too few, or the task is unfit. A verdict holds for the models, tasks and lengths of its runs, and
  for no others.
- **Intervals** count the spread over seeds and the doubt about each method's best learning rate. They are of 95%, or wider by
  what further looks at a sweep cost. One of no width is no estimate: a count of operations, or the most of several runs.
- **rho** is full fine-tuning's updates to a loss that both methods reach, over LoRA's, each at its own best rate: 0.5 means
  that LoRA needs twice as many. It falls along a run, so that numbers compare at equal lengths only; it is read from learning
  curves up to the last evaluation but one (*to update 256* of 384), on fewer held-out rows than the losses at the end, the
  same for all runs. Which rows they are is in no interval.
- **A base** is the model before fine-tuning. tiny64 and tiny128 are small Llamas of these widths, pretrained on a synthetic
  language, tiny64-s1 is tiny64 from another seed, smollm2-135m-instruct is a real model (from 4-bit weights). *dialect* is that
  language changed in part, *skills* are strings to sort, reverse and add, *facts* are random bits to remember.
- **Needs**: how many seeds (or bases) would decide if they alone made the interval's width; where the shape of the valleys
  does, it takes more learning rates as well.
- **Sweeps share runs** (`rank`, `short_runs` and `compute` most of theirs), and several claims are readings of one number, so
  that verdicts are no independent witnesses."""
"""Said before the tables."""
CHANGED = """\
Margins are as they were before the runs. What is held against them is not always. After answers had been seen, and for
reasons other than a verdict, these changed (DECISIONS, by number): the loss that `compute` counts to, what a departure is
(D34); that runs are read at interpolated best rates, and the null of `rank: start` (D41); intervals over seeds (D43); the
test of the ratio's law (D44); that runs are cut where their task is over (D46); how precise a rate is whose repeats break
down (D47); the gates and the number of examples of `batch_size` (D48); LoRA's own rate for `compute`'s loss, and the common
rate of `rank` on tiny128 (D50). `lr_ratio: parity` (D45) and `recipes: retention_equal` (D50) were added when their runs
were there. Seeds and rates were added after looks, which the intervals pay for (up to five looks). Margins, runs and code
of every stage are in the repository's history."""
"""Said of the kept answers, and of no others."""
NOT_TESTED = """\
Reinforcement learning, mixtures of experts, models beyond 135M parameters, high ranks, data sets of a real size, and GPUs. At
tiny, a few hundred updates from a small base, LoRA mostly learns more slowly than full fine-tuning, which is outside of the
regime in which the study finds the two equal: nothing here says what a model of billions would do. What runs that others
published say of the learning rates is in [public_evidence.md](public_evidence.md)."""
"""Said of the kept answers, and of no others."""


def page(parts: Sequence[Part], root: str = "") -> str:
    """Write the study's page; links to answers' folders begin with root, which is empty for the
    kept answers' own page."""
    asked = claims(parts)
    shown = bases(asked)
    runs = len(set().union(*(p.run_ids for p in parts))) if parts else 0
    out = [
        "# When does LoRA match full fine-tuning?",
        "",
        'The claims of [LoRA Without Regret](https://thinkingmachines.ai/blog/lora) ("the study") and of what was made of '
        f"it, each judged from runs of its own: {len(asked)} claims in {len({p.told['sweep'] for p in parts})} sweeps, "
        f"{runs:,} distinct runs, all of them in the tables beside this page.",
        "",
        *tally(asked),
        "",
        "## How to read it",
        "",
        HOW_TO_READ,
        "",
        *(
            []
            if root
            else [
                "## What changed after a look",
                "",
                CHANGED,
                "",
                "## What was not tested",
                "",
                NOT_TESTED,
                "",
            ]
        ),
        *_best_rates(parts),
        "## At a glance",
        "",
    ]
    for name, mine in by_fate(asked).items():
        out += [
            f"### {name}",
            "",
            *glance(mine, [b for b in shown if any(base_of(p) == b for at in mine for p, _ in at)]),
            "",
        ]
    out += [
        *_questions(parts, root),
        "## Every verdict",
        "",
        "Primary claims are corrected for their number over the whole table (Holm), so that one may be open here that its "
        "own report decides; the others are not. Each report prints its margins' hash; what else of a question changed "
        "after a look is in DECISIONS (D34, D36, D41, D43).",
        "",
        "<details><summary>The whole table</summary>",
        "",
        *table(parts),
        "",
        "</details>",
    ]
    return "\n".join(out).rstrip() + "\n"


RATES = (
    "base, data, batch, updates",
    "method",
    "best rate",
    "costs under 0.01 nats",
    "best NLL",
    "over full fine-tuning's",
    "10 times full fine-tuning's rate costs (nats)",
    "full fine-tuning's rate costs (nats)",
)
RULES = ("10 x FullFT's best LR", "FullFT's best LR")
"""Rules of thumb, as an answer's ratios name them."""


def _best_rates(parts: Sequence[Part]) -> list[str]:
    """Write the best rates of answers about their ratio, the largest model first: what somebody who
    sets one looks for."""
    rows = [list(RATES)]
    for part in sorted((p for p in parts if p.told.get("ratios")), key=lambda p: -p.size):
        ratios = {(r["group"], r["rank"]): r for r in part.told["ratios"]}
        for c in part.told["curves"]:
            group = f"{c['model']} on {c['dataset']}, batch {c['batch_size']}, steps {c['steps']}"
            r = ratios.get((group, c["rank"])) if c["method"] == "lora" else None
            rows.append(
                [
                    f"{c['model']}, {c['dataset']}, {c['batch_size']}, {c['steps']} (`{part.told['scale']}`)",
                    f"LoRA r{c['rank']:g}" if c["method"] == "lora" else "full fine-tuning",
                    with_interval(Estimate(c["best_lr"], c["low"], c["high"]), rate),
                    " to ".join(map(rate, c["band"])) if c["band"] else "-",
                    number(c["best_nll"], 4),
                    *(
                        [
                            with_interval(estimate_of(r["ratio"])),
                            *(signed(r["regrets"].get(k)) for k in RULES),
                        ]
                        if r
                        else [""] * 3
                    ),
                ]
            )
    return (
        []
        if len(rows) == 1
        else [
            "## Best rates",
            "",
            "Alpha 32, scaled as alpha / rank; intervals of 95%. A dash: beyond the rates tried, or among "
            "those that break down.",
            "",
            *markdown(rows),
            "",
        ]
    )


def _questions(parts: Sequence[Part], root: str) -> list[str]:
    by_question: dict[str, list[Part]] = {}
    for part in parts:
        by_question.setdefault(part.question["question"], []).append(part)
    out = []
    for text, mine in by_question.items():
        asked = mine[0].question
        out += [
            f"## {text}",
            "",
            f"Source of the claim: {asked['source']}. {asked.get('how', '')}".strip(),
            "",
        ]
        open_, folded = (
            [p for p in mine if "_" not in p.told["scale"]],
            [p for p in mine if "_" in p.told["scale"]],
        )
        for part in open_:
            out += [
                f"At scale `{part.told['scale']}`, {_trained(part, root)}:",
                "",
                *_answer(part, root),
            ]
        for part in folded:
            told = f"{part.told['scale']}: {', '.join(part.bases)}"
            out += [
                f"<details><summary>The same at scale {told}</summary>",
                "",
                f"Of {_trained(part, root)}:",
                "",
                *_answer(part, root),
                "</details>",
                "",
            ]
    return out


def _trained(part: Part, root: str) -> str:
    here = f"{root}{part.folder.name}"
    return (
        f"{part.told.get('runs', 0):,} runs, {part.trained} ([report]({here}/report.md), [table]({here}/table.csv), "
        f"`{part.command}`)"
    )


def _answer(part: Part, root: str) -> list[str]:
    return [*(_said(part, v) for v in part.verdicts), "", *_figures(part, root)]


def _said(part: Part, v: Verdict) -> str:
    where = f" ({v.group})" if len({w.group for w in part.verdicts}) > 1 else ""
    rest = f"; {v.why}" if v.outcome == "UNDECIDED" or v.why.startswith("by task") else ""
    told = f"measured {part.measured(v)}, to lie within {within(v)}"
    return f"- **{v.outcome}**: {part.says(v.claim)}{where}; {told}{rest}."


def _figures(part: Part, root: str) -> list[str]:
    out = []
    for name, caption in part.told.get("figures") or []:
        if (part.folder / name).is_file():
            out += [
                f"![{caption}]({root}{part.folder.name}/{name})",
                "",
                f"*{caption[0].upper()}{caption[1:]}.*",
                "",
            ]
    return out


def table(parts: Sequence[Part]) -> list[str]:
    """Write the whole table as Markdown, claims in words, verdicts in bold."""
    head, *rows = rows_of(parts, words=True)
    return markdown([head, *([*r[:4], f"**{r[4]}**", *r[5:]] for r in rows)])


def block(parts: Sequence[Part], root: str, figures: Sequence[str] = ()) -> str:
    """Write what the project's README shows: the primary claims, and the first figure of the parts
    named."""
    primary = [at for at in claims(parts) if any(v.primary for _, verdicts in at for v in verdicts)]
    out = [*glance(primary, bases(primary), needs=False), ""]
    for part in (p for p in parts if p.name in figures):
        out += _figures(part, root)[:4]
    return "\n".join(out).rstrip()


def readme(text: str, kept: Path) -> str:
    """Return the project's README with its block of answers made anew from the kept results."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{block(parts_of([kept]), 'analysis/results/', SHOWN)}\n{END}{tail}"


def write(kept: Path, front: Path) -> None:
    """Write the kept results' page and the block of the project's README (`front`)."""
    (kept / "README.md").write_text(page(parts_of([kept])))
    front.write_text(readme(front.read_text(), kept))
