"""What was found, in eight findings at most, and which answers are withdrawn.

Every number is picked from an answer by its claim. A finding without an answer is left out. Its
wording follows from the verdicts, so that a verdict that turns changes it. Answers that differ in
base, rank or length are never in one sentence.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from analysis.inference.estimate import Estimate, Verdict, number
from analysis.measures.regret import ALLOWED, COUNTS
from analysis.report.study.answers import Part, estimate_of
from analysis.report.study.by_rank import (
    BATCHES,
    CONTROL,
    REGIME,
    cells_with_bits,
    controls_of,
)
from analysis.report.study.wording import (
    Found,
    change,
    count,
    each,
    found,
    lead,
    listed,
    lowest_rank,
    of_claim,
    percent,
    signed,
    where,
    with_unit,
)

FULL = " times full fine-tuning's"
EIGHTH = 8
"""The claims of `regime` are about ranks of this fraction of the width."""


def sentences(parts: Sequence[Part]) -> list[str]:
    """Return the findings, the one about the regime first."""
    first = (_regime, _room, _rates, _speed, _batches, _layers)
    texts = [text for write in (*first, _rewards, _compute) if (text := write(parts))]
    return texts + _withdrawn(parts)


def _withdrawn(parts: Sequence[Part]) -> list[str]:
    """Say which answers are withdrawn and why, one sentence for each sweep."""
    why = {p.results["sweep"]: p.question["withdrawn"] for p in parts if p.withdrawn}
    return [f"**The answer of `{sweep}` is withdrawn**: {text}." for sweep, text in why.items()]


# ---------------------------------------------------------------- regret over rank


def _regime(parts: Sequence[Part]) -> str:
    low, beyond = found(parts, REGIME, "low"), found(parts, REGIME, "beyond")
    if not low:
        return ""
    controls = [(c, p) for c, p in controls_of(parts) if _is_eighth(p, max(c.regrets))]
    judged = [*low, *(found([p for _, p in controls], BATCHES, f"at_{CONTROL}"))]
    said = [
        lead(
            judged,
            "Where only rules are new, a rank of an eighth of the width has no regret",
            "Where only rules are new, a rank of an eighth of the width has regret",
            "Where only rules are new, a rank of an eighth of the width has no regret on some "
            "bases and data sets",
            "Whether a rank of an eighth of the width has regret where only rules are new is open",
        ),
        *_regrets(low),
        *(
            f"On {line.base} (rank {rank}, {line.updates} updates of {line.batch_size}) it was "
            f"{_percent(line.regrets[rank])}"
            for line, _ in controls
            for rank in [max(line.regrets)]
        ),
        *_regrets(beyond, ", where lists are new too,"),
    ]
    return ". ".join(said) + "."


def _is_eighth(part: Part, rank: int) -> bool:
    return rank * EIGHTH == part.runs["hidden_size"].max()


def _regrets(verdicts: Found, also: str = "") -> list[str]:
    """Return a sentence for each base, rank and length, with the regret on each data set."""
    by_place: dict[str, list[str]] = {}
    for part, v in verdicts:
        cell, row = _at_eighth(part, v)
        if row is not None:
            rows = f" of {cell['batch_size']}" if cell.get("batch_size") else ""
            base = cell["cell"].partition(",")[0]
            place = f"{base} (rank {row['rank']}, {cell['updates']} updates{rows})"
            regret = estimate_of(row["regret_percent"])
            by_place.setdefault(place, []).append(_percent(regret))
    start = "Its regret" if not also else "Regret"
    return [
        f"{start} on {place}{also} was {listed(values)} of full fine-tuning's gain"
        for place, values in by_place.items()
    ]


def _at_eighth(part: Part, v: Verdict) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return a verdict's cell, and in it the smallest rank of an eighth of the width or more."""
    width = part.runs["hidden_size"].max()
    cells: list[dict[str, Any]] = part.results["cells"]
    cell = next((c for c in cells if c["cell"] == v.group), {})
    ranks = [r for r in cell.get("ranks", ()) if r["rank"] >= width / EIGHTH]
    return cell, ranks[0] if ranks else None


def _percent(e: Estimate) -> str:
    return with_unit(percent, "%")(e) if e.has_interval() else f"{percent(e.value or 0.0)}%"


def _room(parts: Sequence[Part]) -> str:
    """Say at which loads the needed rank is, by every count; of cells of one base and length."""
    cells = [c for c in cells_with_bits(parts) if c["rank_interpolated"]["value"] is not None]
    lengths = {(c["cell"].partition(",")[0], c["updates"]) for c in cells}
    if len(lengths) != 1 or len(cells) < 2:
        return ""
    ((base, updates),) = lengths
    spans = {
        count: [v for c in cells if (v := c["loads_needed"][count]["value"]) is not None]
        for count in COUNTS
    }
    spans = {count: values for count, values in spans.items() if values}
    if set(spans) != set(COUNTS):
        return ""
    ends = sorted((min(values), max(values)) for values in spans.values())
    apart = all(low > high for (_, high), (low, _) in itertools.pairwise(ends))
    ranks = [c["rank_interpolated"]["value"] for c in cells]
    loads = [f"{_span(values)} by {COUNTS[count]}" for count, values in spans.items()]
    return (
        f"**Whether an adapter has room for the data {'depends' if apart else 'hardly depends'} on "
        f"how bits are counted**. On {base} after {updates} updates a regret of {100 * ALLOWED:g}% "
        f"takes ranks of {_span(ranks)}, on {len(cells)} data sets. At 2 bits a parameter their "
        f"load is {listed(loads)}; the last count was chosen after a look."
    )


def _span(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(number(v, 2) for v in (min(values), max(values))))


# ---------------------------------------------------------------- the other findings


def _rates(parts: Sequence[Part]) -> str:
    ratio, order = found(parts, "lr_ratio", "ratio"), found(parts, "lr_ratio", "order")
    if not ratio or not order:
        return ""
    start = lead(
        order,
        "LoRA's best learning rate is of the order of ten times full fine-tuning's",
        "LoRA's best learning rate is not of the order of ten times full fine-tuning's",
        "LoRA's best learning rate is of the order of ten times full fine-tuning's in some "
        "settings only",
        "Whether LoRA's best learning rate is of the order of ten times full fine-tuning's is open",
    )
    said = f"{start}. {each(ratio, 'The ratio was', with_unit(number))}"
    cost = found(parts, "lr_ratio", "ten_times")
    show = with_unit(percent, "% of the gain")
    return said + (f" {each(cost, 'Regret at exactly ten times was', show)}" if cost else "")


def _speed(parts: Sequence[Part]) -> str:
    def updates(e: Estimate) -> str:
        return with_unit(number, FULL)(_inverse(e))

    return of_claim(
        found(parts, "rank", "parity"),
        "LoRA's highest rank learns as fast as full fine-tuning",
        "Even LoRA's highest rank learns more slowly than full fine-tuning",
        "LoRA's highest rank learns as fast as full fine-tuning in some settings only",
        "Whether LoRA's highest rank learns as fast as full fine-tuning is open",
        "The number of updates to the same loss was",
        updates,
    )


def _inverse(e: Estimate) -> Estimate:
    low, value, high = (None if v is None else 1 / v for v in (e.high, e.value, e.low))
    return Estimate(value, low, high, e.n)


def _batches(parts: Sequence[Part]) -> str:
    said = of_claim(
        found(parts, "batch_size", "penalty"),
        "Large batches slow LoRA more than full fine-tuning",
        "Large batches do not slow LoRA more than full fine-tuning",
        "Large batches slow LoRA more than full fine-tuning in some settings only",
        "Whether large batches slow LoRA more than full fine-tuning is open",
        "The change of LoRA's speed over full fine-tuning's with each doubling was",
        with_unit(change, "%"),
    )
    control = found(parts, BATCHES, f"at_{CONTROL}")
    if said and control and count(control, "SUPPORTED") < len(control):
        bases = listed([where(p, v).partition(" (")[0] for p, v in control])
        has = "has" if count(control, "REFUTED") else "may have"
        said += (
            f" Batches of 512 and more on {bases} say nothing of it: their control, a batch of "
            f"{CONTROL}, {has} regret as well."
        )
    return said


def _layers(parts: Sequence[Part]) -> str:
    worse = found(parts, "layers", "attention_worse")
    return of_claim(
        worse,
        "Adapters on attention alone learn more slowly than on the MLP alone",
        "Adapters on attention alone do not learn more slowly than on the MLP alone",
        f"Adapters on attention alone learn more slowly than on the MLP alone on "
        f"{count(worse, 'SUPPORTED')} of {len(worse)} tasks",
        "Whether adapters on attention alone learn more slowly than on the MLP alone is open",
        "At equal parameters the speed of the one over the other was",
        with_unit(number),
        _of_equal_parameters,
    )


def _of_equal_parameters(part: Part, v: Verdict) -> str:
    """Name the ranks of attention and MLP that have equally many parameters."""
    ranks = (part.results.get("ranks") or {}).get(v.group)
    return listed([f"{k} at rank {r}" for k, r in ranks.items()]) if ranks else "all ranks"


def _rewards(parts: Sequence[Part]) -> str:
    points = with_unit(signed, " points")
    one = found(parts, "rl", "rank_1")
    said = of_claim(
        one,
        "From rewards rank 1 learns as much as full fine-tuning",
        "From rewards rank 1 does not learn as much as full fine-tuning",
        "From rewards rank 1 learns as much as full fine-tuning in some settings only",
        "Whether rank 1 learns as much from rewards as full fine-tuning is open",
        "The difference of the final reward was",
        points,
        lowest_rank,
    )
    top = found(parts, "rl", "top_rank")
    if said and top:
        said += f" {each(top, 'The difference was', points)}"
    few = [r for p, v in one if (r := p.parameters_an_episode(v)) is not None and r < 1]
    if few:
        said += (
            " The study says so of more parameters than episodes; here rank 1 has "
            f"{_span(few)} parameters an episode."
        )
    return said


def _compute(parts: Sequence[Part]) -> str:
    return of_claim(
        found(parts, "compute", "flops_to_loss"),
        "LoRA saves a third of the work",
        "LoRA does not save a third of the work",
        "LoRA saves a third of the work in some settings only",
        "Whether LoRA saves a third of the work is open",
        "The number of operations to the same loss was",
        with_unit(number, FULL),
    )
