"""Simulate sweeps with known optima, for calibration and tests.

Their shapes come from the fitted family and from others. A family draws a shape h(u), the expected
loss over u = ln(lr / reference) at unit curvature; the truth is its minimum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.optimum.valley import linex
from analysis.runs.lr_curves import LrCurve

MARGIN = (7.1, 14.1)
"""Margin of the claim by which simulated sweeps are judged: the ratio is about 10."""
Shape = Callable[[np.ndarray], np.ndarray]


def _softplus(z: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, z)


def _double(rng: np.random.Generator) -> Shape:
    right, width = rng.uniform(0.8, 2), rng.uniform(0.3, 0.8)
    left = rng.uniform(0.3, 0.8) * right
    return lambda u: width * (right * _softplus(u / width) + left * _softplus(-u / width))


def _kink(rng: np.random.Generator) -> Shape:
    q, a = math.exp(rng.uniform(0, math.log(4))), rng.uniform(0, 0.8)
    return lambda u: np.where(u < 0, 1 / math.sqrt(q), math.sqrt(q)) * linex(u, a)


def _plateau(rng: np.random.Generator) -> Shape:
    top, a = rng.uniform(0.4, 1.5), rng.uniform(0, 1.2)
    return lambda u: np.where(
        u < 0, top * -np.expm1(-(np.minimum(u, 0) ** 2) / 2 / top), linex(u, a)
    )


def _linex(rng: np.random.Generator) -> Shape:
    a = rng.uniform(0, 1.5)
    return lambda u: linex(u, a)


def _cosh(rng: np.random.Generator) -> Shape:
    k = rng.uniform(0.5, 1.2)
    return lambda u: (np.cosh(k * u) - 1) / k**2


def _power(rng: np.random.Generator) -> Shape:
    p = rng.uniform(1.5, 3.0)
    return lambda u: np.abs(u) ** p / 2


def _turning(rng: np.random.Generator) -> Shape:
    k = rng.uniform(0, 0.5)
    return lambda u: u * u / 2 * (1 + k * np.tanh(u))


def _morse(rng: np.random.Generator) -> Shape:
    a = rng.uniform(0.5, 1.0)
    return lambda u: np.expm1(a * u) ** 2 / (2 * a * a)


def _well(rng: np.random.Generator) -> Shape:
    top = rng.uniform(0.8, 3.0)
    return lambda u: top * -np.expm1(-(u**2) / 2 / top)


FAMILIES: dict[str, Callable[[np.random.Generator], Shape]] = {
    "linex": _linex,
    "parabola": lambda rng: lambda u: u * u / 2,
    "cosh": _cosh,
    "plateau": _plateau,
    "double_slope": _double,
    "kink": _kink,
    "power": _power,
    "turning": _turning,
    "morse": _morse,
    "well": _well,
    "cliff": _linex,
    "unequal": _linex,
    "collapse": _linex,
}
"""Families of shapes by name. `cliff`: every run above a learning rate 1.2 to 3 times the optimum
diverges. `unequal`: the noise grows as lr^0.7. `collapse`: above a learning rate 3 to 12 times the
optimum, the loss is 0.8 to 10 nats higher, but the run is not reported as diverged."""
INSIDE = ("linex", "parabola")
"""Families that belong to the fitted one (LINEX)."""
HELD_OUT = ("morse", "well", "cliff", "unequal", "collapse")
"""Families that were not used to choose the model's constants."""


@dataclass(frozen=True)
class Design:
    """The design of a simulated sweep."""

    rates: int
    factor: float
    """Between neighbouring learning rates."""
    seeds: int
    """Over the whole grid."""
    fresh: int = 0
    """More seeds, around the best learning rate only."""
    noise: float = 1e-3
    """Standard deviation of one run, in nats."""
    curves: int = 4
    """The first one is full fine-tuning's."""
    fresh_rates: int = 3
    """Number of rates that get the fresh seeds: the best one and its neighbours, of an even number
    one more above it than below (as `lorasweep.sweep.replicates` has it)."""

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
) -> tuple[list[LrCurve], np.ndarray]:
    """Simulate a sweep with one shape; return its curves and their true optima in ln(lr).

    Args:
        place: optima are at least this many grid spacings inside the lower and the upper end;
            negative: beyond it.
        steep: range of the curvature at the optimum, in nats per unit of ln(lr) squared, drawn
            uniformly in its logarithm.
        paired: a seed shifts the losses of all curves by the same amount, as where arms share
            batches; otherwise each curve by another one.
    """
    x = np.arange(design.rates) * math.log(design.factor) - 8.0
    step = math.log(design.factor)
    shape = FAMILIES[family](rng)
    around = np.linspace(-2, 2, 4001)
    own = float(around[np.argmin(shape(around))])
    curves, truths = [], np.empty(design.curves)
    shared = rng.standard_normal((design.seeds + design.fresh, 1)) if paired else None
    for k in range(design.curves):
        c = math.exp(rng.uniform(*np.log(steep)))
        m = rng.uniform(x[0] + place[0] * step, x[-1] - place[1] * step)
        last = m + rng.uniform(math.log(1.2), math.log(3)) if family == "cliff" else math.inf
        loss = c * shape(x - m + own)
        if family == "collapse":
            beyond = m + rng.uniform(math.log(3), math.log(12))
            rise = math.exp(rng.uniform(math.log(0.8), math.log(10)))
            loss = np.where(x > beyond, loss + rise, loss)
        curves.append(_measure(k, x, loss, m, last, design, family == "unequal", rng, shared))
        truths[k] = m
    return curves, truths


def _measure(
    k: int,
    x: np.ndarray,
    loss: np.ndarray,
    m: float,
    last: float,
    design: Design,
    grows: bool,
    rng: np.random.Generator,
    shared: np.ndarray | None,
) -> LrCurve:
    """Simulate one curve's runs; each seed shifts all its losses by three times the noise (SD).

    Args:
        shared: the seeds' shifts in units of that, [S, 1]; None to draw them for this curve.
    """
    spread = design.noise * (np.exp(0.7 * (x - m)) if grows else np.ones(len(x)))

    def run(n: int, first: int = 0) -> np.ndarray:
        own = spread * rng.standard_normal((n, len(x)))
        shift = rng.standard_normal((n, 1)) if shared is None else shared[first : first + n]
        return loss + own + 3 * design.noise * shift

    alive = x <= last
    y, at = [run(design.seeds)], [np.ones((design.seeds, len(x)), bool)]
    if design.fresh:
        ranked = np.where(alive, y[0].mean(0), np.inf)
        n = design.fresh_rates
        below = int(np.argmin(ranked)) - (n - 1) // 2
        first = min(max(below, 0), max(int(alive.sum()) - n, 0))
        y.append(run(design.fresh, design.seeds))
        around = np.isin(np.arange(len(x)), first + np.arange(n))
        at.append(np.tile(around, (design.fresh, 1)))
    values, there = np.concatenate(y), np.concatenate(at)
    seeds = np.repeat(np.arange(len(values)), len(x)).reshape(values.shape)
    order = np.argsort(np.tile(x, len(values)).reshape(values.shape)[there], kind="stable")
    rates, losses, seed = (
        v[there][order] for v in (np.broadcast_to(x, values.shape), values, seeds)
    )
    usable = rates <= last
    key = {
        "model": "planted",
        "dataset": "planted",
        "method": "lora" if k else "fullft",
        "rank": 4.0 * 2**k if k else None,
        "alpha": 32.0,
    }
    return LrCurve(
        key, rates, np.where(usable, losses, np.nan), seed, seed, usable, math.nan, math.nan
    )
