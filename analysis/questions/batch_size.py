"""Question: does LoRA fall behind full fine-tuning as the batch grows, at any rank.

The effect of the batch on rho (step efficiency) is measured apart from that of the number of
updates, from all prefixes of all runs (`measures.batch_effect`). The regret in nats at each batch
after equally many examples, the study's setting, is shown too. Each method is at its optimal
learning rate for the batch and the number of updates.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.inference.decide import at_level
from analysis.inference.estimate import Estimate, number, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures import batch_effect
from analysis.measures.at_best import mean_of
from analysis.measures.regret import ALLOWED, Gap
from analysis.optimum.fit import fit_all
from analysis.questions import base
from analysis.runs.lr_curves import lr_curves

AT = (32, 256, 512, 1024)
"""Batches of which popular summaries speak."""


class Batches(base.Condition):
    """All batch sizes of one model and data set."""

    @cached_property
    def ranks(self) -> list[int]:
        """The ranks tried, rising."""
        return sorted(self.lora)

    @cached_property
    def batches(self) -> list[int]:
        """The batch sizes tried, rising."""
        return sorted({int(b) for b in self.runs["batch_size"]})

    @cached_property
    def prefixes(self) -> list[batch_effect.Prefix]:
        """rho after every number of updates that two batch sizes share."""
        return batch_effect.prefixes_of(self.runs)

    @cached_property
    def _usable(self) -> list[batch_effect.Prefix]:
        return [
            p for p in self.prefixes if not p.bound and not base.gates_on_speed([p.full, p.lora])
        ]

    def usable(self, *ranks: int) -> list[batch_effect.Prefix]:
        """Return the prefixes of ranks with known optima and a value of rho."""
        return [p for p in self._usable if p.rank in ranks]

    @cached_property
    def effects(self) -> dict[int, Estimate]:
        """The effect of the batch by rank."""
        return {r: batch_effect.effect(self.usable(r)) for r in self.ranks}

    def difference(self) -> Estimate:
        """Return the effect at the highest rank minus that at the lowest."""
        low, high = self.ranks[0], self.ranks[-1]
        return (
            batch_effect.difference(self.usable(high), self.usable(low))
            if low < high
            else base.UNKNOWN
        )

    def gates_on_difference(self) -> list[Gate]:
        """List the gates of both ranks."""
        if len(self.ranks) < 2:
            return [Gate(GateCode.ONE_RANK)]
        ends = (self.ranks[0], self.ranks[-1])
        return list(dict.fromkeys(g for r in ends for g in self.gates_on_effect(r)))

    def gates_on_effect(self, rank: int) -> list[Gate]:
        """List what forbids a verdict about the effect of the batch at one rank.

        Every batch has to take part: at least one of its prefixes is beside another batch's.
        """
        mine = [p for p in self.prefixes if p.rank == rank]
        seen = {b: {p.steps for p in self.usable(rank) if p.batch == b} for b in self.batches}
        found: list[Gate] = []
        for batch in self.batches:
            if any(seen[batch] & seen[b] for b in self.batches if b != batch):
                continue
            of_batch = (p for p in mine if p.batch == batch)
            longest = max(of_batch, key=lambda p: p.steps, default=None)
            closed = base.gates_on_speed([longest.full, longest.lora]) if longest else []
            if longest and longest.bound:
                closed.append(Gate(GateCode.ONLY_A_BOUND, place=f"rank {rank}: "))
            absent = base.missing(f"rank {rank} beside another batch after equal updates")
            found += [g.at(f"batch {batch}, ") for g in closed or absent]
        return found

    def seeds_of(self, *ranks: int) -> int:
        """Return the number of seeds behind the effects at these ranks."""
        return base.fewest_seeds(
            base.distinct(o for p in self.usable(*ranks) for o in (p.full, p.lora))
        )

    @cached_property
    def at_equal_examples(self) -> tuple[int, dict[int, list[Gap]]]:
        """A number of examples, and by batch the gap of each rank after them."""
        return batch_effect.gaps_at_equal_examples(self.runs)

    def gap_at(self, batch: int) -> Gap | None:
        """Return the highest rank's gap at the largest batch up to `batch`.

        Batches below half of `batch` do not count.
        """
        gaps = self.at_equal_examples[1]
        near = [b for b in gaps if batch / 2 <= b <= batch and gaps[b]]
        return max(gaps[max(near)], key=lambda g: g.rank) if near else None


def conditions(table: pd.DataFrame) -> list[Batches]:
    """Return the one condition of a model and data set."""
    optima = fit_all(lr_curves(table))
    key = optima[0].curve.key
    return [Batches(f"{key['model']} on {key['dataset']}", table, optima)]


def _range(used: Sequence[batch_effect.Prefix]) -> str:
    """Describe the batches and numbers of updates of prefixes."""
    if not used:
        return "no prefix"
    batches, steps = ({getattr(p, k) for p in used} for k in ("batch", "steps"))
    return f"batches of {min(batches)} to {max(batches)} after {min(steps)} to {max(steps)} updates"


def _where(c: Batches) -> str:
    """Describe where the effect was measured, with the other ranks' effects."""
    if not c.ranks:
        return ""
    *others, top = c.ranks
    effects = (f"rank {r}: {with_interval(c.effects[r])}" for r in others)
    return "; ".join([f"rank {top}, {_range(c.usable(top))}", *effects])


def _over_allowed(batch: int) -> base.Estimand[Batches]:
    """Return the regret minus what is allowed at a batch size."""

    return base.Estimand(
        f"over_allowed_at_{batch}",
        lambda c: gap.over_allowed() if (gap := c.gap_at(batch)) else None,
        lambda c: base.gates_on_gap(gap) if (gap := c.gap_at(batch)) else [],
        absent=f"batch {batch}",
        seeds=lambda c: base.fewest_seeds([gap.lora, gap.full]) if (gap := c.gap_at(batch)) else 0,
        read=lambda c: f"rank {c.top}, after {c.at_equal_examples[0]:,} examples",
    )


# ---------------------------------------------------------------- the report


def sections(found: Sequence[Batches], asked: base.Asked) -> list[base.Section]:
    """Return rho at equal updates, regret at equal examples, and their figure."""
    (c,) = found
    panels = [*(_panel(c, r) for r in c.ranks), _regret_panel(c)]
    caption = "step efficiency over updates by batch, and regret over the batch"
    figure = base.Section("Batch size", figure="batch.png", panels=panels, caption=caption)
    return [_at_equal_updates(c), _at_equal_examples(c), figure]


def _at_equal_updates(c: Batches) -> base.Section:
    batches = sorted({p.batch for p in c.prefixes})
    rows = [["rank", "updates", *(f"rho at batch {b} [95%]" for b in batches)]]
    for rank in c.ranks:
        used = {(p.steps, p.batch): with_interval(p.rho) for p in c.usable(rank)}
        for steps in sorted({s for s, _ in used}):
            rows.append([str(rank), str(steps), *(used.get((steps, b), "-") for b in batches)])
    effects = "; ".join(f"rank {r} {with_interval(e)}" for r, e in c.effects.items())
    text = [
        "Change of ln(rho) per doubling of the batch, between batches after equally many updates: "
        f"{effects}.",
        "A batch is left out where its optimal learning rates, after so many updates, are not "
        "between those tried, or have fewer seeds than a verdict needs.",
    ]
    return base.Section("At equal updates", rows, text)


def _at_equal_examples(c: Batches) -> base.Section:
    examples, gaps = c.at_equal_examples
    rows = [["batch", "updates", "rank", "gain of FullFT", "regret, % of the gain [95%]"]]
    for batch, g in ((b, g) for b, of_ranks in gaps.items() for g in of_ranks):
        shown = [number(mean_of(g.gain)), with_interval(g.percent())]
        rows.append([str(batch), str(examples // batch), str(g.rank), *shown])
    text = (
        f"After {examples:,} examples at every batch. Regret: LoRA's loss minus full fine-tuning's,"
        f" in percent of what full fine-tuning gains; up to {ALLOWED:.0%} counts as none."
    )
    return base.Section("At equal examples", rows, [text])


def _panel(c: Batches, rank: int) -> base.Panel:
    used = c.usable(rank)
    of_batch = {b: [p for p in used if p.batch == b] for b in sorted({p.batch for p in used})}
    return base.Panel(
        f"rank {rank}",
        "updates",
        "rho: FullFT's updates / LoRA's",
        [
            base.Series.of(f"batch {b}", [p.steps for p in mine], [p.rho for p in mine])
            for b, mine in of_batch.items()
        ],
        log_x=True,
        log_y=True,
        lines={"full fine-tuning": 1.0},
    )


def _regret_panel(c: Batches) -> base.Panel:
    examples, gaps = c.at_equal_examples
    by_rank: dict[int, dict[int, Estimate]] = {}
    for batch, g in ((b, g) for b, of_ranks in gaps.items() for g in of_ranks):
        by_rank.setdefault(g.rank, {})[batch] = g.percent()
    return base.Panel(
        f"after {examples:,} examples",
        "batch size (sequences)",
        "regret, % of full fine-tuning's gain",
        [
            base.Series.of(f"rank {rank}", list(mine), list(mine.values()))
            for rank, mine in sorted(by_rank.items())
        ],
        log_x=True,
        band=(0.0, 100 * ALLOWED),
        ticks=[(float(b), str(b)) for b in gaps],
    )


def measures(found: Sequence[Batches], asked: base.Asked) -> dict[str, Any]:
    """Return the effects by rank, and the regrets by batch and rank."""
    (c,) = found
    examples, gaps = c.at_equal_examples
    regrets = [
        {
            "batch_size": batch,
            "updates": examples // batch,
            "rank": g.rank,
            "regret_percent": at_level(g.percent(), asked.level).plain(),
        }
        for batch, of_ranks in gaps.items()
        for g in of_ranks
    ]
    effects = {str(r): e.plain() for r, e in c.effects.items()}
    return {"batch_effect": effects, "regrets": regrets}


QUESTION = base.Question[Batches](
    estimands=[
        base.Estimand(
            "batch_effect",
            lambda c: c.effects.get(c.top, base.UNKNOWN),
            lambda c: c.gates_on_effect(c.top),
            seeds=lambda c: c.seeds_of(c.top),
            read=_where,
        ),
        base.Estimand(
            "batch_effect_difference",
            lambda c: c.difference() if c.ranks else base.UNKNOWN,
            Batches.gates_on_difference,
            seeds=lambda c: c.seeds_of(*c.ranks[:1], *c.ranks[-1:]) if len(c.ranks) > 1 else 0,
        ),
        *(_over_allowed(batch) for batch in AT),
    ],
    conditions=conditions,
    sections=sections,
    measures=measures,
    split_by=base.TASK,
)
