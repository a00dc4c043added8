"""What a sweep is doing: counts, rates, time left, jobs, the best so far. Reads only; Slurm's word
is an opinion.

Works wherever the run folder can be seen; what Slurm says is added where it can be asked.
"""

import json
import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from lorasweep.cli.progress import duration
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

COLUMNS = ("done", "diverged", "running", "queued", "stale", "failed", "missing")
"""queued: missing or stale in the store, and a live job has it before it."""
WINDOW_S = 1800.0
"""Rates are over the last runs that finished within this time of the latest."""
SHOWN = 20
"""Lines of jobs, running runs and problems that are printed at most."""


def status(request: Request, store: RunStore, points: list[Point]) -> dict[str, Any]:
    """Return the state of a sweep as plain values."""
    queue = (
        submissions.look(store.root)
        if submissions.home(store.root).is_dir()
        else Queue([], {}, {}, [])
    )
    now = make_plan(points, store, request.exec, detect.this_machine())
    covered = queue.covered()
    states = {
        i: "queued" if s in ("missing", "stale") and i in covered else s
        for i, s in now.states.items()
    }
    entries = store.finished(states)
    top = {a: _best(now.points, entries, a) for a in dict.fromkeys(p.arm for p in now.points)}
    at_hand = {i for i, s in states.items() if s in ("running", "failed", "diverged", "stale")}
    names = run_names(now.points, at_hand | {i for _, i in top.values()})
    running = {p.id: p for p in now.points if states[p.id] == "running"}
    steps = {i: (store.records(i) or [{"step": 0}])[-1]["step"] for i in running}
    flops_left = now.flops - sum(
        run_flops(p.spec) * steps[i] / p.spec.steps for i, p in running.items()
    )
    ids = {p.id for p in now.points}
    return {
        "sweep": request.sweep_name,
        "scale": request.scale,
        "runs": {"total": len(now.points), "todo": len(now.todo), **Counter(states.values())},
        "arms": _arms(now.points, states, top, names),
        "best": _told_best(min(top.values(), default=(math.inf, "")), names),
        "left_s": _left_s(now, flops_left, entries, queue),
        "rate_per_h": _rate_per_h(entries),
        "hours": _hours(request, now, entries, flops_left),
        "running": [
            {"run": i, "name": names[i], "step": steps[i], "steps": p.spec.steps}
            for i, p in running.items()
        ],
        "problems": _problems(store, now.points, states, names),
        "jobs": [
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
        ],
        "follows": [
            j.label for n, j in queue.follows.items() if j.live and _is_of(queue, n, request.title)
        ],
        "slurm": queue.unknown,
        "unrecorded": len(queue.strays),
    }


def _is_of(queue: Queue, name: str, title: str) -> bool:
    return any(s.name == name and s.told["sweep"] == title for s in queue.submissions)


def _arms(
    points: list[Point],
    states: dict[str, str],
    top: dict[str, tuple[float, str]],
    names: dict[str, str],
) -> list[dict[str, Any]]:
    counts: dict[str, Counter[str]] = {arm: Counter() for arm in top}
    for p in points:
        counts[p.arm][states[p.id]] += 1
    return [
        {"arm": a, "runs": c.total(), **c, "best": _told_best(top[a], names)}
        for a, c in counts.items()
    ]


def _best(points: list[Point], entries: dict[str, Entry], arm: str) -> tuple[float, str]:
    """Return the lowest test NLL of an arm and its run; (inf, "") if none is done."""
    usable = ((entries[p.id].test_nll, p.id) for p in points if p.arm == arm and p.id in entries)
    return min(
        ((nll, i) for nll, i in usable if nll is not None and entries[i].state == "done"),
        default=(math.inf, ""),
    )


def _told_best(best: tuple[float, str], names: dict[str, str]) -> dict[str, Any] | None:
    nll, rid = best
    return {"run": rid, "name": names[rid], "test_nll": nll} if rid else None


def _rate_per_h(entries: dict[str, Entry]) -> float | None:
    ends = sorted((e.mtime_ns / 1e9 for e in entries.values()), reverse=True)
    recent = [t for t in ends if ends[0] - t < WINDOW_S]
    if len(recent) < 3 or recent[0] == recent[-1]:
        return None
    return 3600 * (len(recent) - 1) / (recent[0] - recent[-1])


def _left_s(now: Plan, flops_left: float, entries: dict[str, Entry], queue: Queue) -> float:
    """By the rate of late where jobs are at work; else by the plan for this machine."""
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
    """Hours of GPUs (of processors where the cluster has none) that the finished runs took, and
    that are left."""
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
    bad = [p.id for p in points if states[p.id] in ("failed", "diverged", "stale")]
    lost = [i for i in bad if states[i] == "stale" and not store.failure(i)]
    owners = {i: store.owner(i, store.last_attempt(i) or 0) for i in lost}
    causes = submissions.causes(store.root, owners)
    told = []
    for i in bad:
        log = store.folder(i) / "attempts" / str(store.last_attempt(i)) / "log.txt"
        cause = store.failure(i) or causes.get(i, "killed without a word" if i in owners else "")
        told.append(
            {
                "run": i,
                "name": names[i],
                "state": states[i],
                "cause": cause,
                "log": str(log),
                "tail": _tail(log),
            }
        )
    return told


def _tail(path: Path, lines: int = 5) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


# ---------------------------------------------------------------- for people


def text(request: Request, told: dict[str, Any]) -> str:
    """Write a status for the terminal."""
    runs = told["runs"]
    counts = ", ".join(f"{runs[s]} {s}" for s in COLUMNS if runs.get(s))
    rate = "" if told["rate_per_h"] is None else f"; {told['rate_per_h']:.0f} runs/h of late"
    left = f"about {duration(told['left_s'])} left"
    lines = [
        f"{request.sweep_name or 'single run'} at scale {request.scale}: {counts}; {left}{rate}"
    ]
    shown = [s for s in COLUMNS if runs.get(s)]
    width = max(len(a["arm"]) for a in told["arms"])
    lines.append(f"  {'arm':{width}}  runs  " + "".join(f"{s:>9}" for s in shown) + "  best NLL")
    for a in told["arms"]:
        best = "" if a["best"] is None else f"  {a['best']['test_nll']:.4f} ({a['best']['name']})"
        lines.append(
            f"  {a['arm']:{width}}  {a['runs']:4}  "
            + "".join(f"{a.get(s, 0):9}" for s in shown)
            + best
        )
    hours = told["hours"]
    if hours["used"]:
        left = "" if hours["left"] is None else f", about {hours['left']:.3g} left"
        lines.append(f"  {hours['of']}-hours: {hours['used']:.3g} used{left}")
    lines += _cut(
        [
            f"  running  {r['name']:32} {r['run']}  step {r['step']}/{r['steps']}"
            for r in told["running"]
        ]
    )
    lines += _job_lines(told)
    lines += _cut([_problem_line(x) for x in told["problems"]])
    if runs.get("failed"):
        lines.append("  try failed runs again: exec.retry=true")
    return "\n".join(lines)


def _problem_line(problem: dict[str, Any]) -> str:
    line = f"  {problem['state']:8} {problem['name']:32} {problem['run']}  {problem['cause']}"
    if problem["state"] == "diverged":
        return line
    return f"{line}\n           log {problem['log']}" + "".join(
        f"\n           | {t}" for t in problem["tail"][-2:]
    )


def _job_lines(told: dict[str, Any]) -> list[str]:
    at_work = [j for j in told["jobs"] if j["state"] != "PENDING"]
    waiting = [j for j in told["jobs"] if j["state"] == "PENDING"]
    lines = []
    if told["jobs"]:
        lines.append(f"  jobs: {len(at_work)} at work, {len(waiting)} waiting")
        for j in at_work:
            again = f", restart {j['restarts']}" if j["restarts"] else ""
            over = f"{j['over']}/{j['runs']} runs over{again}"
            lines.append(f"    {j['job']:10} {j['state']:10} {j['node']:8} {over}  {j['log']}")
        lines = [*lines[:1], *_cut(lines[1:])]
        for reason, n in Counter(j["reason"] for j in waiting).items():
            lines.append(f"    {n} waiting: {reason}")
    if told["follows"]:
        follows = ", ".join(told["follows"])
        lines.append(
            f"  job {follows} follows: it submits what is then missing, and at the end writes the answer"
        )
    if told["slurm"]:
        lines.append(f"  queued runs are not shown: {told['slurm']}")
    if told["unrecorded"]:
        lines.append(
            f"  {told['unrecorded']} job(s) of a command that died while it submitted: ask again, and that is mended"
        )
    return lines


def _cut(lines: list[str]) -> list[str]:
    return (
        lines
        if len(lines) <= SHOWN
        else [*lines[:SHOWN], f"    ... and {len(lines) - SHOWN} more (format=json lists all)"]
    )


def show(request: Request, told: dict[str, Any]) -> None:
    """Print a status as asked for."""
    print(json.dumps(told) if request.format == "json" else text(request, told), flush=True)


def watch(request: Request, look: Any, every_s: float = 5.0) -> None:
    """Show the status again and again until nothing is left to do, or the user stops it."""
    while True:
        told = look()
        if request.format != "json" and os.isatty(1):
            print("\033[2J\033[H", end="")
        show(request, told)
        if not any(told["runs"].get(s) for s in ("missing", "queued", "running", "stale")):
            return
        time.sleep(every_s)
