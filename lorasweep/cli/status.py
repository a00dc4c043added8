"""Show the status of a sweep: counts, rates, time left, jobs, the best so far. Only reads.

Works wherever the run folder is visible. With access to Slurm, it also shows jobs.
"""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasweep.cli.status_text import status_text
from lorasweep.customers.outcome import counts, outcome_of
from lorasweep.customers.runs import planned
from lorasweep.launch.slurm import submissions
from lorasweep.launch.slurm.submissions import Queue
from lorasweep.plan import detect
from lorasweep.plan.estimate import Plan, make_plan
from lorasweep.plan.flops import run_flops
from lorasweep.store.index import Entry
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import run_names
from lorasweep.sweep.request import Request

OPEN_STATES = ("missing", "queued", "running", "interrupted")
"""States of unfinished runs. queued: missing or interrupted in the store, and in a live job."""
WATCH_S = 5.0
WINDOW_S = 1800.0
"""Rates count the runs that finished within this time before the latest one."""


def status(request: Request, store: RunStore, points: list[Point]) -> dict[str, Any]:
    """Return the status of a sweep as JSON values."""
    queue = submissions.look(store.root)
    now = make_plan(points, store, request.exec, detect.this_machine())
    covered = queue.covered()
    states = {
        i: "queued" if s in ("missing", "interrupted") and i in covered else s
        for i, s in now.states.items()
    }
    entries = store.finished(states)
    top = {a: _best(now.points, entries, a) for a in dict.fromkeys(p.arm for p in now.points)}
    at_hand = {
        i for i, s in states.items() if s in ("running", "failed", "diverged", "interrupted")
    }
    names = run_names(now.points, at_hand | {i for _, i in top.values()})
    running = {p.id: p for p in now.points if states[p.id] == "running"}
    steps = {i: (store.recent_records(i) or [{"step": 0}])[-1]["step"] for i in running}
    flops_left = now.flops - sum(
        run_flops(p.spec) * steps[i] / p.spec.steps for i, p in running.items()
    )
    return {
        "sweep": request.sweep_name,
        "scale": request.scale,
        "customers": _customers(request, store),
        "runs": {"total": len(now.points), "todo": len(now.todo), **Counter(states.values())},
        "arms": _arms(now.points, states, top, names, entries),
        "best": _plain_best(min(top.values(), default=(math.inf, "")), names, entries),
        "left_s": _left_s(now, flops_left, entries, queue),
        "rate_per_h": _rate_per_h(entries),
        "hours": _hours(request, now, entries, flops_left),
        "running": [
            {"run": i, "name": names[i], "step": steps[i], "steps": p.spec.steps}
            for i, p in running.items()
        ],
        "problems": _problems(store, now.points, states, names),
        "jobs": _jobs(queue, {p.id for p in now.points}, entries),
        "follows": [
            j.label for n, j in queue.follows.items() if j.live and _is_of(queue, n, request.title)
        ],
        "slurm": queue.unavailable,
        "unrecorded": len(queue.strays),
    }


def _customers(request: Request, store: RunStore) -> dict[str, int] | None:
    """Count a fleet's customers by what became of them; None for other requests."""
    if not request.members:
        return None
    fleet = planned(request.members, request.points)
    return counts(outcome_of(m, store) for m in fleet)


def _jobs(queue: Queue, ids: set[str], entries: dict[str, Entry]) -> list[dict[str, Any]]:
    """Describe the live jobs with any of these runs."""
    return [
        {
            "job": j.label,
            "state": j.state,
            "reason": j.reason,
            "node": j.node,
            "restarts": j.restarts,
            "runs": len(s.tasks[k]),
            "over": sum(r in entries for r in s.tasks[k]),
            "log": str(s.log(j.label)),
        }
        for s, k, j in queue.live()
        if ids & set(s.tasks[k])
    ]


def _is_of(queue: Queue, name: str, title: str) -> bool:
    return any(s.name == name and s.record["sweep"] == title for s in queue.submissions)


def _arms(
    points: list[Point],
    states: dict[str, str],
    top: dict[str, tuple[float, str]],
    names: dict[str, str],
    entries: dict[str, Entry],
) -> list[dict[str, Any]]:
    counts: dict[str, Counter[str]] = {arm: Counter() for arm in top}
    for p in points:
        counts[p.arm][states[p.id]] += 1
    return [
        {"arm": a, "runs": c.total(), **c, "best": _plain_best(top[a], names, entries)}
        for a, c in counts.items()
    ]


def _best(points: list[Point], entries: dict[str, Entry], arm: str) -> tuple[float, str]:
    """Return an arm's best final metric, signed so that lower is better, and its run.

    (inf, "") if no run is done.
    """
    mine = ((entries[p.id], p.id) for p in points if p.arm == arm and p.id in entries)
    usable = ((e, e.value, i) for e, i in mine if e.state == "done")
    return min(
        ((-v if e.higher_is_better else v, i) for e, v, i in usable if v is not None),
        default=(math.inf, ""),
    )


def _plain_best(
    best: tuple[float, str], names: dict[str, str], entries: dict[str, Entry]
) -> dict[str, Any] | None:
    _, run = best
    if not run:
        return None
    e = entries[run]
    return {"run": run, "name": names[run], "metric": e.metric, e.metric: e.value}


def _rate_per_h(entries: dict[str, Entry]) -> float | None:
    ends = sorted((e.mtime_ns / 1e9 for e in entries.values()), reverse=True)
    recent = [t for t in ends if ends[0] - t < WINDOW_S]
    if len(recent) < 3 or recent[0] == recent[-1]:
        return None
    return 3600 * (len(recent) - 1) / (recent[0] - recent[-1])


def _left_s(now: Plan, flops_left: float, entries: dict[str, Entry], queue: Queue) -> float:
    """Estimate the time left: from the recent rate if jobs are live, else from the local plan."""
    if not now.todo:
        return 0.0
    rate = _rate_per_h(entries)
    if rate and queue.live():
        done = [p for p in now.points if p.id in entries]
        mean = sum(run_flops(p.spec) for p in done) / len(done)
        return flops_left / mean / rate * 3600
    return now.hours * 3600 * (flops_left / now.flops if now.flops else 0.0)


def _hours(
    request: Request, now: Plan, entries: dict[str, Entry], flops_left: float
) -> dict[str, Any]:
    """Return the hours used by finished runs, and the hours left.

    GPU hours if the jobs have GPUs, else core hours.
    """
    share = 1.0 if request.cluster.gpus else None
    used = sum((e.wall_s or 0.0) * (share or e.threads or 1) for e in entries.values()) / 3600
    left: float | None = 0.0
    if flops_left:
        done = sum(run_flops(p.spec) for p in now.points if p.id in entries)
        left = used * flops_left / done if done else None
    return {"of": "GPU" if share else "core", "used": used, "left": left}


def _problems(
    store: RunStore, points: list[Point], states: dict[str, str], names: dict[str, str]
) -> list[dict[str, Any]]:
    bad = [p.id for p in points if states[p.id] in ("failed", "diverged", "interrupted")]
    lost = [i for i in bad if states[i] == "interrupted" and not store.failure(i)]
    owners = {i: store.owner(i, store.last_attempt(i) or 0) for i in lost}
    causes = submissions.causes(store.root, owners)
    problems = []
    for i in bad:
        log = store.folder(i) / "attempts" / str(store.last_attempt(i)) / "log.txt"
        cause = store.failure(i) or causes.get(i, "killed, cause unknown" if i in owners else "")
        problems.append(
            {
                "run": i,
                "name": names[i],
                "state": states[i],
                "cause": cause,
                "log": str(log),
                "tail": _tail(log),
            }
        )
    return problems


def _tail(path: Path, lines: int = 5) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def show(request: Request, store: RunStore, points: Callable[[], list[Point]]) -> int:
    """Print the status; with watch=true repeatedly, until nothing is left to do."""
    while True:
        values = status(request, store, points())
        if request.watch and request.format != "json" and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        shown = json.dumps(values) if request.format == "json" else status_text(request, values)
        print(shown, flush=True)
        open_ = any(values["runs"].get(s) for s in OPEN_STATES)
        if not (request.watch and open_):
            return 0
        time.sleep(WATCH_S)
