"""The decision rule: an interval against a margin that was stated before any run.

SUPPORTED: the 95% interval lies inside the margin. REFUTED: the two do not meet. Else UNDECIDED, with the runs
that would decide. A failing gate forces UNDECIDED, whatever the numbers say.
"""

import math
from typing import Any

from analysis.results import Estimate, Verdict

MIN_SEEDS = 3
"""Seeds at the rates around the optimum below which no verdict is given: fewer say nothing of the noise there."""
MAX_NEEDED = 64
"""More seeds than this are reported as 'more than'."""


def judge(
    name: str, claim: dict[str, Any], group: str, estimate: Estimate, gates: list[str], seeds: int, log: bool
) -> Verdict:
    """Judge one claim. `gates` are reasons that forbid a verdict; `log` says that the margin is one of ratios."""
    low, high = (float(v) for v in claim["margin"])
    outcome, why, needed = "UNDECIDED", "", ""
    if gates:
        why = "; ".join(gates)
    elif estimate.value is None or not estimate.has_interval():
        why = "no interval"
    elif low <= estimate.low and estimate.high <= high:
        outcome, why = "SUPPORTED", "the 95% interval lies inside the margin"
    elif estimate.high < low or estimate.low > high:
        outcome, why = "REFUTED", "the 95% interval and the margin do not meet"
    else:
        why = "the 95% interval crosses the margin's edge"
    if outcome == "UNDECIDED":
        needed = _remedy(gates) or _needed(estimate, low, high, seeds, log)
    return Verdict(
        claim=name, group=group, outcome=outcome, estimate=estimate, expected=float(claim["expected"]),
        margin=(low, high), primary=bool(claim.get("primary")), why=why, needed=needed,
        rivals=dict(claim.get("rivals") or {}),
    )  # fmt: skip


REMEDIES = {
    "task:": "another task or model: more runs cannot help",
    "no curve of": "the missing arm",
    "one rank only": "another rank",
    "bounded_by_divergence": "learning rates between the best one and the first that breaks down",
    "at_edge": "learning rates beyond the edge",
    "few_points": "more learning rates",
    "no_usable_points": "lower learning rates",
}
"""What opens each gate, the first that applies; the gates not named here are about seeds."""


def _remedy(gates: list[str]) -> str:
    text = "; ".join(gates)
    return next((remedy for gate, remedy in REMEDIES.items() if gate in text), "")


def _needed(estimate: Estimate, low: float, high: float, seeds: int, log: bool) -> str:
    """Say how many seeds an optimum would need, its interval shrinking with their square root."""
    if estimate.value is None:
        return "optima with intervals in every curve"
    if not estimate.has_interval():
        return f"fresh seeds around the optimum (at least {MIN_SEEDS})"
    to = math.log if log else float
    value, edges = to(estimate.value), (to(low), to(high))
    half = max(value - to(estimate.low), to(estimate.high) - value) if not log or estimate.low > 0 else math.inf
    room = min(abs(value - e) for e in edges)
    if room == 0 or not math.isfinite(half):
        return f"more than {MAX_NEEDED} seeds at each optimum"
    n = max(MIN_SEEDS, seeds + 1, math.ceil(max(seeds, 1) * (half / room) ** 2))
    return f"about {n} seeds at each optimum (now {seeds})" if n <= MAX_NEEDED else f"more than {MAX_NEEDED} seeds"
