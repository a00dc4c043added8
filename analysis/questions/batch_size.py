"""Question: does LoRA fall behind full fine-tuning as the batch grows, at any rank.

The answer is measured as rho after equally many updates (`measures.batch_effect`), and as a gap in
nats after equally many examples, the study's setting. Each method is at its optimal learning rate
for the batch size and the number of updates.
"""

import math
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.inference.decide import Gate, GateCode, at_level
from analysis.inference.estimate import Estimate, with_interval
from analysis.measures import batch_effect
from analysis.measures.at_best import AtBest, losses_at_best, mean_of, over_seeds
from analysis.measures.regret import ALLOWED, Gap, gaps_of, growth
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.learning_curves import at_step, on_curve_rows

AT = (32, 256, 512, 1024)
"""Batch sizes that popular summaries of the study name."""
SMALL = 32
"""The largest batch that counts as small: the smallest one of the study."""
SHARE = 4
"""A gap is compared with the gap after the first 1/SHARE of the updates."""


class Batches(base.Condition):
    """All batch sizes of one model and data set."""

    @cached_property
    def ranks(self) -> list[int]:
        return sorted(self.lora)

    @cached_property
    def batches(self) -> list[int]:
        return sorted({int(b) for b in self.runs["batch_size"]})

    @cached_property
    def prefixes(self) -> list[batch_effect.Prefix]:
        """rho after every number of updates at which two batch sizes were evaluated."""
        return batch_effect.prefixes_of(self.runs)

    @cached_property
    def usable(self) -> dict[int, list[batch_effect.Prefix]]:
        """The prefixes without gates and with a value of rho, by rank."""
        return self._usable(self.prefixes)

    def _usable(self, prefixes: list[batch_effect.Prefix]) -> dict[int, list[batch_effect.Prefix]]:
        known = [p for p in prefixes if not p.bound and not base.gates_on_speed([p.full, p.lora])]
        return {r: [p for p in known if p.rank == r] for r in (*self.ranks, self.top)}

    @cached_property
    def effects(self) -> dict[int, Estimate]:
        return {r: over_seeds(batch_effect.effect(self.usable[r])) for r in self.ranks}

    @cached_property
    def effects_at_equal_examples(self) -> dict[int, Estimate]:
        """As `effects`, between batches after equally many examples: the study's comparison.

        No value if a batch cannot be compared with another one.
        """
        known = self._usable(batch_effect.prefixes_of(self.runs, examples=True))
        found = {}
        for r in self.ranks:
            seen = {(p.batch, p.steps * p.batch) for p in known[r]}
            is_whole = not self._alone(seen)
            effect = over_seeds(batch_effect.effect(known[r], examples=True))
            found[r] = effect if is_whole else base.UNKNOWN
        return found

    def _alone(self, seen: Collection[tuple[int, int]]) -> list[int]:
        """List the batches that share no length, of pairs of batch and length, with another."""
        lengths = {b: {n for batch, n in seen if batch == b} for b in self.batches}
        return [
            b
            for b, mine in lengths.items()
            if not any(mine & lengths[other] for other in self.batches if other != b)
        ]

    def difference(self) -> Estimate:
        """Return the effect at the highest rank minus that at the lowest."""
        if len(self.ranks) < 2:
            return base.UNKNOWN
        return batch_effect.difference(self.usable[self.top], self.usable[self.ranks[0]])

    def gates_on_difference(self) -> list[Gate]:
        if len(self.ranks) < 2:
            return [Gate(GateCode.ONE_RANK)]
        both = self.gates_on_effect(self.ranks[0]) + self.gates_on_effect(self.top)
        return list(dict.fromkeys(both))

    def gates_on_effect(self, rank: int) -> list[Gate]:
        """List the gates of a rank; each batch size needs as many updates as another batch size."""
        mine = [p for p in self.prefixes if p.rank == rank]
        found: list[Gate] = []
        for batch in self._alone({(p.batch, p.steps) for p in self.usable[rank]}):
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
            [o for r in ranks for p in self.usable[r] for o in (p.full, p.lora)]
        )

    @cached_property
    def at_equal_examples(self) -> tuple[int, list[tuple[int, Gap]]]:
        """A number of examples, and (batch size, gap at a rank) after so many examples."""
        examples, gaps = batch_effect.gaps_at_equal_examples(self.runs)
        return examples, [(batch, g) for batch, of_ranks in gaps.items() for g in of_ranks]

    def gap_at(self, batch: int) -> Gap | None:
        """Return the highest rank's gap at the largest batch from `batch` / 2 to `batch`."""
        near = [(b, g) for b, g in self.at_equal_examples[1] if batch / 2 <= b <= batch]
        return max(near, key=lambda pair: (pair[0], pair[1].rank))[1] if near else None

    @cached_property
    def losses(self) -> dict[int, dict[int, tuple[Optimum, AtBest[float]]]]:
        """Rank (0: full fine-tuning) -> batch size -> curve and losses after equal examples."""
        gaps = self.at_equal_examples[1]
        optima = base.distinct(o for _, g in gaps for o in (g.full, g.lora))
        found: dict[int, dict[int, tuple[Optimum, AtBest[float]]]] = {}
        for o, losses in zip(optima, losses_at_best(optima)):
            batch = int(o.curve.key["batch_size"])
            found.setdefault(base.rank_of(o), {})[batch] = (o, losses)
        return found

    @cached_property
    def small_best(self) -> tuple[list[Optimum], Estimate] | None:
        """Curves, and the lowest loss of larger batches minus that of batches up to SMALL, in nats.

        Of full fine-tuning or the highest rank, whichever has the lower end of the interval; None
        without batches on both sides.
        """
        found = []
        for rank in (0, self.top):
            sides = [
                [v for b, v in self.losses.get(rank, {}).items() if (b <= SMALL) == small]
                for small in (True, False)
            ]
            if not all(sides):
                return None
            small, large = (min(side, key=lambda v: mean_of(v[1])) for side in sides)
            found.append(([small[0], large[0]], over_seeds(large[1].minus(small[1]))))
        used = [o for optima, _ in found for o in optima]
        lowest = min(found, key=lambda v: -math.inf if v[1].low is None else v[1].low)
        return used, lowest[1]

    @cached_property
    def gap_change(self) -> tuple[Gap, Gap] | None:
        """The highest rank's gap at batch SMALL after 1/SHARE of the updates, and after all.

        Both on the rows of learning curves; None without runs of this batch, or if the LR changes.
        """
        runs = self.runs[self.runs["batch_size"] == SMALL].reset_index(drop=True)
        if not len(runs) or (runs["schedule"] != "constant").any():
            return None
        steps = int(runs["steps"].max())
        runs = on_curve_rows(runs[runs["steps"] == steps].reset_index(drop=True))
        early = at_step(runs, steps // SHARE)
        gaps = [gaps_of(part, base.fit(part)) if len(part) else [] for part in (early, runs)]
        return None if not all(gaps) else (gaps[0][-1], gaps[1][-1])


def conditions(table: pd.DataFrame) -> list[Batches]:
    """Return the one condition of a model and data set."""
    optima = base.fit(table)
    key = optima[0].curve.key
    return [Batches(f"{key['model']} on {key['dataset']}", table, optima)]


def _where(c: Batches) -> str:
    """Describe the prefixes behind the effect at the highest rank, and list the other effects."""
    if not c.ranks:
        return ""
    *others, top = c.ranks
    place = "no prefix"
    if used := c.usable[top]:
        batches, steps = ({getattr(p, k) for p in used} for k in ("batch", "steps"))
        place = (
            f"batches of {min(batches)} to {max(batches)} after {min(steps)} to {max(steps)} "
            "updates"
        )
    effects = (f"rank {r}: {with_interval(c.effects[r])}" for r in others)
    return "; ".join([f"rank {top}, {place}", *effects])


def _ends(c: Batches) -> str:
    """Return rank and updates of `gap_change`."""
    if c.gap_change is None:
        return ""
    steps = int(c.runs.loc[c.runs["batch_size"] == SMALL, "steps"].max())
    return f"rank {c.top}, update {steps // SHARE} to {steps}"


def _over_allowed(batch: int) -> base.Estimand[Batches]:
    return base.over_allowed(
        f"over_allowed_at_{batch}",
        lambda c: c.gap_at(batch),
        absent=f"batch {batch}",
        seeds=lambda c: base.fewest_seeds([gap.lora, gap.full]) if (gap := c.gap_at(batch)) else 0,
        read=lambda c: f"rank {c.top}, after {c.at_equal_examples[0]:,} examples",
    )


ESTIMANDS = [
    base.Estimand[Batches](
        "batch_effect",
        lambda c: c.effects.get(c.top, base.UNKNOWN),
        lambda c: c.gates_on_effect(c.top),
        seeds=lambda c: c.seeds_of(c.top),
        read=_where,
    ),
    base.Estimand[Batches](
        "batch_effect_difference",
        Batches.difference,
        Batches.gates_on_difference,
        seeds=lambda c: c.seeds_of(c.ranks[0], c.top) if len(c.ranks) > 1 else 0,
    ),
    *(_over_allowed(batch) for batch in AT),
    base.Estimand[Batches](
        "small_batches_gain",
        lambda c: c.small_best[1] if c.small_best else None,
        lambda c: base.gates_on(c.small_best[0]) if c.small_best else [],
        absent=f"batches up to {SMALL} and above, of both methods",
        seeds=lambda c: base.fewest_seeds(c.small_best[0]) if c.small_best else 0,
        read=lambda c: f"rank {c.top} or FullFT, after {c.at_equal_examples[0]:,} examples",
    ),
    base.Estimand[Batches](
        "gap_change_at_32",
        lambda c: growth(*c.gap_change) if c.gap_change else None,
        lambda c: [gate for g in c.gap_change or () for gate in base.gates_on_gap(g)],
        absent=f"batch {SMALL}",
        seeds=lambda c: base.fewest_seeds(
            [o for g in c.gap_change or () for o in (g.full, g.lora)]
        ),
        read=_ends,
    ),
]


def measures(found: Sequence[Batches], asked: base.Asked) -> dict[str, Any]:
    """Return the effects by rank, and the regrets by batch and rank."""
    (c,) = found
    examples, each = c.at_equal_examples
    regrets = []
    for b, g in each:
        place = {"batch_size": b, "updates": examples // b, "rank": g.rank}
        regrets.append({**place, "regret_percent": at_level(g.percent(), asked.level)})
    return {
        "batch_effect": c.effects,
        "batch_effect_at_equal_examples": c.effects_at_equal_examples,
        "regrets": regrets,
    }


def sections(found: Sequence[Batches], asked: base.Asked) -> list[base.Section]:
    """Return rho at equal updates, regret at equal examples, and their figure."""
    (c,) = found
    batches = sorted({p.batch for p in c.prefixes})
    rows: list[list[Any]] = []
    for rank in c.ranks:
        used = {(p.steps, p.batch): p.rho for p in c.usable[rank]}
        for steps in sorted({s for s, _ in used}):
            rows.append([rank, steps, *(used.get((steps, b)) for b in batches)])
    effects = "; ".join(f"rank {r} {with_interval(e)}" for r, e in c.effects.items())
    head = " | ".join(["rank", "updates", *(f"rho at batch {b} [95%]" for b in batches)])
    text = [
        "Change of ln(rho) per doubling of the batch, between batches after equally many updates: "
        f"{effects}.",
        "A batch is left out where its optimal learning rates, after so many updates, are not "
        "between those tried, or have fewer seeds than a verdict needs.",
    ]
    out = [base.Section.of("At equal updates", head, rows, text)]
    examples, each = c.at_equal_examples
    rows = [[b, examples // b, g.rank, mean_of(g.gain), g.percent()] for b, g in each]
    text = [
        f"After {examples:,} examples at every batch. Regret: LoRA's loss minus full fine-tuning's,"
        f" in percent of what full fine-tuning gains; up to {ALLOWED:.0%} counts as none.",
        "Change of ln(speed) per doubling of the batch, between batches after equally many "
        "examples (not asked beforehand): "
        + "; ".join(f"rank {r} {with_interval(e)}" for r, e in c.effects_at_equal_examples.items())
        + ".",
    ]
    head = "batch | updates | rank | gain of FullFT | regret, % of the gain [95%]"
    out.append(base.Section.of("At equal examples", head, rows, text))
    panels = []
    for rank in c.ranks:
        rho: dict[int, dict[float, Estimate]] = {}
        for p in c.usable[rank]:
            rho.setdefault(p.batch, {})[p.steps] = p.rho
        lines = {f"batch {b}": rho[b] for b in sorted(rho)}
        y, look = "rho: FullFT's updates / LoRA's", {"ticks": None, "log_y": True}
        one = {"full fine-tuning": 1.0}
        panels.append(base.panel_over("updates", f"rank {rank}", y, lines, lines=one, **look))
    regrets: dict[int, dict[float, Estimate]] = {}
    for batch, g in each:
        regrets.setdefault(g.rank, {})[batch] = g.percent()
    lines = {f"rank {r}": regrets[r] for r in sorted(regrets)}
    title, y = f"after {examples:,} examples", "regret, % of full fine-tuning's gain"
    band = (0.0, 100 * ALLOWED)
    panels.append(base.panel_over("batch size (sequences)", title, y, lines, band=band))
    caption = "step efficiency over updates by batch, and regret over the batch"
    figure = base.Section("Batch size", figure="batch.png", panels=panels, caption=caption)
    return [*out, figure]


QUESTION = base.Question(ESTIMANDS, conditions, measures, sections, split_by=base.TASK)
