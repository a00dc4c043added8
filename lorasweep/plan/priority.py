"""Choose the claims that a budget of GPU-hours decides, by decided claims per GPU-hour."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Need:
    """A claim, and the runs that are expected to decide it."""

    sweep: str
    claim: str
    runs: Mapping[str, float]
    """Run id -> GPU-hours; claims and sweeps share runs by their ids."""


@dataclass(frozen=True)
class Choice:
    """A chosen claim, with the cost that it adds to the claims chosen before it."""

    need: Need
    runs: int
    gpu_hours: float
    total: float
    """GPU-hours of all claims so far, this one included."""


def choose(needs: Sequence[Need], budget: float) -> tuple[list[Choice], list[tuple[Need, float]]]:
    """Choose claims within a budget of GPU-hours; also return each other claim with its extra cost.

    Greedy: of the sets of runs that still fit, each time the one that decides most further claims
    per additional GPU-hour. The candidates are the runs of each claim; they also decide every claim
    whose runs are among them. The extra cost is that of the runs that no chosen claim has.
    """
    missing = {need: set(need.runs) for need in needs}
    chosen: list[Choice] = []
    total = 0.0

    def cost(need: Need) -> float:
        return math.fsum(need.runs[run] for run in missing[need])  # in any order

    while missing:
        costs = {need: cost(need) for need in missing}
        values = {
            need: sum(runs <= missing[need] for runs in missing.values()) / max(hours, 1e-9)
            for need, hours in costs.items()
            if total + hours <= budget
        }
        if not values:
            break
        bought = missing[max(values, key=values.__getitem__)]
        decided = [need for need, runs in missing.items() if runs <= bought]
        for need in sorted(decided, key=costs.__getitem__):
            hours, runs = cost(need), missing.pop(need)
            total += hours
            chosen.append(Choice(need, len(runs), hours, total))
            for others in missing.values():
                others -= runs
    return chosen, [(need, cost(need)) for need in missing]
