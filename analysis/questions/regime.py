"""Question: how much can be new in the data before LoRA has regret.

A condition is a data set on one base. Each rank is compared with full fine-tuning, both at their
optimal learning rates. The comparison is made twice in the same runs: at the last update, and after
FIRST updates.
"""

import functools
import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import Gate, GateCode, at_level
from analysis.inference.estimate import Estimate, number, signed, with_interval
from analysis.inference.rows import Row, measured
from analysis.measures import regret
from analysis.measures.at_best import AtBest, is_finite, mean_of, over_seeds
from analysis.measures.ratio import MIN_RANK, ratio_of
from analysis.measures.speed import fall_over
from analysis.optimum.fit import Optimum
from analysis.questions import base, rank
from analysis.runs.curves import at_step, on_curve_rows, title

FIRST = 64
"""Updates after which the gap is first read, to see whether it grows."""
EIGHTH = 8
"""The study's ranks end at an eighth of the hidden size."""
GROWING = (8, 32)
"""Lowest and highest of the ranks whose gaps are compared over updates, besides the smallest."""
FITTING = 0.5
"""Largest load at which the capacity of a rank counts as sufficient, with a factor 2 to spare."""
Gaps = dict[int, regret.Gap]
"""Rank -> gap."""


@dataclass(frozen=True)
class Data(base.Condition):
    """One data set on one base."""

    novelty: regret.Novelty | None
    """None for real data."""
    last: Gaps
    """After the last update."""
    first: Gaps
    """After FIRST updates; empty for shorter runs, and where the LR is not constant."""
    last_on_first_rows: Gaps
    """After the last update, on the held-out rows of `first`, which may be fewer."""
    bits: dict[str, float]
    """Way to count (`regret.COUNTS`) -> bits of the data set; unknown counts are left out."""

    def of(self, column: str) -> Any:
        """Return the value of a column that all runs share."""
        return self.runs[column].iloc[0]

    @property
    def eighth(self) -> int:
        """The smallest rank tried of an eighth of the hidden size or more, else the highest one."""
        large = (r for r in self.last if r * EIGHTH >= self.of("hidden_size"))
        return min(large, default=max(self.last, default=0))

    @property
    def data(self) -> str:
        return self.novelty.name if self.novelty else str(self.of("dataset"))

    @property
    def gap(self) -> regret.Gap:
        """The gap at rank `eighth`."""
        return self.last[self.eighth]

    @property
    def missing(self) -> str:
        return "" if self.last else "lora" if base.full_of(self.optima) else "fullft"

    @property
    def shown(self) -> bool:
        return True

    @functools.cached_property
    def parts_of_gap(self) -> dict[int, dict[str, AtBest[float]]]:
        """Parts of the gap from the changed and from the unchanged contexts, in nats, by rank."""
        return {r: regret.parts_at_best(self.runs, g) for r, g in self.last.items()}

    @functools.cached_property
    def loads(self) -> dict[int, dict[str, float]]:
        """Rank -> way to count bits (`regret.COUNTS`) -> load."""
        return {r: regret.loads_of(self.runs, g.lora, self.bits) for r, g in self.last.items()}

    @functools.cached_property
    def controls(self) -> list[regret.Gap]:
        """Full fine-tuning of some matrices only, compared with full fine-tuning of all weights."""
        return regret.gaps_of(self.runs, self.optima, controls=True)

    @property
    def fitting(self) -> int | None:
        """The smallest rank with a load of at most FITTING, by the generator's bits; or None."""
        return min(
            (r for r, g in self.last.items() if (g.load or math.inf) <= FITTING), default=None
        )

    @property
    def overfull(self) -> int | None:
        """The largest rank with a load above 1, by the generator's bits; or None."""
        return max((r for r, g in self.last.items() if (g.load or 0) > 1), default=None)

    @property
    def growing(self) -> tuple[regret.Gap, regret.Gap] | None:
        """The smallest rank's gap after FIRST and after all updates, on the same rows."""
        r = min(self.last)
        return (self.first[r], self.last_on_first_rows[r]) if r in self.first else None

    @functools.cached_property
    def growths(self) -> dict[int, Estimate]:
        """The growth of the gap from FIRST to all updates, on the same rows, by rank in GROWING."""
        low, high = GROWING
        ranks = [r for r in self.last if r in self.first and low <= r <= high]
        return {r: regret.growth(self.first[r], self.last_on_first_rows[r]) for r in ranks}

    @functools.cached_property
    def ranks(self) -> rank.Ranks:
        """The ranks' learning curves and speeds, before the task is solved."""
        return rank.conditions(self.runs)[0]

    @property
    def is_new(self) -> bool:
        """Whether something is known to be new."""
        return self.novelty is not None and not self.novelty.nothing

    @property
    def is_low(self) -> bool:
        """Whether only rules are new."""
        return self.is_new and self.novelty.low

    @property
    def rests(self) -> list[Optimum]:
        used = [self.gap.lora, self.gap.full]
        if self.is_new:
            used += [c.lora for c in self.controls]
            used += [self.last[r].lora for r in (self.fitting, self.overfull) if r is not None]
            used += [self.growing[1].lora] if self.growing else []
        return base.distinct(used)

    def gates_at_eighth(self) -> list[Gate]:
        gates = base.gates_on_gap(self.gap)
        if self.eighth * EIGHTH < self.of("hidden_size"):
            gates += base.missing(f"a rank of 1/{EIGHTH} of the width or more")
        return gates

    # ---- the rank that is needed

    @functools.cached_property
    def rank_needed(self) -> Estimate:
        """The needed rank, over seeds. No value if it lies outside the ranks tried for any seed."""
        logs = regret.rank_needed_by_seed(_judged(self.last))
        return _mapped(over_seeds(logs), lambda v: 2**v) if is_finite(logs) else base.UNKNOWN

    def load_needed(self, count: str) -> Estimate:
        """Return the load at the needed rank. The load is inversely proportional to the rank."""
        of_rank_1 = [r * loads[count] for r, loads in self.loads.items() if count in loads]
        if not of_rank_1:
            return base.UNKNOWN
        return _mapped(self.rank_needed, lambda v: float(np.mean(of_rank_1)) / v)

    @functools.cached_property
    def needed(self) -> regret.Needed:
        """The smallest rank with no regret, as a range of ranks tried."""
        judged = _judged(self.last)
        over = {r: judged[r].over_allowed() if r in judged else base.UNKNOWN for r in self.last}
        return regret.rank_needed(over)


def _judged(gaps: Gaps) -> Gaps:
    """Return the gaps without gates; gaps with gates say nothing about the needed rank."""
    return {r: g for r, g in gaps.items() if not base.gates_on_gap(g)}


def _mapped(e: Estimate, f: Callable[[float], float]) -> Estimate:
    """Apply a monotone f to an estimate's value and ends; the result has no draws."""
    low, value, high = (None if v is None else f(v) for v in (e.low, e.value, e.high))
    return Estimate(value, *((high, low) if f(1.0) > f(2.0) else (low, high)), e.n, e.flags)


@dataclass(frozen=True)
class Base(base.Condition):
    """All data sets of one base on which something is new."""

    sets: list[Data]
    data = "all cells"

    @property
    def shown(self) -> bool:
        return False

    @property
    def rests(self) -> list[Optimum]:
        return base.both(*(g for c in self.sets for g in c.last.values()))

    @functools.cached_property
    def change(self) -> AtBest[float] | None:
        """Change of log2(needed rank) per doubling of the updates, from FIRST to the last one.

        Mean over data sets; None if it is known for none.
        """
        known = []
        for c in (c for c in self.sets if c.first):
            gaps = (c.first, c.last_on_first_rows)
            first, last = (regret.rank_needed_by_seed(_judged(g)) for g in gaps)
            doublings = math.log2(c.of("steps") / FIRST)
            change = last.minus(first).map((1 / doublings).__mul__)
            known += [change] * is_finite(change)
        if not known:
            return None
        total = functools.reduce(lambda a, b: a.paired(b, operator.add), known)
        return total.map((1 / len(known)).__mul__)

    def gates_on_change(self) -> list[Gate]:
        """Return the gate of a change that is not known."""
        if not any(len(c.first) > 1 for c in self.sets):
            return base.missing(f"two ranks over {FIRST} updates, at constant learning rates")
        return [Gate(GateCode.NO_LAW)] if self.change is None else []


def conditions(table: pd.DataFrame) -> list[Data | Base]:
    """Fit every data set of a table, sorted by base and load; then group them by base."""
    found = []
    for (model, dataset, *_), part in table.groupby(
        ["model", "dataset", "batch_size", "steps"], sort=False
    ):
        runs = part.reset_index(drop=True)
        optima = base.fit(runs)
        last, first, again = _by_rank(runs, optima), {}, {}
        longer = (runs["schedule"] == "constant").all() and int(runs["steps"].iloc[0]) > FIRST
        if longer and len(early := at_step(runs, FIRST)):
            same = on_curve_rows(runs)
            first, again = _by_rank(early, base.fit(early)), _by_rank(same, base.fit(same))
        novelty = regret.novelty_of(json.loads(runs["spec"].iloc[0])["dataset"])
        bits = regret.bits_of(runs, next(iter(last.values())).full) if last else {}
        name = f"{model}, {novelty.name if novelty else dataset}"
        found.append(Data(name, runs, optima, novelty, last, first, again, bits))
    # Conditions that share a name, such as those that differ only in updates, get full titles.
    times = Counter(c.name for c in found)
    found = [c if times[c.name] == 1 else replace(c, name=title(c.optima[0].curve)) for c in found]

    def place(c: Data) -> tuple[str, float]:
        return c.of("model"), max((g.load or 0.0 for g in c.last.values()), default=0.0)

    bases: dict[str, list[Data]] = {}
    for c in sorted(found, key=place):
        if c.is_new and c.last:
            bases.setdefault(c.of("model"), []).append(c)
    joined = [Base(f"{m}, all cells", table, [], mine) for m, mine in bases.items()]
    return [*sorted(found, key=place), *joined]


def _by_rank(runs: pd.DataFrame, optima: Sequence[Optimum]) -> Gaps:
    base.check_one([o for o in optima if not o.curve.is_control], "rank")
    return {g.rank: g for g in regret.gaps_of(runs, optima)}


# ---------------------------------------------------------------- estimands


LATER: dict[str, Callable[[Data], bool]] = {
    **dict.fromkeys(("over_allowed_fitting", "over_allowed_overfull"), lambda c: c.is_new),
    **dict.fromkeys(("fall_overfull", "generator_over_first_pass"), lambda c: c.is_new),
    "unchanged_minus_changed": lambda c: c.is_low,
}
"""Estimand of which only training shows whether it applies -> where it may."""


def _on(where: Callable[[Data], Any], name: str, measure: Any, gates: Any, **more: Any) -> Any:
    """Declare an estimand on the data sets with both methods where a condition holds."""

    def on(where: Callable[[Data], Any]) -> Callable[[Data | Base], bool]:
        return lambda c: isinstance(c, Data) and not c.missing and bool(where(c))

    later = on(LATER.get(name, lambda c: False))
    more = {"applies": on(where), "by_data": later, "used": lambda c: base.both(c.gap), **more}
    return base.Estimand(name, measure, gates, **more)


def _regret(
    where: Callable[[Data], Any], name: str, gap: Callable[[Data], Any], **more: Any
) -> Any:
    gates = more.pop("gates", lambda c: base.gates_on_gap(gap(c)))
    more["used"] = lambda c: base.both(gap(c))
    return _on(where, name, lambda c: gap(c).over_allowed(), gates, **more)


def _gates_on_growth(c: Data) -> list[Gate]:
    gates = [gate for g in c.growing for gate in base.gates_on_gap(g)]
    behind = any((g.mean().low or 0) > 0 for g in c.growing)
    return gates if behind else [*gates, Gate(GateCode.NO_GAP)]


ESTIMANDS = [
    _regret(
        lambda c: c.is_low,
        "over_allowed_low",
        lambda c: c.gap,
        applies=lambda c: isinstance(c, Data) and (bool(c.missing) or c.is_low),
        gates=Data.gates_at_eighth,
    ),
    _regret(
        lambda c: c.is_new and not c.is_low,
        "over_allowed_beyond",
        lambda c: c.gap,
        gates=Data.gates_at_eighth,
    ),
    _regret(lambda c: c.is_new and c.fitting, "over_allowed_fitting", lambda c: c.last[c.fitting]),
    _regret(
        lambda c: c.is_new and c.overfull, "over_allowed_overfull", lambda c: c.last[c.overfull]
    ),
    _on(
        lambda c: c.is_new and c.growing,
        "gap_growth",
        lambda c: regret.growth(*c.growing),
        _gates_on_growth,
        used=lambda c: base.both(c.growing[1]),
        at=lambda c: f"rank {min(c.last)}, update {FIRST} to {c.of('steps')}",
    ),
    _on(
        lambda c: c.is_low and c.growths,
        "gap_growth_high_ranks",
        # All ranks must grow: the one with the lowest end of its interval decides, or one without.
        lambda c: min(c.growths.values(), key=lambda e: -math.inf if e.low is None else e.low),
        lambda c: list(
            dict.fromkeys(
                gate
                for r in c.growths
                for g in (c.first[r], c.last_on_first_rows[r])
                for gate in base.gates_on_gap(g)
            )
        ),
        used=lambda c: base.both(*(c.last_on_first_rows[r] for r in c.growths)),
        at=lambda c: f"ranks {min(r := c.growths)} to {max(r)}, update {FIRST} to {c.of('steps')}",
    ),
    _on(
        lambda c: c.is_new and not c.is_low,
        "rho_slope_lists",
        lambda c: c.ranks.slope,
        lambda c: c.ranks.gates_on_slope(),
        used=lambda c: None,
        at=lambda c: f"ranks {min(c.last)} to {max(c.last)}, to update {c.ranks.last}",
    ),
    _on(
        lambda c: c.is_new and 1 in c.lora and c.high,
        "rate_over_rank_1",
        lambda c: ratio_of(c.high, c.lora[1]),
        lambda c: base.gates_on([c.lora[1], *c.high]),
        log=True,
        seeds=lambda c: base.fewest_seeds([c.lora[1], *c.high]),
        used=lambda c: None,
        at=lambda c: f"ranks {MIN_RANK} to {max(c.last)} over rank 1, {c.of('steps')} updates",
    ),
    _on(
        lambda c: c.is_new and c.overfull,
        "fall_overfull",
        lambda c: fall_over(c.ranks.points[c.overfull], c.ranks.points[0]),
        lambda c: c.ranks.gates_on([0, c.overfull]),
        used=lambda c: base.both(c.last[c.overfull]),
    ),
    _on(
        lambda c: c.is_new and {regret.GENERATOR, regret.FIRST_PASS} <= set(c.bits),
        "generator_over_first_pass",
        lambda c: over_seeds(regret.share_of_first_pass(c.runs, c.gap.full)),
        lambda c: base.gates_on([c.gap.full]),
        used=lambda c: [c.gap.full],
    ),
    _on(lambda c: c.is_low, "gap_low", lambda c: c.gap.mean(), Data.gates_at_eighth),
    _on(
        lambda c: c.novelty and c.novelty.nothing,
        "gap_nothing",
        lambda c: c.gap.mean(),
        # NOISY compares the error with the gain. Here the gain is near 0, so no number of seeds
        # would lift that gate.
        lambda c: [g for g in c.gates_at_eighth() if g.code != GateCode.NOISY],
    ),
    _on(
        lambda c: c.is_low and c.controls,
        "gap_matrices",
        lambda c: c.controls[0].mean(),
        lambda c: base.gates_on_gap(c.controls[0]),
        used=lambda c: base.both(c.controls[0]),
    ),
    _on(
        lambda c: c.is_low and c.parts_of_gap[c.eighth],
        "unchanged_minus_changed",
        lambda c: over_seeds(
            (parts := c.parts_of_gap[c.eighth])["unchanged"].minus(parts["changed"])
        ),
        lambda c: (
            c.gates_at_eighth()
            + ([] if (c.gap.mean().high or 0) < 0 else [Gate(GateCode.NO_ADVANTAGE)])
        ),
    ),
    _regret(lambda c: c.novelty is None, "over_allowed_real", lambda c: c.gap),
    _regret(
        lambda c: c.novelty is None and 16 in c.last,
        "over_allowed_real_16",
        lambda c: c.last[16],
        seeds=lambda c: base.fewest_seeds(base.both(c.last[16])),
    ),
    base.Estimand(
        "rank_by_updates",
        lambda c: base.UNKNOWN if c.change is None else over_seeds(c.change),
        Base.gates_on_change,
        applies=lambda c: isinstance(c, Base),
    ),
]


# ---------------------------------------------------------------- report


def report(asked: base.Asked, *found: Data) -> tuple[list[Row], list[base.Section]]:
    """Return regret, load, gap and its parts by condition and rank; the gap over updates."""
    out: list[Row] = []
    rows: list[list[Any]] = []
    text = [
        "Regret: LoRA's loss minus full fine-tuning's at the last update, in percent of what full "
        f"fine-tuning gains; up to {regret.ALLOWED:.0%} counts as none. Load: bits to learn over "
        f"{regret.BITS_PER_PARAMETER:g} bits for each trained parameter. The generator's count is "
        "the fewest bits that describe the new rules and exceptions; the first pass, the study's "
        "count, is an upper bound: the summed loss of full fine-tuning over the training rows, "
        "each before the model trains on it. The gap in nats is the sum of two parts: of contexts "
        "whose next-symbol probabilities are new (changed), and of the others."
    ]
    growth, level = [], base.level_of(asked)
    for c in found:
        name, steps = c.name, int(c.of("steps"))
        place = replace(c.place, batch_size=int(c.of("batch_size")), updates=steps)
        for count, bits in c.bits.items():
            out.append(measured(place, f"bits, {count}", bits))
            load = c.load_needed(count)
            out.append(measured(place, f"load at the needed rank, {count}", load))
        out.append(measured(place, "needed_rank", c.rank_needed))
        low, high = (v if 0 < v < math.inf else None for v in c.needed)
        out.append(measured(place, "needed_rank_between", Estimate(None, low, high)))
        for r, g in c.last.items():
            percent, parts, first = g.percent(), c.parts_of_gap[r], c.first.get(r)
            of_parts = [with_interval(over_seeds(v), signed) for v in parts.values()]
            loads = [c.loads[r].get(count) for count in regret.COUNTS]
            shares = [mean_of(g.gain), percent, *loads, *(of_parts or (None, None))]
            rows.append([name, steps, r, *shares])
            arm = replace(place, arm=f"lora r{r}", rank=r)
            out += [measured(arm, f"load, {k}", load) for k, load in c.loads[r].items()]
            out.append(measured(arm, "regret_percent", at_level(percent, level)))
            if first and g.gain.best:
                of_gain = functools.partial(operator.mul, 100 / mean_of(g.gain))
                share = _mapped(first.mean(), of_gain)
                out.append(measured(arm, "regret_percent_first", share))
            if first and (last := c.last_on_first_rows.get(r)):
                gaps = [first.mean(), last.mean(), regret.growth(first, last)]
                growth.append([name, r, *(with_interval(e, signed) for e in gaps)])
        rank, loads_needed = c.rank_needed, {k: c.load_needed(k) for k in regret.COUNTS}
        needed = c.needed
        if str(needed) != "-":  # "-": no rank could be judged
            of_counts = ", ".join(number(e.value) for e in loads_needed.values())
            between = f"; interpolated {with_interval(rank)}, loads {of_counts}"
            between = "" if rank.value is None else between
            text.append(f"{name}: the smallest rank with no regret is {needed}{between}.")
    counts = " | ".join(f"load by {words}" for words in regret.COUNTS.values())
    head = "condition | updates | rank | gain of FullFT | regret, % of the gain [95%] | "
    head += f"{counts} | changed contexts, nats [95%] | unchanged contexts"
    over_rank = base.Section.of("Regret over rank", head, rows, text)
    text = [
        "A lack of capacity lets the gap grow with updates; slower learning lets it shrink. All "
        "gaps are on the same held-out rows."
    ]
    head = f"condition | rank | gap at {FIRST} updates [95%] | at the last [95%] | growth"
    return out, [
        over_rank,
        base.Section.of("Speed or capacity", head, growth, text),
    ]


QUESTION = base.Question(ESTIMANDS, conditions, report)
