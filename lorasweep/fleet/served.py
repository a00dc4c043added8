"""Judge from log-probabilities whether a server computes what the trainer computes.

All arrays hold log p of the same answer tokens, in nats. Errors of a server are measured in the
same run: its base against the trainer's base.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

SERVED, NOT_APPLIED, ANOTHERS = "served", "not applied", "another customer's"
DIFFERS, TOO_SMALL = "differs", "too small to tell"
TIMES_NOISE = 2.0
"""Accepted distance to the trainer, in units of the noise (tinker-cookbook, pull request 928)."""
OF_CHANGE = 0.03
"""Further accepted distance, as a share of the change by training. A server rounds an adapter to
bf16, so errors grow with the change: measured 0.0014 to 0.0025 of it on a two-layer base of random
weights, up to ten times the noise of the base (docs/fleet.md). Half an alpha is about 0.5."""
ERRORS = 3.0
"""Standard errors at which a factor differs from 1, or from 0."""
FACTOR = 0.25
"""The change is too small to tell if the factor is not known to this: 0.5 and 1 must differ."""
OTHER_BASE = 0.25
"""The server has another base if the noise is above this share of the spread (standard deviation)
of the trainer's log p under the base. In bf16 it was 0.004 on a two-layer base and 0.03 on
SmolLM2-135M; unrelated values of equal spread give 1.4."""


@dataclass(frozen=True)
class Probe:
    """Log p of one adapter's tokens in nats, [L]; the first tokens are common to all adapters."""

    base: np.ndarray
    """The trainer's base."""
    trained: np.ndarray
    """The trainer's base with the adapter."""
    server_base: np.ndarray
    served: np.ndarray
    """The server's answer under the adapter's name."""


@dataclass(frozen=True)
class Finding:
    """What was found of one adapter; distances are root mean squares over tokens, in nats."""

    verdict: str
    change: float
    """Between the trainer's adapter and base."""
    distance: float
    """Between server and trainer."""
    bound: float
    """The accepted distance."""
    factor: float
    """Slope of the server's change on the trainer's: 1 is right, 0 not applied."""
    factor_se: float
    nearest: str
    """Name of the adapter whose values on the common tokens are nearest to the server's."""


def rms(values: np.ndarray) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def judge(name: str, probe: Probe, trained: Mapping[str, np.ndarray], noise: float) -> Finding:
    """Judge one adapter: is it applied, is it the right one, how far is it from the trainer's.

    Args:
        name: the adapter.
        probe: its log-probabilities.
        trained: name -> the trainer's values on the common tokens, for all adapters of the base.
        noise: distance between the server's and the trainer's base, in nats.
    """
    change, served_change = probe.trained - probe.base, probe.served - probe.server_base
    size, distance = rms(change), rms(probe.served - probe.trained)
    length = max(float(np.linalg.norm(change)), 1e-12)
    factor = float(served_change @ change) / length**2
    # a slope's standard error; the difference of two answers of the server has twice the variance
    se = 2**0.5 * noise / length
    bound, uncertain = TIMES_NOISE * noise + OF_CHANGE * size, ERRORS * se + OF_CHANGE
    common = {n: v - probe.served[: len(v)] for n, v in trained.items()}
    nearest = min(common, key=lambda n: rms(common[n]))
    tells = ERRORS * se <= FACTOR
    # two adapters are told apart if they differ by more than errors would move one to the other
    gap = float(np.linalg.norm(common[nearest] - common[name]))
    apart = gap > 2 * ERRORS * (noise + OF_CHANGE * size)
    its_change = rms(trained[nearest] - probe.base[: len(trained[nearest])])
    near = rms(common[nearest]) <= TIMES_NOISE * noise + OF_CHANGE * its_change
    if tells and abs(factor) <= uncertain and rms(served_change) <= TIMES_NOISE * noise:
        verdict = NOT_APPLIED
    elif nearest != name and apart and near:
        verdict = ANOTHERS
    elif distance > bound or (tells and abs(factor - 1) > uncertain):
        verdict = DIFFERS
    else:
        verdict = SERVED if tells else TOO_SMALL
    return Finding(verdict, size, distance, bound, factor, se, nearest)
