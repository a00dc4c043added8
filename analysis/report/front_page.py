"""Five sentences on the project's front page, their numbers rendered from kept results.

    python -m analysis study --write

The sentences give what was measured and what was claimed; the verdicts are on the study's page.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.inference.estimate import Verdict, number
from analysis.report.study import Part, parts_of
from analysis.report.study_page import figures
from analysis.report.text import with_block

BEGIN, END = "<!-- answers: made by `python -m analysis study` -->", "<!-- end of answers -->"
FIGURE = "rank-tiny"
"""The answer whose first figure the front page shows."""
REAL = "smollm2-135m-instruct"


def sentences(parts: Sequence[Part]) -> list[str]:
    """Return five sentences."""

    def measured(sweep: str, claim: str, real: bool | None = None) -> str:
        found = _verdicts(parts, sweep, claim, real)
        return _span(found, lambda value: number(value))

    def percent(sweep: str, claim: str) -> str:
        return _span(_verdicts(parts, sweep, claim), lambda value: f"{100 * value:.0f}%")

    slower = _span(_verdicts(parts, "rank", "parity"), lambda value: number(1 / value))
    return [
        f"LoRA's best learning rate was {measured('lr_ratio', 'ratio', real=False)} times full "
        f"fine-tuning's on small Llamas pretrained on a synthetic language, and "
        f"{measured('lr_ratio', 'ratio', real=True)} times "
        f"({_intervals(_verdicts(parts, 'lr_ratio', 'ratio', True))}) on {REAL} in a short run of "
        "30 updates; the study predicts 10, and about 15 for short runs.",
        f"Even at the highest rank tried, LoRA needed {slower} times as many updates as full "
        "fine-tuning to reach the same loss on the small Llamas. The study claims parity only "
        "while the data fit the adapter, which these soon do not.",
        "To reach the same loss, LoRA needed "
        f"{measured('compute', 'flops_to_loss')} times the operations of full fine-tuning; the "
        "study's formula gives 0.67 an update.",
        "At equal parameters, adapters on the attention matrices alone learned at "
        f"{measured('layers', 'attention_worse')} times the speed of adapters on the MLP alone, "
        "depending on the task; at equal rank, the MLP alone learned at "
        f"{measured('layers', 'mlp_is_enough')} times the speed of both together.",
        "Adapters on attention only, at full fine-tuning's best rate, lost "
        f"{percent('recipes', 'attention_at_full_lr')} of the loss reduction that tuned LoRA "
        f"reaches; setting alpha to twice the rank lost {percent('recipes', 'alpha_twice_rank')}.",
    ]


def _verdicts(
    parts: Sequence[Part], sweep: str, claim: str, real: bool | None = None
) -> list[Verdict]:
    """Return a claim's verdicts in all answers; by task, if there are several tasks.

    Args:
        real: True: only those of the real model; False: only the others; None: all.
    """
    found = []
    for part in (p for p in parts if p.results["sweep"] == sweep):
        if real is not None and (REAL in part.bases) != real:
            continue
        mine = [v for v in part.verdicts if v.claim == claim]
        found += mine[1:] if part.overall(claim) else mine
    return found


def _span(verdicts: Sequence[Verdict], shown: Callable[[float], str]) -> str:
    known = [v.estimate.value for v in verdicts if v.estimate.value is not None]
    if not known:
        return "(not measured)"
    low, high = sorted((shown(min(known)), shown(max(known))), key=lambda t: float(t.rstrip("%")))
    return low if low == high else f"{low} to {high}"


def _intervals(verdicts: Sequence[Verdict]) -> str:
    return ", ".join(
        f"interval {number(v.estimate.low)} to {number(v.estimate.high)}"
        for v in verdicts
        if v.estimate.low is not None and v.estimate.high is not None
    )


def block(parts: Sequence[Part], root: str) -> list[str]:
    """Return the lines of the front page's block; links to answers begin with root."""
    out = [f"{k}. {sentence}" for k, sentence in enumerate(sentences(parts), 1)]
    out.append("")
    for part in (p for p in parts if p.name == FIGURE):
        out += figures(part, root)[:3]
    return out


def readme(text: str, kept: Path) -> str:
    """Return the project's README with its findings rendered again from the kept results."""
    return with_block(text, BEGIN, END, block(parts_of([kept]), "analysis/results/"))
