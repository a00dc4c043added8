"""Extrapolate the code length of a training set (its summed loss in the first epoch).

Only the losses of its first rows are known, in batches in random order: under the base model, and
online, under the model in training just before it trains on that batch (a prequential code, Dawid
1984). Their ratio, online / base, is called share. A line is fitted to ln(share) over ln(rows).
"""

import math

import numpy as np
from scipy import stats

from analysis.inference.estimate import LEVEL, N_DRAWS, Estimate

FITTED = 8
"""The fit of the line leaves out the first 1 / FITTED of the rows measured. On those rows the model
learns the format of completions, which says little about later rows."""
STEEPER = 1.25
"""Factor on the fitted slope, for the lower bound of the share. If the loss began to fall late, the
slope of later rows is steeper than the fitted one."""
LATE = 4
"""The upper bound of the share is that of the last 1 / LATE of the rows measured."""
FEWEST = 24
"""Batches that an extrapolation needs: with fewer the scatter is unknown."""


def extrapolate(
    base: np.ndarray, code: np.ndarray, tokens: np.ndarray, left: float
) -> list[Estimate]:
    """Return the nats of all rows: under the base model, and online during training.

    They are exact if all rows were measured, and without a value if too few were. Under the base
    model, a token of the remaining rows costs as much as one of the measured rows. Online, it costs
    a share of that. The upper bound of the share is that of the last 1 / LATE of the measured rows.
    The lower bound is the fitted line, extended with STEEPER times its slope. The interval reaches
    from the low quantile of the lower bound to the high quantile of the upper bound. The value lies
    midway between the upper bound and the line extended with its own slope.

    `base`: nats of each measured batch under the base model, in the order of training. `code`: nats
    of each measured batch online. `tokens`: loss tokens of each measured batch. `left`: loss tokens
    of the remaining rows.
    """
    n, coded, first = len(tokens), float(code.sum()), float(base.sum())
    if left <= 0:
        return [Estimate(nats, nats, nats, n) for nats in (first, coded)]
    if n < FEWEST:
        return [Estimate(None, n=n)] * 2
    rng = np.random.default_rng(0)
    at, size = np.cumsum(tokens), float(tokens.mean())
    error, degrees = _scatter(base, tokens, left, size)
    per_token = base.sum() / tokens.sum() + error * rng.standard_t(degrees, N_DRAWS)
    rest = left * per_token
    # The line, extended to the remaining rows: draws of their mean share, with STEEPER times the
    # slope, and one value with the fitted slope.
    used = at >= tokens.sum() / FITTED
    x, share = np.log(at[used] / tokens.sum()), np.maximum(code[used] / base[used], 1e-12)
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
    ahead = (np.arange(64) + 0.5) / 64 * np.log1p(left / tokens.sum())  # midpoints in ln(rows)
    weight = np.exp(ahead) / np.exp(ahead).sum()  # rows in each interval of ln(rows)
    low_share = np.exp(middle[:, None] + slope[:, None] * (ahead - x.mean())) @ weight
    line = np.exp(centre + below + min(0.0, float(found.slope)) * (ahead - x.mean())) @ weight
    late = at >= (1 - 1 / LATE) * tokens.sum()
    error, degrees = _scatter(code[late], base[late], left, size)
    level = float(code[late].sum() / base[late].sum())
    high_share = level + error * rng.standard_t(degrees, N_DRAWS)
    tail = (1 - LEVEL) / 2
    low = coded + float(np.quantile(rest * np.minimum(low_share, high_share), tail))
    high = coded + float(np.quantile(rest * high_share, 1 - tail))
    mean = left * first / float(tokens.sum())
    value = coded + mean * (min(float(line), level) + level) / 2
    least, most = np.quantile(first + rest, [tail, 1 - tail]).tolist()
    online = Estimate(value, min(low, value), max(high, value), n)
    return [Estimate(first + mean, least, most, n), online]


def _scatter(part: np.ndarray, whole: np.ndarray, left: float, unit: float) -> tuple[float, int]:
    """Return the standard error of sum(part) / sum(whole), and its degrees of freedom.

    It includes the scatter of `left` further tokens, in batches of `unit`.
    """
    n = len(part)
    ratio = part.sum() / whole.sum()
    each = (part - ratio * whole) / whole.mean()
    spread = float(np.sqrt((each**2).sum() / (n - 1)))
    return spread * math.sqrt(1 / n + unit / left), n - 1
