"""Show what would run and what it costs, what each run trains; measure packs for a better plan."""

import json
from collections.abc import Callable

from lorasweep.cli import answer
from lorasweep.cli.plans import of_fleet, plan_text
from lorasweep.cli.points import all_points
from lorasweep.config.preflight import check_available
from lorasweep.errors import SpecError
from lorasweep.launch.measure_packs import measure_packs
from lorasweep.launch.slurm import planning
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.plan import detect
from lorasweep.plan.estimate import make_plan, summary
from lorasweep.plan.same_data import refuse_mixing
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.request import Request
from lorasweep.sweep.trained import trained_plain, trained_text

OUTLOOK_RUNS = 2000
"""Number of runs above which action=plan does not say what claims can be decided. Loading the
analysis takes a second, longer than planning; the start of the runs says it."""


def show(request: Request, store: RunStore) -> int:
    """Print what would run and what it costs; start nothing."""
    points = all_points(request, store)
    refuse_mixing(points, store, request.exec)
    now = make_plan(points, store, request.exec, hardware_of(request))
    difference = planning.difference(request, store, now)
    outlooks = []
    if len(now.points) <= OUTLOOK_RUNS:
        outlooks = answer.outlooks(request.points, request.sweep, request.scale)
    fleet = {"fleet": of_fleet.here(request, store, now)} if request.members else {}
    if request.format == "json":
        name = {"sweep": request.sweep_name, "scale": request.scale}
        claims = {"claims": [found.plain() for found in outlooks]} if outlooks else {}
        print(json.dumps({**name, **summary(now), **difference, **claims, **fleet}))
        return 0
    lines = [plan_text.plan_text(request, now), *plan_text.queue_lines(difference)]
    if request.members:
        lines += ["", *of_fleet.lines(fleet["fleet"], f"on {now.workers} worker(s)")]
    print("\n".join([*lines, *(found.line() for found in outlooks)]))
    return 0


def layers(request: Request) -> int:
    """Print what each kind of run trains, by layer set."""
    if request.format == "json":
        print(json.dumps({"sweep": request.sweep_name, "kinds": trained_plain(request.points)}))
    else:
        print(trained_text(request.points))
    return 0


def measure(request: Request, store: RunStore, notify: Callable[[str], None]) -> int:
    """Measure the kinds of missing runs on this machine, and print the plan."""
    if request.cluster.kind == "slurm":
        raise SpecError(
            "action=measure_packs measures the machine it runs on. On a cluster, run it inside a "
            "job, with cluster=local: srun python -m lorasweep ... action=measure_packs"
        )
    store.prepare()
    check_available(request)
    points = all_points(request, store)
    states = store.states(p.id for p in points)
    missing = [p.spec for p in points if states[p.id] == "missing"]
    if missing:
        measure_packs(missing, store, request.exec, detect.this_machine(), notify)
    return show(request, store)
