"""The loss of a curve's runs at a prescribed learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.inference.estimate import AT_LEAST, Estimate
from analysis.inference.gates import MIN_SEEDS, Gate, GateCode
from analysis.inference.seeds import PooledVariance
from analysis.measures.at_best import NEAR, AtBest, over_seeds, weights
from analysis.optimum.optimum import Optimum


@dataclass(frozen=True)
class AtRate:
    """Losses at a prescribed rate, and at draws of that rate if it has an error itself."""

    losses: AtBest[float]
    read_at: list[float]
    """The tried rates from which the loss at the first rate was interpolated."""
    near_broken: list[bool]
    """For each rate, whether it is next to one that diverged, so that the loss may be higher."""


def losses_at(o: Optimum | None, rates: Sequence[float]) -> AtRate:
    """Interpolate a curve's losses by seed, in ln(rate), to a prescribed rate and draws of it.

    Args:
        rates: the prescribed rate, then equally likely draws of it.
    """
    found = [_at(o, at) for at in rates] if o is not None else []
    if not found:
        return AtRate(AtBest({}), [], [])
    losses = AtBest(found[0][0], tuple(by_seed for by_seed, *_ in found[1:]))
    return AtRate(losses, sorted(found[0][1]), [near for *_, near in found])


def _at(o: Optimum, at: float) -> tuple[dict[int, float], set[float], bool]:
    c, losses, used, near = o.curve, {}, set(), False
    heights = {x: float(np.mean(c.y[c.usable & (c.x == x)])) for x in c.x[c.usable]}
    for seed in sorted(set(c.seed)):
        of_seed = c.seed == seed
        mine = dict(zip(c.x[of_seed], zip(c.y[of_seed], c.usable[of_seed])))
        found = weights(list(mine), math.log(at), {x: heights.get(x, math.inf) for x in mine})
        broken = not all(mine[x][1] for x in found)
        if len(found) == 1 or broken:  # at a tried rate, outside them, or next to a diverged one
            nearest = min(mine, key=lambda x: abs(x - math.log(at)))
            if abs(nearest - math.log(at)) > NEAR:
                continue
            found, near = {nearest: 1.0}, near or (broken and mine[nearest][1])
        # After a diverged run one would keep the base model, so the whole gain is lost.
        losses[int(seed)] = sum(
            w * (mine[x][0] if mine[x][1] or mine[x][0] < c.nll_start else c.nll_start)
            for x, w in found.items()
        )
        used |= {math.exp(x) for x in found}
    return losses, used, near


def lost_at(
    o: Optimum | None,
    at: AtRate,
    lost: AtBest[float],
    highest: float,
    pooled: PooledVariance | None = None,
) -> tuple[Estimate, list[Gate]]:
    """Average over seeds what a curve loses at a prescribed rate; also return the gates.

    Args:
        o: None if the curve is missing.
        lost: by seed, from the losses in `at`.
        highest: upper end of the claim's margin.
        pooled: variance over seeds of similar curves.
    """
    mean = over_seeds(lost, pooled, (AT_LEAST,) if at.near_broken[:1] == [True] else ())
    gates = [] if mean.n else [Gate(GateCode.RECIPE_OUTSIDE)]
    if o is None:
        gates = [Gate(GateCode.MISSING, "the recipe")]
    if 0 < mean.n < MIN_SEEDS:
        gates.append(Gate(GateCode.FEW_SEEDS_AT_RECIPE, mean.n))
    if any(at.near_broken) and mean.low is not None and mean.low <= highest:
        gates.append(Gate(GateCode.RECIPE_BY_A_CLIFF, flags=("bounded_by_divergence",)))
    return mean, gates
