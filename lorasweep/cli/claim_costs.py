"""What each claim of sweeps costs on GPUs, its looks, and the claims that a budget decides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import or_
from typing import Any

from lorasweep.cli import answer
from lorasweep.plan.budget import choose, parse_budget
from lorasweep.plan.planner import Planner
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import aligned
from lorasweep.sweep.replicates import planned_seeds
from lorasweep.sweep.request import Request

SMALLER = ("small", "tiny")
"""Scales whose standard deviation between seeds is used if a larger scale states none."""
MIN_SEEDS = 3
"""Seeds at each optimum without which most claims get no verdict (analysis.inference.decide)."""
N_AROUND = 3
"""Learning rates at which a look adds seeds (analysis.measures.next_runs.N_AROUND)."""
HEAD = ("claim", "sweep", "runs", "GPU-hours", "cumulative")
OPEN_HEAD = ("claim", "sweep", "further GPU-hours", "why")


@dataclass(frozen=True)
class ClaimCost:
    """A claim of a planned sweep, and the runs that are expected to decide it."""

    request: Request
    plain: dict[str, Any]
    """JSON values: the outlook, and if it can be decided runs, gpu_hours and its looks."""
    fresh: list[int]
    """Fresh seeds that the claim needs."""
    hours: dict[str, float]
    """Missing run with these seeds -> GPU-hours; empty: no number of seeds decides the claim."""

    @property
    def name(self) -> dict[str, Any]:
        """The claim and its sweep."""
        return {"claim": self.plain["claim"], "sweep": self.request.sweep_name}


def stays_open(plain: Mapping[str, Any]) -> str:
    """Say why no number of seeds is known to decide a claim; empty: one is."""
    if "runs" in plain:
        return ""
    if plain["can_decide"] is None:
        return "no standard deviation between seeds stated"
    if plain["needed"] is None:
        return "no number of seeds was found with which it can be decided"
    units = "{needed} {units} (planned {planned})".format(**plain)
    return f"{units}, which fresh seeds do not add"


def claim_costs(request: Request, missing: Sequence[Point], planner: Planner) -> list[ClaimCost]:
    """Return the cost of each claim of a sweep; empty if nothing is missing.

    Uses the standard deviation between seeds of this scale, else of the first scale in SMALLER that
    states one. A claim over other units than seeds is given MIN_SEEDS, or more if these have less
    than its share of the planned runs.
    """
    sweep = request.sweep
    if sweep is None or not missing:
        return []
    outlooks = answer.outlooks(request.points, sweep, request.scale, *SMALLER)
    planned = len(sweep.replicate.seeds)
    grid = max(1, planned_seeds(request.points, sweep.replicate) - planned)
    most = max([MIN_SEEDS, *(o.needed or 0 for _, o in outlooks if o.units == "seeds")])
    used = {*sweep.replicate.seeds, *(p.spec.seed for p in request.points)}
    more = [max(used) + 1 + k for k in range(max(most - grid - planned, 0))]
    seeds = [*sweep.replicate.seeds, *more]
    stages = planner.forecast(missing, replace(sweep.replicate, seeds=seeds))
    hours = [{i: k.hours for i, k in stage.items() if k.trains} for stage in stages]
    by_seeds = list(accumulate(hours, or_))  # run -> GPU-hours, by the number of fresh seeds
    found = []
    for scale, o in outlooks:
        names = ("claim", "half_width", "planned", "needed", "units", "can_decide")
        plain = {name: getattr(o, name) for name in names} | {"spread_from": scale}
        n = None
        if o.needed is not None and o.units == "seeds":
            n = max(o.needed - grid, 0)
        elif o.needed is not None and o.needed <= o.planned:
            share = o.needed / o.planned * len(by_seeds[planned])
            enough = (
                len(runs) >= share and k + grid >= MIN_SEEDS for k, runs in enumerate(by_seeds)
            )
            n = list(enough).index(True)
        if n is not None:
            plain |= {"runs": len(by_seeds[n]), "gpu_hours": sum(by_seeds[n].values())}
        at, decided = answer.decided_by(sweep.claims[o.claim], scale, o, sweep.rounds)
        if at and planned:
            first, all_seeds = (sum(by_seeds[k].values()) for k in (0, planned))
            each = (all_seeds - first) / planned * N_AROUND / sweep.replicate.n_lrs
            plain["looks"] = [
                {"seeds": k, "gpu_hours": all_seeds + (k - at[0]) * each, "decided": p}
                for k, p in zip(at, decided)
            ]
            undecided = [1.0, *(1 - p for p in decided)]
            spent = [0.0, *(look["gpu_hours"] for look in plain["looks"])]
            # if the sweep stops at the first look that decides the claim
            plain["expected_gpu_hours"] = sum(
                (b - a) * p for a, b, p in zip(spent, spent[1:], undecided)
            )
        runs = {} if n is None else by_seeds[n]
        found.append(ClaimCost(request, plain, seeds[: n or 0], runs))
    return found


# ---------------------------------------------------------------- within a budget


def within_budget(request: Request, costs: Sequence[ClaimCost]) -> dict[str, Any]:
    """Return as JSON values which claims a budget decides, in which order, and which stay open.

    `commands` are those that train the chosen claims; `open` has the reason for each other claim,
    and the GPU-hours that it takes in addition to the chosen ones.
    """
    asked = parse_budget(request.budget, 1)
    assert asked is not None
    known = [c for c in costs if "runs" in c.plain]
    chosen, others = choose([c.hours for c in known], asked.amount / 3600)
    most: dict[str, ClaimCost] = {}  # by sweep, the chosen claim with the most seeds
    for cost in (known[k] for k, *_ in chosen):
        name = cost.request.sweep_name or ""
        most[name] = max(most.get(name, cost), cost, key=lambda c: len(c.fresh))
    keys = ("runs", "gpu_hours", "cumulative_gpu_hours")
    return {
        "gpu_hours": asked.amount / 3600,
        "used": chosen[-1][-1] if chosen else 0.0,
        "chosen": [known[k].name | dict(zip(keys, values)) for k, *values in chosen],
        "commands": [_command(cost.request, cost.fresh) for cost in most.values()],
        "open": [
            *(
                known[k].name | {"gpu_hours": hours, "why": "over budget"}
                for k, hours in sorted(others, key=lambda other: other[1])
            ),
            *(c.name | {"why": stays_open(c.plain)} for c in costs if c not in known),
        ],
    }


def _command(request: Request, fresh: list[int]) -> str:
    """Return the command that trains a sweep with these fresh seeds."""
    words = [f"+sweep={request.sweep_name}", f"scale={request.scale}"]
    words += [f"'{c}'" for c in request.changes if not c.startswith("sweep.replicate.seeds=")]
    if request.sweep and fresh != request.sweep.replicate.seeds:
        words.append(f"'sweep.replicate.seeds=[{','.join(map(str, fresh))}]'")
    cluster = f"cluster=slurm hardware={request.hardware['name']}"
    return " ".join(["python -m lorasweep", *words, cluster])


def budget_lines(found: dict[str, Any]) -> list[str]:
    """Return a budget's claims as lines of text."""

    def hours(value: float) -> str:
        return f"{value:,.0f}" if value >= 10 or not value else f"{value:.2g}"

    rows, left = [HEAD], [OPEN_HEAD]
    for c in found["chosen"]:
        spent = (hours(c[key]) for key in ("gpu_hours", "cumulative_gpu_hours"))
        rows.append((c["claim"], c["sweep"], f"{c['runs']:,}", *spent))
    for c in found["open"]:
        more = hours(c["gpu_hours"]) if "gpu_hours" in c else "-"
        left.append((c["claim"], c["sweep"], more, c["why"]))
    total = f"{hours(found['used'])} of {hours(found['gpu_hours'])} GPU-hours"
    return [
        "",
        f"within the budget, by decided claims per GPU-hour: {len(rows) - 1} claims, {total}",
        *(aligned(rows, range(2, len(HEAD))) if rows[1:] else []),
        *(["", "to train them:"] if rows[1:] else []),
        *(f"  {command}" for command in found["commands"]),
        *(["", "what stays open:", *aligned(left, [2])] if left[1:] else []),
    ]
