"""The likelihood of the losses at a curve's rates, from its runs. Fits nothing.

Decides which rates belong to a valley at all, which curves share one noise, and whether the noise
grows with the rate.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.runs.lr_curves import LrCurve

MIN_RATES = 4
"""Distinct usable learning rates below which a curve has no fit of its own."""
MIN_DF = 10
"""Degrees of freedom of the pooled variance below which there is no interval."""
RIVAL = 3.5
"""Standard errors within which a rate may still be the lowest."""
KEPT = 0.2
"""A rate above the best one that keeps less than this share of its gain over the untrained model
has collapsed."""
APART = math.log(1.6)
OUTSIZED = 20.0
"""A rate this many times as high above the best one as rates a factor 1.6 (APART) from it is no
part of the valley, nor is any beyond it: it collapsed without being called diverged. LINEX gets
there 2 factors of 2 from the optimum at a = 1.5. In simulation 40 lets a rise of 1 nat through that
spoils the fit, and 12 costs width everywhere."""
TIE = 1e-9
"""Losses (nats) closer than this are one: tables print few digits, and rounding in a sum must not
choose the best rate."""
GROWTH = (0.0, 0.35, 0.7, 1.05)
"""Growth of the noise's standard deviation tried: as lr to this power."""
UNSTEADY = 1e-6
"""Level of the test for unsteady rates, over a whole sweep."""
MIN_DF_GROWTH = 20
"""Degrees of freedom of repeats below which the noise is taken to be even."""


def lowest_loss(loss: np.ndarray) -> int:
    """Return the index of the lowest loss; of equal ones that of the lowest rate."""
    return int(np.argmax(loss <= np.min(loss) + TIE))


@dataclass(frozen=True)
class Likelihood:
    """The Gaussian likelihood of the losses at one curve's rates; each block's common shift is
    taken out."""

    x: np.ndarray
    """Distinct ln(lr), [P], rising."""
    loss: np.ndarray
    """Best estimate of the loss at each, [P]; known up to a constant."""
    root: np.ndarray
    """Root of its precision for unit noise, [D, P], D < P: root' root = precision."""
    squares: float
    """Sum of squares of repeats about it: sigma^2 times a chi^2 of `df`."""
    df: int
    first_diverged: float = math.inf
    """ln of the lowest rate above all usable ones that diverged: the minimum lies below."""

    @property
    def best(self) -> int:
        """Index of the best rate."""
        return lowest_loss(self.loss)

    def bracket(self, sigma: float) -> tuple[float, float]:
        """Return where the minimum of any valley with one bottom lies if a run's noise is sigma:
        between the neighbours of the rates whose loss is within RIVAL standard errors of the
        lowest. Beyond an end rate there is no neighbour."""
        inverse = np.linalg.pinv(self.root.T @ self.root)
        b = self.best
        error = sigma * np.sqrt(
            np.maximum(np.diag(inverse) + inverse[b, b] - 2 * inverse[:, b], 0.0)
        )
        rivals = np.flatnonzero(self.loss - self.loss[b] <= RIVAL * error + 1e-12)
        first, last = int(rivals[0]), int(rivals[-1])
        low = self.x[first - 1] if first else -math.inf
        return float(low), float(self.x[last + 1]) if last + 1 < len(self.x) else math.inf


def gather(
    x: np.ndarray,
    y: np.ndarray,
    block: np.ndarray,
    first_diverged: float = math.inf,
    growth: float = 0.0,
    weights: np.ndarray | None = None,
) -> Likelihood:
    """Sum up runs. Where blocks share no rates (every run has a seed of its own), shifts cannot be
    separated from the curve: they then count as noise.

    Args:
        x: ln(lr), [n].
        y: losses in nats, [n].
        block: of each run, [n]; runs of one block share a shift, such as that of a seed's batches.
        first_diverged: ln of the lowest rate above that diverged.
        growth: the noise's standard deviation rises as lr^growth about the best rate.
        weights: each run's precision, 1 for a steady one, [n].
    """
    rates, at = np.unique(x, return_inverse=True)
    means = np.bincount(at, y) / np.bincount(at)
    weight = np.exp(-2 * growth * (rates - rates[lowest_loss(means)]))[at] * (
        1.0 if weights is None else weights
    )
    precision, right = np.zeros((len(rates), len(rates))), np.zeros(len(rates))
    blocks = [np.flatnonzero(block == b) for b in np.unique(block)]
    for rows in blocks:
        w, k, v = weight[rows], at[rows], y[rows]
        total = np.bincount(k, w, len(rates))
        precision += np.diag(total) - np.outer(total, total) / w.sum()
        right += np.bincount(k, w * (v - (w @ v) / w.sum()), len(rates))
    size, axes = np.linalg.eigh(precision)
    known = size > 1e-9 * weight.sum()
    if known.sum() < len(rates) - 1 and len(blocks) > 1:
        # Blocks that share no rate leave their shifts unknown.
        return gather(x, y, np.zeros(len(x), int), first_diverged, growth, weights)
    loss = axes[:, known] @ ((axes[:, known].T @ right) / size[known])
    squares = sum(_about(weight[r], y[r] - loss[at[r]]) for r in blocks)
    df = len(y) - len(blocks) - int(known.sum())
    return Likelihood(
        rates, loss, (axes[:, known] * np.sqrt(size[known])).T, float(squares), df, first_diverged
    )


def _about(w: np.ndarray, rest: np.ndarray) -> float:
    return float(w @ (rest - (w @ rest) / w.sum()) ** 2)


def of_curve(curve: LrCurve, growth: float, weights: np.ndarray | None = None) -> Likelihood:
    """Sum up a curve's usable runs; weights: of these runs, [n]."""
    use = curve.usable
    return gather(
        curve.x[use], curve.y[use], curve.block[use], first_diverged(curve), growth, weights
    )


def weights_of(curves: Sequence[LrCurve]) -> list[np.ndarray]:
    """Return the weights of every curve's usable runs: 1, or below 1 at unsteady rates.

    A rate above the best one is unsteady where its repeats lie so far apart that some of them had
    begun to diverge. It still says that the loss is higher there. At full weight a single one would
    make the pooled noise that of a diverging run, and no curve of the sweep would have an optimum.

    An F test against the median of all repeats' variances, each allowed the strongest GROWTH, at
    level UNSTEADY over all rates; needs MIN_DF rates with repeats.
    """
    out = [np.ones(int(c.usable.sum())) for c in curves]
    cells = [r for k, c in enumerate(curves) for r in _repeats(k, c)]
    if len(cells) < MIN_DF:
        return out
    spreads = [r.var / r.allowed * r.df / stats.chi2.median(r.df) for r in cells]
    typical, total = float(np.median(spreads)), sum(r.df for r in cells)
    for r in cells:
        if r.above and typical > 0:
            p = stats.f.sf(r.var / r.allowed / typical, r.df, total)
            if p < UNSTEADY / len(cells):
                out[r.curve][r.runs] = typical / r.var
    return out


@dataclass(frozen=True)
class _Repeats:
    """A curve's runs at one rate."""

    curve: int
    runs: np.ndarray
    """Which of the curve's usable runs they are, [n], boolean."""
    df: int
    var: float
    allowed: float
    """Factor on the variance that the strongest growth of the noise allows at this rate."""
    above: bool
    """The rate is above the best one."""


def _repeats(k: int, curve: LrCurve) -> list[_Repeats]:
    x, y = curve.x[curve.usable], curve.y[curve.usable]
    rates = np.unique(x)
    means = np.array([y[x == v].mean() for v in rates])
    found = []
    for v in (v for v in rates if (x == v).sum() > 1):
        runs, above = x == v, v - rates[lowest_loss(means)]
        allowed = math.exp(2 * GROWTH[-1] * max(above, 0.0))
        var = float(np.var(y[runs], ddof=1))
        found.append(_Repeats(k, runs, int(runs.sum()) - 1, var, allowed, above > 0))
    return found


def first_diverged(curve: LrCurve) -> float:
    """Return ln of the lowest rate above all usable ones that diverged; infinite without one."""
    top = max(curve.x[curve.usable], default=-math.inf)
    return float(min(curve.x[~curve.usable & (curve.x > top)], default=math.inf))


def growth_of(curves: Sequence[LrCurve], all_weights: Sequence[np.ndarray]) -> float:
    """Return how the noise grows with the rate, by the likelihood of repeats near the bottoms of a
    sweep's valleys; unsteady ones left out."""
    far, rest, df = [], [], 0
    for c, weights in zip(curves, all_weights):
        x, y, block = c.x[c.usable], c.y[c.usable], c.block[c.usable]
        if not len(x):
            continue
        e = gather(x, y, block, weights=weights)
        if not e.df:
            continue
        at = np.searchsorted(e.x, x)
        left = y - e.loss[at]
        for b in np.unique(block):
            left[block == b] -= left[block == b].mean()
        near = (np.bincount(at)[at] >= 2) & (np.abs(at - e.best) <= 2) & (weights == 1)
        far += list(x[near] - e.x[e.best])
        rest += list(left[near])
        df += e.df
    if df < MIN_DF_GROWTH or len(far) < MIN_DF_GROWTH:
        return 0.0
    u, r = np.array(far), np.array(rest)

    def log(g: float) -> float:
        return -0.5 * len(u) * math.log((r**2 * np.exp(-2 * g * u)).mean() + 1e-30) - g * u.sum()

    return max(GROWTH, key=lambda g: log(g) - g)  # a light prior for even noise


def n_rates(curve: LrCurve) -> int:
    """Count a curve's usable rates."""
    return len(set(curve.x[curve.usable]))


def pools(curves: Sequence[LrCurve]) -> list[list[int]]:
    """Group curves that share one noise: those of a model and data set; those that cannot vouch for
    a noise of their own (fewer than MIN_DF degrees of freedom) share one."""
    groups: dict[tuple, list[int]] = {}
    for k, c in enumerate(curves):
        groups.setdefault((c.key.get("model"), c.key.get("dataset")), []).append(k)
    rich, poor = [], []
    for members in groups.values():
        df = sum(_df(curves[k]) for k in members)
        rich.append(members) if df >= MIN_DF else poor.extend(members)
    return [*rich, *([poor] if poor else [])] or [[]]


def _df(curve: LrCurve) -> int:
    if n_rates(curve) < MIN_RATES:
        return 0
    e = of_curve(curve, 0.0)
    return e.df + len(e.x) - MIN_RATES


def without_collapse(curve: LrCurve) -> LrCurve:
    """Leave out rates above the best one at which the runs collapsed without being called diverged,
    and all beyond them.

    They stand out by their height, or by having lost most of what the best rate gained. What is
    typical of the height: that of rates a factor 1.6 from the best one, or a quarter of that of
    rates twice as far; the lower of both sides.
    """
    x, y = curve.x[curve.usable], curve.y[curve.usable]
    rates = np.unique(x)
    if len(rates) < MIN_RATES:
        return curve
    means = np.array([y[x == v].mean() for v in rates])
    best = lowest_loss(means)
    height = means - means[best]

    def nearest(distance: float) -> float:
        """Return the lower of the heights at the nearest rates this far away, on either side."""
        down = height[:best][rates[best] - rates[:best] >= distance][-1:]
        up = height[best + 1 :][rates[best + 1 :] - rates[best] >= distance][:1]
        return float(min([*down, *up], default=0.0))

    limit = OUTSIZED * max(nearest(APART), nearest(2 * APART) / 4)
    lost = (1 - KEPT) * (
        curve.nll_start - means[best]
    )  # NaN, where the start is not known, loses no rate
    top = next(
        (k for k in range(best + 1, len(rates)) if height[k] > limit > 0 or height[k] > lost > 0),
        len(rates),
    )
    if top == len(rates):
        return curve
    return dataclasses.replace(curve, usable=curve.usable & (curve.x < rates[top] - 1e-9))
