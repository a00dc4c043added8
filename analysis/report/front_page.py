"""The findings on the project's front page: five sentences and one small table, with every number
rendered from kept results.

    python -m analysis study --write

The sentences say what was measured and what was claimed, not which of them is right: the verdicts
stand in the table.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.inference.estimate import Verdict, number
from analysis.report.study import Part, parts_of, within
from analysis.report.study_page import figures
from analysis.report.text import markdown, with_block

BEGIN, END = "<!-- answers: made by `python -m analysis study` -->", "<!-- end of answers -->"
FIGURE = "rank-tiny"
"""The answer whose first figure the front page shows."""
TABLE = (
    ("lr_ratio", "ratio"),
    ("rank", "parity"),
    ("compute", "flops_to_loss"),
    ("layers", "attention_worse"),
    ("layers", "mlp_is_enough"),
    ("recipes", "attention_at_full_lr"),
    ("recipes", "alpha_twice_rank"),
)
"""The claims of the table, as (sweep, claim)."""
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
        f"{measured('lr_ratio', 'ratio', real=True)} times on {REAL} in 30 updates; the study says "
        "10, and 15 in short runs.",
        f"At the highest rank tried, LoRA took {slower} times as many updates as full fine-tuning "
        "to the same loss on the small Llamas.",
        "To one loss of full fine-tuning LoRA took "
        f"{measured('compute', 'flops_to_loss')} times the operations; the study counts 0.67.",
        "At equal parameters, LoRA on attention alone learned "
        f"{measured('layers', 'attention_worse')} times as fast as LoRA on the MLP alone, "
        "depending on the task; at equal rank, the MLP alone learned "
        f"{measured('layers', 'mlp_is_enough')} times as fast as both together.",
        "LoRA on attention only, at full fine-tuning's best rate, gave up "
        f"{percent('recipes', 'attention_at_full_lr')} of what tuned LoRA gains; alpha = 2 x rank "
        f"at LoRA's own best rate gave up {percent('recipes', 'alpha_twice_rank')}.",
    ]


def _verdicts(
    parts: Sequence[Part], sweep: str, claim: str, real: bool | None = None
) -> list[Verdict]:
    """Return a claim's verdicts in all answers, by task where there are tasks.

    real: only of the real model, or only of the others.
    """
    found = []
    for part in (p for p in parts if p.results["sweep"] == sweep):
        mine = [v for v in part.verdicts if v.claim == claim]
        mine = mine[1:] if part.overall(claim) else mine
        found += [v for v in mine if real is None or v.group.startswith(REAL) == real]
    return found


def _span(verdicts: Sequence[Verdict], shown: Callable[[float], str]) -> str:
    known = [v.estimate.value for v in verdicts if v.estimate.value is not None]
    if not known:
        return "(not measured)"
    low, high = sorted((shown(min(known)), shown(max(known))), key=lambda t: float(t.rstrip("%")))
    return low if low == high else f"{low} to {high}"


def rows(parts: Sequence[Part]) -> list[list[str]]:
    """Return the table, its head first: one row a claim."""
    out = [["claim", "counts as yes", "measured", "verdicts"]]
    for sweep, claim in TABLE:
        found = _verdicts(parts, sweep, claim)
        if not found:
            continue
        part = next(p for p in parts if p.results["sweep"] == sweep)
        counts = Counter(v.outcome for v in found)
        verdicts = ", ".join(f"{n} {o}" for o, n in sorted(counts.items()))
        span = _span(found, lambda value: number(value))
        out.append([f"{part.says(claim)} (`{sweep}`)", within(found[0]), span, verdicts])
    return out


def block(parts: Sequence[Part], root: str) -> list[str]:
    """Return the lines of the front page's block; links to answers begin with root."""
    out = [f"{k}. {sentence}" for k, sentence in enumerate(sentences(parts), 1)]
    out += ["", *markdown(rows(parts)), ""]
    for part in (p for p in parts if p.name == FIGURE):
        out += figures(part, root)[:3]
    return out


def readme(text: str, kept: Path) -> str:
    """Return the project's README with its block made anew from the kept results."""
    return with_block(text, BEGIN, END, block(parts_of([kept]), "analysis/results/"))
