"""The action status: how far a sweep is, its failed runs with their causes, and its jobs."""

from collections import Counter
from typing import Any

from lorasweep.cli.answer import all_points
from lorasweep.cli.printed import Answer, duration, table
from lorasweep.fleet.choice import counts, counts_line, outcome_of
from lorasweep.fleet.runs import planned
from lorasweep.launch.slurm import queue as slurm
from lorasweep.plan import detect
from lorasweep.plan.load import run_flops
from lorasweep.plan.planner import make_plan
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import run_names
from lorasweep.sweep.request import Request

COLUMNS = ("done", "diverged", "running", "queued", "interrupted", "failed", "missing")
SHOWN = 20
"""Maximum lines for running runs, for jobs and for problems; format=json has all of them."""
WINDOW_S = 1800.0
"""The speed counts runs that finished within this time before the latest one."""


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
    flops_left = plan.flops - sum(run_flops(p.spec) * steps[p.id] / p.spec.steps for p in running)
    ends = sorted((e.mtime_ns / 1e9 for e in entries.values()), reverse=True)
    recent = [t for t in ends if ends[0] - t < WINDOW_S]
    left_s = plan.hours * 3600 * (flops_left / plan.flops if plan.flops else 0.0)
    if len(recent) >= 3 and recent[0] > recent[-1] and plan.todo and queue.jobs:
        # at the recent speed of the jobs
        run_s = (recent[0] - recent[-1]) / (len(recent) - 1)
        of_a_run = sum(run_flops(p.spec) for p in plan.points if p.id in entries) / len(entries)
        left_s = flops_left / of_a_run * run_s
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
        f"{', '.join(f'{runs[s]} {s}' for s in columns)}; about {duration(left_s)} left",
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
    again = ["  try failed runs again: exec.retry=true"] if runs["failed"] else []
    return Answer(found, [*lines, *again])
