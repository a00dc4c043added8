"""The optimum of one LR curve, and the fitted loss at other learning rates."""

import functools
import math
from dataclasses import dataclass, field

import numpy as np

from analysis.inference.estimate import Estimate
from analysis.optimum import valley
from analysis.optimum.likelihood import Likelihood, lowest_loss, rate_means
from analysis.optimum.posterior import Pooled, Posterior
from analysis.runs.lr_curves import LrCurve

WITHIN = 0.01
"""Extra loss allowed in the low-regret band, in units of the metric."""
N_REGRETS = 40
"""Number of draws of the optimum for the regret of the best learning rate."""


@dataclass(frozen=True)
class Optimum:
    """The optimum of one curve. The value of `best_lr` is None if only a bound is known."""

    curve: LrCurve
    best_lr: Estimate
    lowest: float | None
    """Mean NLL at the best LR tried."""
    flags: tuple[str, ...]
    pooled: Pooled | None = None
    open_side: int = 0
    """1: the optimum may lie above the LRs tried; -1: below them. 0: it lies inside them, or the
    curve is flat, so that it may lie on either side."""
    posterior: Posterior | None = field(default=None, repr=False)
    likelihood: Likelihood | None = field(default=None, repr=False)

    @functools.cached_property
    def shape(self) -> valley.Shape | None:
        """The likeliest shape with its minimum at the posterior's median; None without a fit."""
        return (
            None if self.posterior is None else self._shape_at(float(self.posterior.quantile(0.5)))
        )

    def _shape_at(self, m: float) -> valley.Shape | None:
        """Return the likeliest shape with its minimum at ln(lr) m; None without a fit."""
        e = self.likelihood
        if e is None or self.pooled is None:
            return None
        return valley.likeliest(
            e.x, e.root, e.root @ e.loss, m, self.pooled.noise, self.pooled.misfit
        )

    def regret_of_best(self, level: float) -> float | None:
        """Return the regret of choosing `best_lr`, at most, in nats; None without draws.

        The upper end of a one-sided interval of this level: the optimum is drawn from its
        posterior, and the likeliest shape with this optimum gives the loss at `best_lr`.
        """
        if self.best_lr.value is None or self.best_lr.draws is None:
            return None
        at, logs = np.array([math.log(self.best_lr.value)]), np.log(self.best_lr.draws)
        optima = np.quantile(logs, (np.arange(N_REGRETS) + 0.5) / N_REGRETS)
        shapes = [self._shape_at(float(m)) for m in optima]
        return float(np.quantile([s.height(at)[0] for s in shapes if s], level))

    @functools.cached_property
    def best_nll(self) -> float | None:
        """The fitted NLL at the optimum; without a fit, the mean NLL at the best LR tried."""
        return self.lowest if self.best_lr.value is None or self._level is None else self._level

    def predict(self, lr: np.ndarray) -> np.ndarray | None:
        """Return the fitted NLL at learning rates; None without a fit."""
        if self.shape is None or self._level is None:
            return None
        return self._level + self.shape.height(np.log(lr))

    @functools.cached_property
    def _level(self) -> float | None:
        """The fitted minimum of the NLL; None without a fit.

        Height is the fitted loss above the minimum. So each run's loss minus the height at its LR
        estimates the minimum; these are averaged in each block (seed), then over blocks.
        """
        if self.shape is None or self.pooled is None:
            return None
        x, y, block = (v[self.curve.usable] for v in (self.curve.x, self.curve.y, self.curve.block))
        height = self.shape.height(x)
        weight = 1 / (self.pooled.noise**2 + (self.pooled.misfit * height) ** 2 + 1e-18)
        blocks = np.unique(block)
        # Runs near the minimum weigh most. A block weighs at most as much as one run there.
        most = 1 / self.pooled.noise**2
        share = [min(float(weight[block == b].sum()), most) for b in blocks]
        levels = [np.average((y - height)[block == b], weights=weight[block == b]) for b in blocks]
        return float(np.average(levels, weights=share))

    def regret(self, lr: float) -> float | None:
        """Return the fitted NLL(lr) - best NLL, in nats; None outside the LRs tried."""
        x = self.curve.x[self.curve.usable]
        if self.shape is None or not x.min() - 1e-9 <= math.log(lr) <= x.max() + 1e-9:
            return None
        return float(max(self.shape.height(np.array([math.log(lr)]))[0], 0.0))

    def band(self, loss: float) -> tuple[float, float] | None:
        """Return the range of LRs within `loss` nats of the fitted minimum; None without a fit."""
        if self.shape is None:
            return None
        x = self.curve.x[self.curve.usable]
        grid = np.union1d(
            np.linspace(x.min(), x.max(), 400), [np.clip(self.shape.m, x.min(), x.max())]
        )
        over = np.flatnonzero(self.shape.height(grid) > loss)
        at = int(np.argmin(np.abs(grid - self.shape.m)))
        low = max((int(k) for k in over if k < at), default=-1) + 1
        high = min((int(k) for k in over if k > at), default=len(grid)) - 1
        return float(np.exp(grid[low])), float(np.exp(grid[high]))


def seeds_at_best(o: Optimum) -> int:
    """Return the smaller number of seeds at the two LRs next to the fitted optimum.

    Without a fitted optimum, the smallest number at the best LR and its neighbours.
    """
    x = o.curve.x[o.curve.usable]
    if not len(x):
        return 0
    rates, m = sorted(set(x)), math.log(o.best_lr.value or math.nan)
    if rates[0] <= m <= rates[-1]:  # False for NaN
        around = [max(r for r in rates if r <= m), min(r for r in rates if r >= m)]
    else:
        best = lowest_loss(rate_means(o.curve)[1])
        around = rates[max(0, best - 1) : best + 2]
    return min(len(set(o.curve.seed[o.curve.usable][x == r])) for r in around)
