"""The code length of data in a first pass, extrapolated from its first rows.

Losses come in batches of rows in random order: under the base model, and online, each batch before
it is trained on (a prequential code, Dawid 1984).
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.inference.estimate import LEVEL, N_DRAWS, Estimate

FITTED = 8
"""The line is not fitted to the first 1 / FITTED of the rows measured: the form of a completion is
learned at once, and says little about later rows."""
STEEPER = 1.25
"""The line may continue this much steeper: the slope grows if the loss began to fall late."""
LATE = 4
"""The level reached is that of the last 1 / LATE of the rows measured."""
FEWEST = 24
"""Batches that an extrapolation needs: with fewer the scatter is unknown."""


@dataclass(frozen=True)
class CodeLength:
    """Nats of all rows: exact where all were measured, without a value where too few were."""

    as_is: Estimate
    prequential: Estimate


def extrapolate(base: np.ndarray, code: np.ndarray, tokens: np.ndarray, left: float) -> CodeLength:
    """Return the code length of all rows, under the base model and online during training.

    Under the base model further rows cost as much as those measured, with the scatter of the
    batches. During training they cost a share of that: at most the share of the last 1 / LATE of
    the rows, and at least what a straight line of ln(share) over ln(rows) says, STEEPER times as
    steep. The interval reaches from the low end of the one to the high end of the other; the value
    is midway between the two.

    Args:
        base, code, tokens: nats of each batch under the base model and during training, in the
            order of training, and its loss tokens.
        left: loss tokens of the rows that were not measured.
    """
    n, coded, first = len(tokens), float(code.sum()), float(base.sum())
    if left <= 0:
        return CodeLength(Estimate(first, first, first, n), Estimate(coded, coded, coded, n))
    if n < FEWEST:
        return CodeLength(Estimate(None, n=n), Estimate(None, n=n))
    rng = np.random.default_rng(0)
    at, size = np.cumsum(tokens), float(tokens.mean())
    error, degrees = _scatter(base, tokens, left, size)
    per_token = base.sum() / tokens.sum() + error * rng.standard_t(degrees, N_DRAWS)
    rest = left * per_token
    low_share, line = _continued(base, code, tokens, left, rng)
    late = at >= (1 - 1 / LATE) * tokens.sum()
    error, degrees = _scatter(code[late], base[late], left, size)
    level = float(code[late].sum() / base[late].sum())
    high_share = level + error * rng.standard_t(degrees, N_DRAWS)
    tail = (1 - LEVEL) / 2
    low = coded + float(np.quantile(rest * np.minimum(low_share, high_share), tail))
    high = coded + float(np.quantile(rest * high_share, 1 - tail))
    mean = left * first / float(tokens.sum())
    value = coded + mean * (min(line, level) + level) / 2
    ends = np.quantile(first + rest, [tail, 1 - tail])
    as_is = Estimate(first + mean, float(ends[0]), float(ends[1]), n)
    return CodeLength(as_is, Estimate(value, min(low, value), max(high, value), n))


def _scatter(part: np.ndarray, whole: np.ndarray, left: float, unit: float) -> tuple[float, int]:
    """Return the standard error of sum(part) / sum(whole), and its degrees of freedom.

    It includes the scatter of `left` further tokens, in batches of `unit`.
    """
    n = len(part)
    ratio = part.sum() / whole.sum()
    each = (part - ratio * whole) / whole.mean()
    spread = float(np.sqrt((each**2).sum() / (n - 1)))
    return spread * math.sqrt(1 / n + unit / left), n - 1


def _continued(
    base: np.ndarray, code: np.ndarray, tokens: np.ndarray, left: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Draw the mean share over further rows if the line continues; also return its middle."""
    at, total = np.cumsum(tokens), float(tokens.sum())
    used = at >= total / FITTED
    x, share = np.log(at[used] / total), np.maximum(code[used] / base[used], 1e-12)
    found = stats.linregress(x, np.log(share))
    residual = np.log(share) - found.intercept - found.slope * x
    degrees = len(x) - 2
    spread = math.sqrt(float((residual**2).sum()) / degrees)
    wide = float(((x - x.mean()) ** 2).sum())
    t = rng.standard_t(degrees, (2, N_DRAWS))
    # the mean of the logarithm lies below the logarithm of the mean by half the variance
    centre, below = float(np.log(share).mean()), spread**2 / 2
    middle = centre + spread / math.sqrt(len(x)) * t[0] + below
    slope = STEEPER * np.minimum(0.0, found.slope + spread / math.sqrt(wide) * t[1])
    ahead = (np.arange(64) + 0.5) / 64 * np.log1p(left / total)  # midpoints in ln(rows)
    weight = np.exp(ahead) / np.exp(ahead).sum()  # by the rows there
    drawn = np.exp(middle[:, None] + slope[:, None] * (ahead - x.mean())) @ weight
    line = np.exp(centre + below + min(0.0, float(found.slope)) * (ahead - x.mean())) @ weight
    return drawn, float(line)
