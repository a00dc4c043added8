"""Compute the likelihood of the losses at a curve's learning rates, from the curve's runs.

The module fits no shape. It decides which LRs belong to the valley, which curves share one noise
level, and whether the noise grows with the LR.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.runs.lr_curves import LrCurve

MIN_RATES = 4
"""Distinct usable LRs that a curve needs for a fit without a prior of its shape."""
MIN_DF = 10
"""Degrees of freedom that the pooled variance needs for an interval."""
RIVAL = 3.5
"""An LR within this many standard errors of the lowest loss may be the best one."""
KEPT = 0.2
"""An LR has collapsed if its gain over the untrained model is below this share of the best gain."""
APART = math.log(1.6)
OUTSIZED = 20.0
"""Height is loss minus the curve's lowest loss. An LR has collapsed if its height exceeds OUTSIZED
times the typical height, which is measured at an LR APART (in ln) from the best one. A LINEX valley
with a = 1.5 reaches this limit only a factor 4 from its optimum. In simulations, a limit of 40 lets
a rise of 1 nat through, which spoils the fit, and a limit of 12 widens all intervals."""
TIE = 1e-9
"""Losses (nats) closer than this are equal, so that rounding does not choose the best LR."""
GROWTH = (0.0, 0.35, 0.7, 1.05)
"""Candidate exponents g: the noise's standard deviation grows as lr^g."""
UNSTEADY = 1e-6
"""Significance level of the test for unsteady LRs (`weights_of`), over a whole sweep."""
MIN_DF_GROWTH = 20
"""Degrees of freedom of repeats below which the noise is taken to be the same at all LRs."""


def lowest_loss(loss: np.ndarray) -> int:
    """Return the index of the lowest loss; the lowest LR wins a tie."""
    return int(np.argmax(loss <= np.min(loss) + TIE))


@dataclass(frozen=True)
class Likelihood:
    """The Gaussian likelihood of the losses at one curve's LRs, after removal of block shifts."""

    x: np.ndarray
    """Distinct ln(lr), [P], rising."""
    loss: np.ndarray
    """Estimated loss at each LR, [P], up to a common constant."""
    root: np.ndarray
    """Root of the precision of `loss` at unit noise, [D, P], D < P: root' root = precision."""
    squares: float
    """Sum of squares of repeats about `loss`: sigma^2 times a chi^2 of `df` degrees of freedom."""
    df: int
    first_diverged: float = math.inf
    """ln of the lowest LR above all usable ones that diverged; the minimum must lie below it."""

    @property
    def best(self) -> int:
        """Index of the best LR."""
        return lowest_loss(self.loss)

    def bracket(self, sigma: float) -> tuple[float, float]:
        """Return the interval of ln(lr) in which the minimum of a unimodal curve must lie.

        Rivals are the LRs whose loss is within RIVAL standard errors of the lowest. The interval
        reaches from the LR below all rivals to the LR above them, or to infinity if there is none.
        `sigma`: noise of one run, in nats.
        """
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
    """Compute the likelihood from runs.

    Args:
        x: ln(lr), [n].
        y: losses in nats, [n].
        block: [n]; runs of one block share a shift, such as the effect of a seed's batches.
            If blocks share no LRs, shifts cannot be separated from the curve and count as noise.
        growth: the noise's standard deviation is proportional to lr^growth.
        weights: relative precision of each run, [n]; below 1 at unsteady LRs (`weights_of`).
    """
    rates, at = np.unique(x, return_inverse=True)
    center = gather(x, y, block).best if growth else 0
    weight = np.exp(-2 * growth * (rates - rates[center]))[at] * (
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
        return gather(x, y, np.zeros(len(x), int), first_diverged, growth, weights)
    loss = axes[:, known] @ ((axes[:, known].T @ right) / size[known])
    squares = 0.0
    for rows in blocks:
        w, rest = weight[rows], y[rows] - loss[at[rows]]
        squares += float(w @ (rest - (w @ rest) / w.sum()) ** 2)
    df = len(y) - len(blocks) - int(known.sum())
    return Likelihood(
        rates, loss, (axes[:, known] * np.sqrt(size[known])).T, squares, df, first_diverged
    )


def without_shifts(curve: LrCurve) -> tuple[np.ndarray, np.ndarray]:
    """Return ln(lr) and the losses of the usable runs, [n], with all blocks moved to their mean.

    Otherwise means would mislead: not all seeds ran at all LRs, and losses may differ a hundred
    times as much between seeds as between LRs.
    """
    x, y, block = curve.x[curve.usable], curve.y[curve.usable], curve.block[curve.usable]
    if not len(x):
        return x, y
    e = gather(x, y, block)
    if e.df == len(y) - len(e.x):  # one block, or blocks that share no LR
        return x, y
    of = np.unique(block, return_inverse=True)[1]
    shift = np.bincount(of, y - e.loss[np.searchsorted(e.x, x)]) / np.bincount(of)
    return x, y - shift[of] + shift.mean()


def rate_means(curve: LrCurve) -> tuple[np.ndarray, np.ndarray]:
    """Return a curve's usable LRs, as ln(lr), and the mean loss at each without shifts, [P]."""
    x, y = without_shifts(curve)
    rates, at = np.unique(x, return_inverse=True)
    return rates, np.bincount(at, y) / np.bincount(at)


def likelihood_of(curve: LrCurve, growth: float, weights: np.ndarray | None = None) -> Likelihood:
    """Compute the likelihood of a curve's usable runs; for `growth` and `weights` see `gather`."""
    use = curve.usable
    return gather(
        curve.x[use], curve.y[use], curve.block[use], first_diverged(curve), growth, weights
    )


def weights_of(curves: Sequence[LrCurve]) -> list[np.ndarray]:
    """Return the weights of every curve's usable runs: 1, or below 1 at unsteady LRs.

    Repeats are the runs at one LR. An LR above the best one is unsteady if its repeats are so far
    apart that some must have begun to diverge. They still show that the loss is higher there. But
    at full weight they would dominate the pooled noise, and no curve would have an optimum.

    An F test compares the variance of the repeats, divided by the strongest GROWTH, with the median
    over all LRs. Its level is UNSTEADY over all LRs. It needs MIN_DF LRs with repeats.
    """
    out = [np.ones(int(c.usable.sum())) for c in curves]
    repeats = []  # per curve and LR: curve, mask of runs, df, variance, ratio, above best
    for k, c in enumerate(curves):
        (x, y), (rates, means) = without_shifts(c), rate_means(c)
        for v in (v for v in rates if (x == v).sum() > 1):
            runs, above = x == v, v - rates[lowest_loss(means)]
            # By the strongest GROWTH, the variance may exceed the best LR's by this factor.
            allowed = math.exp(2 * GROWTH[-1] * max(above, 0.0))
            var = float(np.var(y[runs], ddof=1))
            repeats.append((k, runs, int(runs.sum()) - 1, var, var / allowed, above > 0))
    if len(repeats) < MIN_DF:
        return out
    spreads = [ratio * df / stats.chi2.median(df) for _, _, df, _, ratio, _ in repeats]
    typical, total = float(np.median(spreads)), sum(df for _, _, df, *_ in repeats)
    for k, runs, df, var, ratio, above in repeats:
        if above and typical > 0:
            p = stats.f.sf(ratio / typical, df, total)
            if p < UNSTEADY / len(repeats):
                out[k][runs] = typical / var
    return out


def first_diverged(curve: LrCurve) -> float:
    """Return ln of the lowest diverged LR above all usable ones; infinity if there is none."""
    top = max(curve.x[curve.usable], default=-math.inf)
    return float(min(curve.x[~curve.usable & (curve.x > top)], default=math.inf))


def growth_of(curves: Sequence[LrCurve], all_weights: Sequence[np.ndarray]) -> float:
    """Return the likeliest exponent of GROWTH, from steady repeats near each curve's minimum."""
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

    return max(GROWTH, key=lambda g: log(g) - g)  # a weak prior for constant noise


def n_rates(curve: LrCurve) -> int:
    """Count a curve's usable LRs."""
    return len(set(curve.x[curve.usable]))


def pools(curves: Sequence[LrCurve]) -> list[list[int]]:
    """Group curves by model, data set and metric; a group shares one noise level.

    Groups of one metric with fewer than MIN_DF degrees of freedom are merged into one group.
    """
    groups: dict[tuple, list[int]] = {}
    for k, c in enumerate(curves):
        groups.setdefault((c.shown, c.key.get("model"), c.key.get("dataset")), []).append(k)
    found: dict[tuple, list[int]] = {}
    for (metric, *rest), members in groups.items():
        fitted = [likelihood_of(curves[k], 0.0) for k in members if n_rates(curves[k]) >= MIN_RATES]
        df = sum(e.df + len(e.x) - MIN_RATES for e in fitted)
        found.setdefault((metric, *(rest if df >= MIN_DF else ())), []).extend(members)
    return list(found.values()) or [[]]


def without_collapse(curve: LrCurve) -> LrCurve:
    """Leave out the first LR that collapsed without a report of divergence, and all LRs above it.

    An LR above the best one has collapsed if it lost most of the best LR's gain over the untrained
    model (KEPT), or if its height exceeds OUTSIZED typical heights. The typical height is the
    height APART from the best LR, or a quarter of the height twice as far, whichever is larger.
    """
    rates, means = rate_means(curve)
    if len(rates) < MIN_RATES:
        return curve
    best = lowest_loss(means)
    height = means - means[best]

    def nearest(distance: float) -> float:
        """Return the height at the nearest LR at least this far away, on the lower side."""
        down = height[:best][rates[best] - rates[:best] >= distance][-1:]
        up = height[best + 1 :][rates[best + 1 :] - rates[best] >= distance][:1]
        return float(min([*down, *up], default=0.0))

    limit = OUTSIZED * max(nearest(APART), nearest(2 * APART) / 4)
    # NaN if the untrained model's loss is unknown: every comparison below is then False.
    lost = (1 - KEPT) * (curve.nll_start - means[best])
    top = next(
        (k for k in range(best + 1, len(rates)) if height[k] > limit > 0 or height[k] > lost > 0),
        len(rates),
    )
    if top == len(rates):
        return curve
    return dataclasses.replace(curve, usable=curve.usable & (curve.x < rates[top] - 1e-9))
