"""The decision rule: compare an interval with a margin that was stated before any run.

SUPPORTED: the interval lies inside the margin. REFUTED: the two do not overlap. Otherwise, or with
a gate, the claim is UNDECIDED, and the verdict names what would decide it. The level is 95%, or
higher in a sweep with interim analyses: repeated looks must not make it easier to support a false
claim.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from analysis.inference.estimate import (
    BETTER,
    LEVEL,
    MAX_NEEDED,
    SEEDS,
    Estimate,
    Spread,
    Verdict,
    from_draws,
    needed,
)
from analysis.inference.gates import MIN_SEEDS, Gate, remedy

NO_INTERVAL = ("unread_at_likely_rates", "one_rank_departs")
"""Flags that say why an estimate has no interval."""
POCOCK = {1: 0.05, 2: 0.0294, 3: 0.0221, 4: 0.0182, 5: 0.0158}
"""Number of looks planned -> significance level of each look, for an overall level of 5%
(Pocock, Biometrika 64, 1977)."""


def look_level(rounds: int) -> float:
    """Return the interval's level at each of `rounds` looks; ValueError if POCOCK has none."""
    if rounds not in POCOCK:
        raise ValueError(f"a sweep has at most {max(POCOCK)} rounds, not {rounds}")
    return 1 - POCOCK[rounds]


def at_level(e: Estimate, level: float) -> Estimate:
    """Return an estimate with the interval of this level; unchanged if it has no draws."""
    if e.draws is None or level == e.level:
        return e
    return from_draws(e.draws, e.n, level, e.flags, e.spread)


def judge(
    name: str,
    claim: dict[str, Any],
    group: str,
    estimate: Estimate,
    gates: Sequence[Gate],
    seeds: int,
    log: bool,
    level: float = LEVEL,
) -> Verdict:
    """Judge one claim.

    `seeds`: number of seeds at the optima, used if the estimate has no spread. `log`: the margin is
    of a ratio. `level`: level of the interval that is compared with the margin.
    """
    low, high = (float(v) for v in claim["margin"])
    outcome, why, remedied, p, missing = "UNDECIDED", "", "", None, None
    unread = [] if gates else [f for f in estimate.flags if f in NO_INTERVAL]
    estimate = at_level(estimate, level)
    if estimate.value is not None and math.isnan(estimate.value):  # some run has no value
        estimate = Estimate(None, n=estimate.n, flags=estimate.flags)
    if (draws := estimate.draws) is not None:
        p = p_value(draws, low, high)
    shown = f"the {100 * level:.3g}% interval"
    if gates:
        why = "; ".join(g.sentence for g in gates)
    elif estimate.value is None or estimate.low is None or estimate.high is None:
        why = ": ".join(["no interval", *unread])
    elif low <= estimate.low and estimate.high <= high:
        outcome, why = "SUPPORTED", f"{shown} lies inside the margin"
    elif estimate.high < low or estimate.low > high:
        above = estimate.low > high
        better = claim.get("better") == ("higher" if above else "lower")
        outcome, why = "REFUTED", f"{shown} and the margin do not meet"
        why += f": {BETTER}" if better else ""
    else:
        why = f"{shown} crosses the margin's edge"
    if outcome == "UNDECIDED":
        remedied = remedy(gates, unread)
        spread = estimate.spread or Spread(seeds)
        # An estimate may average more seeds than the LRs around the optimum have.
        now = min(seeds, spread.n) if spread.of == SEEDS and seeds else spread.n
        if remedied:
            pass
        elif estimate.value is None:
            remedied = "optima with intervals in every curve"
        elif not estimate.has_interval():
            remedied, missing = f"at least {MIN_SEEDS} {spread.of}", max(MIN_SEEDS - now, 1)
        else:
            to = scale_of(log)
            ends, margin = [to(v) for v in estimate.interval], (to(low), to(high))
            n = needed(spread, to(estimate.value), ends, margin, estimate.level, MIN_SEEDS)
            if n is None:
                rates = " and learning rates around the best ones" if spread.shared else ""
                remedied = f"more than {MAX_NEEDED} {spread.of}{rates}"
            else:
                remedied, missing = f"about {n} {spread.of} (now {now})", n - now
    return Verdict(
        claim=name,
        group=group,
        outcome=outcome,
        estimate=estimate,
        expected=float(claim["expected"]),
        margin=(low, high),
        primary=bool(claim.get("primary")),
        why=why,
        gates=tuple(gates),
        needed=remedied,
        rivals=dict(claim.get("alternatives") or {}),
        log=log,
        p=p,
        missing=missing,
    )


def p_value(draws: np.ndarray, low: float, high: float) -> float:
    """Return the p-value at which the draws decide a claim, at least 2 / len(draws).

    It is the smallest p for which the interval of level 1 - p lies inside [low, high] or outside.
    """
    below, above = float((draws < low).mean()), float((draws > high).mean())
    inside, apart = 2 * max(below, above), 2 * min(1 - below, 1 - above)
    return min(1.0, max(min(inside, apart), 2 / len(draws)))


def holm(verdicts: Sequence[Verdict], alpha: float = 1 - LEVEL) -> list[Verdict]:
    """Correct the primary claims for multiplicity by Holm's method (1979).

    The k-th smallest of n p-values must be at most alpha / (n - k + 1). A verdict that does not
    survive becomes UNDECIDED, with the reason. All other verdicts stay unchanged.
    """
    primary = [v for v in verdicts if v.primary]
    out = {id(v): v for v in verdicts}
    failed = False
    for k, v in enumerate(sorted(primary, key=lambda v: 1.0 if v.p is None else v.p)):
        share = alpha / (len(primary) - k)
        failed = failed or v.p is None or v.p > share
        if failed and v.outcome != "UNDECIDED":
            out[id(v)] = dataclasses.replace(
                v,
                outcome="UNDECIDED",
                needed=f"more {v.estimate.spread.of if v.estimate.spread else SEEDS}",
                why=f"{v.outcome} alone (p {v.p:.2g}), but not after Holm's correction over "
                f"{len(primary)} primary claims",
            )
    return [out[id(v)] for v in verdicts]


def scale_of(log: bool) -> Callable[[float], float]:
    """Return the map to a scale of symmetric errors: ln for ratios (-inf at 0), else identity."""
    return (lambda v: math.log(v) if v > 0 else -math.inf) if log else float
