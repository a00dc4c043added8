"""Compute the likelihood of an LR curve's minimum from the curve's losses.

The model, in x = ln(lr), u = x - m:

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

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.special import logsumexp, softmax

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

    `x`: ln(lr), [n]. `y`: losses in nats, [n]. `block`: [n]; runs of one block share a shift, such
    as the effect of a seed's batches. If blocks share no LRs, shifts cannot be separated from the
    curve and count as noise. `growth`: the noise's standard deviation is proportional to lr^growth.
    `weights`: relative precision of each run, [n]; below 1 at unsteady LRs (`weights_of`).
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


ELL = 0.7
"""Correlation length of the curvature's wiggles, in units of ln(lr): a factor 2."""
STEP = 1.75
"""Size of the curvature's jump at the minimum, relative to its wiggles."""
TAUS = (0.15, 0.22, 0.35, 0.6, 1.0)
"""Values of the misfit tau (relative error of the curvature) to average over."""
TAU_PRIOR = (0.001, 0.003, 0.2, 0.5, 0.296)
"""Prior probabilities of TAUS; the median is 0.6."""
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


@dataclass(frozen=True)
class ShapePrior:
    """A prior of a curve's shape, from related curves.

    Asymmetry `a` per unit of ln(lr), and curvature `c` in nats per unit of ln(lr) squared, with the
    standard deviation of `a` and the relative one of `c`.
    """

    a: float
    a_sd: float
    c: float
    c_spread: float


def misfit(x: np.ndarray, m: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Return the covariance of the misfit between points x [P] at c = tau = 1, [M, A, P, P].

    The points x and the minima m [M] are in ln(lr); `a` [A]: asymmetries.
    """
    t = np.linspace(min(x.min(), m.min()), max(x.max(), m.max()), _N_T)
    below, above = t[None, None] <= m[:, None, None], t[None, None] >= m[:, None, None]
    reach = x[None, :, None] - t[None, None]
    lever = np.where(above & (reach >= 0), reach, 0.0) + np.where(below & (reach <= 0), -reach, 0.0)
    # On the flat side the scale of the curvature's process is c, as at the minimum, not
    # c exp(a (t - m)).
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


def log_likelihood(
    e: Likelihood, m: np.ndarray, sigmas: np.ndarray, prior: ShapePrior | None = None
) -> np.ndarray:
    """Return the log likelihood of a curve over noise `sigmas` [S], tau and minima m: [S, T, M].

    The likelihood is maximised over the curvature c, and averaged over the prior of a. Default
    prior: A_MEAN, A_SD.
    """
    keys = (np.round(np.ascontiguousarray(v), 9) for v in (e.x - e.x[0], e.root, m - e.x[0]))
    turn, spread, shape = _tables(len(e.root), *(v.tobytes() for v in keys))
    turned = np.einsum("madj,j->mad", turn, e.root @ e.loss)
    weight = -0.5 * ((_A - (prior.a if prior else A_MEAN)) / (prior.a_sd if prior else A_SD)) ** 2
    pin = 1 / (prior.c * prior.c_spread) ** 2 if prior else 0.0
    aim = prior.c * pin if prior else 0.0
    c = np.maximum((turned * shape).sum(-1) / (shape**2).sum(-1), _C_MIN)[None, None]
    noise = sigmas[:, None, None, None, None] ** 2
    tau = np.array(TAUS)[:, None, None]
    for _ in range(2):
        pull = shape / ((tau * c)[..., None] ** 2 * spread + noise)
        c = (np.einsum("mad,stmad->stma", turned, pull) + aim) / (
            np.einsum("mad,stmad->stma", shape, pull) + pin
        )
        c = np.maximum(c, _C_MIN)
    variance = (tau * c)[..., None] ** 2 * spread + noise
    rest = turned - c[..., None] * shape
    log = -0.5 * (rest * rest / variance + np.log(variance)).sum(-1) + weight
    log = log - 0.5 * pin * (c - prior.c) ** 2 if prior else log
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
        return (
            self.c * linex(x - self.m, self.a) + (self.tau * self.c) ** 2 * cov[n:, :n] @ self.pull
        )


def likeliest(
    x: np.ndarray, root: np.ndarray, z: np.ndarray, m: float, sigma: float, tau: float
) -> Shape:
    """Return the likeliest shape with its minimum at m, given noise and misfit."""
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


@dataclass(frozen=True)
class Pooled:
    """Posterior means of a sweep's noise (of one run at the minimum, in nats) and misfit."""

    noise: float
    misfit: float
    df: int


def weigh(
    sweep: Sequence[Likelihood],
    shape_priors: Sequence[ShapePrior | None] | None = None,
) -> tuple[list[Posterior], Pooled]:
    """Return a sweep's posteriors, one per curve, and its pooled noise and misfit.

    `shape_priors`: one per curve.
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
    logs = [log_likelihood(e, m, sigmas, prior) for e, m, prior in zip(sweep, grids, priors)]
    posteriors, pooled = _pool(sweep, sigmas, logs, grids)
    again = [k for k, p in enumerate(posteriors) if max(p.mass[0], p.mass[-1]) > _END]
    for k in again:
        e = sweep[k]
        high = min(e.x[-1] + _PAD, e.first_diverged)
        grids[k] = np.linspace(e.x[0] - _PAD, high, 2 * _STEPS)
        logs[k] = log_likelihood(e, grids[k], sigmas, priors[k])
    return _pool(sweep, sigmas, logs, grids) if again else (posteriors, pooled)


def _pool(
    sweep: Sequence[Likelihood],
    sigmas: np.ndarray,
    logs: Sequence[np.ndarray],
    grids: Sequence[np.ndarray],
) -> tuple[list[Posterior], Pooled]:
    """Weigh noise and misfit by the likelihood of all curves; average each curve's posterior."""
    prior = np.array(TAU_PRIOR)
    if np.median([np.median(np.diff(e.x)) for e in sweep]) > COARSE:
        prior = np.where(np.array(TAUS) < COARSE_TAU, 0.0, prior)
    with np.errstate(divide="ignore"):
        total = np.log(prior)[None] + np.zeros((len(sigmas), 1))
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
