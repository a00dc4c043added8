"""Write the status of a sweep for the terminal."""

from collections import Counter
from typing import Any

from lorasweep.cli.progress import duration
from lorasweep.customers.outcome import counts_line
from lorasweep.sweep.request import Request

COLUMNS = ("done", "diverged", "running", "queued", "interrupted", "failed", "missing")
SHOWN = 20
"""Largest number of lines each for running runs, jobs and problems."""


def status_text(request: Request, status: dict[str, Any]) -> str:
    """Return a status as text for the terminal."""
    runs = status["runs"]
    counts = ", ".join(f"{runs[s]} {s}" for s in COLUMNS if runs.get(s))
    rate = "" if status["rate_per_h"] is None else f"; {status['rate_per_h']:.0f} runs/h lately"
    left = f"about {duration(status['left_s'])} left"
    lines = [
        f"{request.sweep_name or 'single run'} at scale {request.scale}: {counts}; {left}{rate}"
    ]
    if status["customers"]:
        lines.append(f"  {counts_line(status['customers'])}")
    shown = [s for s in COLUMNS if runs.get(s)]
    label = "customer" if status["customers"] else "arm"
    width = max(len(label), *(len(a["arm"]) for a in status["arms"]))
    heads = "".join(f"{s:>{_width(s)}}" for s in shown)
    lines.append(f"  {label:{width}}  runs  {heads}  best")
    for a in status["arms"]:
        best = "" if a["best"] is None else _best(a["best"])
        cells = "".join(f"{a.get(s, 0):{_width(s)}}" for s in shown)
        lines.append(f"  {a['arm']:{width}}  {a['runs']:4}  {cells}{best}")
    hours = status["hours"]
    if hours["used"]:
        left = "" if hours["left"] is None else f", about {hours['left']:.3g} left"
        lines.append(f"  {hours['of']}-hours: {hours['used']:.3g} used{left}")
    running = [
        f"  running  {r['name']:32} {r['run']}  step {r['step']}/{r['steps']}"
        for r in status["running"]
    ]
    lines += _cut(running)
    lines += _job_lines(status)
    lines += _cut([_problem_line(x) for x in status["problems"]])
    if runs.get("failed"):
        lines.append("  try failed runs again: exec.retry=true")
    return "\n".join(lines)


def _best(best: dict[str, Any]) -> str:
    return f"  {best[best['metric']]:.4f} ({best['name']})"


def _width(column: str) -> int:
    return max(9, len(column) + 2)


def _problem_line(problem: dict[str, Any]) -> str:
    line = f"  {problem['state']:11} {problem['name']:32} {problem['run']}  {problem['cause']}"
    if problem["state"] == "diverged":
        return line
    return f"{line}\n              log {problem['log']}" + "".join(
        f"\n              | {t}" for t in problem["tail"][-2:]
    )


def _job_lines(status: dict[str, Any]) -> list[str]:
    at_work = [j for j in status["jobs"] if j["state"] != "PENDING"]
    waiting = [j for j in status["jobs"] if j["state"] == "PENDING"]
    lines = []
    if status["jobs"]:
        lines.append(f"  jobs: {len(at_work)} running, {len(waiting)} waiting")
        for j in at_work:
            again = f", restart {j['restarts']}" if j["restarts"] else ""
            over = f"{j['over']}/{j['runs']} runs finished{again}"
            lines.append(f"    {j['job']:10} {j['state']:10} {j['node']:8} {over}  {j['log']}")
        lines = [*lines[:1], *_cut(lines[1:])]
        for reason, n in Counter(j["reason"] for j in waiting).items():
            lines.append(f"    {n} waiting: {reason}")
    if status["follows"]:
        follows = ", ".join(status["follows"])
        lines.append(
            f"  follow-up job {follows}: it submits what is missing when the others end, and "
            "finally writes the answer"
        )
    if status["slurm"]:
        lines.append(f"  queued runs are not shown: {status['slurm']}")
    if status["unrecorded"]:
        lines.append(
            f"  {status['unrecorded']} job(s) are from a command that died while submitting: run "
            "the command again to adopt or cancel them"
        )
    return lines


def _cut(lines: list[str]) -> list[str]:
    if len(lines) <= SHOWN:
        return lines
    return [*lines[:SHOWN], f"    ... and {len(lines) - SHOWN} more (format=json lists all)"]
