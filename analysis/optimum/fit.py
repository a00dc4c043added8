"""Find the best learning rate of LR curves, with an interval or a bound where possible.

If the best LR is the lowest or highest tried, or next to a diverged one, the result is a bound. A
curve that is too flat for its noise has neither value nor bound.

The model of the loss, in x = ln(lr), u = x - m, with its minimum at m:

    loss(x) = level + integral over t from m to x of (x - t) k(t) dt
    k(t) = c exp(a (t - m)) (1 + w(t))

With w = 0 this is LINEX, c (exp(a u) - a u - 1) / a^2 (Varian 1975): convex, with its minimum at m,
and steeper on the right for a > 0. No real curve is exactly of this family, so the curvature k has
a random process w of mean zero and covariance tau^2 (matern(s - t) + STEP^2 sign(s - m)
sign(t - m)): wiggles of length scale ELL, and a jump between the two sides. w changes neither value
nor slope of the loss at m, so m remains the minimum. The loss is then Gaussian. Its covariance is
zero at m and grows with the loss. So points near the minimum count most, and an interval does not
shrink below the uncertainty of the shape, however small the noise.

tau (misfit) and sigma (noise of one run, in nats) are shared by the curves of a sweep and averaged
over their posterior. The constants were chosen on the generators of benchmarks/calibration. The
calibration that tests the constants uses different seeds.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats
from scipy.special import logsumexp, softmax

from analysis.inference.estimate import LEVEL, PROBABILITIES, Estimate
from analysis.runs.curves import LrCurve

MIN_RATES = 4
"""Distinct usable LRs that a curve needs for a fit."""
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
        variance = np.diag(inverse) + inverse[b, b] - 2 * inverse[:, b]
        error = sigma * np.sqrt(np.maximum(variance, 0.0))
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

    `x`: ln(lr), [n]. `y`: losses in nats, [n]. `block`: [n]; runs of one block share a shift, such
    as the effect of a seed's batches. If blocks share no LRs, shifts cannot be separated from the
    curve and count as noise. `growth`: the noise's standard deviation is proportional to lr^growth.
    `weights`: relative precision of each run, [n]; below 1 at unsteady LRs (`weights_of`).
    """
    rates, at = np.unique(x, return_inverse=True)
    center = gather(x, y, block).best if growth else 0
    weight = np.exp(-2 * growth * (rates - rates[center]))[at]
    weight = weight if weights is None else weight * weights
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


def pools(curves: Sequence[LrCurve]) -> list[list[int]]:
    """Group curves by model, data set and metric; a group shares one noise level.

    Groups of one metric with fewer than MIN_DF degrees of freedom are merged into one group.
    """
    groups: dict[tuple, list[int]] = {}
    for k, c in enumerate(curves):
        groups.setdefault((c.shown, c.key.get("model"), c.key.get("dataset")), []).append(k)
    found: dict[tuple, list[int]] = {}
    for (metric, *rest), members in groups.items():
        usable = ([v[c.usable] for v in (c.x, c.y, c.block)] for c in (curves[k] for k in members))
        fitted = [gather(*runs) for runs in usable if len(set(runs[0])) >= MIN_RATES]
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
    above = zip(rates[best + 1 :], height[best + 1 :])
    top = next((x for x, h in above if h > limit > 0 or h > lost > 0), math.inf)
    return replace(curve, usable=curve.usable & (curve.x < top - 1e-9))


ELL = 0.7
"""Correlation length of the curvature's wiggles, in units of ln(lr): a factor 2."""
STEP = 1.75
"""Size of the curvature's jump at the minimum, relative to its wiggles."""
TAUS = (0.15, 0.22, 0.35, 0.6, 1.0)
"""Values of the misfit tau (relative error of the curvature), equally likely at first. A prior with
most of its mass at 0.6 and 1 made intervals 1.2 times as wide, which held 98 to 99% of truths."""
COARSE, COARSE_TAU = math.log(2.2), 0.6
"""LRs further apart than COARSE (in ln) cannot show that the misfit is below COARSE_TAU."""
A_MEAN, A_SD = 0.5, 1.0
"""Mean and standard deviation of the prior of a, per unit of ln(lr). Real curves have a > 0."""
_A = np.linspace(-1.0, 2.0, 11)
_N_T = 100
_C_MIN = 1e-9


def linex(u: np.ndarray, a: float | np.ndarray) -> np.ndarray:
    """Return (exp(a u) - a u - 1) / a^2, with its limit u^2/2 at a = 0."""
    t = a * u
    small = np.abs(t) < 1e-3
    series = u * u * (0.5 + t / 6 + t * t / 24)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        full = (np.expm1(t) - t) / np.where(np.asarray(a) == 0, 1.0, a) ** 2
    return np.where(small, series, full)


def misfit(x: np.ndarray, m: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Return the covariance of the misfit between points x [P] at c = tau = 1, [M, A, P, P].

    The points x and the minima m [M] are in ln(lr); `a` [A]: asymmetries.
    """
    t = np.linspace(min(x.min(), m.min()), max(x.max(), m.max()), _N_T)
    below, above = t[None, None] <= m[:, None, None], t[None, None] >= m[:, None, None]
    reach = x[None, :, None] - t[None, None]
    lever = np.where(above & (reach >= 0), reach, 0.0) + np.where(below & (reach <= 0), -reach, 0.0)
    # On the flat side the curvature's process has scale c, as at the minimum, not c exp(a (t - m)).
    scale = np.maximum(np.exp(a[None, :, None] * (t[None, None] - m[:, None, None])), 1.0)
    lever = lever[:, None] * scale[:, :, None, :] * (t[1] - t[0])
    far = np.sqrt(3) * np.abs(t[:, None] - t[None]) / ELL
    matern = (1 + far) * np.exp(-far)
    jump = (lever * np.sign(t[None, None, None] - m[:, None, None, None])).sum(-1) * STEP
    return (lever @ matern) @ lever.swapaxes(-1, -2) + jump[..., :, None] * jump[..., None, :]


@functools.lru_cache(maxsize=256)
def _tables(d: int, *keys: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return arrays that depend only on the design (LRs and repeats), for a grid of (m, a).

    The P losses at the tried LRs are known up to a constant, with precision root' root / sigma^2
    (root: D x P), so z = root loss has noise sigma along every axis. At each (m, a), z is rotated
    to the axes of the misfit's covariance. So the log likelihood is a sum of D terms for any sigma,
    tau and c. `keys`: LRs x [P], root and candidate minima m [M], as bytes. Returns the rotation
    [M, A, D, D], and along each axis [M, A, D] at c = tau = 1 the misfit's variance and LINEX.
    """
    x, root, m = map(np.frombuffer, keys)
    root = root.reshape(d, len(x))
    spread, axes = np.linalg.eigh(root @ misfit(x, m, _A) @ root.T)
    shape = linex(x - m[:, None, None], _A[:, None]) @ root.T
    along = np.einsum("maij,mai->maj", axes, shape)
    return axes.swapaxes(-1, -2), np.maximum(spread, 0.0), along


def log_likelihood(e: Likelihood, m: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Return the log likelihood of a curve over noise `sigmas` [S], tau and minima m: [S, T, M].

    The likelihood is maximised over the curvature c, and averaged over the prior of a (A_MEAN).
    """
    keys = (np.round(np.ascontiguousarray(v), 9) for v in (e.x - e.x[0], e.root, m - e.x[0]))
    turn, spread, shape = _tables(len(e.root), *(v.tobytes() for v in keys))
    turned = np.einsum("madj,j->mad", turn, e.root @ e.loss)
    weight = -0.5 * ((_A - A_MEAN) / A_SD) ** 2
    c = np.maximum((turned * shape).sum(-1) / (shape**2).sum(-1), _C_MIN)[None, None]
    noise = sigmas[:, None, None, None, None] ** 2
    tau = np.array(TAUS)[:, None, None]
    for _ in range(2):
        pull = shape / ((tau * c)[..., None] ** 2 * spread + noise)
        c = np.einsum("mad,stmad->stma", turned, pull)
        c = np.maximum(c / np.einsum("mad,stmad->stma", shape, pull), _C_MIN)
    variance = (tau * c)[..., None] ** 2 * spread + noise
    rest = turned - c[..., None] * shape
    log = -0.5 * (rest * rest / variance + np.log(variance)).sum(-1) + weight
    # The minimum of a unimodal curve lies inside the bracket. The random curvature alone would also
    # allow a second, lower minimum at another LR.
    ends = np.array([e.bracket(float(s)) for s in sigmas])
    inside = (m >= ends[:, :1]) & (m <= ends[:, 1:])
    return logsumexp(log, axis=-1) + np.where(inside, 0.0, _NEVER)[:, None, :]


@dataclass(frozen=True)
class Shape:
    """The likeliest shape of one curve: LINEX constants and the fitted misfit."""

    x: np.ndarray
    m: float
    a: float
    c: float
    tau: float
    pull: np.ndarray
    """Weights [P] of the misfit's covariance, so that the curve passes near precise points."""

    def height(self, x: np.ndarray) -> np.ndarray:
        """Return the loss at ln(lr) = x minus the minimum, in nats."""
        x = np.asarray(x, float)
        both = np.concatenate([self.x, x])
        cov, n = misfit(both, np.array([self.m]), np.array([self.a]))[0, 0], len(self.x)
        rest = (self.tau * self.c) ** 2 * cov[n:, :n] @ self.pull
        return self.c * linex(x - self.m, self.a) + rest


@dataclass(frozen=True)
class Pooled:
    """Posterior means of a sweep's noise (of one run at the minimum, in nats) and misfit."""

    noise: float
    misfit: float
    df: int


def likeliest(e: Likelihood | None, pooled: Pooled | None, m: float) -> Shape | None:
    """Return the likeliest shape with its minimum at ln(lr) m; None without a fit."""
    if e is None or pooled is None:
        return None
    x, root, z, sigma, tau = e.x, e.root, e.root @ e.loss, pooled.noise, pooled.misfit
    found = []
    for a, k in zip(_A, misfit(x, np.array([m]), _A)[0]):
        shape = root @ linex(x - m, a)
        c = max(float(z @ shape / (shape @ shape)), _C_MIN)
        for _ in range(4):  # the last total and solution are of the last c
            total = (tau * c) ** 2 * root @ k @ root.T + sigma**2 * np.eye(len(z))
            by_shape, by_z = np.linalg.solve(total, np.stack([shape, z], 1)).T
            pull, now = by_z - c * by_shape, c
            c = max(float(shape @ by_z / (shape @ by_shape)), _C_MIN)
        log = float((z - now * shape) @ pull + np.linalg.slogdet(total)[1])
        log = -0.5 * (log + ((a - A_MEAN) / A_SD) ** 2)
        found.append((log, Shape(x, m, float(a), now, tau, root.T @ pull)))
    return max(found, key=lambda v: v[0])[1]


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


def weigh(sweep: Sequence[Likelihood]) -> tuple[list[Posterior], Pooled]:
    """Return a sweep's posteriors, one per curve, and its pooled noise and misfit."""
    if not sweep:
        return [], Pooled(math.nan, math.nan, 0)
    df = sum(e.df for e in sweep)
    if df >= 10:  # enough repeats: noise levels to average over, near their standard deviation
        noise = math.sqrt(max(sum(e.squares for e in sweep) / df, 1e-18))
        sigmas = noise * np.exp(np.linspace(-2.5, 2.5, 5) / math.sqrt(2 * df))
    else:
        scale = float(np.median([np.ptp(e.loss) for e in sweep])) or 1e-6
        sigmas = scale * np.geomspace(1e-4, 0.5, 12)
    grids = []  # minima to try: from two LRs below the best one to two above
    for e in sweep:
        low = e.x[e.best - 2] if e.best >= 2 else e.x[0] - _PAD
        high = e.x[e.best + 2] if e.best + 2 < len(e.x) else e.x[-1] + _PAD
        grids.append(np.linspace(low, min(high, e.first_diverged), _STEPS))
    logs = [log_likelihood(e, m, sigmas) for e, m in zip(sweep, grids)]
    posteriors, pooled = _pool(sweep, sigmas, logs, grids)
    again = [k for k, p in enumerate(posteriors) if max(p.mass[0], p.mass[-1]) > _END]
    for k in again:
        e = sweep[k]
        high = min(e.x[-1] + _PAD, e.first_diverged)
        grids[k] = np.linspace(e.x[0] - _PAD, high, 2 * _STEPS)
        logs[k] = log_likelihood(e, grids[k], sigmas)
    return _pool(sweep, sigmas, logs, grids) if again else (posteriors, pooled)


def _pool(
    sweep: Sequence[Likelihood],
    sigmas: np.ndarray,
    logs: Sequence[np.ndarray],
    grids: Sequence[np.ndarray],
) -> tuple[list[Posterior], Pooled]:
    """Weigh noise and misfit by the likelihood of all curves; average each curve's posterior."""
    coarse = np.median([np.median(np.diff(e.x)) for e in sweep]) > COARSE
    excluded = np.where(coarse & (np.array(TAUS) < COARSE_TAU), np.inf, 0.0)
    total = np.zeros((len(sigmas), 1)) - excluded
    df = sum(e.df for e in sweep)
    total = total - (df * np.log(sigmas) + sum(e.squares for e in sweep) / (2 * sigmas**2))[:, None]
    for log in logs:
        # the minimum has a uniform prior over the grid
        total = total + logsumexp(log, axis=-1) - math.log(log.shape[-1])
    share = softmax(total)
    posteriors = [
        Posterior(m, np.einsum("st,stm->m", share, softmax(log, axis=-1)))
        for log, m in zip(logs, grids)
    ]
    free = sum(max(len(e.x) - 4, 0) for e in sweep)
    noise = math.exp(float(share.sum(1) @ np.log(sigmas)))
    return posteriors, Pooled(noise, float(share.sum(0) @ np.array(TAUS)), df + free)


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
    def shape(self) -> Shape | None:
        """The likeliest shape with its minimum at the posterior's median; None without a fit."""
        m = None if self.posterior is None else float(self.posterior.quantile(0.5))
        return None if m is None else likeliest(self.likelihood, self.pooled, m)

    def regret_of_best(self, level: float) -> float | None:
        """Return the regret of choosing `best_lr`, at most, in nats; None without draws.

        The upper end of a one-sided interval of this level: the optimum is drawn from its
        posterior, and the likeliest shape with this optimum gives the loss at `best_lr`.
        """
        if self.best_lr.value is None or self.best_lr.draws is None:
            return None
        at, logs = np.array([math.log(self.best_lr.value)]), np.log(self.best_lr.draws)
        optima = np.quantile(logs, (np.arange(N_REGRETS) + 0.5) / N_REGRETS)
        shapes = [likeliest(self.likelihood, self.pooled, float(m)) for m in optima]
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
        ends = x.min(), x.max()
        grid = np.union1d(np.linspace(*ends, 400), [np.clip(self.shape.m, *ends)])
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


FEW_RATES = 5
"""A curve with fewer LRs is flagged 'few_points', and no verdict may depend on it."""


def fit_all(curves: Sequence[LrCurve], few: int = FEW_RATES) -> list[Optimum]:
    """Find the optima of a sweep, in the order of its curves.

    `few`: a curve with fewer LRs is flagged. With 3, curves of three LRs a factor 2 apart around
    their optimum, and 9 degrees of freedom, are enough: 99% of simulated intervals hold it.
    """
    trimmed = [without_collapse(c) for c in curves]
    found: dict[int, Optimum] = {}
    for part in pools(trimmed):
        mine = [trimmed[k] for k in part]
        weights = weights_of(mine)
        growth = growth_of(mine, weights)
        likelihoods: dict[int, Likelihood] = {}
        for k, c, weight in zip(part, mine, weights):
            x, y, block = (v[c.usable] for v in (c.x, c.y, c.block))
            if len(set(x)) >= min(MIN_RATES, few):
                likelihoods[k] = gather(x, y, block, first_diverged(c), growth, weight)
        posteriors, pooled = weigh(list(likelihoods.values()))
        of = dict(zip(likelihoods, posteriors))
        for k, c in zip(part, mine):
            found[k] = _optimum(c, likelihoods.get(k), of.get(k), pooled, few)
    return [found[k] for k in range(len(found))]


def _optimum(
    curve: LrCurve,
    likelihood: Likelihood | None,
    posterior: Posterior | None,
    pooled: Pooled,
    enough: int,
) -> Optimum:
    x, y = curve.x[curve.usable], curve.y[curve.usable]
    if not len(x):
        nothing = ("no_usable_points",)
        return Optimum(curve, Estimate(None, flags=nothing), None, nothing)
    rates, means = rate_means(curve)
    means = means if likelihood is None else likelihood.loss
    best, known = lowest_loss(means), pooled.df >= min(MIN_DF, 3 * enough)
    lowest = float(np.mean(y[x == rates[best]]))
    few: tuple[str, ...] = () if len(rates) >= enough else ("few_points",)

    def found(e: Estimate, flags: tuple[str, ...], side: int = 0, fit: bool = True) -> Optimum:
        flags += ("mixed_versions",) * curve.mixed
        model = (posterior, likelihood) if fit else ()
        return Optimum(
            curve, replace(e, n=len(x), flags=flags), lowest, flags, pooled, side, *model
        )

    if best in (0, len(rates) - 1):
        bound = _bound_at_end(curve, rates, best, posterior)
        side, flags = 1 if best and len(rates) > 1 else -1, (*few, *bound.flags)
        return found(bound, flags, side, fit=False)
    low, high = rates[best - 1], rates[best + 1]
    if likelihood is None or posterior is None:
        return replace(found(Estimate(None, math.exp(low), math.exp(high)), few), pooled=None)
    if few and not known:
        # Misfit and noise are both unknown: only the neighbours of the best LR bound the minimum.
        bracket = np.exp([np.clip(posterior.quantile(0.5), low, high), low, high]).tolist()
        return found(Estimate(*bracket), (*few, "no_variance"))
    ends = np.array([0.5 - LEVEL / 2, 0.5, 0.5 + LEVEL / 2])
    low, median, high = map(float, posterior.quantile(ends))
    below, above = low < rates[0], high > rates[-1]
    if below and above:
        answer = Estimate(None, flags=("flat",))
    elif below:
        answer = Estimate(None, None, math.exp(high) if known else None, flags=("at_edge",))
    elif above:
        end, flag = _upper_end(curve)
        answer = Estimate(None, math.exp(low) if known else None, end, flags=(flag,))
    elif not known:
        answer = Estimate(math.exp(median))
    else:
        # Quantiles, evenly spaced in probability, in a random order: sums of such draws have
        # smoother distributions than sums of random draws.
        draws = np.exp(curve.stream("optimum").permutation(posterior.quantile(PROBABILITIES)))
        answer = Estimate(math.exp(median), math.exp(low), math.exp(high), draws=draws)
    flags = (*few, *(() if known else ("no_variance",)), *answer.flags)
    side = 0 if below == above else -1 if below else 1
    return found(answer, flags, side)


def _bound_at_end(
    curve: LrCurve, rates: np.ndarray, best: int, posterior: Posterior | None
) -> Estimate:
    """Return the bound for a best LR, rates[best], that is the first or the last one tried.

    The inner bound is the neighbouring LR, or a more distant value if the posterior reaches there.
    The outer bound is the first LR that diverged, if there is one.
    """
    end, flag = _upper_end(curve)
    if len(rates) == 1:
        return Estimate(None, None, end, flags=("at_edge",))
    if best == 0:
        inner = max(rates[1], -math.inf if posterior is None else posterior.quantile(0.975))
        if inner >= rates[-1] and len(rates) > 2:
            return Estimate(None, flags=("at_edge", "flat"))
        return Estimate(None, None, math.exp(inner), flags=("at_edge",))
    inner = min(rates[-2], math.inf if posterior is None else posterior.quantile(0.025))
    if inner <= rates[0] and len(rates) > 2:
        return Estimate(None, None, end, flags=("at_edge", "flat"))
    return Estimate(None, math.exp(inner), end, flags=(flag,))


def _upper_end(curve: LrCurve) -> tuple[float | None, str]:
    """Return the lowest diverged LR above the usable ones (or None), and the bound's flag."""
    end = first_diverged(curve)
    return (math.exp(end), "bounded_by_divergence") if math.isfinite(end) else (None, "at_edge")
