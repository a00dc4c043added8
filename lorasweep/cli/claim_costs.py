"""What each claim of sweeps costs on GPUs, its looks, and the claims that a budget decides."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorasweep.cli import answer
from lorasweep.plan import priority
from lorasweep.plan.budget import parse_budget
from lorasweep.plan.forecast import Forecast, Forecaster
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import aligned
from lorasweep.sweep.question import Sweep
from lorasweep.sweep.replicates import planned_seeds
from lorasweep.sweep.request import Request

if TYPE_CHECKING:
    from analysis.inference.design import Outlook

SMALLER = ("small", "tiny")
"""Scales whose standard deviation between seeds is used if a larger scale states none."""
MIN_SEEDS = 3
"""Seeds at each optimum without which most claims get no verdict (analysis.inference.gates)."""
N_AROUND = 3
"""Learning rates at which a look adds seeds (analysis.measures.next_runs.N_AROUND)."""
HEAD = ("claim", "sweep", "runs", "GPU-hours", "cumulative")
OPEN_HEAD = ("claim", "sweep", "further GPU-hours", "why")


@dataclass(frozen=True)
class ClaimCost:
    """A claim of a planned sweep, and the runs that are expected to decide it."""

    request: Request
    outlook: "Outlook"
    spread_from: str
    """Scale whose standard deviation between seeds was used."""
    fresh: list[int] | None = None
    """Fresh seeds that the claim needs; None: no number of seeds is known to decide it."""
    runs: Forecast | None = None
    """The missing runs with these seeds."""
    looks: list[dict[str, Any]] = field(default_factory=list)
    """Seeds, GPU-hours and probability of a decision at each look; empty with one look."""

    @property
    def stays_open(self) -> str:
        """Why no number of seeds is known to decide the claim; empty: one is."""
        o = self.outlook
        if self.runs is not None:
            return ""
        if o.can_decide is None:
            return "no standard deviation between seeds stated"
        if o.needed is None:
            return "no number of seeds was found with which it can be decided"
        return f"{o.needed} {o.units} (planned {o.planned}), which fresh seeds do not add"

    def plain(self) -> dict[str, Any]:
        """Return the claim's cost as JSON values."""
        names = ("claim", "half_width", "planned", "needed", "units", "can_decide")
        price = {name: getattr(self.outlook, name) for name in names}
        price["spread_from"] = self.spread_from
        if self.runs is not None:
            price |= {"runs": self.runs.n_runs, "gpu_hours": self.runs.gpu_hours}
        if self.looks:
            price |= {"looks": self.looks, "expected_gpu_hours": self.expected_hours}
        return price

    @property
    def expected_hours(self) -> float:
        """Expected GPU-hours if the sweep stops at the first look that decides the claim."""
        undecided = [1.0, *(1 - look["decided"] for look in self.looks)]
        hours = [0.0, *(look["gpu_hours"] for look in self.looks)]
        return sum((b - a) * p for a, b, p in zip(hours, hours[1:], undecided))

    @property
    def looks_text(self) -> str:
        """What several looks cost, in words; empty with one look."""
        if not self.looks:
            return ""
        first, last = self.looks[0], self.looks[-1]
        return (
            f"; with {len(self.looks)} looks: the first decides with probability "
            f"{first['decided']:.2f}, expected {self.expected_hours:,.0f} GPU-hours, at most "
            f"{last['gpu_hours']:,.0f}"
        )


def claim_costs(request: Request, missing: Sequence[Point], planner: Forecaster) -> list[ClaimCost]:
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
    longer = dataclasses.replace(sweep.replicate, seeds=seeds)
    forecast = planner.forecast(request.sweep_name or "", missing, longer)
    by_seeds = [forecast.with_fresh(n) for n in range(len(seeds) + 1)]
    costs = []
    for scale, o in outlooks:
        n = None
        if o.needed is not None and o.units == "seeds":
            n = max(o.needed - grid, 0)
        elif o.needed is not None and o.needed <= o.planned:
            share = o.needed / o.planned * by_seeds[planned].n_runs
            n = next(
                k for k, f in enumerate(by_seeds) if f.n_runs >= share and k + grid >= MIN_SEEDS
            )
        found = ClaimCost(request, o, scale, looks=_looks(sweep, scale, o, by_seeds))
        if n is not None:
            found = dataclasses.replace(found, fresh=seeds[:n], runs=by_seeds[n])
        costs.append(found)
    return costs


def _looks(
    sweep: Sweep, scale: str, outlook: "Outlook", by_seeds: Sequence[Forecast]
) -> list[dict[str, Any]]:
    """Return the seeds, GPU-hours and probability of a decision of each planned look."""
    claim, planned = sweep.claims[outlook.claim], len(sweep.replicate.seeds)
    at, decided = answer.decided_by(claim, scale, outlook, sweep.rounds)
    if not at or not planned:
        return []
    first, hours = by_seeds[0].gpu_hours, by_seeds[planned].gpu_hours
    each = (hours - first) / planned * N_AROUND / sweep.replicate.n_lrs
    return [
        {"seeds": n, "gpu_hours": hours + (n - at[0]) * each, "decided": p}
        for n, p in zip(at, decided)
    ]


# ---------------------------------------------------------------- within a budget


def within_budget(request: Request, costs: Sequence[ClaimCost]) -> dict[str, Any]:
    """Return as JSON values which claims a budget decides, in which order, and which stay open.

    `commands` are those that train the chosen claims; `open` has the reason for each other claim,
    and the GPU-hours that it takes in addition to the chosen ones.
    """
    asked = parse_budget(request.budget, 1)
    assert asked is not None
    known = {
        priority.Need(c.request.sweep_name or "", c.outlook.claim, c.runs.hours_by_run()): c
        for c in costs
        if c.runs is not None
    }
    chosen, others = priority.choose(list(known), asked.amount / 3600)
    most: dict[str, ClaimCost] = {}  # by sweep, the chosen claim with the most seeds
    for cost in (known[c.need] for c in chosen):
        name = cost.request.sweep_name or ""
        most[name] = max(most.get(name, cost), cost, key=lambda c: len(c.fresh or []))
    beyond = [{**_name(known[need]), "gpu_hours": hours} for need, hours in others]
    return {
        "gpu_hours": asked.amount / 3600,
        "used": chosen[-1].total if chosen else 0.0,
        "chosen": [
            _name(known[c.need])
            | {"runs": c.runs, "gpu_hours": c.gpu_hours, "cumulative_gpu_hours": c.total}
            for c in chosen
        ],
        "commands": [_command(cost.request, cost.fresh or []) for cost in most.values()],
        "open": [
            *({**c, "why": "over budget"} for c in sorted(beyond, key=lambda c: c["gpu_hours"])),
            *({**_name(c), "why": c.stays_open} for c in costs if c.runs is None),
        ],
    }


def _name(cost: ClaimCost) -> dict[str, Any]:
    return {"claim": cost.outlook.claim, "sweep": cost.request.sweep_name}


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
        costs = (hours(c[key]) for key in ("gpu_hours", "cumulative_gpu_hours"))
        rows.append((c["claim"], c["sweep"], f"{c['runs']:,}", *costs))
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
