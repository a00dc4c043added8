"""Question: does LoRA's gap grow with the updates, whether or not the learning rate decays.

A gap is LoRA's loss minus full fine-tuning's, each at its best learning rate for that number of
updates and that schedule, in percent of full fine-tuning's gain there, paired by seed.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from analysis.inference.decide import Gate, at_level
from analysis.inference.estimate import Estimate, from_draws
from analysis.inference.rows import Row, measured
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import Gap, gaps_of
from analysis.questions import base
from analysis.runs.curves import in_words

BOTH = CONSTANT, DECAYING = "constant", "cosine"


class Schedules(base.Condition):
    """Full fine-tuning and one rank at several lengths, with and without a decaying rate."""

    @cached_property
    def gaps(self) -> dict[str, dict[int, Gap]]:
        """Schedule -> updates -> the gap; cells without both methods are left out."""
        found: dict[str, dict[int, Gap]] = {CONSTANT: {}, DECAYING: {}}
        base.one_value(self.runs, "batch_size")
        base.check_same((o.curve for o in self.optima), "schedule", "steps", "warmup_steps")
        for (schedule, steps), part in self.runs.groupby(["schedule", "steps"]):
            cell = {"schedule": schedule, "steps": steps}
            optima = [o for o in self.optima if cell.items() <= o.curve.key.items()]
            gaps = gaps_of(part, base.check_one(optima))
            found.setdefault(str(schedule), {}).update((int(steps), gap) for gap in gaps)
        return found

    @cached_property
    def ends(self) -> tuple[int, int]:
        """The fewest and the most updates of any run."""
        return int(self.runs["steps"].min()), int(self.runs["steps"].max())

    @property
    def missing(self) -> str:
        there = len({*self.ends}) == 2 and all(self.gaps[s].keys() >= {*self.ends} for s in BOTH)
        return "" if there else "both methods and schedules at the fewest and the most updates"

    @property
    def rests(self) -> list[base.Optimum]:
        return base.both(*(self.gaps[s][n] for s in BOTH for n in self.ends))

    def percent(self, steps: int, schedule: str) -> AtBest[float]:
        """Return the gap in percent of the gain, by seed."""
        return self.gaps[schedule][steps].in_percent

    def apart(self, steps: int) -> AtBest[float]:
        """Return the gap under a decaying rate minus that at a constant one, by seed."""
        return self.percent(steps, DECAYING).minus(self.percent(steps, CONSTANT))

    def growth(self, of: Any, between: tuple[int, int] | None = None) -> Estimate:
        """Return the change of a gap, `of` updates, in points; from the fewest to the most."""
        first, last = between or self.ends
        return _minus(over_seeds(of(last)), over_seeds(of(first)))

    def gates(self, schedules: Sequence[str], lengths: Sequence[int]) -> list[Gate]:
        """List the gates of the gaps of these schedules and lengths."""
        found = []
        for s, n in itertools.product(schedules, lengths):
            gap = self.gaps[s][n]
            gates = base.gates_on([gap.full, gap.lora]) or base.gates_on_pairs(gap.nats)
            found += [gate.at(f"{s}, {n} updates: ") for gate in gates]
        return found


def _minus(a: Estimate, b: Estimate) -> Estimate:
    """Return the difference of two means over seeds. Their errors count as independent."""
    if a.draws is None or b.draws is None:
        return base.UNKNOWN
    # Short runs are the noisier ones, and have the more seeds: `needed` counts these.
    spread = b.spread and b.spread.sharing(float(np.std(a.draws)))
    draws = a.draws - np.random.default_rng(20261201).permutation(b.draws)
    return from_draws(draws, min(a.n, b.n), spread=spread)


def _growth(name: str, of: Any, *schedules: str) -> base.Estimand:
    """Declare the growth of `of`, which rests on these schedules; the short runs' seeds count."""

    def seeds(c: Schedules) -> int:
        return base.fewest_seeds(base.both(*(c.gaps[s][c.ends[0]] for s in schedules)))

    return base.Estimand(
        name,
        lambda c: c.growth(lambda n: of(c, n)),
        lambda c: c.gates(schedules, c.ends),
        used=lambda c: c.rests,
        at=lambda c: f"rank {c.top}, from {c.ends[0]} to {c.ends[1]} updates",
        seeds=seeds,
    )


ESTIMANDS = [
    _growth("growth_apart", Schedules.apart, CONSTANT, DECAYING),
    *(
        _growth(f"growth_{name}", functools.partial(Schedules.percent, schedule=s), s)
        for name, s in (("decaying", DECAYING), ("constant", CONSTANT))
    ),
    base.Estimand(
        "gap_decaying",
        lambda c: over_seeds(c.percent(c.ends[1], DECAYING)),
        lambda c: c.gates([DECAYING], c.ends[1:]),
        used=lambda c: base.both(c.gaps[DECAYING][c.ends[1]]),
        at=lambda c: f"rank {c.top}, after {c.ends[1]} updates",
    ),
]


def report(asked: base.Asked, c: Schedules) -> tuple[list[Row], list[base.Section]]:
    """Return the gaps by schedule and length, as a table and a figure."""
    percent = {s: {n: of[n].percent() for n in sorted(of)} for s, of in c.gaps.items() if of}
    # Growth may be the loss of an early lead alone, so it is measured from length to length, too.
    since = {(s, b): a for s, of in percent.items() for a, b in itertools.pairwise(of)}
    at = {k: functools.partial(c.percent, schedule=k[0]) for k in since}
    grown = {k: c.growth(at[k], (first, k[1])) for k, first in since.items()}
    rows = [
        [s, n, *map(base.best_lr, (g.full, g.lora)), ratio_of([g.lora], g.full), percent[s][n]]
        + [grown.get((s, n))]
        for s, of in c.gaps.items()
        for n, g in sorted(of.items())
    ]
    head = (
        "schedule | updates | FullFT's best LR [95%] | LoRA's [95%] | ratio [95%] | "
        "regret, % of the gain [95%] | growth since the length above [95%]"
    )
    panel = base.panel_over("updates", in_words(c.name), "regret, % of the gain", percent)
    figure = ("growth.png", [panel], "LoRA's regret over the updates, by schedule")
    section = base.Section.of("Growth of the gap", head, rows, (), *figure)
    level, out = base.level_of(asked), []
    for s, of in c.gaps.items():
        for n, g in sorted(of.items()):
            place = replace(c.where([g.lora]), arm=f"lora r{g.rank}, {s}", at="")
            out.append(measured(place, "regret_percent", at_level(percent[s][n], level)))
            if e := grown.get((s, n)):
                place = replace(place, at=f"since {since[s, n]} updates")
                out.append(measured(place, "regret_growth_percent", at_level(e, level)))
    return out, [section]


QUESTION = base.Question(ESTIMANDS, base.whole(Schedules), report, split_by=base.TASK)
