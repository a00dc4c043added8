"""Write the pages over all answers: analysis/results/README.md, and a study's own page.

First what was found, then the figures and the ledger; details are folded away. No measured number
is typed by hand.
"""

from collections.abc import Sequence
from pathlib import Path

from analysis.report import plots, plots_study
from analysis.report.report_page import added_after
from analysis.report.study import by_rank, details, rates, speed
from analysis.report.study.answers import Part, parts_of
from analysis.report.study.findings import sentences
from analysis.report.study.forest import rows_of
from analysis.report.study.ledger import ledger
from analysis.report.study.pooled import pooled
from analysis.report.text import text_hash
from analysis.runs.names import in_words

REGRET, FOREST, RATES, SPEED = "regret.png", "forest.png", "rates.png", "speed.png"
SETTINGS = """\
**In the regime** means here: only rules of a synthetic language change, which are few numbers.
**Beyond the regime** lists are new as well, or are all there is: exceptions, facts, exercises.
**On a real model** means SmolLM2 with 135 million parameters and word problems. An answer over
data of several kinds stands with the hardest of them. The bases tiny64 and tiny128 are small
Llamas with these hidden sizes, pretrained on the synthetic language; tiny64-s1 is tiny64 from
another seed, tiny64-experts has 8 experts of which 2 are active. Three more are tiny64 with another
schooling: tiny64-skilled has practised exercises (copying, reversing, sorting, sums), which
rewards then ask for under new words, and tiny64-skills easier ones for longer; tiny64-knows has
learned facts by heart, and guesses nothing else. What was found holds for these models, tasks and
lengths of runs."""
REGRET_CAPTION = """\
A line a condition: a base, what is new in its data, the updates and the rows of each. Regret is
LoRA's final held-out loss minus full fine-tuning's, each at its own best learning rate, in percent
of what full fine-tuning gains; up to 5% counts as none. Open triangles lie below the axis."""
ROOM = """\
Bits of the training rows: the generator counts the free numbers of what is new; the first pass (the
study's count) is full fine-tuning's summed loss, each row before it is learned from; above its
entropy, chosen after a look, is without what no model can learn away. Load is bits over 2 bits a
trained parameter, here of the needed rank, which has a regret of 5%; of other ranks: in Details."""
FOREST_CAPTION = """\
One row a claim of the study, one symbol an answer: a base, or a task where a claim has tasks.
Values are in units of the claim's margin, which was fixed before the runs: 0 is the claim's
value, green is the margin. A claim is supported if the whole interval lies in the green,
refuted if none of it does; an open symbol away from the green is one that something else
forbids to decide, such as too few seeds. Where one end of the margin is open, the green goes
on. A unit is then the distance of the other end or, if the claim's value is that end, a factor
of 2 (or 0.01 nats). Arrows leave the figure. Black symbols average over three bases or more."""
RATES_CAPTION = """\
The price of a wrong learning rate: LoRA's final loss above that at its best rate, in percent of
what it gains there. Symbols are means over seeds, lines the fits that give the best rates; they
end where runs begin to break down, or where no rate was tried. Alpha is 32, scaled as alpha /
rank."""
SPEED_CAPTION = """\
Speed (rho) is the number of updates that full fine-tuning needs to reach a loss, divided by
LoRA's, each at its best rate for that length: at 0.5, LoRA needs twice as many. Bars are
intervals over seeds."""
LEDGER = """\
Every sentence of the study and of its popular summaries, with its verdicts: how many answers of
how many, and at which scale (`tiny`: small Llamas on a CPU, `small`: the real model)."""
NOT_TESTED = """\
Reinforcement learning of a real model, layers in mixtures of experts, models beyond 135M
parameters, high ranks, long runs and GPUs. Rates in runs that others published:
[public_evidence.md](public_evidence.md).

An earlier, exploratory study is archived: [archive.md](archive.md) lists its verdicts."""
"""Only for the page of the kept answers."""
HOW_TO_READ = """\
- **A claim** is a sentence with a number and a margin. SUPPORTED: the measured interval lies
  inside the margin. REFUTED: the two do not overlap. UNDECIDED: everything else, and whenever
  the best rate is at an edge of the rates tried, there are too few seeds, or the task is
  unsuitable.
- **"Exploratory"** marks single verdicts that rest on an estimator which was changed after their
  runs had been seen. They explore until the same question is asked of fresh seeds.
- **WITHDRAWN** stands where an answer does not count, whatever was measured; the reason stands with
  the question.
- **Intervals** cover the spread over seeds and the uncertainty of each method's best learning
  rate, at 95%, or more if the sweep was looked at more than once. Zero-width intervals mark
  exact counts and maxima. All runs of a task are evaluated on the same rows; that sampling
  error is not included.
- **More than one claim.** Primary claims are corrected for multiplicity within one question
  (Holm). Bases are replicates: where a claim has intervals on three or more of one scale, their
  average by a random effect stands beside the single verdicts and changes none of them. Answers
  that must not be judged (a best rate at an edge, too few seeds) are left out of it.
- **Needs** is how many seeds (bases, layer sets) decide a claim in 80% of cases if the value
  and the spread found are the true ones.
- **Answers are not independent.** Questions share runs, and some claims are readings of one
  number."""
CHANGED = """\
Margins never changed. Runs that were added after a look are listed under Details; their sweeps are
judged at the level of two looks. One estimator changed: the rewards of `rl` and
`rl_bits` are read at the best of the stable rates, a rule that was written after runs
of `rl` had been seen, and written again after a review (D96). The verdicts of `rl` that rest on it are exploratory.

In `regime`, the claim about the needed rank over training was stated when one of its data sets had
been seen (D74), and the one about ranks without room when all had been seen (D91). Two claims were
withdrawn after they had been judged: that the needed rank grows with the bits (SUPPORTED, exponent
0.48 [0.35, 0.62]), and that at equal bits the rank of the change does not matter (SUPPORTED). Both
rested on a power law through three data sets, by one count of bits of three. The first pass above
its entropy was counted after a look. Six of eight data sets are trained; after the first, fresh
seeds went to three rates instead of four.

`rank`, `short_runs` and `compute` were asked of runs of `regime` when their final losses had been
seen, so they explore too. Claims that were stated when their answers were known are marked
exploratory. The study's bound on the bits of an episode is read from the upper end of a margin that
was committed as a range."""
"""Only for the page of the kept answers."""


def write(parts: Sequence[Part], path: Path, kept: bool = False) -> None:
    """Write the page and, beside it, its figures; see `page`."""
    folder, inputs = path.parent, inputs_hash(parts)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in (REGRET, FOREST, RATES, SPEED):
        (folder / figure).unlink(missing_ok=True)
    if lines := by_rank.lines_of(parts):
        plots_study.regret_over_rank(lines, folder / REGRET, inputs)
    if rows := rows_of(parts, pooled(parts)):
        plots_study.forest(rows, folder / FOREST, inputs)
    if rates.has_curves(parts):
        plots_study.rates(rates.rate_curves(parts), folder / RATES, inputs)
    if speed.chosen(parts):
        plots.panels(speed.panels(parts), folder / SPEED, inputs)
    path.write_text(page(parts, folder, kept))


def write_kept(kept: Path) -> None:
    """Write the page of the kept answers."""
    write(parts_of([kept]), kept / "README.md", True)


def inputs_hash(parts: Sequence[Part]) -> str:
    """Hash what the page's figures are drawn from: the answers, and which runs they have."""
    texts = [(p.folder / "results.json").read_text() for p in parts]
    return text_hash("".join(texts) + "".join(sorted(i for p in parts for i in p.run_ids)))


def page(parts: Sequence[Part], folder: Path, kept: bool = False) -> str:
    """Render the page of answers.

    Args:
        folder: of the page, from which links lead to the answers.
        kept: say what changed after a look and what was not tested; that is known of the kept
            answers only.
    """
    over_bases = pooled(parts)
    out = ["# When does LoRA match full fine-tuning?", ""]
    for sentence in sentences(parts):
        out += [sentence, ""]
    out += [*_study(parts), SETTINGS, ""]
    if by_rank.lines_of(parts):
        out += _figure("Regret over rank", REGRET, "regret over rank, by condition", REGRET_CAPTION)
    if room := by_rank.room(parts):
        out += ["## Room for what is new", "", ROOM, "", *room, ""]
    if rows_of(parts, over_bases):
        out += _figure("The claims", FOREST, "the claims in units of margins", FOREST_CAPTION)
    if rates.has_curves(parts):
        out += _figure("Learning rates", RATES, "regret over LoRA's rate, by base", RATES_CAPTION)
    if speed.chosen(parts):
        out += _figure("Ranks", SPEED, "speed of each rank over updates", SPEED_CAPTION)
    out += ["## Sentence by sentence", "", LEDGER, "", *ledger(parts), ""]
    if kept:
        out += ["## What was not tested", "", NOT_TESTED, ""]
    out += ["## How to read it", "", HOW_TO_READ, ""]
    if kept:
        out += ["## What changed after a look", "", CHANGED, ""]
    out += ["## Details", ""]
    out += _folded("Runs that were added after a look", _added(parts) if kept else [])
    out += _folded("Best learning rates", rates.best_rates(parts))
    out += _folded("Load and regret of every rank", by_rank.loads(parts))
    out += _folded("Questions, verdicts, figures", details.questions(parts, over_bases, folder))
    out += _folded("Every verdict", details.table(parts))
    return in_words("\n".join(out).rstrip() + "\n")


def _study(parts: Sequence[Part]) -> list[str]:
    runs = len(set().union(*(p.run_ids for p in parts))) if parts else 0
    claims = {(p.results["sweep"], v.claim) for p in parts for v in p.single}
    return [
        '"The study" is [LoRA Without Regret](https://thinkingmachines.ai/blog/lora). Its claims, '
        "and popular ones about the same methods, were judged from runs made for them: "
        f"{len(claims)} claims, {runs:,} runs, all of them in the tables next to this page.",
        "",
    ]


def _added(parts: Sequence[Part]) -> list[str]:
    """List the runs that were added after a look, sweep by sweep."""
    return [f"- `{p.name}`, {line}" for p in parts for line in added_after(p.question)]


def _figure(title: str, name: str, alt: str, caption: str) -> list[str]:
    return [f"## {title}", "", f"![{alt}]({name})", "", caption, ""]


def _folded(title: str, lines: Sequence[str]) -> list[str]:
    """Fold lines away under a title; nothing without lines."""
    if not lines:
        return []
    return [f"<details><summary>{title}</summary>", "", *lines, "", "</details>", ""]
