"""Question: does LoRA's gap grow with the updates, whether or not the learning rate decays.

A gap is LoRA's loss minus full fine-tuning's, each at its best learning rate for that number of
updates and that schedule, in percent of full fine-tuning's gain there, paired by seed.
"""

from functools import cached_property
from typing import Any

import numpy as np

from analysis.inference.decide import Gate
from analysis.inference.estimate import Estimate, from_draws
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import Gap, gaps_of
from analysis.questions import base
from analysis.runs.table import TableError

CONSTANT, DECAYING = "constant", "cosine"


class Schedules(base.Condition):
    """Full fine-tuning and one rank at several lengths, with and without a decaying rate."""

    @cached_property
    def gaps(self) -> dict[str, dict[int, Gap]]:
        """Schedule -> updates -> the gap; cells without both methods are left out."""
        found: dict[str, dict[int, Gap]] = {CONSTANT: {}, DECAYING: {}}
        for (schedule, steps), part in self.runs.groupby(["schedule", "steps"]):
            cell = {"schedule": schedule, "steps": steps}
            optima = [o for o in self.optima if cell.items() <= o.curve.key.items()]
            gaps = gaps_of(part, optima)
            if len(gaps) > 1:
                curves = ", ".join(g.lora.curve.name for g in gaps)
                raise TableError(f"{curves}: one rank is compared. Analyse one at a time.")
            found.setdefault(str(schedule), {}).update((int(steps), gap) for gap in gaps)
        return found

    @cached_property
    def ends(self) -> list[int]:
        """The fewest and the most updates with both schedules; empty if there are not two."""
        both = sorted(self.gaps[CONSTANT].keys() & self.gaps[DECAYING].keys())
        return [both[0], both[-1]] if len(both) > 1 else []

    @property
    def missing(self) -> str:
        return "" if self.ends else "both methods and schedules at two lengths"

    @property
    def rests(self) -> list[base.Optimum]:
        ends = (self.gaps[s][n] for s in (CONSTANT, DECAYING) for n in self.ends)
        return base.distinct(o for gap in ends for o in (gap.full, gap.lora))

    def percent(self, schedule: str, steps: int) -> AtBest[float]:
        """Return the gap in percent of the gain, by seed."""
        gap = self.gaps[schedule][steps]
        return gap.nats.paired(gap.gain, lambda nats, gain: 100 * nats / gain)

    def apart(self, steps: int) -> AtBest[float]:
        """Return the gap under a decaying rate minus that at a constant one, by seed."""
        return self.percent(DECAYING, steps).minus(self.percent(CONSTANT, steps))

    def growth(self, of: Any) -> Estimate:
        """Return the change of a gap, `of` updates, from the fewest to the most, in points."""
        return _minus(over_seeds(of(self.ends[1])), over_seeds(of(self.ends[0])))

    def gates(self) -> list[Gate]:
        pairs = [base.gates_on_pairs(self.apart(n)) for n in self.ends]
        return base.gates_on(self.rests) or [g for found in pairs for g in found]


def _minus(a: Estimate, b: Estimate) -> Estimate:
    """Return the difference of two means over seeds. Their errors count as independent."""
    if a.draws is None or b.draws is None:
        return base.UNKNOWN
    # Short runs are the noisier ones, and have the more seeds: `needed` counts these.
    spread = b.spread and b.spread.sharing(float(np.std(a.draws)))
    draws = a.draws - np.random.default_rng(20261201).permutation(b.draws)
    return from_draws(draws, min(a.n, b.n), spread=spread)


def _estimand(name: str, measure: Any) -> base.Estimand:
    return base.Estimand(
        name,
        measure,
        Schedules.gates,
        read=lambda c: f"rank {c.top}, from {c.ends[0]} to {c.ends[1]} updates",
    )


ESTIMANDS = [
    _estimand("growth_apart", lambda c: c.growth(c.apart)),
    _estimand("growth_decaying", lambda c: c.growth(lambda n: c.percent(DECAYING, n))),
    _estimand("growth_constant", lambda c: c.growth(lambda n: c.percent(CONSTANT, n))),
    _estimand("gap_decaying", lambda c: over_seeds(c.percent(DECAYING, c.ends[1]))),
]


def report(asked: base.Asked, c: Schedules) -> tuple[dict[str, Any], list[base.Section]]:
    """Return the gaps by schedule and length, as a table and a figure."""
    percent = {
        s: {n: over_seeds(c.percent(s, n)) for n in sorted(of)} for s, of in c.gaps.items() if of
    }
    rows = [
        [s, n, *map(base.best_lr, (g.full, g.lora)), ratio_of([g.lora], g.full), percent[s][n]]
        for s, of in c.gaps.items()
        for n, g in sorted(of.items())
    ]
    head = (
        "schedule | updates | FullFT's best LR [95%] | LoRA's [95%] | ratio [95%] | "
        "regret, % of the gain [95%]"
    )
    panel = base.panel_over(c.name, "updates", "regret, % of the gain", percent)
    figure = ("growth.png", [panel], "LoRA's regret over the updates, by schedule")
    section = base.Section.of("Growth of the gap", head, rows, (), *figure)
    return {"percent": percent}, [section]


QUESTION = base.Question(ESTIMANDS, base.whole(Schedules), report, split_by=base.TASK)
