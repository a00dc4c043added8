"""The learning rate with its interval: measured where this very model was, else what is published.

The interval is the disagreement of the sources, and half a step of their grids each way. A ratio or
rate measured on one size is never carried to another.
"""

import math
from dataclasses import dataclass

from lorasweep.advise.customer import Customer
from lorasweep.advise.kept import Kept
from lorasweep.advise.published import Published
from lorasweep.advise.rules.workload import Workload
from lorasweep.advise.shapes import family_of
from lorasweep.advise.trace import Sure, Trace
from lorasweep.spec.model import ModelSpec

SHORT = 100
"""Updates below which the study says that the ratio is about 15 and not 10, by its authors' word an
anecdote."""
SHORT_FACTOR = 1.5
STEP = 1.8
"""Factor by which a published best rate is uncertain each way: half a step, in the logarithm, of
the coarsest public grid (rates 3.3 apart). Without it 7 of 10 best rates of sources that were held
out lay outside the interval (analysis/results/advice)."""
LAW_WIDTH = 2000
ALPHA = 32


@dataclass(frozen=True)
class Rate:
    """A learning rate to start from."""

    rate: float
    low: float
    high: float
    source: str


def law_rate(published: Published, family: str, hidden: int, method: str) -> float | None:
    """Return the rate of the published law; None if it was taken out of the sources."""
    law = published.law
    if law is None:
        return None
    factor = law["factor"] if method == "lora" else 1
    return float(law["base"] * factor * (LAW_WIDTH / hidden) ** law["exponents"][family])


def rate_of(
    c: Customer,
    model: ModelSpec,
    method: str,
    rank: int,
    work: Workload,
    kept: Kept,
    published: Published,
    trace: Trace,
) -> Rate:
    """Return the rate for LoRA (alpha 32, scaled by alpha / rank) or for full fine-tuning."""
    arm = "full" if method == "full" else "lora"
    measured = _measured(c, model, arm, kept)
    found = measured or _published(c, model, arm, rank, published)
    sure = Sure.MEASURED if measured else Sure.ONCE
    step = 1.0 if measured else STEP
    low, high = min(found.values()) / step, max(found.values()) * step
    middle = [v for name, v in found.items() if name.endswith(", best") or name.startswith("law")]
    if not measured and len(middle) != 1:  # no law, or two families' that disagree
        middle = list(found.values())
    rate = math.exp(sum(map(math.log, middle)) / len(middle))
    short = work.steps is not None and work.steps < SHORT and c.task == "sft" and arm == "lora"
    if short and not measured:
        high *= SHORT_FACTOR
        trace.warn(
            f"{work.steps} updates: below {SHORT} the study saw higher best rates (about "
            f"{SHORT_FACTOR:g} times, an anecdote), so try {high:.2g} as well"
        )
    sources = "; ".join(found)
    keys = [k for k in published.values["sources"] if f"({k})" in sources]
    trace.note(
        "lr",
        rate,
        (
            "the measured best rate"
            if measured
            else "the published law where one family is known, else "
            "the geometric mean; low and high are the ends of the sources, half a step of their "
            "grids further"
        )
        + (f"; high times {SHORT_FACTOR:g} as the run is short" if short and not measured else ""),
        "; ".join(published.where(k) for k in keys) or "analysis/results: lr_ratio",
        sure,
        low=low,
        high=high,
        sources=sources,
        **({"alpha": ALPHA} if arm == "lora" else {}),
    )
    _note_factor(kept, published, trace)
    return Rate(rate, low, high, sources)


def _measured(c: Customer, model: ModelSpec, arm: str, kept: Kept) -> dict[str, float]:
    """Return the ends of the measured best rates of this very model; empty without any."""
    method = "fullft" if arm == "full" else "lora"
    mine = [o for o in kept.optima if o.model == model.name and o.method == method]
    if c.task != "sft" or not mine:
        return {}
    found: dict[str, float] = {}
    for o in mine:
        where = f"lr_ratio at {o.scale} on {o.dataset}"
        ends = {"low end": o.rate.low, "best": o.rate.value, "high end": o.rate.high}
        found |= {f"{where}, {end}": v for end, v in ends.items() if v is not None}
    return found


def _published(
    c: Customer, model: ModelSpec, arm: str, rank: int, published: Published
) -> dict[str, float]:
    found: dict[str, float] = {}
    if c.task == "sft":
        family = family_of(model)
        for name in [family] if family else ["llama", "qwen"]:
            law = law_rate(published, name, model.hidden_size, arm)
            if law is not None:
                found[f"law of {name}s (tinker_law)"] = law
        best = published.best_rate(model.location, rank) if arm == "lora" else None
        if best is not None:
            found[f"best of this model near rank {rank} (tinker_sweep)"] = best
    for e in published.entries("rates", task=c.task, method=arm):
        found[f"{e['what']} ({e['source']})"] = e["rate"]
    return found


def _note_factor(kept: Kept, published: Published, trace: Trace) -> None:
    """Say what is known of the factor between LoRA's best rate and full fine-tuning's."""
    here = [v for v in kept.about("lr_ratio", "ratio") if v.found]
    measured = "; ".join(
        f"{v.found.text()} on {v.group.partition(' ')[0]} ({v.outcome})" for v in here if v.found
    )
    trace.note(
        "lr_factor",
        10,
        "best LoRA rate over best full fine-tuning rate at alpha 32 in SFT; 2 to 4 in RL (zhu). "
        "Measured "
        f"here, and only for these models: {measured or 'nothing kept'}. Outdated: "
        f"{published.values['outdated']}",
        f"{published.where('study')}, its fit to 14 models: 9.8",
        Sure.ONCE,
    )
