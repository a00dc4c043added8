"""Measure LoRA's regret, how many bits are new in the data, and the smallest rank with no regret.

Each method is at its optimal learning rate, and losses are paired by seed. If the seed also draws
the data, intervals cover the draw of the data too.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from analysis.inference.estimate import Estimate, Part
from analysis.measures import at_best
from analysis.measures.at_best import (
    AtBest,
    is_finite,
    losses_at_best,
    mean_of,
    over_seeds,
    pooled_over,
)
from analysis.optimum.fit import Optimum
from analysis.runs.curves import runs_of

ALLOWED = 0.05
"""Regret of up to this share of full fine-tuning's gain counts as no regret."""
BITS_PER_PARAMETER = 2.0
"""Capacity of LoRA according to the study, in bits per trained parameter."""
GENERATOR, FIRST_PASS, ABOVE_FLOOR = "generator", "first_pass", "above_floor"
COUNTS = {
    GENERATOR: "the generator's count",
    FIRST_PASS: "the first pass",
    ABOVE_FLOOR: "the first pass above its entropy",
}
"""Ways to count the bits to learn. The generator's: the fewest bits that describe the new rules and
exceptions. The first pass (the study's): the summed loss of full fine-tuning over the training
rows, each taken before the model trains on that row (a prequential code, Dawid 1984). Above its
entropy: the first pass minus the entropy of the rows."""
UNSCORED = 3
"""Number of symbols at the start of a generated row that have no loss, because too few symbols
precede them."""
PARTS = ("changed", "unchanged")
VOCABULARY = 32


class Novelty(NamedTuple):
    """What is new in a generated data set: symbols with changed rules, and exceptions."""

    name: str
    """A short description for reports."""
    nothing: bool
    """Whether nothing is new, so that the run continues pretraining."""
    low: bool
    """Whether no exceptions are new. New rules may remain, but these are few numbers."""


def novelty_of(dataset: dict[str, Any]) -> Novelty | None:
    """Read the novelty of a data set from its spec; None if the generator is not `dialect`."""
    if dataset["location"] != "dialect":
        return None
    params = dataset.get("knobs") or {}
    symbols = round(VOCABULARY * float(params.get("rule_shift", 0.5)))
    exceptions, rank = float(params.get("new_exceptions", 0.3)), int(params.get("shift_rank", 0))
    rules = f"{symbols} symbols, {f'change of rank {rank}' if rank else 'drawn anew'}"
    facts = f"{exceptions:.0%} new exceptions"
    parts = [rules] * bool(symbols) + [facts] * bool(exceptions)
    return Novelty(" + ".join(parts) or "nothing new", not parts, not exceptions)


@dataclass(frozen=True)
class Gap:
    """LoRA at one rank compared with full fine-tuning, in one condition at one update."""

    rank: int
    lora: Optimum
    full: Optimum
    nats: AtBest[float]
    """LoRA's loss minus full fine-tuning's, by seed."""
    gain: AtBest[float]
    """How much full fine-tuning lowers the loss of the base, in nats, by seed."""
    load: float | None
    """The generator's bits / (BITS_PER_PARAMETER x parameters); None if the bits are unknown."""
    pooled: Part | None = None
    """Variance over seeds of the gap, pooled over the ranks of a condition."""

    @property
    def beyond_allowed(self) -> AtBest[float]:
        """The gap minus ALLOWED x gain, in nats, by seed; below 0 LoRA has no regret."""
        return self.nats.paired(self.gain, lambda gap, gain: gap - ALLOWED * gain)

    def over_allowed(self) -> Estimate:
        """Average `beyond_allowed` over seeds, in nats."""
        return over_seeds(self.beyond_allowed, self.pooled)

    def mean(self) -> Estimate:
        """Average the gap over seeds, in nats."""
        return over_seeds(self.nats, self.pooled)

    @property
    def in_percent(self) -> AtBest[float]:
        """The gap in percent of the gain, by seed."""
        return self.nats.paired(self.gain, lambda gap, gain: 100 * gap / gain)

    def percent(self) -> Estimate:
        """Average the gap in percent of the gain over seeds."""
        return over_seeds(self.in_percent)

    @property
    def planned_error(self) -> float:
        """The expected standard error of the gap, as a share of the gain; infinite if unknown.

        It comes from the noise of repeated full fine-tuning runs, so it does not depend on the gap.
        """
        runs, gain = self.full.likelihood, mean_of(self.gain)
        if runs is None or not runs.df or not gain > 0 or not self.nats.best:
            return math.inf
        noise = math.sqrt(runs.squares / runs.df)
        return math.sqrt(2 / len(self.nats.best)) * noise / gain


def gaps_of(table: pd.DataFrame, optima: Sequence[Optimum], controls: bool = False) -> list[Gap]:
    """Compare every rank with full fine-tuning in one condition; empty if a method is missing.

    `controls`: compare full fine-tuning of some matrices (rank 0) instead of LoRA.
    """
    losses, gaps = losses_at_best(optima), []
    whole = next(((o, v) for o, v in zip(optima, losses) if o.curve.is_full), None)
    if whole is None:
        return []
    chosen = [
        (o, v.minus(whole[1]))
        for o, v in zip(optima, losses)
        if (o.curve.is_control if controls else o.curve.key["method"] == "lora")
    ]
    gain = gain_from(starts_of(table), whole[1])
    pooled = None if controls else pooled_over(v for _, v in chosen)
    for o, nats in chosen:
        bits = None if controls else _generator_bits(runs_of(table, o.curve))
        load = None if bits is None else loads_of(table, o, {GENERATOR: bits})[GENERATOR]
        rank = 0 if controls else int(o.curve.key["rank"])
        gaps.append(Gap(rank, o, whole[0], nats, gain, load, pooled))
    return gaps


def gain_from(start: Mapping[int, float], losses: AtBest[float]) -> AtBest[float]:
    """Return how much training lowered the loss, by seed, in nats."""
    return losses.each(lambda by_seed: {s: start[s] - v for s, v in by_seed.items()})


def starts_of(table: pd.DataFrame) -> dict[int, float]:
    """Return the loss before training by seed, in nats."""
    return {int(s): float(v.mean()) for s, v in table.groupby("seed")["nll_start"]}


def bits_of(table: pd.DataFrame, full: Optimum) -> dict[str, float]:
    """Return the bits of a data set as means over seeds. Each key is a way to count (COUNTS).

    Unknown counts are left out. The first pass is of full fine-tuning, so that the load does not
    depend on LoRA.
    """
    codes = codes_of(table, full).best.values()
    counted = {k: [v[k] for v in codes if k in v] for k in (FIRST_PASS, ABOVE_FLOOR)}
    known = _generator_bits(table)
    found = {} if known is None else {GENERATOR: known}
    return found | {k: float(np.mean(v)) for k, v in counted.items() if v}


def codes_of(table: pd.DataFrame, full: Optimum) -> AtBest[dict[str, float]]:
    """Return full fine-tuning's bits of the first pass, by seed; keys are ways to count (COUNTS).

    Unknown counts are left out.
    """

    def read(run: pd.Series) -> dict[str, float]:
        """Return the bits of a run's first pass over its rows; empty if not recorded."""
        result, data = json.loads(run["result"]), json.loads(run["spec"])["dataset"]
        seen = int(run["batch_size"]) * int(run["steps"])
        rows = min(seen, int(result.get("n_train") or seen))
        points = [*result.get("curve", ()), {**result, "examples": seen}]
        at_end = [p["code_nats"] for p in points if p.get("examples") == rows and "code_nats" in p]
        nats = next((v for v in at_end if v is not None), math.nan)
        if not math.isfinite(nats):
            return {}
        bits = {FIRST_PASS: nats / math.log(2)}
        # The entropy per token of the held-out rows; only generated data have one.
        floor = result.get("floor_nats")
        if floor is not None and novelty_of(data) is not None:
            tokens = rows * (int(data["max_length"]) - UNSCORED)
            bits[ABOVE_FLOOR] = (nats - tokens * floor) / math.log(2)
        return bits

    return at_best.values_at_best(table, [full], read)[0]


def share_of_first_pass(table: pd.DataFrame, full: Optimum) -> AtBest[float]:
    """Return the generator's bits / the bits of full fine-tuning's first pass, by seed.

    Seeds for which a count is unknown are left out.
    """
    known = {int(s): _generator_bits(runs) for s, runs in table.groupby("seed")}

    def read(codes: dict[int, dict[str, float]]) -> dict[int, float]:
        pairs = ((s, known.get(s), v.get(FIRST_PASS)) for s, v in codes.items())
        return {s: new / code for s, new, code in pairs if new is not None and code}

    return codes_of(table, full).each(read)


def _generator_bits(table: pd.DataFrame) -> float | None:
    every = [json.loads(r).get("bits_generator") for r in table["result"]]
    known = [bits for bits in every if bits is not None]
    return float(np.mean(known)) if known else None


def loads_of(table: pd.DataFrame, o: Optimum, bits: Mapping[str, float]) -> dict[str, float]:
    """Return a load for each count of bits: bits / (BITS_PER_PARAMETER x trained parameters)."""
    capacity = BITS_PER_PARAMETER * float(runs_of(table, o.curve)["n_trainable"].mean())
    return {count: value / capacity for count, value in bits.items()}


def growth(first: Gap, last: Gap) -> Estimate:
    """Return how much the gap of a rank grows between two numbers of updates, in nats."""
    return over_seeds(last.nats.minus(first.nats))


def parts_at_best(table: pd.DataFrame, gap: Gap) -> dict[str, AtBest[float]]:
    """Split a gap into the parts from changed and from unchanged contexts, in nats, by seed.

    Empty if the two losses were not measured, or if all contexts are of one kind.
    """

    def read(row: pd.Series) -> dict[str, float]:
        result = json.loads(row["result"])
        share = result.get("changed_share")
        if share is None or not 0 < share < 1:
            return {}
        shares = zip(PARTS, (share, 1 - share))
        return {part: share * result[f"test_nll_{part}"] for part, share in shares}

    lora, full = at_best.values_at_best(table, [gap.lora, gap.full], read, parts=True)

    def difference(part: str) -> AtBest[float]:
        return lora.paired(full, lambda a, b: a.get(part, math.nan) - b.get(part, math.nan))

    found = {part: difference(part) for part in PARTS}
    return found if all(map(is_finite, found.values())) else {}


class Needed(NamedTuple):
    """The range (above, up_to] in which the smallest rank with no regret lies."""

    above: float
    """Largest rank whose interval lies above the allowed regret; 0 if there is none."""
    up_to: float
    """Smallest rank such that it and all higher ranks have no regret; infinite if there is none."""

    def __str__(self) -> str:
        """Format the range for reports."""
        if math.isinf(self.up_to):
            return f"above {self.above:g}" if self.above else "-"
        return f"up to {self.up_to:g}" if not self.above else f"{self.above:g} to {self.up_to:g}"


def rank_needed(over_allowed: Mapping[int, Estimate]) -> Needed:
    """Return the range of the smallest rank with no regret, from `Gap.over_allowed` by rank.

    A rank is undecided if its interval is missing or contains 0: `up_to` is then above this rank.
    """
    above, up_to = 0.0, math.inf
    for rank, e in sorted(over_allowed.items()):
        lacks = e.low is not None and e.low > 0
        above = float(rank) if lacks else above
        enough = not lacks and e.high is not None and e.high < 0
        up_to = min(up_to, float(rank)) if enough else math.inf
    return Needed(above, up_to)


def rank_needed_by_seed(gaps: Mapping[int, Gap]) -> AtBest[float]:
    """Interpolate log2(smallest rank with no regret) by seed; +-inf outside the ranks tried."""
    ranks = sorted(gaps)
    over = [gaps[r].beyond_allowed for r in ranks]

    def read(values: Sequence[Mapping[int, float]]) -> dict[int, float]:
        seeds = set.intersection(*(set(v) for v in values)) if values else set()
        return {s: crossing(np.log2(ranks), [v[s] for v in values]) for s in sorted(seeds)}

    draws = tuple(read(v) for v in zip(*(o.draws for o in over)))
    return AtBest(read([o.best for o in over]), draws)


def crossing(x: Sequence[float] | np.ndarray, y: Sequence[float]) -> float:
    """Return the last x where y falls to 0; -inf if all y are below 0, inf if the last is above."""
    if not np.isfinite(y).all():
        return math.nan
    if y[-1] > 0:
        return math.inf
    if max(y) <= 0:
        return -math.inf
    # A monotone cubic (Fritsch and Butland 1984) adds no crossings of 0 to those of the points.
    return float(PchipInterpolator(x, y).roots(extrapolate=False).max())
