"""Question: does LoRA fall behind full fine-tuning as the batch grows, at any rank.

The effect of the batch on rho (step efficiency) is measured apart from that of the number of
updates, from all prefixes of all runs (`measures.batch_effect`). Beside it stands what LoRA gives
up in nats at each batch after equally many examples, the study's setting. Each method is at its
best rate for the batch and the number of updates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.decide import at_level, look_level
from analysis.inference.estimate import Estimate, number, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures.batch_effect import (
    Prefix,
    difference,
    effect,
    gaps_at_equal_examples,
    prefixes_of,
)
from analysis.measures.regret import ALLOWED, Gap, mean_of
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    claims_about,
    correct,
    distinct,
    fewest_seeds,
    gates_on_gap,
    gates_on_speed,
    judge_claims,
)
from analysis.runs.lr_curves import lr_curves

AT = (32, 256, 512, 1024)
"""Batches of which popular summaries speak."""
ESTIMANDS = ("batch_effect", "batch_effect_difference", *(f"over_allowed_at_{b}" for b in AT))
LOG_ESTIMANDS: tuple[str, ...] = ()
Answer = tuple[Estimate, list[Gate], list[Optimum]]
"""What was measured, what forbids a verdict, and the optima that it rests on."""
Gaps = dict[int, list[Gap]]
"""By batch, the gap of each rank."""


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge the effect of the batch, its difference between ranks, and popular thresholds."""
    optima = fit_all(lr_curves(table))
    group = f"{optima[0].curve.key['model']} on {optima[0].curve.key['dataset']}"
    ranks = sorted({int(o.curve.key["rank"]) for o in optima if o.curve.key["method"] == "lora"})
    batches = sorted({int(b) for b in table["batch_size"]})
    prefixes = prefixes_of(table)
    examples, gaps = gaps_at_equal_examples(table)
    answers = {
        "batch_effect": _effect(prefixes, ranks, batches),
        "batch_effect_difference": _difference(prefixes, ranks, batches),
        **{f"over_allowed_at_{b}": _over_allowed(gaps, b) for b in AT},
    }
    verdicts = []
    for estimand in dict.fromkeys(c["estimand"] for c in question["claims"].values()):
        measured = {e: (estimate, gates) for e, (estimate, gates, _) in answers.items()}
        seeds = fewest_seeds(answers[estimand][2]) if estimand in answers else 0
        asked = claims_about(question, estimand)
        verdicts += judge_claims(asked, measured, LOG_ESTIMANDS, group, seeds)
    effects = {r: effect(_usable(prefixes, r)) for r in ranks}
    sections = [
        _over_updates(prefixes, effects),
        _at_equal_examples(gaps, examples),
        Section(
            "Batch size",
            figure="batch.png",
            panels=[*(_panel(prefixes, r) for r in ranks), _regret_panel(gaps, examples)],
            caption="step efficiency over updates by batch, and regret over the batch",
        ),
    ]
    level = look_level(int(question.get("rounds", 1)))
    measures = {
        "batch_effect": {str(r): e.plain() for r, e in effects.items()},
        "regrets": [
            {
                "batch_size": batch,
                "updates": examples // batch,
                "rank": g.rank,
                "regret_percent": at_level(g.percent(), level).plain(),
            }
            for batch, of_ranks in gaps.items()
            for g in of_ranks
        ],
        "read": _read(prefixes, effects, examples),
    }
    return Analysis(optima, correct(verdicts, question), sections, measures, {group: optima})


# ---------------------------------------------------------------- what is measured


def _effect(prefixes: Sequence[Prefix], ranks: Sequence[int], batches: Sequence[int]) -> Answer:
    """Measure the effect of the batch at the highest rank."""
    top = ranks[-1] if ranks else 0
    used = _usable(prefixes, top)
    return effect(used), _gates(prefixes, top, batches), _optima(used)


def _difference(prefixes: Sequence[Prefix], ranks: Sequence[int], batches: Sequence[int]) -> Answer:
    """Measure the effect at the highest rank minus that at the lowest."""
    if len(ranks) < 2:
        return Estimate(None), [Gate(GateCode.ONE_RANK)], []
    high, low = (_usable(prefixes, r) for r in (ranks[-1], ranks[0]))
    gates = [g for r in (ranks[0], ranks[-1]) for g in _gates(prefixes, r, batches)]
    return difference(high, low), list(dict.fromkeys(gates)), _optima([*high, *low])


def _over_allowed(gaps: Gaps, batch: int) -> Answer:
    """Measure the highest rank's gap minus what is allowed, at the largest batch up to `batch`.

    Batches below half of `batch` do not count.
    """
    near = [b for b in gaps if batch / 2 <= b <= batch and gaps[b]]
    if not near:
        return Estimate(None), [Gate(GateCode.MISSING, f"batch {batch}")], []
    gap = max(gaps[max(near)], key=lambda g: g.rank)
    return gap.over_allowed(), gates_on_gap(gap), [gap.lora, gap.full]


def _usable(prefixes: Sequence[Prefix], rank: int) -> list[Prefix]:
    """Return the prefixes of a rank that may bear a verdict: optima are known, rho is no bound."""
    return [
        p
        for p in prefixes
        if p.rank == rank and not p.bound and not gates_on_speed([p.full, p.lora])
    ]


def _gates(prefixes: Sequence[Prefix], rank: int, batches: Sequence[int]) -> list[Gate]:
    """List what forbids a verdict about the effect of the batch at one rank.

    Every batch has to take part: with some prefix of its own, beside another batch's.
    """
    mine = [p for p in prefixes if p.rank == rank]
    used = _usable(prefixes, rank)
    seen = {b: {p.steps for p in used if p.batch == b} for b in batches}
    found: list[Gate] = []
    for batch in batches:
        if any(seen[batch] & seen[b] for b in batches if b != batch):
            continue
        place = f"batch {batch}, "
        longest = max((p for p in mine if p.batch == batch), key=lambda p: p.steps, default=None)
        closed = gates_on_speed([longest.full, longest.lora]) if longest else []
        if longest and longest.bound:
            closed.append(Gate(GateCode.ONLY_A_BOUND, place=f"rank {rank}: "))
        absent = Gate(GateCode.MISSING, f"rank {rank} beside another batch after equal updates")
        found += [g.at(place) for g in closed or [absent]]
    return found


def _optima(prefixes: Sequence[Prefix]) -> list[Optimum]:
    return distinct(o for p in prefixes for o in (p.full, p.lora))


def _read(
    prefixes: Sequence[Prefix], effects: dict[int, Estimate], examples: int
) -> dict[str, str]:
    """Describe where each estimand was measured, with the other ranks' effects."""
    if not effects:
        return {}
    *others, top = effects
    at = f"after {examples:,} examples"
    return {
        "batch_effect": "; ".join(
            [
                f"rank {top}, {_range(_usable(prefixes, top))}",
                *(f"rank {r}: {with_interval(effects[r])}" for r in others),
            ]
        ),
        **{f"over_allowed_at_{b}": f"rank {top}, {at}" for b in AT},
    }


def _range(used: Sequence[Prefix]) -> str:
    """Describe the batches and numbers of updates of prefixes."""
    if not used:
        return "no prefix"
    batches, steps = ({getattr(p, k) for p in used} for k in ("batch", "steps"))
    return f"batches of {min(batches)} to {max(batches)} after {min(steps)} to {max(steps)} updates"


# ---------------------------------------------------------------- what is shown


def _over_updates(prefixes: Sequence[Prefix], effects: dict[int, Estimate]) -> Section:
    batches = sorted({p.batch for p in prefixes})
    rows = [["rank", "updates", *(f"rho at batch {b} [95%]" for b in batches)]]
    for rank in effects:
        used = {(p.steps, p.batch): with_interval(p.rho) for p in _usable(prefixes, rank)}
        for steps in sorted({s for s, _ in used}):
            shown = [used.get((steps, b), "-") for b in batches]
            rows.append([str(rank), str(steps), *shown])
    text = [
        "Change of ln(rho) per doubling of the batch, between batches after equally many updates: "
        + "; ".join(f"rank {r} {with_interval(e)}" for r, e in effects.items())
        + ".",
        "A batch is left out where its best rates, after so many updates, are not between the "
        "rates tried, or have fewer seeds than a verdict needs.",
    ]
    return Section("At equal updates", rows, text)


def _at_equal_examples(gaps: Gaps, examples: int) -> Section:
    rows = [["batch", "updates", "rank", "gain of FullFT", "regret, % of the gain [95%]"]]
    for batch, of_ranks in gaps.items():
        for g in of_ranks:
            gain = number(mean_of(g.gain))
            regret = with_interval(g.percent())
            rows.append([str(batch), str(examples // batch), str(g.rank), gain, regret])
    text = (
        f"After {examples:,} examples at every batch. Regret: LoRA's loss minus full fine-tuning's,"
        f" in percent of what full fine-tuning gains; up to {ALLOWED:.0%} counts as none."
    )
    return Section("At equal examples", rows, [text])


def _panel(prefixes: Sequence[Prefix], rank: int) -> Panel:
    used = _usable(prefixes, rank)
    series = []
    for batch in sorted({p.batch for p in used}):
        mine = [p for p in used if p.batch == batch]
        label = f"batch {batch}"
        series.append(Series.of(label, [p.steps for p in mine], [p.rho for p in mine]))
    return Panel(
        f"rank {rank}",
        "updates",
        "rho: FullFT's updates / LoRA's",
        series,
        log_x=True,
        log_y=True,
        lines={"full fine-tuning": 1.0},
    )


def _regret_panel(gaps: Gaps, examples: int) -> Panel:
    series = []
    for rank in sorted({g.rank for of_ranks in gaps.values() for g in of_ranks}):
        mine = [
            (b, g.percent()) for b, of_ranks in gaps.items() for g in of_ranks if g.rank == rank
        ]
        series.append(Series.of(f"rank {rank}", [b for b, _ in mine], [e for _, e in mine]))
    return Panel(
        f"after {examples:,} examples",
        "batch size (sequences)",
        "regret, % of full fine-tuning's gain",
        series,
        log_x=True,
        band=(0.0, 100 * ALLOWED),
        ticks=[(float(b), str(b)) for b in gaps],
    )
