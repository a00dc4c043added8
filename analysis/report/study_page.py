"""Render the pages over all answers: analysis/results/README.md, and a study's own page.

A page starts with an overview of the claims. The questions follow with their verdicts and figures,
and the whole table comes last. No measured number is typed by hand.
"""

from collections.abc import Sequence
from pathlib import Path

from analysis.inference.estimate import Estimate, Verdict, number, rate, signed, with_interval
from analysis.report.report_page import band_text
from analysis.report.study import Part, estimate_of, parts_of, rows_of, within
from analysis.report.study_claims import base_of, bases, by_fate, claims_of, glance, tally
from analysis.report.text import markdown
from analysis.runs.names import in_words

HOW_TO_READ = """\
- **A claim** is a sentence with a number and a margin. The margin was fixed before the runs.
  SUPPORTED: the measured interval lies inside the margin. REFUTED: the two do not overlap.
  UNDECIDED: everything else. A claim is also undecided if the best rate is at an edge of the rates
  tried, if there are too few seeds, or if the task is unsuitable. A verdict holds only for the
  models, tasks and lengths of its runs.
- **Intervals** cover the spread over seeds and the uncertainty of each method's best learning
  rate. Their level is 95%, or higher if the sweep was looked at more than once. Zero-width
  intervals mark exact counts and maxima, not estimates. The sampling error of the held-out data is
  not included: all runs are evaluated on the same rows.
- **rho** is the number of updates that full fine-tuning needs to reach a loss, divided by LoRA's,
  each at its own best rate: at 0.5, LoRA needs twice as many. It falls during a run, so compare it
  at equal lengths only. It comes from learning curves up to the second-last evaluation (*to update
  256* of 384), which use fewer held-out rows than the losses at the end.
- **A base** is the model before fine-tuning. tiny64 and tiny128 are small Llamas with these
  hidden sizes, pretrained on a synthetic language. tiny64-s1 is tiny64 from another seed.
  smollm2-135m-instruct is a real model (from 4-bit weights).
- **Tasks**: *dialect* is a partly changed version of the synthetic language; *skills* are strings
  to sort, reverse and add; *facts* are random bits to memorise; *gsm8k* are word problems.
- **Needs** estimates how many seeds (bases, layer sets) decide the claim in 80% of cases if the
  value and the spread found are the true ones. The error of the best rates is taken to stay: where
  it is what makes an interval wide, more learning rates are needed too.
- **Answers are not independent.** Sweeps share runs (`rank`, `short_runs` and `compute` most of
  theirs), and some claims are readings of one number."""
CHANGED = """\
Margins were fixed before the runs, but some estimators were changed after answers had been seen,
for reasons other than a verdict (the numbers refer to DECISIONS).

- The loss to which `compute` counts, and the definition of a departure (D34).
- Interpolation to the best rates, and the null distribution of `rank: start` (D41).
- Intervals over seeds (D43), and the test of the ratio's law (D44).
- Runs are cut before their task is solved (D46).
- The weight of a rate at which some repeats diverge (D47).
- The gates and the number of examples of `batch_size` (D48).
- LoRA's own rate for `compute`'s loss, and the common rate of `rank` on tiny128 (D50).
- The law of the departures counts ranks that depart outside the evaluations as censored (D63), the
  correlation in `layers` counts the means that it subtracts, intervals over seeds are picked at the
  level that judges (D43), and losses at best rates are read off the fitted valley.

`lr_ratio: parity` (D45) and `recipes: retention_equal` (D50) were added when their runs already
existed. Seeds and rates were added after looks at the results, and the intervals are wider to
account for that (up to five looks). Margins, runs and code of every stage are in the repository's
history."""
"""Only for the page of the kept answers."""
NOT_TESTED = """\
Reinforcement learning, mixtures of experts, models beyond 135M parameters, high ranks, large data
sets, and GPUs. At scale tiny, with a few hundred updates from a small base, LoRA mostly learns
more slowly than full fine-tuning. That is outside the regime in which the study finds the two
equal, so these results do not extend to models with billions of parameters. Learning rates in runs
that others published are in [public_evidence.md](public_evidence.md)."""
"""Only for the page of the kept answers."""
EVERY = (
    "Primary claims are corrected for multiplicity over the whole table (Holm), so a claim may be "
    "undecided here although its own report decides it. The other claims are not corrected. Each "
    "report prints the hash of its claims and margins."
)
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
"""Rules of thumb, as named in an answer's ratios."""


def page(parts: Sequence[Part], root: str = "") -> str:
    """Render the page of all answers.

    Args:
        root: prefix of links to the answers' folders. Empty for the kept answers' own page, which
            also has the sections on later changes and on what was not tested.
    """
    claims = claims_of(parts)
    out = [*_head(parts, len(claims)), *tally(claims), ""]
    out += ["## How to read it", "", HOW_TO_READ, ""]
    if not root:
        out += ["## What changed after a look", "", CHANGED, ""]
        out += ["## What was not tested", "", NOT_TESTED, ""]
    out += [*_best_rates(parts), "## At a glance", ""]
    for name, mine in by_fate(claims).items():
        shown = [b for b in bases(claims) if any(base_of(p) == b for at in mine for p, _ in at)]
        out += [f"### {name}", "", *glance(mine, shown), ""]
    out += _questions(parts, root)
    out += ["## Every verdict", "", EVERY, ""]
    out += ["<details><summary>The whole table</summary>", "", *table(parts), "", "</details>"]
    return in_words("\n".join(out).rstrip() + "\n")


def _head(parts: Sequence[Part], n_claims: int) -> list[str]:
    runs = len(set().union(*(p.run_ids for p in parts))) if parts else 0
    sweeps = len({p.results["sweep"] for p in parts})
    return [
        "# When does LoRA match full fine-tuning?",
        "",
        "The claims of [LoRA Without Regret](https://thinkingmachines.ai/blog/lora) "
        '("the study") and popular claims about the same methods, each judged from its own runs: '
        f"{n_claims} claims in {sweeps} sweeps, {runs:,} distinct runs, all of them in the tables "
        "next to this page.",
        "",
    ]


def _best_rates(parts: Sequence[Part]) -> list[str]:
    """Render the best rates of all answers with ratios, the largest model first."""
    rows = [list(RATES)]
    for part in sorted((p for p in parts if p.results.get("ratios")), key=lambda p: -p.size):
        rows += _rates_of(part)
    if len(rows) == 1:
        return []
    note = (
        "Alpha 32, scaled as alpha / rank; 95% intervals. A dash: the rate is outside those tried, "
        "or diverges."
    )
    return ["## Best rates", "", note, "", *markdown(rows), ""]


def _rates_of(part: Part) -> list[list[str]]:
    ratios = {(r["group"], r["rank"]): r for r in part.results["ratios"]}
    rows = []
    for c in part.results["curves"]:
        where = (c["model"], c["dataset"], c["batch_size"], c["steps"])
        group = "{} on {}, batch {}, steps {}".format(*where)
        lora = c["method"] == "lora"
        r = ratios.get((group, c["rank"])) if lora else None
        against = ["", "", ""]
        if r is not None:
            costs = [signed(r["regrets"].get(rule)) for rule in RULES]
            against = [with_interval(estimate_of(r["ratio"])), *costs]
        rows.append(
            [
                f"{', '.join(map(str, where))} (`{part.results['scale']}`)",
                f"LoRA r{c['rank']:g}" if lora else "full fine-tuning",
                with_interval(Estimate(c["best_lr"], c["low"], c["high"]), rate),
                band_text(c["band"]),
                number(c["best_nll"], 4),
                *against,
            ]
        )
    return rows


def _questions(parts: Sequence[Part], root: str) -> list[str]:
    by_question: dict[str, list[Part]] = {}
    for part in parts:
        by_question.setdefault(part.question["question"], []).append(part)
    out = []
    for text, mine in by_question.items():
        question = mine[0].question
        source = f"Source of the claim: {question['source']}. {question.get('how', '')}".strip()
        out += [f"## {text}", "", source, ""]
        for part in (p for p in mine if "_" not in p.results["scale"]):
            lead = f"At scale `{part.results['scale']}`, {_trained(part, root)}:"
            out += [lead, "", *_answer(part, root)]
        for part in (p for p in mine if "_" in p.results["scale"]):
            name = f"{part.results['scale']}: {', '.join(part.bases)}"
            out += [f"<details><summary>The same at scale {name}</summary>", ""]
            out += [f"Of {_trained(part, root)}:", "", *_answer(part, root), "</details>", ""]
    return out


def _trained(part: Part, root: str) -> str:
    here = f"{root}{part.folder.name}"
    runs = part.results.get("runs", 0)
    return (
        f"{runs:,} runs, {part.trained} ([report]({here}/report.md), [table]({here}/table.csv), "
        f"`{part.command}`)"
    )


def _answer(part: Part, root: str) -> list[str]:
    return [*(_verdict(part, v) for v in part.verdicts), "", *figures(part, root)]


def _verdict(part: Part, v: Verdict) -> str:
    where = f" ({v.group})" if len({w.group for w in part.verdicts}) > 1 else ""
    by_task = {w.outcome for w in part.verdicts if w.claim == v.claim and w is not v}
    split = v is part.overall(v.claim) and len(by_task) > 1
    rest = f"; {v.why}" if v.outcome == "UNDECIDED" or split else ""
    measured = f"measured {part.measured(v)}, margin {within(v)}"
    return f"- **{v.outcome}**: {part.says(v.claim)}{where}; {measured}{rest}."


def figures(part: Part, root: str) -> list[str]:
    """Render an answer's figures with their captions."""
    out = []
    for name, caption in part.results.get("figures") or []:
        if (part.folder / name).is_file():
            out += [f"![{caption}]({root}{part.folder.name}/{name})", ""]
            out += [f"*{caption[0].upper()}{caption[1:]}.*", ""]
    return out


def table(parts: Sequence[Part]) -> list[str]:
    """Render the whole table as Markdown, with claims as sentences and verdicts in bold."""
    head, *rows = rows_of(parts, words=True)
    return markdown([head, *([*r[:4], f"**{r[4]}**", *r[5:]] for r in rows)])


def write(kept: Path) -> None:
    """Write the kept answers' page."""
    (kept / "README.md").write_text(page(parts_of([kept])))
