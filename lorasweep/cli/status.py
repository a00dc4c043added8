"""The action status: how far a sweep is, its failed runs with their causes, and its jobs."""

import io
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.fleet.choice import counts, counts_line, outcome_of
from lorasweep.fleet.runs import planned
from lorasweep.launch.slurm import queue as slurm
from lorasweep.plan import detect
from lorasweep.plan.budget import amount_of, union_s
from lorasweep.plan.needs import run_flops
from lorasweep.plan.planner import Plan, make_plan
from lorasweep.store import files
from lorasweep.store.run_store import FINISHED, Entry, RunStore
from lorasweep.sweep.grid import run_names
from lorasweep.sweep.request import Request
from lorasweep.work.printed import Answer, duration, table, time_left
from lorasweep.work.search import all_points

COLUMNS = ("done", "diverged", "running", "queued", "interrupted", "failed", "missing")
SHOWN = 20
"""Maximum lines for running runs, for jobs and for problems; format=json has all of them."""
WINDOW_S = 1800.0
"""The speed counts the runs that train, and those that ended within this time before the latest."""


def status(request: Request, store: RunStore) -> Answer:
    """Show what is done, running, waiting, diverged and failed, the best runs, and what is left."""
    queue = slurm.look(store.root)
    plan = make_plan(all_points(request, store), store, request.exec, detect.this_machine())
    covered, names = queue.covered(), run_names(plan.points)
    states = {
        i: "queued" if s in ("missing", "interrupted") and i in covered else s
        for i, s in plan.states.items()
    }
    entries, runs = store.finished(states), Counter(states.values())
    columns = [s for s in COLUMNS if runs[s]]
    arms: dict[str, dict[str, Any]] = {}
    ranked = []  # (metric, lower is better; arm; run)
    for p in plan.points:
        arm = arms.setdefault(p.arm, {"arm": p.arm, "runs": 0, "best": None})
        arm["runs"] += 1
        arm[states[p.id]] = arm.get(states[p.id], 0) + 1
        e = entries.get(p.id)
        if e is not None and e.state == "done" and e.value is not None:
            ranked.append((-e.value if e.higher_is_better else e.value, p.arm, p.id))
    shown = {name: {**dict.fromkeys(columns, 0), **arm, "best": ""} for name, arm in arms.items()}
    for _, name, i in sorted(ranked, reverse=True):  # the best one comes last
        e = entries[i]
        arms[name]["best"] = {"run": i, "name": names[i], "metric": e.metric, e.metric: e.value}
        shown[name]["best"] = f"{e.value:.4f} ({names[i]})"
    running = [p for p in plan.points if states[p.id] == "running"]
    steps = {p.id: (store.records(p.id) or [{"step": 0}])[-1]["step"] for p in running}
    left_s = _left_s(plan, steps, entries, store)
    bad = {i: s for i, s in states.items() if s in ("failed", "diverged", "interrupted")}
    lost = [i for i, s in bad.items() if s == "interrupted" and not store.failure(i)]
    owners = {i: store.owner(i, store.last_attempt(i) or 0) for i in lost}
    logs = {i: store.folder(i) / f"attempts/{store.last_attempt(i)}/log.txt" for i in bad}
    causes = {**dict.fromkeys(owners, "killed, cause unknown"), **slurm.causes(store.root, owners)}
    customers = [outcome_of(m, store) for m in planned(request.members, request.points)]
    found: dict[str, Any] = {
        "sweep": request.sweep_name,
        "scale": request.scale,
        "customers": counts(customers) if customers else None,
        "runs": {"total": len(plan.points), "todo": len(plan.todo), **runs},
        "arms": [*arms.values()],
        "left_s": left_s,
        "running": [
            {"run": p.id, "name": names[p.id], "step": steps[p.id], "steps": p.spec.steps}
            for p in running
        ],
        "problems": [
            {
                **{"run": i, "name": names[i], "state": state, "log": str(logs[i])},
                "cause": store.failure(i) or causes.get(i, ""),
                "tail": (files.read(logs[i]) or b"").decode(errors="replace").splitlines()[-5:],
            }
            for i, state in bad.items()
        ],
        "jobs": [
            {
                **{"job": j.label, "state": j.state, "reason": j.reason, "node": j.node},
                **{"restarts": j.restarts, "runs": len(task)},
                "over": sum(r in entries for r in task),
                "log": str(slurm.log_of(s.folder, j.label)),
            }
            for s, task, j in queue.jobs
            if states.keys() & set(task)
        ],
        "follows": [j.label for s, j in queue.follows if s.sweep == request.title],
        "slurm": queue.unavailable,
    }
    lines = [
        f"{request.sweep_name or 'single run'} at scale {request.scale}: "
        f"{', '.join(f'{runs[s]} {s}' for s in columns)}; "
        + ("time left unknown" if left_s is None else f"about {duration(left_s)} left"),
        *([counts_line(found["customers"])] if customers else []),
    ]
    jobs = found["jobs"]
    waiting = Counter(j["reason"] for j in jobs if j["state"] == "PENDING")
    started = [j for j in jobs if j["state"] != "PENDING"]
    for rows in (
        table([*shown.values()], "arm", "runs", *columns, "best"),
        table(found["running"], "name", "run", "step", "steps"),
        [f"{n} jobs waiting: {reason}" for reason, n in waiting.items()],
        table(started, "job", "state", "node", "over", "runs", "restarts", "log"),
        table(found["problems"], "state", "name", "run", "cause", "log"),
    ):
        lines += [f"  {line}" for line in rows[: SHOWN + 1]]
        if len(rows) > SHOWN + 1:
            lines.append(f"    ... and {len(rows) - SHOWN - 1} more (format=json lists all)")
    if found["follows"]:
        lines.append(f"  follow-up job, which answers: {', '.join(found['follows'])}")
    if queue.unavailable:
        lines.append(f"  queued runs are not shown: {queue.unavailable}")
    by_others = [p.id for p in plan.points if p.spec.trainer.command and p.id in entries]
    doubts = {i: d for i in by_others if (d := (store.result(i) or {}).get("doubt"))}
    found |= {"doubts": doubts} if doubts else {}
    lines += [f"  doubtful: run {i} ({names[i]}): {doubt}" for i, doubt in doubts.items()]
    again = ["  try failed runs again: exec.retry=true"] if runs["failed"] else []
    return Answer(found, [*lines, *again])


def watch(request: Request, store: RunStore, show: Callable[[], int]) -> int:
    """Call `show` every request.watch until all runs have ended; return its exit status."""
    if (found := amount_of(request.watch, "s", "min", "h")) is None:
        raise SpecError(f"watch={request.watch}: expected a time, such as watch=5s or watch=1min.")
    clear = "\033[2J\033[H" if sys.stdout.isatty() and request.format != "json" else ""
    while True:
        parts = [all_points(part, store) for part in request.parts or [request]]
        states = store.states(p.id for points in parts for p in points)
        with redirect_stdout(io.StringIO()) as picture:  # made before the last one is cleared
            code = show()
        print(clear + picture.getvalue(), end="", flush=True)
        if {*states.values()} <= {*FINISHED, "failed"}:
            return code
        time.sleep(min(found[0], 86400.0))  # a clock holds no 1e11 hours


def _left_s(
    plan: Plan, steps: dict[str, int], ended: dict[str, Entry], store: RunStore
) -> float | None:
    """Return the seconds that are left at the recent speed, else by the plan; None: unknown."""
    runs = {p.id: p.spec for p in plan.points}
    now = {i: step / runs[i].steps for i, step in steps.items()} | dict.fromkeys(ended, 1.0)
    saved = [p.id for p in plan.todo if plan.states[p.id] == "interrupted"]
    now |= {i: store.saved_step(i) / runs[i].steps for i in saved}
    ends = {i: e.mtime_ns / 1e9 for i, e in ended.items()}
    before, latest, spans = dict(now), max(ends.values(), default=0.0), []
    for i in (*steps, *(i for i, end in ends.items() if latest - end < WINDOW_S)):
        begun = files.status(store.attempt(i, store.last_attempt(i) or 0) / "owner.json")
        seen = files.status(store.folder(i) / "metrics.jsonl")
        first = store.env(i).get("resumed_from_step") or 0
        # else imported; or loaded just now, with one update
        if begun and seen and (i in ends or steps[i] > first + 1):
            spans.append((begun.st_mtime, ends.get(i, seen.st_mtime)))
            before[i] = first / runs[i].steps
    work = {i: run_flops(runs[i]) for i in (*before, *(p.id for p in plan.todo))}
    left = time_left(work, before, now, union_s(spans))
    todo = sum(work[p.id] * (1 - now.get(p.id, 0.0)) for p in plan.todo)
    if math.isnan(left) and plan.points[0].spec.trainer.command and not plan.speeds:
        return None
    return plan.hours * 3600 * todo / plan.flops if math.isnan(left) else left
