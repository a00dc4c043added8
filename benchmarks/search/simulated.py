"""Coverage: whole searches on simulated arms, whose optima are known.

Later runs of a search depend on earlier results, which may bias intervals.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from benchmarks.calibration.generators import FAMILIES
from benchmarks.harness import Figures, Log
from benchmarks.search.methods import FAR, FULL_STEPS, RIGHT, Arm, swept, updates_of, whole_search
from lorasweep.spec.streams import stream
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import Search

SHAPES = [f for f in FAMILIES if f not in ("cliff", "unequal", "collapse")]
"""Families of simulated valleys; the others differ from `linex` in their noise or divergence."""
GAIN = 0.25
"""Loss before training minus the loss of full fine-tuning at its optimum, in nats."""
LEVELS = (-0.05, 0.1)
"""LoRA's loss minus full fine-tuning's, each at its optimum, as a share of the gain."""
STEEP = (0.08, 0.3)
"""Curvature at the optimum, as a share of the gain per unit of ln(lr) squared."""
NOISE = (0.003, 0.012)
"""Standard deviation of a run, as a share of the gain; of a seed's shift, three times as much."""
LATER = 2.5
"""The optimum of a short run lies up to this factor above a full run's."""


@dataclass(frozen=True)
class Valley:
    """A simulated arm: expected losses of known shape, optimum and level, and noise."""

    shape: Callable[[float], float]
    """ln(lr / optimum) -> height above the minimum, at unit curvature."""
    optimum: float
    level: float
    steep: float
    noise: float
    later: float
    name: tuple[object, ...]
    """Of the random streams of seeds and runs."""

    def loss(self, lr: float, steps: int, seed: int) -> float:
        """Return the loss of a run of FULL_STEPS updates, or of a short one."""
        short = steps < FULL_STEPS
        u = math.log(lr / self.optimum / (self.later if short else 1.0))
        room = GAIN / 2 if short else GAIN - self.level
        height = self.steep * self.shape(u)
        if u < 0:  # a learning rate that is too low leaves the loss before training
            height = -room * math.expm1(-height / room)
        if height > 2 * room:
            return math.inf
        shift = 3 * stream(*self.name, "seed", seed).standard_normal()
        own = stream(*self.name, "run", seed, f"{lr:.2e}", steps).standard_normal()
        return GAIN - room + height + self.noise * float(shift + own)

    def regret(self, lr: float) -> float:
        """Return the regret of a learning rate, in percent of the gain."""
        return 100 * self.steep * self.shape(math.log(lr / self.optimum)) / (GAIN - self.level)


def simulated(family: str, k: int) -> tuple[list[Arm], list[Valley]]:
    """Simulate full fine-tuning and two ranks of LoRA with valleys of one family."""
    rng = stream("tune", family, k)
    ranges, drawn = FAMILIES[family]
    parameters = [rng.uniform(*ends) for ends in ranges]
    near = np.linspace(-2, 2, 4001)
    heights = drawn(near, *parameters)
    at, lowest = float(near[np.argmin(heights)]), float(heights.min())

    def shape(u: float) -> float:
        return max(float(drawn(np.array([u + at]), *parameters)[0]) - lowest, 0.0)

    noise, arms, valleys = GAIN * _log_uniform(rng, NOISE), [], []
    for p in swept().points:
        lora = p.arm != "fullft"
        valley = Valley(
            shape,
            (1e-3 if lora else 1e-4) * _log_uniform(rng, (1 / 3, 3)),
            GAIN * rng.uniform(*LEVELS) if lora else 0.0,
            GAIN * _log_uniform(rng, STEEP),
            noise,
            _log_uniform(rng, (1, LATER)),
            ("valley", family, k, p.id),
        )
        lr = valley.optimum * _log_uniform(rng, (1 / FAR, FAR))
        start = Point(p.arm, dataclasses.replace(p.spec, lr=lr, seed=0))
        arms.append(Arm(start, valley.loss, [FULL_STEPS]))
        valleys.append(valley)
    return arms, valleys


def _log_uniform(rng: np.random.Generator, ends: tuple[float, float]) -> float:
    return math.exp(rng.uniform(*np.log(ends)))


def coverage(log: Log, n: int = 30) -> list[Figures]:
    """Run whole searches on simulated runs; count how often intervals hold the truth."""
    rows = []
    for family in SHAPES:
        held: dict[str, list[bool]] = {"lr": [], "gap": []}
        updates, regrets = [], []
        for k in range(n):
            arms, valleys = simulated(family, k)
            trials, results = whole_search(arms, Search(), GAIN)
            updates.append(updates_of(trials, FULL_STEPS))
            for valley, found in zip(valleys, results["arms"]):
                best, gap = found["best_lr"], found["gap_percent"]
                regrets.append(valley.regret(best["value"] or found["best_tried"]))
                for name, e, truth in (
                    ("lr", best, valley.optimum),
                    ("gap", gap, 100 * valley.level / GAIN),
                ):
                    if e and e["low"] is not None and e["high"] is not None:
                        held[name].append(e["low"] <= truth <= e["high"])
        row = {
            "family": family,
            "searches": n,
            "updates": fmean(updates),
            "right": fmean(r < RIGHT for r in regrets),
            "intervals": {name: len(v) for name, v in held.items()},
            "held": {name: sum(v) for name, v in held.items()},
            "arms": len(regrets),
        }
        log(str(row))
        rows.append(row)
    return rows
