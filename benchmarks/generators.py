"""Simulate sweeps with known optima, for calibration and tests.

The shapes come from the fitted family and from others. A family draws a shape h(u): the expected
loss over u = ln(lr / reference) at unit curvature. The true optimum is the minimum of h.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.optimum.fit import linex
from analysis.runs.curves import LrCurve

MARGIN = (7.1, 14.1)
"""Margin of the claim by which simulated sweeps are judged: the ratio is about 10."""


def _softplus(z: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, z)


def _well(u: np.ndarray, top: float) -> np.ndarray:
    return top * -np.expm1(-(u**2) / 2 / top)


FAMILIES: dict[str, tuple[tuple[tuple[float, float], ...], Callable[..., np.ndarray]]] = {
    "linex": (((0, 1.5),), linex),
    "parabola": ((), lambda u: u * u / 2),
    "cosh": (((0.5, 1.2),), lambda u, k: (np.cosh(k * u) - 1) / k**2),
    "plateau": (
        ((0.4, 1.5), (0, 1.2)),
        lambda u, top, a: np.where(u < 0, _well(np.minimum(u, 0), top), linex(u, a)),
    ),
    "double_slope": (
        ((0.8, 2), (0.3, 0.8), (0.3, 0.8)),
        lambda u, right, width, ratio: (
            width * (right * _softplus(u / width) + ratio * right * _softplus(-u / width))
        ),
    ),
    "kink": (
        ((0, math.log(4)), (0, 0.8)),
        lambda u, q, a: (
            np.where(u < 0, 1 / math.sqrt(math.exp(q)), math.sqrt(math.exp(q))) * linex(u, a)
        ),
    ),
    "power": (((1.5, 3.0),), lambda u, p: np.abs(u) ** p / 2),
    "turning": (((0, 0.5),), lambda u, k: u * u / 2 * (1 + k * np.tanh(u))),
    "morse": (((0.5, 1.0),), lambda u, a: np.expm1(a * u) ** 2 / (2 * a * a)),
    "well": (((0.8, 3.0),), _well),
    "cliff": (((0, 1.5),), linex),
    "unequal": (((0, 1.5),), linex),
    "collapse": (((0, 1.5),), linex),
}
"""Families of shapes: ranges of their parameters, and h(u, *parameters).

`cliff`: every run above a learning rate 1.2 to 3 times the optimum diverges. `unequal`: the noise
grows as lr^0.7. `collapse`: above a learning rate 3 to 12 times the optimum, the loss is 0.8 to 10
nats higher, but the run is not reported as diverged."""
INSIDE = ("linex", "parabola")
"""Families that belong to the fitted one (LINEX)."""
HELD_OUT = ("morse", "well", "cliff", "unequal", "collapse")
"""Families that were not used to choose the model's constants."""


@dataclass(frozen=True)
class Design:
    """The design of a simulated sweep."""

    rates: int
    factor: float
    """Ratio of neighbouring learning rates."""
    seeds: int
    """Number of seeds at every learning rate."""
    fresh: int = 0
    """Number of further seeds, around the best learning rate only."""
    noise: float = 1e-3
    """Standard deviation of one run, in nats."""
    curves: int = 4
    """Number of curves; the first is of full fine-tuning."""
    fresh_rates: int = 3
    """Number of LRs that get the fresh seeds: the best LR and its neighbours. An even number has
    one more neighbour above than below, as in `lorasweep.sweep.grid`."""

    @property
    def runs(self) -> int:
        """Runs of one curve."""
        return self.rates * self.seeds + self.fresh * self.fresh_rates


def plant(
    family: str,
    design: Design,
    rng: np.random.Generator,
    place: tuple[float, float] = (1.0, 1.0),
    steep: tuple[float, float] = (0.02, 0.3),
    paired: bool = False,
    alike: bool = True,
) -> tuple[list[LrCurve], np.ndarray]:
    """Simulate a sweep of one family; return its curves and their true optima in ln(lr).

    Each seed shifts all losses of a curve by three times the noise (standard deviation).

    Args:
        place: optima are at least this many grid spacings inside the lower and the upper end;
            negative: beyond that end.
        steep: range of the curvature at the optimum, in nats per unit of ln(lr) squared, drawn
            uniformly in its logarithm.
        paired: a seed shifts the losses of all curves by the same amount, as if arms shared
            batches. Otherwise the shift differs between curves.
        alike: all curves have one shape. Otherwise each has a shape of its own in the family.
    """
    x = np.arange(design.rates) * math.log(design.factor) - 8.0
    step = math.log(design.factor)
    ranges, shape = FAMILIES[family]
    around = np.linspace(-2, 2, 4001)
    n = 1 if alike else design.curves
    parameters = [[rng.uniform(*ends) for ends in ranges] for _ in range(n)]
    parameters *= design.curves // n
    curves, truths = [], np.empty(design.curves)
    shared = rng.standard_normal((design.seeds + design.fresh, 1)) if paired else None
    for k in range(design.curves):
        c = math.exp(rng.uniform(*np.log(steep)))
        own = float(around[np.argmin(shape(around, *parameters[k]))])
        m = rng.uniform(x[0] + place[0] * step, x[-1] - place[1] * step)
        last = m + rng.uniform(math.log(1.2), math.log(3)) if family == "cliff" else math.inf
        loss = c * shape(x - m + own, *parameters[k])
        if family == "collapse":
            beyond = m + rng.uniform(math.log(3), math.log(12))
            rise = math.exp(rng.uniform(math.log(0.8), math.log(10)))
            loss = np.where(x > beyond, loss + rise, loss)
        spread = design.noise * (np.exp(0.7 * (x - m)) if family == "unequal" else 1)
        losses = []
        for first, n in ((0, design.seeds), (design.seeds, design.fresh)):
            own_noise = spread * rng.standard_normal((n, len(x)))
            shift = rng.standard_normal((n, 1)) if shared is None else shared[first : first + n]
            losses.append(loss + own_noise + 3 * design.noise * shift)
        y, alive = np.concatenate(losses), x <= last
        there = np.ones(y.shape, bool)
        n = design.fresh_rates
        best = int(np.argmin(np.where(alive, losses[0].mean(0), np.inf)))
        first = min(max(best - (n - 1) // 2, 0), max(int(alive.sum()) - n, 0))
        there[design.seeds :] = np.isin(np.arange(len(x)), first + np.arange(n))
        of_seed, of_rate = np.nonzero(there)
        order = np.lexsort((of_seed, of_rate))
        seed, at = of_seed[order], of_rate[order]
        usable = alive[at]
        key = {
            "model": "planted",
            "dataset": "planted",
            "method": "lora" if k else "fullft",
            "rank": 4.0 * 2**k if k else None,
            "alpha": 32.0,
        }
        measured = np.where(usable, y[seed, at], np.nan)
        curves.append(LrCurve(key, x[at], measured, seed, seed, usable, math.nan, math.nan))
        truths[k] = m
    return curves, truths
