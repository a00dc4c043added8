"""The posterior of each curve's minimum, with noise and misfit pooled over a sweep."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.inference.estimate import PROBABILITIES
from analysis.optimum import valley
from analysis.optimum.likelihood import Likelihood
from analysis.optimum.valley import ShapePrior

_STEPS, _PAD = 57, 0.7
_END = 3e-3
"""Mass in the first or last cell above which a posterior is recomputed on a grid over all LRs."""
_NEVER = -1e4


@dataclass(frozen=True)
class Posterior:
    """The posterior of one minimum, in ln(lr): probability mass on an even grid."""

    m: np.ndarray
    mass: np.ndarray

    def quantile(self, p: float | np.ndarray) -> np.ndarray:
        """Return quantiles; the mass of a grid point is spread evenly over its cell."""
        step = self.m[1] - self.m[0]
        edges = np.append(self.m - step / 2, self.m[-1] + step / 2)
        return np.interp(p, np.append(0.0, np.cumsum(self.mass)), edges)

    def draws(self, stream: int) -> np.ndarray:
        """Return quantiles, evenly spaced in probability, in a random order (`stream`: the seed).

        Sums of such draws have smoother distributions than sums of random draws.
        """
        order = np.random.default_rng([20251125, stream]).permutation(len(PROBABILITIES))
        return self.quantile(PROBABILITIES)[order]


@dataclass(frozen=True)
class Pooled:
    """Posterior means of a sweep's noise (of one run at the minimum, in nats) and misfit."""

    noise: float
    misfit: float
    df: int


def weigh(
    sweep: Sequence[Likelihood],
    shape_priors: Sequence[ShapePrior | None] | None = None,
    misfit: float | None = None,
) -> tuple[list[Posterior], Pooled]:
    """Return a sweep's posteriors, one per curve, and its pooled noise and misfit.

    `shape_priors`: one per curve. `misfit`: a known misfit, rounded to valley.TAUS.
    """
    if not sweep:
        return [], Pooled(math.nan, math.nan, 0)
    df = sum(e.df for e in sweep)
    if df >= 10:  # enough repeats: noise levels to average over, near their standard deviation
        noise = math.sqrt(max(sum(e.squares for e in sweep) / df, 1e-18))
        sigmas = noise * np.exp(np.linspace(-2.5, 2.5, 5) / math.sqrt(2 * df))
    else:
        scale = float(np.median([np.ptp(e.loss) for e in sweep])) or 1e-6
        sigmas = scale * np.geomspace(1e-4, 0.5, 12)
    priors = shape_priors or [None] * len(sweep)
    grids = []  # minima to try: from two LRs below the best one to two above
    for e in sweep:
        low = e.x[e.best - 2] if e.best >= 2 else e.x[0] - _PAD
        high = e.x[e.best + 2] if e.best + 2 < len(e.x) else e.x[-1] + _PAD
        grids.append(np.linspace(low, min(high, e.first_diverged), _STEPS))
    logs = [_log_likelihood(e, m, sigmas, prior) for e, m, prior in zip(sweep, grids, priors)]
    posteriors, pooled = _pool(sweep, sigmas, logs, grids, misfit)
    again = [k for k, p in enumerate(posteriors) if max(p.mass[0], p.mass[-1]) > _END]
    for k in again:
        e = sweep[k]
        high = min(e.x[-1] + _PAD, e.first_diverged)
        grids[k] = np.linspace(e.x[0] - _PAD, high, 2 * _STEPS)
        logs[k] = _log_likelihood(e, grids[k], sigmas, priors[k])
    return _pool(sweep, sigmas, logs, grids, misfit) if again else (posteriors, pooled)


def _log_likelihood(
    e: Likelihood, m: np.ndarray, sigmas: np.ndarray, prior: ShapePrior | None
) -> np.ndarray:
    """Return the log likelihood [S, T, M] of a curve over noise, misfit and minima m."""
    log = valley.log_likelihood(valley.tables(e.x, e.root, m), e.root @ e.loss, sigmas, prior)
    # The minimum of a unimodal curve lies inside the bracket. The random curvature alone would also
    # allow a second, lower minimum at another LR.
    ends = np.array([e.bracket(float(s)) for s in sigmas])
    inside = (m >= ends[:, :1]) & (m <= ends[:, 1:])
    return log + np.where(inside, 0.0, _NEVER)[:, None, :]


def _pool(
    sweep: Sequence[Likelihood],
    sigmas: np.ndarray,
    logs: Sequence[np.ndarray],
    grids: Sequence[np.ndarray],
    misfit: float | None,
) -> tuple[list[Posterior], Pooled]:
    """Weigh noise and misfit by the likelihood of all curves; average each curve's posterior."""
    prior = np.array(valley.TAU_PRIOR)
    if np.median([np.median(np.diff(e.x)) for e in sweep]) > valley.COARSE:
        prior = np.where(np.array(valley.TAUS) < valley.COARSE_TAU, 0.0, prior)
    if misfit is not None:
        nearest = np.argmin(np.abs(np.array(valley.TAUS) - misfit))
        prior = (np.arange(len(prior)) == nearest).astype(float)
    with np.errstate(divide="ignore"):
        total = np.log(prior)[None] + np.zeros((len(sigmas), 1))
    df = sum(e.df for e in sweep)
    total = total - (df * np.log(sigmas) + sum(e.squares for e in sweep) / (2 * sigmas**2))[:, None]
    for log in logs:
        top = log.max(-1)  # the minimum has a uniform prior over the grid
        total = total + top + np.log(np.exp(log - top[..., None]).mean(-1))
    share = np.exp(total - total.max())
    share /= share.sum()
    posteriors = []
    for log, m in zip(logs, grids):
        density = np.exp(log - log.max(-1, keepdims=True))
        density /= density.sum(-1, keepdims=True)
        posteriors.append(Posterior(m, np.einsum("st,stm->m", share, density)))
    free = sum(max(len(e.x) - 4, 0) for e in sweep)
    noise = math.exp(float(share.sum(1) @ np.log(sigmas)))
    return posteriors, Pooled(noise, float(share.sum(0) @ np.array(valley.TAUS)), df + free)


def expected_spread(e: Likelihood, noise: float, misfit: float) -> float:
    """Return the minimum's posterior standard deviation, in ln(lr); `noise` in nats."""
    known = dataclasses.replace(e, squares=100 * noise**2, df=100)
    ((posterior,), _) = weigh([known], misfit=misfit)
    mean = float(posterior.m @ posterior.mass)
    return math.sqrt(max(float((posterior.m - mean) ** 2 @ posterior.mass), 0.0))
