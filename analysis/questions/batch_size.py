"""Question: does LoRA fall behind full fine-tuning as the batch grows, at any rank.

The answer is measured as rho after equally many updates (`measures.speed`), and as a gap in
nats after equally many examples, the study's setting. Each method is at its optimal learning rate
for the batch size and the number of updates.
"""

import math
from collections.abc import Collection, Sequence
from functools import cached_property

from analysis.inference.decide import Gate, GateCode, at_level
from analysis.inference.estimate import Estimate, with_interval
from analysis.inference.rows import Row, measured
from analysis.measures import speed
from analysis.measures.at_best import losses_at_best, mean_of, over_seeds
from analysis.measures.regret import ALLOWED, Gap, gaps_of, growth
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.curves import at_step, on_curve_rows

AT = (32, 256, 512, 1024)
"""Batch sizes that popular summaries of the study name."""
SMALL = 32
"""The largest batch that counts as small: the smallest one of the study."""
SHARE = 4
"""A gap is compared with the gap after the first 1/SHARE of the updates."""


class Batches(base.Condition):
    """All batch sizes of one model and data set."""

    @property
    def missing(self) -> str:
        full, lora = base.full_of(self.optima), base.lora_of(self.optima)
        return "fullft" if full is None else "" if lora else "lora"

    @cached_property
    def ranks(self) -> list[int]:
        return sorted(self.lora)

    @cached_property
    def batches(self) -> list[int]:
        return sorted({int(b) for b in self.runs["batch_size"]})

    @cached_property
    def prefixes(self) -> list[speed.Prefix]:
        """rho after every number of updates at which two batch sizes were evaluated."""
        return speed.prefixes_of(self.runs)

    @cached_property
    def usable(self) -> dict[int, list[speed.Prefix]]:
        """The prefixes without gates and with a value of rho, by rank."""
        return self._usable(self.prefixes)

    def _usable(self, prefixes: list[speed.Prefix]) -> dict[int, list[speed.Prefix]]:
        known = [p for p in prefixes if not p.bound and not base.gates_on_speed([p.full, p.lora])]
        return {r: [p for p in known if p.rank == r] for r in (*self.ranks, self.top)}

    @cached_property
    def effects(self) -> dict[int, Estimate]:
        return {r: over_seeds(speed.effect(self.usable[r])) for r in self.ranks}

    @cached_property
    def effects_at_equal_examples(self) -> dict[int, Estimate]:
        """As `effects`, between batches after equally many examples: the study's comparison.

        No value if a batch cannot be compared with another one.
        """
        known = self._usable(speed.prefixes_of(self.runs, examples=True))
        return {
            r: base.UNKNOWN
            if self._alone({(p.batch, p.steps * p.batch) for p in known[r]})
            else over_seeds(speed.effect(known[r], examples=True))
            for r in self.ranks
        }

    def _alone(self, seen: Collection[tuple[int, int]]) -> list[int]:
        """List the batches that share no length, of pairs of batch and length, with another."""
        shared = {n for b, n in seen for other, m in seen if b != other and n == m}
        return [b for b in self.batches if not any((b, n) in seen for n in shared)]

    def gates_on_effect(self, *ranks: int) -> list[Gate]:
        """List the gates of ranks; each batch size needs as many updates as another batch size."""
        found: list[Gate] = []
        for rank in ranks:
            mine = [p for p in self.prefixes if p.rank == rank]
            for batch in self._alone({(p.batch, p.steps) for p in self.usable[rank]}):
                of_batch = (p for p in mine if p.batch == batch)
                longest = max(of_batch, key=lambda p: p.steps, default=None)
                closed = base.gates_on_speed([longest.full, longest.lora]) if longest else []
                if longest and longest.bound:
                    closed.append(Gate(GateCode.ONLY_A_BOUND, place=f"rank {rank}: "))
                absent = base.missing(f"rank {rank} beside another batch after equal updates")
                found += [g.at(f"batch {batch}, ") for g in closed or absent]
        return list(dict.fromkeys(found))

    def seeds_of(self, *ranks: int) -> int:
        """Return the number of seeds behind the effects at these ranks."""
        return base.fewest_seeds(
            [o for r in ranks for p in self.usable[r] for o in (p.full, p.lora)]
        )

    @property
    def ends(self) -> list[int]:
        """The lowest and the highest rank; empty with fewer than two."""
        return [self.ranks[0], self.top] if len(self.ranks) > 1 else []

    @cached_property
    def at_equal_examples(self) -> tuple[int, list[tuple[int, Gap]]]:
        """A number of examples, and (batch size, gap at a rank) after so many examples."""
        examples, gaps = speed.gaps_at_equal_examples(self.runs)
        return examples, [(batch, g) for batch, of_ranks in gaps.items() for g in of_ranks]

    def gap_at(self, batch: int) -> Gap | None:
        """Return the highest rank's gap at the largest batch from `batch` / 2 to `batch`."""
        near = [(b, g) for b, g in self.at_equal_examples[1] if batch / 2 <= b <= batch]
        return max(near, key=lambda pair: (pair[0], pair[1].rank))[1] if near else None

    @cached_property
    def small_best(self) -> tuple[list[Optimum], Estimate] | None:
        """Curves, and the lowest loss of larger batches minus that of batches up to SMALL, in nats.

        After equally many examples, of full fine-tuning or the highest rank, whichever has the
        lower end of the interval; None without batches on both sides.
        """
        optima = base.distinct(o for _, g in self.at_equal_examples[1] for o in (g.full, g.lora))
        losses, found = list(zip(optima, losses_at_best(optima))), []
        for rank in (0, self.top):
            mine = [v for v in losses if base.rank_of(v[0]) == rank]
            sides = [
                [v for v in mine if (v[0].curve.key["batch_size"] <= SMALL) == small]
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
    def gap_change(self) -> Sequence[Gap]:
        """The highest rank's gap at batch SMALL after 1/SHARE of the updates, and after all.

        Both on the rows of learning curves; empty without runs of this batch, or if the LR changes.
        """
        runs = self.runs[self.runs["batch_size"] == SMALL].reset_index(drop=True)
        if not len(runs) or (runs["schedule"] != "constant").any():
            return ()
        steps = int(runs["steps"].max())
        runs = on_curve_rows(runs[runs["steps"] == steps].reset_index(drop=True))
        early = at_step(runs, steps // SHARE)
        gaps = [gaps_of(part, base.fit(part)) if len(part) else [] for part in (early, runs)]
        return [g[-1] for g in gaps] if all(gaps) else ()

    def read(self) -> str:
        """Describe the prefixes behind the effect at the highest rank; list the other effects."""
        place = "no prefix"
        if used := self.usable[self.top]:
            batches, steps = ({getattr(p, k) for p in used} for k in ("batch", "steps"))
            place = f"batches of {min(batches)} to {max(batches)}"
            place += f" after {min(steps)} to {max(steps)} updates"
        effects = (f"rank {r}: {with_interval(self.effects[r])}" for r in self.ranks[:-1])
        return "; ".join([f"rank {self.top}, {place}", *effects]) if self.ranks else ""


def _over_allowed(batch: int) -> base.Estimand:
    return base.over_allowed(
        f"over_allowed_at_{batch}",
        lambda c: c.gap_at(batch),
        absent=f"batch {batch}",
        seeds=lambda c: base.fewest_seeds(base.both(c.gap_at(batch))),
        at=lambda c: f"rank {c.top}, after {c.at_equal_examples[0]:,} examples",
    )


ESTIMANDS = [
    base.Estimand(
        "batch_effect",
        lambda c: c.effects.get(c.top, base.UNKNOWN),
        lambda c: c.gates_on_effect(c.top),
        seeds=lambda c: c.seeds_of(c.top),
        used=lambda c: [p.lora for p in c.usable[c.top]],
        at=Batches.read,
    ),
    base.Estimand(
        "batch_effect_difference",
        lambda c: (
            speed.difference(*(c.usable[r] for r in reversed(c.ends))) if c.ends else base.UNKNOWN
        ),
        lambda c: c.gates_on_effect(*c.ends) if c.ends else [Gate(GateCode.ONE_RANK)],
        seeds=lambda c: c.seeds_of(*c.ends),
    ),
    *map(_over_allowed, AT),
    base.Estimand(
        "small_batches_gain",
        lambda c: c.small_best[1] if c.small_best else None,
        lambda c: base.gates_on(c.small_best[0]),
        absent=f"batches up to {SMALL} and above, of both methods",
        seeds=lambda c: base.fewest_seeds(c.small_best[0]),
        at=lambda c: f"rank {c.top} or FullFT, after {c.at_equal_examples[0]:,} examples",
    ),
    base.Estimand(
        "gap_change_at_32",
        lambda c: growth(*c.gap_change) if c.gap_change else None,
        lambda c: [gate for g in c.gap_change for gate in base.gates_on_gap(g)],
        absent=f"batch {SMALL}",
        seeds=lambda c: base.fewest_seeds(base.both(*c.gap_change)),
        used=lambda c: base.both(*c.gap_change),
        at=lambda c: (
            f"rank {c.top}, update {(n := c.gap_change[1].full.curve.key['steps']) // SHARE} to {n}"
        ),
    ),
]


def report(asked: base.Asked, c: Batches) -> tuple[list[Row], list[base.Section]]:
    """Return rho at equal updates, regret at equal examples, and their figure."""
    batches, rows = sorted({p.batch for p in c.prefixes}), []
    panels: list[base.Panel] = []
    for rank in c.ranks:
        rho: dict[int, dict[float, Estimate]] = {}
        for p in c.usable[rank]:
            rho.setdefault(p.batch, {})[p.steps] = p.rho
        for steps in sorted({p.steps for p in c.usable[rank]}):
            rows.append([rank, steps, *(rho.get(b, {}).get(steps) for b in batches)])
        lines = {f"batch {b}": rho[b] for b in sorted(rho)}
        y, look = "rho: FullFT's updates / LoRA's", {"ticks": None, "log_y": True}
        one = {"full fine-tuning": 1.0}
        panels.append(base.panel_over("updates", f"rank {rank}", y, lines, lines=one, **look))
    effects = "; ".join(f"rank {r} {with_interval(e)}" for r, e in c.effects.items())
    head = " | ".join(["rank", "updates", *(f"rho at batch {b} [95%]" for b in batches)])
    text = [
        "Change of ln(rho) per doubling of the batch, between batches after equally many updates: "
        f"{effects}.",
        "A batch is left out where its optimal learning rates, after so many updates, are not "
        "between those tried, or have fewer seeds than a verdict needs.",
    ]
    equal_updates = base.Section.of("At equal updates", head, rows, text)
    (examples, each), rows, out = c.at_equal_examples, [], list[Row]()
    regrets: dict[int, dict[float, Estimate]] = {}
    for b, g in each:
        regrets.setdefault(g.rank, {})[b] = percent = g.percent()
        rows.append([b, examples // b, g.rank, mean_of(g.gain), percent])
        place = {"arm": f"lora r{g.rank}", "rank": g.rank, "batch_size": b}
        e = at_level(percent, base.level_of(asked))
        out.append(measured(c.place, "regret_percent", e, **place, updates=examples // b))
    text = [
        f"After {examples:,} examples at every batch. Regret: LoRA's loss minus full fine-tuning's,"
        f" in percent of what full fine-tuning gains; up to {ALLOWED:.0%} counts as none.",
        "Change of ln(speed) per doubling of the batch, between batches after equally many "
        "examples (not asked beforehand): "
        + "; ".join(f"rank {r} {with_interval(e)}" for r, e in c.effects_at_equal_examples.items())
        + ".",
    ]
    head = "batch | updates | rank | gain of FullFT | regret, % of the gain [95%]"
    equal_examples = base.Section.of("At equal examples", head, rows, text)
    lines = {f"rank {r}": regrets[r] for r in sorted(regrets)}
    title, y = f"after {examples:,} examples", "regret, % of full fine-tuning's gain"
    band = (0.0, 100 * ALLOWED)
    panels.append(base.panel_over("batch size (sequences)", title, y, lines, band=band))
    caption = "step efficiency over updates by batch, and regret over the batch"
    figure = base.Section("Batch size", figure="batch.png", panels=panels, caption=caption)
    equal = "batch_effect_at_equal_examples"
    for name, of in (("batch_effect", c.effects), (equal, c.effects_at_equal_examples)):
        out += [measured(c.place, name, e, arm=f"lora r{r}", rank=r) for r, e in of.items()]
    return out, [equal_updates, equal_examples, figure]


QUESTION = base.Question(ESTIMANDS, base.whole(Batches), report, split_by=base.TASK)
