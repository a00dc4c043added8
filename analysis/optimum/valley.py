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

import functools
import math
from dataclasses import dataclass

import numpy as np

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
    """A prior of a curve's shape, from related curves."""

    a: float
    """Asymmetry, per unit of ln(lr)."""
    a_sd: float
    c: float
    """Curvature, nats per unit of ln(lr) squared."""
    c_spread: float
    """Relative standard deviation of c."""


@dataclass(frozen=True)
class Tables:
    """Arrays that depend only on the design (LRs and repeats), for a grid of (m, a).

    The P losses at the tried LRs are known up to a constant, with precision root' root / sigma^2
    (root: D x P), so z = root loss has noise sigma along every axis. At each (m, a), z is rotated
    to the axes of the misfit's covariance. So the log likelihood is a sum of D terms for any sigma,
    tau and c.
    """

    turn: np.ndarray
    """Rotation, [M, A, D, D]."""
    spread: np.ndarray
    """Variance of the misfit along each axis at c = tau = 1, [M, A, D]."""
    shape: np.ndarray
    """LINEX along each axis at c = 1, [M, A, D]."""


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


def tables(x: np.ndarray, root: np.ndarray, m: np.ndarray) -> Tables:
    """Build the tables of a design: LRs x [P], root [D, P], and candidate minima m [M]."""
    key = (x - x[0], root, m - x[0])
    return _tables(*(np.round(np.ascontiguousarray(v), 9).tobytes() for v in key), len(root))


@functools.lru_cache(maxsize=256)
def _tables(x_key: bytes, root_key: bytes, m_key: bytes, d: int) -> Tables:
    x, m = np.frombuffer(x_key), np.frombuffer(m_key)
    root = np.frombuffer(root_key).reshape(d, len(x))
    spread, axes = np.linalg.eigh(root @ misfit(x, m, _A) @ root.T)
    shape = linex(x - m[:, None, None], _A[:, None]) @ root.T
    turn, along = axes.swapaxes(-1, -2), np.einsum("maij,mai->maj", axes, shape)
    return Tables(turn, np.maximum(spread, 0.0), along)


def log_likelihood(
    t: Tables, z: np.ndarray, sigmas: np.ndarray, prior: ShapePrior | None = None
) -> np.ndarray:
    """Return the log likelihood of a curve over (sigma, tau, m), [S, T, M].

    The likelihood is maximised over the curvature c, and averaged over the prior of a. `z`: root x
    loss, [D]. `sigmas`: noise levels, [S]. Default prior: A_MEAN, A_SD.
    """
    turned = np.einsum("madj,j->mad", t.turn, z)
    weight = -0.5 * ((_A - (prior.a if prior else A_MEAN)) / (prior.a_sd if prior else A_SD)) ** 2
    pin = 1 / (prior.c * prior.c_spread) ** 2 if prior else 0.0
    aim = prior.c * pin if prior else 0.0
    c = np.maximum((turned * t.shape).sum(-1) / (t.shape**2).sum(-1), _C_MIN)[None, None]
    noise = sigmas[:, None, None, None, None] ** 2
    tau = np.array(TAUS)[:, None, None]
    for _ in range(2):
        pull = t.shape / ((tau * c)[..., None] ** 2 * t.spread + noise)
        c = (np.einsum("mad,stmad->stma", turned, pull) + aim) / (
            np.einsum("mad,stmad->stma", t.shape, pull) + pin
        )
        c = np.maximum(c, _C_MIN)
    variance = (tau * c)[..., None] ** 2 * t.spread + noise
    rest = turned - c[..., None] * t.shape
    log = -0.5 * (rest * rest / variance + np.log(variance)).sum(-1) + weight
    log = log - 0.5 * pin * (c - prior.c) ** 2 if prior else log
    top = log.max(-1)
    return top + np.log(np.exp(log - top[..., None]).sum(-1))


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
    best, found = -np.inf, None
    cov = misfit(x, np.array([m]), _A)[0]
    for a, k in zip(_A, cov):
        shape = root @ linex(x - m, a)
        c = max(float(z @ shape / (shape @ shape)), _C_MIN)
        for _ in range(3):
            total = (tau * c) ** 2 * root @ k @ root.T + sigma**2 * np.eye(len(z))
            solved = np.linalg.solve(total, np.stack([shape, z], 1))
            c = max(float(shape @ solved[:, 1] / (shape @ solved[:, 0])), _C_MIN)
        total = (tau * c) ** 2 * root @ k @ root.T + sigma**2 * np.eye(len(z))
        pull = np.linalg.solve(total, z - c * shape)
        log = (
            -0.5 * float((z - c * shape) @ pull + np.linalg.slogdet(total)[1])
            - 0.5 * ((a - A_MEAN) / A_SD) ** 2
        )
        if log > best:
            best, found = log, Shape(x, m, float(a), c, tau, root.T @ pull)
    assert found is not None
    return found
