"""Show the status of a sweep from the run folder, and of its jobs if Slurm can be asked."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from lorasweep.cli import fleet_costs
from lorasweep.cli.points import all_points
from lorasweep.cli.printed import Answer
from lorasweep.cli.progress import duration
from lorasweep.launch.slurm import queue as slurm
from lorasweep.plan import detect
from lorasweep.plan.load import run_flops
from lorasweep.plan.plan import make_plan
from lorasweep.store.run_store import Entry, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import aligned, run_names
from lorasweep.sweep.request import Request

OPEN_STATES = ("missing", "queued", "running", "interrupted")
"""States of unfinished runs; queued: missing or interrupted, and in a live job."""
COLUMNS = ("done", "diverged", "running", "queued", "interrupted", "failed", "missing")
SHOWN = 20
"""Maximum lines for running runs, for jobs and for problems; format=json has all of them."""
TAIL = 5
"""Last lines of a run's log that format=json shows for a problem."""
WATCH_S = 5.0
WINDOW_S = 1800.0
"""The speed counts runs that finished within this time before the latest one."""


def show(request: Request, store: RunStore) -> Iterator[Answer]:
    """Yield the status; with watch=true repeatedly, until nothing is left to do."""
    while True:
        values = status(request, store, all_points(request, store))
        yield Answer(values, partial(status_text, request, values))
        if not (request.watch and any(values["runs"].get(s) for s in OPEN_STATES)):
            return
        time.sleep(WATCH_S)


def status(request: Request, store: RunStore, points: list[Point]) -> dict[str, Any]:
    """Return the status of a sweep as JSON values."""
    queue = slurm.look(store.root)
    plan = make_plan(points, store, request.exec, detect.this_machine())
    covered = queue.covered()
    states = {
        i: "queued" if s in ("missing", "interrupted") and i in covered else s
        for i, s in plan.states.items()
    }
    entries = store.finished(states)
    by_arm: dict[str, Counter[str]] = {}
    best: dict[str, tuple[float, str]] = {}  # arm -> (signed metric, lower is better; run id)
    for p in plan.points:
        by_arm.setdefault(p.arm, Counter())[states[p.id]] += 1
        e = entries.get(p.id)
        if e is not None and e.state == "done" and e.value is not None:
            found = (-e.value if e.higher_is_better else e.value, p.id)
            best[p.arm] = min(found, best.get(p.arm, found))
    named = {i for i, s in states.items() if s in ("running", "failed", "diverged", "interrupted")}
    names = run_names(plan.points, named | {i for _, i in best.values()})

    def best_plain(found: tuple[float, str] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        e = entries[found[1]]
        return {"run": found[1], "name": names[found[1]], "metric": e.metric, e.metric: e.value}

    running = {p.id: p for p in plan.points if states[p.id] == "running"}
    steps = {i: (store.recent_records(i) or [{"step": 0}])[-1]["step"] for i in running}
    begun = sum(run_flops(p.spec) * steps[i] / p.spec.steps for i, p in running.items())
    flops_left = plan.flops - begun
    finished = [p for p in plan.points if p.id in entries]
    flops_done = sum(run_flops(p.spec) for p in finished)
    rate = _rate_per_h(entries)
    if rate and plan.todo and queue.jobs:  # use the recent speed of the jobs
        left_s = flops_left / (flops_done / len(finished)) / rate * 3600
    else:
        left_s = plan.hours * 3600 * (flops_left / plan.flops if plan.flops else 0.0)
    on_gpus = request.cluster.gpus > 0
    spent = ((e.wall_s or 0.0) * (1 if on_gpus else e.threads or 1) for e in entries.values())
    used = sum(spent) / 3600
    left: float | None = 0.0
    if flops_left:
        left = used * flops_left / flops_done if flops_done else None
    mine = {s.folder for s in queue.submissions if s.record["sweep"] == request.title}
    jobs = [(s, s.tasks[k], j) for s, k, j in queue.jobs if states.keys() & set(s.tasks[k])]
    return {
        "sweep": request.sweep_name,
        "scale": request.scale,
        "customers": fleet_costs.customer_counts(request, store) if request.members else None,
        "runs": {"total": len(plan.points), "todo": len(plan.todo), **Counter(states.values())},
        "arms": [
            {"arm": a, "runs": c.total(), **c, "best": best_plain(best.get(a))}
            for a, c in by_arm.items()
        ],
        "best": best_plain(min(best.values(), default=None)),
        "left_s": left_s,
        "rate_per_h": rate,
        "hours": {"of": "GPU" if on_gpus else "core", "used": used, "left": left},
        "running": [
            {"run": i, "name": names[i], "step": steps[i], "steps": p.spec.steps}
            for i, p in running.items()
        ],
        "problems": _problems(store, plan.points, states, names),
        "jobs": [
            {
                "job": j.label,
                **{name: getattr(j, name) for name in ("state", "reason", "node", "restarts")},
                "runs": len(task),
                "over": sum(r in entries for r in task),
                "log": str(slurm.log_of(s.folder, j.label)),
            }
            for s, task, j in jobs
        ],
        "follows": [j.label for folder, j in queue.follows.items() if folder in mine],
        "slurm": queue.unavailable,
        "unrecorded": len(queue.strays),
    }


def _rate_per_h(entries: dict[str, Entry]) -> float | None:
    ends = sorted((e.mtime_ns / 1e9 for e in entries.values()), reverse=True)
    recent = [t for t in ends if ends[0] - t < WINDOW_S]
    if len(recent) < 3 or recent[0] == recent[-1]:
        return None
    return 3600 * (len(recent) - 1) / (recent[0] - recent[-1])


def _problems(
    store: RunStore, points: list[Point], states: dict[str, str], names: dict[str, str]
) -> list[dict[str, Any]]:
    bad = [p.id for p in points if states[p.id] in ("failed", "diverged", "interrupted")]
    lost = [i for i in bad if states[i] == "interrupted" and not store.failure(i)]
    owners = {i: store.owner(i, store.last_attempt(i) or 0) for i in lost}
    causes = slurm.causes(store.root, owners)
    problems = []
    for i in bad:
        log = store.folder(i) / f"attempts/{store.last_attempt(i)}/log.txt"
        tail: list[str] = []
        with suppress(OSError):
            tail = log.read_text(errors="replace").splitlines()[-TAIL:]
        cause = store.failure(i) or causes.get(i, "killed, cause unknown" if i in owners else "")
        problem = {"run": i, "name": names[i], "state": states[i], "cause": cause}
        problems.append({**problem, "log": str(log), "tail": tail})
    return problems


def status_text(request: Request, status: dict[str, Any]) -> list[str]:
    """Return a status in lines for the terminal."""
    runs, hours, jobs = status["runs"], status["hours"], status["jobs"]
    columns = [s for s in COLUMNS if runs.get(s)]
    counts = ", ".join(f"{runs[s]} {s}" for s in columns)
    speed = "" if status["rate_per_h"] is None else f"; {status['rate_per_h']:.0f} runs/h recently"
    lines = [
        f"{request.sweep_name or 'single run'} at scale {request.scale}: {counts}; about "
        f"{duration(status['left_s'])} left{speed}"
    ]
    if status["customers"]:
        lines.append(f"  {fleet_costs.counts_line(status['customers'])}")
    table = [["customer" if status["customers"] else "arm", "runs", *columns, "best"]]
    for a in status["arms"]:
        best = a["best"]
        shown = "" if best is None else f"{best[best['metric']]:.4f} ({best['name']})"
        table.append([a["arm"], str(a["runs"]), *(str(a.get(s, 0)) for s in columns), shown])
    lines += [f"  {line}" for line in aligned(table, range(1, len(columns) + 2))]
    if hours["used"]:
        left = "" if hours["left"] is None else f", about {hours['left']:.3g} left"
        lines.append(f"  {hours['of']}-hours: {hours['used']:.3g} used{left}")
    form = "  running  {name:32} {run}  step {step}/{steps}"
    lines += _cut([form.format(**r) for r in status["running"]])
    started = [j for j in jobs if j["state"] != "PENDING"]
    if jobs:
        lines.append(f"  jobs: {len(started)} running, {len(jobs) - len(started)} waiting")
    form = "    {job:10} {state:10} {node:8} {over}/{runs} finished, {restarts} restarts  {log}"
    lines += _cut([form.format(**j) for j in started])
    waiting = Counter(j["reason"] for j in jobs if j["state"] == "PENDING")
    lines += [f"    {n} waiting: {reason}" for reason, n in waiting.items()]
    if status["follows"]:
        lines.append(
            f"  follow-up job {', '.join(status['follows'])}: it submits missing runs when the "
            "other jobs end, and finally writes the answer"
        )
    if status["slurm"]:
        lines.append(f"  queued runs are not shown: {status['slurm']}")
    if status["unrecorded"]:
        lines.append(
            f"  {status['unrecorded']} job(s) are from a command that died while submitting: run "
            "the command again to cancel them"
        )
    problems = []
    for p in status["problems"]:
        text = f"  {p['state']:11} {p['name']:32} {p['run']}  {p['cause']}"
        if p["state"] != "diverged":
            tail = (f"              | {line}" for line in p["tail"][-2:])
            text = "\n".join([text, f"              log {p['log']}", *tail])
        problems.append(text)
    lines += _cut(problems)
    return [*lines, "  try failed runs again: exec.retry=true"] if runs.get("failed") else lines


def _cut(lines: list[str]) -> list[str]:
    if len(lines) <= SHOWN:
        return lines
    return [*lines[:SHOWN], f"    ... and {len(lines) - SHOWN} more (format=json lists all)"]
