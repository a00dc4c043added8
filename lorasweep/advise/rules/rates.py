"""Advise a learning rate and an interval: measured on the customer's model, else published.

The interval spans all sources. For published rates it adds half a step of the grid on both sides.
"""

import math
from dataclasses import dataclass

from lorasweep.advise.evidence import Case, Published, interval_of
from lorasweep.advise.rules.workload import Workload
from lorasweep.spec.model import ModelSpec

SHORT = 100
"""Below this many updates, the study reports an LR ratio of about 15, not 10, as an anecdote."""
SHORT_FACTOR = 1.5
STEP = 1.8
"""Factor by which a published best learning rate is uncertain on both sides: half a step of the
coarsest public grid, whose learning rates are a factor 3.3 apart. Without it, the best learning
rates of 7 of 10 held-out sources lay outside the interval (analysis/results/advice)."""
APART = 3.0
"""Factor between the learning rates that a fleet tries, as in public grids (STEP)."""
MOST_RATES = 9
LAW_WIDTH = 2000
ALPHA = 32


@dataclass(frozen=True)
class Rate:
    """A learning rate to start from."""

    rate: float
    low: float
    high: float
    source: str


def family_of(model: ModelSpec) -> str | None:
    """Return the family in the published law, 'llama' or 'qwen', or None."""
    words = f"{model.name} {model.location}".lower()
    return next((f for f in ("llama", "qwen") if f in words), None)


def law_rate(published: Published, family: str, hidden: int, method: str) -> float | None:
    """Return the learning rate of the published law; None if that source was left out."""
    law = published.values["law"]
    if law is None:
        return None
    factor = law["factor"] if method == "lora" else 1
    return float(law["base"] * factor * (LAW_WIDTH / hidden) ** law["exponents"][family])


def rate_of(case: Case, method: str, rank: int, work: Workload) -> Rate:
    """Return the learning rate of a method: lora (scaling alpha / rank, alpha 32) or full."""
    values, kept = case.known.published.values, case.known.kept
    measured: dict[str, float] = {}  # measured on this model: best LRs and interval ends
    arm = "fullft" if method == "full" else "lora"
    if case.customer.task == "sft":
        for row, best in kept.measured("lr_ratio", "best_lr"):
            if row["base"] != case.model.name or row["arm"].split()[0] != arm:
                continue
            where = f"{row['scale']} on {row['data']}"
            ends = {"low end": best.low, "best": best.value, "high end": best.high}
            measured |= {f"lr_ratio at {where}, {k}": v for k, v in ends.items() if v is not None}
    found = measured or _published(case, method, rank)
    step = 1.0 if measured else STEP
    low, high = min(found.values()) / step, max(found.values()) * step
    middle = [v for name, v in found.items() if name.endswith(", best") or name.startswith("law")]
    if not measured and len(middle) != 1:  # no law, or two families that disagree
        middle = list(found.values())
    rate = math.exp(sum(map(math.log, middle)) / len(middle))
    few = work.steps is not None and work.steps < SHORT
    short = ""
    if few and case.customer.task == "sft" and method == "lora" and not measured:
        high *= SHORT_FACTOR
        short = f"; high times {SHORT_FACTOR:g} as the run is short"
        case.warn("short_run", steps=work.steps, short=SHORT, factor=SHORT_FACTOR, high=high)
    found_in = "; ".join(found)
    inputs = {"low": low, "high": high, "sources": found_in}
    inputs |= {"alpha": ALPHA} if method == "lora" else {}
    sources = "; ".join(text for key, text in values["sources"].items() if f"({key})" in found_in)
    form = "measured" if measured else "published"
    case.note("lr", rate, form, inputs, short=short, sources=sources)
    ratios = "; ".join(
        f"{e.text()} on {v['base']} ({v['outcome']})"
        for v in kept.about("lr_ratio", "ratio")
        if (e := interval_of(v))
    )
    case.note("lr_factor", 10, measured=ratios or "nothing kept", outdated=values["outdated"])
    return Rate(rate, low, high, found_in)


def _published(case: Case, method: str, rank: int) -> dict[str, float]:
    found: dict[str, float] = {}
    task, model, published = case.customer.task, case.model, case.known.published
    if task == "sft":
        family = family_of(model)
        for name in [family] if family else ["llama", "qwen"]:
            law = law_rate(published, name, model.hidden_size, method)
            if law is not None:
                found[f"law of {name}s (tinker_law)"] = law
        table = (published.values["best_rates"] or {"models": {}})["models"]
        if method == "lora" and model.location in table:
            by_rank = table[model.location]
            best = by_rank[min(by_rank, key=lambda r: abs(r - rank))]
            found[f"best of this model near rank {rank} (tinker_sweep)"] = best
    for e in published.entries("rates", task=task, method=method):
        found[f"{e['what']} ({e['source']})"] = e["rate"]
    return found
