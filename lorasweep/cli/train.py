"""Train the runs of a request, here or by jobs of a cluster, and return the answer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lorasweep.cli import answer
from lorasweep.cli.answer import all_points, is_search, judged
from lorasweep.cli.finished_runs import check_search, finish, prune
from lorasweep.cli.plans import plan_lines, search_lines, understood, unpinned_lines
from lorasweep.cli.printed import Answer, Display, notifier
from lorasweep.config.preflight import check_available
from lorasweep.errors import GaveUp, SpecError, check_installed
from lorasweep.launch import local
from lorasweep.launch.process import Stopped
from lorasweep.launch.slurm.submit import Work, cancel, hardware_of, submit, updates_of
from lorasweep.launch.trainer import Trainer
from lorasweep.launch.worker import check_world_size
from lorasweep.plan import detect
from lorasweep.plan.planner import Planner, make_plan
from lorasweep.spec.metric import metric_of
from lorasweep.store import files, looks
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import load_runs
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import run_names
from lorasweep.sweep.request import Request, question
from lorasweep.tracking import wandb

STOPPED = 130
"""Exit status after Ctrl-C."""
MAX_IDLE = 3
"""Follow-up jobs in a row without a saved update, after which no more jobs are submitted."""
CHANGED_CLAIMS = "the claims were changed after a first answer from these runs"
"""Why the verdicts of such a sweep are exploratory."""


def run(
    request: Request,
    store: RunStore,
    trainer: Trainer | str | None = None,
    follow: dict[str, Any] | None = None,
) -> Answer:
    """Train the missing runs, judge and report; on a cluster, submit jobs and report later."""
    if request.sweep is not None and follow is None:  # not only after hours of training
        folder = Path(request.exec.reports_dir) / request.title
        files.check_writable(folder, "exec.reports_dir")
    points, status, sent = train(request, store, trainer, follow)
    if sent or status == STOPPED:
        return sent or Answer(status=status)
    names, states = run_names(points), store.states(p.id for p in points)
    warn = notifier(request, always=True)
    for i in (i for i, state in states.items() if state in ("failed", "interrupted")):
        cause, log = "its process was killed (out of memory?)", store.folder(i) / "attempts"
        warn(
            f"run {i} ({names[i]}) failed: {store.failure(i) or cause}. Logs: {log}. Try again: "
            "exec.retry=true; after kills also fewer exec.workers, a smaller exec.micro_batch_size "
            "or a larger exec.max_attempts"
        )
    if request.mirror == "wandb":
        wandb.mirror(points, store, request.sweep_name or "single")
    finished = [p.id for p in judged(request, points) if store.result(p.id)]
    if not finished:
        why = "no run has finished"
        if request.budget:
            why = f"budget={request.budget} ended before a full run; a larger one continues"
        warn(f"{why}, so there is no answer yet")
        return Answer(status=status)
    if request.sweep_name is None:
        (rid,) = finished
        result = store.result(rid) or {}
        metric, measure = metric_of(result), ""
        value = metric.value(result)
        if value is not None:
            start = metric.value(result["curve"][0])
            measure = f", {metric.label} {value:.4f} (from {start:.4f})"
        text = f"run {rid} ({names[rid]}): {result['state']}{measure}. Folder: {store.folder(rid)}"
        return Answer({k: v for k, v in result.items() if k != "curve"}, text, status)
    asked, folder = question(request), Path(request.exec.reports_dir) / request.title
    searched, path = is_search(request), looks.path_of(store.root, request.title)
    if looks.first_claims(path) not in (None, answer.claims_hash(asked)):
        for claim in asked["claims"].values():
            earlier = claim.get("exploratory") or {}
            claim["exploratory"] = {request.scale: CHANGED_CLAIMS, **earlier}
    as_json = request.format == "json"
    text = answer.judge(load_runs(store.root, finished), asked, folder, as_json or searched)
    looks.note_look(path, answer.claims_hash(asked), asked["rounds"])
    if searched:
        return Answer(*finish(request, store, points, json.loads(text)), status)
    return Answer(json.loads(text) if as_json else None, text, status)


def qualify(request: Request, store: RunStore, trainer: Trainer | str | None = None) -> Answer:
    """Train the runs that judge a sweep's tasks; return whether the tasks qualify."""
    if request.sweep is None or request.cluster.kind == "slurm":
        raise SpecError(
            "action=qualify judges the tasks of a sweep on this machine. Add +sweep=NAME and "
            "cluster=local."
        )
    points, status, _ = train(request, store, trainer)
    if status == STOPPED:
        return Answer(status=STOPPED)
    finished = [p.id for p in points if store.result(p.id)]
    qualified, checks, lines = answer.qualify(load_runs(store.root, finished))
    content: dict[str, Any] = {"sweep": request.sweep_name, "scale": request.scale}
    content |= {"qualified": qualified, "checks": checks}
    lines += [f"{g}: {'qualifies' if ok else 'DOES NOT QUALIFY'}" for g, ok in qualified.items()]
    return Answer(content, lines, int(not all(qualified.values())))


# ---------------------------------------------------------------- before training


def within_limit(request: Request) -> Request:
    """Leave out the runs that need more than exec.max_gpus GPUs, and say how many."""
    kept = Planner(hardware_of(request), request.exec).without_too_large(request.points)
    if len(kept) < len(request.points):
        notifier(request)(
            f"{len(request.points) - len(kept)} runs need more than "
            f"exec.max_gpus={request.exec.max_gpus} GPUs and are left out"
        )
    return dataclasses.replace(request, points=kept)


def check(request: Request) -> None:
    """Raise an error if the user must correct something before training."""
    if request.mirror == "wandb":
        wandb.check()
    if request.cluster.kind == "slurm":
        check_installed("submitit", f"cluster={request.cluster.name}")
    if request.exec.world_size > 1:
        specs = [p.spec for p in request.points]
        check_world_size(specs, request.exec, request.cluster, detect.this_machine())
    if request.hardware and (hardware := hardware_of(request)).has_speeds:
        Planner(hardware, request.exec).settings(request.points)
    check_available(request)
    answer.check_claims(request.sweep)


# ---------------------------------------------------------------- training


def train(
    request: Request,
    store: RunStore,
    trainer: Trainer | str | None = None,
    follow: dict[str, Any] | None = None,
) -> tuple[list[Point], int, Answer | None]:
    """Train the missing runs of a request here, or submit them as jobs of a cluster.

    Returns the runs, those of the second stage that are known included; the exit status: 0, 1 if
    runs failed or were killed, STOPPED; and while runs are in jobs of a cluster, the answer.

    `follow`: the task of a follow-up job. Raises GaveUp if its last rounds of jobs saved no update.
    """
    store.prepare()
    notify, searched = notifier(request), is_search(request)
    lines = understood(request)  # also refuses rows
    if searched:
        check_search(request)
        lines += search_lines(request)
    for line in lines:
        notify(line)
    points = all_points(request, store)
    check(request)
    for _, outlook in answer.outlooks(request.points, request.sweep, request.scale):
        if outlook.warns and any(not store.result(p.id) for p in points):
            notify(outlook.line())
    if request.cluster.kind == "slurm":
        idle = 0
        for line in unpinned_lines(points):
            notify(line)
        if follow is not None:
            idle = follow["idle"] + 1 if updates_of(points, store) <= follow["updates"] else 0
            if idle >= MAX_IDLE:
                raise GaveUp(
                    f"no run got further in {idle} rounds of jobs, so no more are submitted. "
                    "See the causes with action=status."
                )
        named = trainer if isinstance(trainer, str) else None
        work = submit(request, store, lambda: all_points(request, store), notify, named, idle)
        points, sent = all_points(request, store), _submitted(request, work)
        if searched:
            prune(request, store, points)
        if work.queued or work.running:
            return points, 0, sent
        for line in sent.as_text().splitlines():
            notify(line)
    else:
        plan = make_plan(points, store, request.exec, detect.this_machine())
        lines = plan_lines(request, plan)
        try:
            with local.Workers(store, request.exec.world_size) as workers:
                while plan.todo:  # results of the first stage choose the second
                    notify("\n".join(lines))
                    show = Display(plan.todo, request).event
                    local.run_points(points, store, request.exec, show, trainer, plan, workers)
                    if searched:
                        prune(request, store, points)
                    known, points = len(points), all_points(request, store)
                    if len(points) == known:
                        break
                    plan = make_plan(points, store, request.exec, plan.hardware)
                    lines = plan_lines(request, plan)
                    if request.members or searched:  # the first stage's plan has listed the arms
                        lines = lines[:1]
        except (Stopped, KeyboardInterrupt):
            notifier(request, always=True)(
                "stopped; finished runs are kept, unfinished runs resume from their checkpoints "
                "when you run the command again"
            )
            return points, STOPPED, None
    states = store.states(p.id for p in points).values()
    return points, int(not {"failed", "interrupted"}.isdisjoint(states)), None


def _submitted(request: Request, work: Work) -> Answer:
    """Return what was submitted, and what stays in the queue."""
    jobs = ", ".join(f"{n} job(s) as {number}" for number, n in work.sent.items())
    lines = (
        (jobs, f"submitted {work.n_submitted} runs: {jobs}; records and logs in {work.folder}"),
        (work.refused, f"Slurm did not accept all jobs; the rest waits: {work.refused}"),
        (
            work.exhausted,
            f"{work.exhausted} runs were killed {request.exec.max_attempts} times and are not "
            "submitted again: see the causes with action=status, then raise exec.max_attempts",
        ),
        (
            work.queued or work.running,
            f"{work.queued} runs queued, {work.running} running. Watch them with action=status; "
            "the same command answers when they have finished.",
        ),
    )
    names = ("queued", "refused", "running", "exhausted")
    values: dict[str, Any] = {key: getattr(work, key) for key in names}
    values |= {"submitted": work.n_submitted}
    values["jobs"] = [*work.sent, *filter(None, [work.follow])]
    return Answer(values, [line for said, line in lines if said])


def cancel_jobs(request: Request, store: RunStore) -> Answer:
    """Cancel the sweep's jobs on the cluster (Ctrl-C stops local runs)."""
    n_jobs, n_runs = cancel(request, store, notifier(request))
    text = f"cancelled {n_jobs} job(s) with {n_runs} unfinished run(s), which may be resumed"
    return Answer({"jobs": n_jobs, "runs": n_runs}, text if n_jobs else "nothing to cancel")
