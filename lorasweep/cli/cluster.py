"""Run a sweep on a Slurm cluster: submit what is missing, cancel what is queued, print both."""

import json
import sys
from collections.abc import Callable
from typing import Any

from lorasweep.errors import GaveUp, SpecError
from lorasweep.launch.slurm import planning
from lorasweep.launch.slurm.submit import MAX_IDLE, FollowUp, Outcome, cancel, submit
from lorasweep.plan.estimate import make_plan
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

FOLLOW_COMMAND = ("-u", "-m", "lorasweep", "--follow")
"""What the job that follows the others gives to Python, before the path of its task file."""


def submit_missing(
    request: Request,
    store: RunStore,
    points: Callable[[], list[Point]],
    notify: Callable[[str], None],
    trainer: str | None,
    follow: dict[str, Any] | None,
) -> bool:
    """Submit what is missing and print it; return whether there is anything to wait for.

    `follow`: the task, inside a follow-up job.

    Raises:
        GaveUp: no run finished in the last rounds of jobs.
    """
    idle = 0
    if follow is not None:
        over = sum(s in FINAL for s in store.states(p.id for p in points()).values())
        idle = follow["idle"] + 1 if over <= follow["finished"] else 0
        if idle >= MAX_IDLE:
            raise GaveUp(
                f"no run finished in {idle} rounds of jobs, so no more are submitted. "
                "See the causes with action=status."
            )
    done = submit(request, store, points, notify, FollowUp(FOLLOW_COMMAND, trainer, idle))
    if request.format == "json" and (done.waiting or done.n_submitted):
        print(json.dumps(_plain(done)))
        return True
    _print_submitted(done)
    _print_left_out(request, store, done)
    if done.waiting:
        print(
            f"{done.queued} runs queued, {done.work.running} running. Watch them with "
            "action=status; the same command answers when they have finished."
        )
    return done.waiting


def _plain(done: Outcome) -> dict[str, Any]:
    work = done.work
    return {
        "submitted": done.n_submitted,
        "queued": done.queued,
        "running": work.running,
        "removed": work.n_removed,
        "pruned": done.pruned,
        "refused": done.refused,
        "unknown": work.unknown_runs,
        "exhausted": len(work.exhausted),
        "scripts": [str(p) for p in done.scripts],
        "jobs": [a.job for s in done.submitted for a in s.arrays if a.job],
    }


def _print_submitted(done: Outcome) -> None:
    for s in done.submitted:
        arrays = [a for a in s.arrays if a.job and a.part != "follow"]
        jobs = ", ".join(f"{a.n} job(s) as {a.job}" for a in arrays)
        print(f"submitted {done.n_submitted} runs: {jobs}; records and logs in {s.folder}")
    for script in done.scripts:
        print(f"submit it yourself: sbatch {script}")
    if done.refused:
        print(f"Slurm did not accept all jobs: {done.refused}", file=sys.stderr)
        print(
            "The rest is submitted when jobs have ended, or when you run the command again",
            file=sys.stderr,
        )


def _print_left_out(request: Request, store: RunStore, done: Outcome) -> None:
    work = done.work
    if work.unknown_runs:
        print(
            f"{work.unknown_runs} runs may be in jobs of another cluster, or in jobs of another "
            "user that Slurm hides: run the command there, or as that user. If those jobs are "
            f"gone, delete their folders in {store.root}/.slurm",
            file=sys.stderr,
        )
    if work.exhausted:
        print(
            f"{len(work.exhausted)} runs were killed {request.exec.max_attempts} times and are not "
            "submitted again: see the causes with action=status, then raise exec.max_attempts",
            file=sys.stderr,
        )
    if done.pruned:
        print(
            f"cancelled {done.pruned} queued run(s) of this sweep that this command line does not "
            "ask for"
        )
    elif work.n_removed:
        print(
            f"{work.n_removed} queued run(s) of this sweep are not asked for by this command line; "
            "cancel them with prune=true"
        )


def difference(
    request: Request, store: RunStore, within_limit: Callable[[Request], Request]
) -> dict[str, Any]:
    """Return what a submission of runs planned for GPUs would change in the queue.

    Empty for a study of several sweeps, without a cluster, and if runs fit nowhere.
    """
    if request.parts or request.cluster.kind != "slurm":
        return {}
    try:
        request = within_limit(request)
        hardware = planning.hardware_of(request)
        now = make_plan(request.points, store, request.exec, hardware)
        return planning.difference(request, store, now)
    except SpecError:
        return {}  # the plan says which and why


def cancel_jobs(request: Request, store: RunStore, notify: Callable[[str], None]) -> int:
    """Cancel the sweep's jobs on the cluster. Local runs are stopped with Ctrl-C."""
    n_jobs, n_runs = cancel(request, store, notify)
    if request.format == "json":
        print(json.dumps({"jobs": n_jobs, "runs": n_runs}))
    elif n_jobs:
        print(
            f"cancelled {n_jobs} job(s) with {n_runs} unfinished run(s); finished runs are kept, "
            "the others continue from their checkpoints when you run the sweep's command again"
        )
    else:
        print("nothing to cancel")
    return 0
