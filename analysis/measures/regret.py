"""Regret of LoRA against full fine-tuning, how much is new in the data, and the rank it needs.

Each arm is at its optimal learning rate, and losses are paired by seed. Where data are drawn by
seed, an interval is over draws of what is to be learned.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from analysis.inference.estimate import Estimate
from analysis.inference.seeds import PooledVariance
from analysis.measures import at_best
from analysis.measures.at_best import AtBest, is_finite, losses_at_best, mean_of, over_seeds
from analysis.optimum.optimum import Optimum
from analysis.runs.lr_curves import runs_of

ALLOWED = 0.05
"""LoRA has no regret if it loses less than this share of what full fine-tuning gains."""
BITS_PER_PARAMETER = 2.0
"""Capacity of LoRA in the study, bits per trained parameter."""
GENERATOR, FIRST_PASS, ABOVE_FLOOR = "generator", "first_pass", "above_floor"
COUNTS = {
    GENERATOR: "the generator's count",
    FIRST_PASS: "the first pass",
    ABOVE_FLOOR: "the first pass above its entropy",
}
"""How the bits of a data set are counted. The generator's: the free numbers of what is new. The
first pass (the study's): the summed loss of full fine-tuning over the training rows, each before it
is learned from (a prequential code, Dawid 1984). Above its entropy: without the rows' entropy."""
UNSCORED = 3
"""Symbols at the start of a generated row without a full context, which bear no loss."""
PARTS = ("changed", "unchanged")


@dataclass(frozen=True)
class Novelty:
    """What is new in a generated data set, from its parameters."""

    symbols: int
    """Symbols with changed rules, of VOCABULARY."""
    rank: int
    """Rank of that change; 0: the rules are redrawn."""
    exceptions: float
    """Share of the memorised exceptions that are new."""

    @property
    def nothing(self) -> bool:
        """Whether nothing is new, so that the run continues pretraining."""
        return not self.symbols and not self.exceptions

    @property
    def low(self) -> bool:
        """Whether the rules alone, which are few numbers, are new."""
        return not self.exceptions

    @property
    def name(self) -> str:
        """The name for people."""
        how = f"change of rank {self.rank}" if self.rank else "drawn anew"
        rules = f"{self.symbols} symbols, {how}" if self.symbols else ""
        facts = f"{self.exceptions:.0%} new exceptions" if self.exceptions else ""
        return " + ".join(filter(None, (rules, facts))) or "nothing new"


VOCABULARY = 32


def novelty_of(dataset: dict[str, Any]) -> Novelty | None:
    """Read the novelty of a data set from its spec; None if the generator is not `dialect`."""
    if dataset["location"] != "dialect":
        return None
    params = dataset.get("knobs") or {}
    symbols = round(VOCABULARY * float(params.get("rule_shift", 0.5)))
    exceptions = float(params.get("new_exceptions", 0.3))
    return Novelty(symbols, int(params.get("shift_rank", 0)), exceptions)


@dataclass(frozen=True)
class Gap:
    """LoRA of one rank against full fine-tuning in one condition after one number of updates."""

    rank: int
    lora: Optimum
    full: Optimum
    nats: AtBest[float]
    """LoRA's loss minus full fine-tuning's, by seed."""
    gain: AtBest[float]
    """What full fine-tuning gains over the base, in nats, by seed."""
    load: float | None
    """The generator's bits over the capacity at BITS_PER_PARAMETER; None if they are not known."""
    pooled: PooledVariance | None = None
    """Variance over seeds of the gap, pooled over the ranks of a condition."""

    @property
    def beyond_allowed(self) -> AtBest[float]:
        """The gap minus ALLOWED of the gain, by seed: below 0 LoRA has no regret."""
        return self.nats.paired(self.gain, lambda gap, gain: gap - ALLOWED * gain)

    def over_allowed(self) -> Estimate:
        """Average `beyond_allowed` over seeds, in nats."""
        return over_seeds(self.beyond_allowed, self.pooled)

    def mean(self) -> Estimate:
        """Average the gap over seeds, in nats."""
        return over_seeds(self.nats, self.pooled)

    def percent(self) -> Estimate:
        """Average the gap in percent of the gain over seeds."""
        return over_seeds(self.nats.paired(self.gain, lambda gap, gain: 100 * gap / gain))

    @property
    def planned_error(self) -> float:
        """The standard error to expect of the gap, as a share of the gain; infinite if unknown.

        From the noise of repeats of full fine-tuning, so that it does not depend on what is judged.
        """
        runs, gain = self.full.likelihood, mean_of(self.gain)
        if runs is None or not runs.df or not gain > 0:
            return math.inf
        noise = math.sqrt(runs.squares / runs.df)
        return math.sqrt(2 / len(self.gain.best)) * noise / gain


def gaps_of(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Gap]:
    """Compare every rank with full fine-tuning in one condition's runs; empty without both arms."""
    lora = [o for o in optima if o.curve.key["method"] == "lora"]
    found = _against_full(table, optima, lora)
    pooled = at_best.pooled_over(g.nats for g in found)
    gaps = []
    for g in found:
        bits = _generator_bits(runs_of(table, g.lora.curve))
        load = None if bits is None else loads_of(table, g.lora, {GENERATOR: bits})[GENERATOR]
        gaps.append(replace(g, rank=int(g.lora.curve.key["rank"]), load=load, pooled=pooled))
    return gaps


def controls_of(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Gap]:
    """Compare full fine-tuning of some matrices alone, as rank 0, with that of everything."""
    full = (o for o in optima if o.curve.key["method"] == "fullft")
    return _against_full(table, optima, [o for o in full if o.curve.key.get("scope") == "matrices"])


def _against_full(
    table: pd.DataFrame, optima: Sequence[Optimum], others: Sequence[Optimum]
) -> list[Gap]:
    """Compare curves with full fine-tuning of everything; empty without it."""
    full_ft = (o for o in optima if o.curve.key["method"] == "fullft")
    whole = [o for o in full_ft if o.curve.key.get("scope") != "matrices"]
    if not whole:
        return []
    losses = dict(zip(map(id, optima), losses_at_best(optima)))
    full = losses[id(whole[0])]
    gain = gain_from(starts_of(table), full)
    return [Gap(0, o, whole[0], losses[id(o)].minus(full), gain, None) for o in others]


def gain_from(start: Mapping[int, float], losses: AtBest[float]) -> AtBest[float]:
    """Return what was gained over the loss before training, by seed, in nats."""
    return losses.each(lambda by_seed: {s: start[s] - v for s, v in by_seed.items()})


def starts_of(table: pd.DataFrame) -> dict[int, float]:
    """Return the loss before training by seed, in nats."""
    return {int(s): float(v.mean()) for s, v in table.groupby("seed")["nll_start"]}


def bits_of(table: pd.DataFrame, full: Optimum) -> dict[str, float]:
    """Return the bits of a data set by each of COUNTS that is known, as means over seeds.

    Full fine-tuning codes the rows, so that the load does not depend on LoRA.
    """
    found = {} if (known := _generator_bits(table)) is None else {GENERATOR: known}

    def read(run: pd.Series) -> dict[str, float]:
        """Return the bits of a run's first pass over its rows; empty if not recorded."""
        result, data = json.loads(run["result"]), json.loads(run["spec"])["dataset"]
        seen = int(run["batch_size"]) * int(run["steps"])
        rows = min(seen, int(result.get("n_train") or seen))
        points = [*result.get("curve", ()), {**result, "examples": seen}]
        at_end = (p["code_nats"] for p in points if p.get("examples") == rows and "code_nats" in p)
        nats = next(at_end, math.nan)
        if not math.isfinite(nats):
            return {}
        bits = {FIRST_PASS: nats / math.log(2)}
        # Per token, of the held-out rows: only generated data have one.
        floor = result.get("floor_nats")
        if floor is not None and novelty_of(data) is not None:
            tokens = rows * (int(data["max_length"]) - UNSCORED)
            bits[ABOVE_FLOOR] = (nats - tokens * floor) / math.log(2)
        return bits

    (codes,) = at_best.values_at_best(table, [full], read)
    for count in (FIRST_PASS, ABOVE_FLOOR):
        by_seed = [v[count] for v in codes.best.values() if count in v]
        if by_seed:
            found[count] = float(np.mean(by_seed))
    return found


def _generator_bits(table: pd.DataFrame) -> float | None:
    every = [json.loads(r).get("bits_generator") for r in table["result"]]
    known = [bits for bits in every if bits is not None]
    return float(np.mean(known)) if known else None


def loads_of(table: pd.DataFrame, o: Optimum, bits: Mapping[str, float]) -> dict[str, float]:
    """Return bits over the capacity of a curve's adapter, at BITS_PER_PARAMETER, by count."""
    capacity = BITS_PER_PARAMETER * float(runs_of(table, o.curve)["n_trainable"].mean())
    return {count: value / capacity for count, value in bits.items()}


def growth(first: Gap, last: Gap) -> Estimate:
    """Return how much the gap of a rank grows between two numbers of updates, in nats."""
    return over_seeds(last.nats.minus(first.nats))


def parts_at_best(table: pd.DataFrame, gap: Gap) -> dict[str, AtBest[float]]:
    """Split a gap, in nats by seed, into the parts of changed and of unchanged contexts.

    Empty if the losses were not measured apart, or there is only one kind of contexts.
    """

    def read(row: pd.Series) -> dict[str, float]:
        result = json.loads(row["result"])
        share = result.get("changed_share")
        if share is None or not 0 < share < 1:
            return {}
        shares = zip(PARTS, (share, 1 - share))
        return {part: share * result[f"test_nll_{part}"] for part, share in shares}

    lora, full = at_best.parts_at_best(table, [gap.lora, gap.full], read)

    def difference(part: str) -> AtBest[float]:
        return lora.paired(full, lambda a, b: a.get(part, math.nan) - b.get(part, math.nan))

    found = {part: difference(part) for part in PARTS}
    return found if all(map(is_finite, found.values())) else {}


@dataclass(frozen=True)
class Needed:
    """The smallest rank with no regret, as far as the ranks tried tell: in (above, up_to]."""

    above: float
    """Largest rank whose regret exceeds what is allowed; 0 if none does."""
    up_to: float
    """Smallest rank from which on no regret exceeds what is allowed; infinite if there is none."""

    def __str__(self) -> str:
        """Return the range for people."""
        if math.isinf(self.up_to):
            return f"above {self.above:g}" if self.above else "-"
        return f"up to {self.up_to:g}" if not self.above else f"{self.above:g} to {self.up_to:g}"


def rank_needed(over_allowed: Mapping[int, Estimate]) -> Needed:
    """Return the smallest rank with no regret; ranks without an interval are not judged."""
    above, up_to = 0.0, math.inf
    for rank, e in sorted(over_allowed.items()):
        if e.low is not None and e.low > 0:
            above, up_to = float(rank), math.inf
        elif e.high is not None and e.high < 0:
            up_to = min(up_to, float(rank))
        else:
            up_to = math.inf
    return Needed(above, up_to)


def rank_needed_by_seed(gaps: Mapping[int, Gap]) -> AtBest[float]:
    """Return log2 of the needed rank, interpolated, by seed; +-inf outside the ranks tried."""
    ranks = sorted(gaps)
    over = [gaps[r].beyond_allowed for r in ranks]

    def read(values: Sequence[Mapping[int, float]]) -> dict[int, float]:
        seeds = set.intersection(*(set(v) for v in values)) if values else set()
        return {s: crossing(np.log2(ranks), [v[s] for v in values]) for s in sorted(seeds)}

    draws = tuple(read(v) for v in zip(*(o.draws for o in over)))
    return AtBest(read([o.best for o in over]), draws)


def crossing(x: Sequence[float] | np.ndarray, y: Sequence[float]) -> float:
    """Return where y last falls to 0; -inf if all of y is below 0, inf if the last y is above."""
    if not np.isfinite(y).all():
        return math.nan
    if y[-1] > 0:
        return math.inf
    if max(y) <= 0:
        return -math.inf
    # A monotone cubic (Fritsch and Butland 1984) does not leave the ranks around the crossing.
    return float(PchipInterpolator(x, y).roots(extrapolate=False).max())


def change_of_needed(
    first: AtBest[float], last: AtBest[float], doublings: float
) -> AtBest[float] | None:
    """Return the change of log2 of the needed rank per doubling, or None if a seed's is unknown."""
    change = last.paired(first, lambda b, a: (b - a) / doublings)
    return change if is_finite(change) else None
