"""Train the runs of a request, here or by jobs of a cluster, and return the answer."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.cli import answer, tuned, understood
from lorasweep.cli.plans import plan_text, unpinned_lines
from lorasweep.cli.points import all_points, is_search, judged, qualifying
from lorasweep.cli.printed import Answer
from lorasweep.cli.progress import Display, notifier
from lorasweep.config.preflight import check_available
from lorasweep.errors import GaveUp, SpecError, check_installed
from lorasweep.launch import local
from lorasweep.launch.distributed import check_world_size
from lorasweep.launch.process import Stopped
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.launch.slurm.submit import Outcome, cancel, submit, updates_of
from lorasweep.launch.trainer import Trainer
from lorasweep.plan import detect
from lorasweep.plan.plan import make_plan
from lorasweep.plan.planner import Planner
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


@dataclass(frozen=True)
class Trained:
    """The runs of a request after training."""

    points: list[Point]
    """Runs of the first stage, and the runs of the second stage that are known."""
    status: int
    """Exit status: 0, 1 if runs failed or were killed, STOPPED."""
    sent: Answer | None = None
    """The answer while runs are in jobs of a cluster."""


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
    trained = train(request, store, trainer, follow)
    points, status = trained.points, trained.status
    if trained.sent or status == STOPPED:
        return trained.sent or Answer(status=status)
    names = run_names(points)
    warn = notifier(request, always=True)
    for i, state in sorted(store.states(p.id for p in points).items(), key=lambda s: s[1]):
        if state == "failed":
            log = f"{store.folder(i)}/attempts/{store.last_attempt(i)}/log.txt"
            warn(
                f"run {i} ({names[i]}) failed: {store.failure(i)}. Log: {log}. "
                "Try again: exec.retry=true"
            )
        elif state == "interrupted":
            warn(
                f"run {i} ({names[i]}) did not finish: its process was killed {store.failures(i)} "
                "times (out of memory?). Try fewer workers (exec.workers) or a smaller "
                "exec.micro_batch_size, and a larger exec.max_attempts."
            )
    if request.mirror == "wandb":
        wandb.mirror(points, store, request.sweep_name or "single")
    finished = [p.id for p in judged(request, points) if store.result(p.id)]
    if not finished:
        warn("no run has finished, so there is no answer yet")
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
    text = tuned.finish(request, store, points, text) if searched else text
    looks.note_look(path, answer.claims_hash(asked), asked["rounds"])
    return Answer(json.loads(text) if as_json else None, text, status)


def qualify(request: Request, store: RunStore, trainer: Trainer | str | None = None) -> Answer:
    """Train the runs that judge a sweep's tasks; return and save whether the tasks qualify."""
    if request.sweep is None or request.cluster.kind == "slurm":
        raise SpecError(
            "action=qualify judges the tasks of a sweep on this machine. Add +sweep=NAME and "
            "cluster=local."
        )
    path = Path(request.exec.reports_dir) / f"qualify-{request.title}.json"
    files.check_writable(path.parent, "exec.reports_dir")
    trained = train(request, store, trainer)
    if trained.status == STOPPED:
        return Answer(status=STOPPED)
    finished = [p.id for p in trained.points if store.result(p.id)]
    qualified, checks, lines = answer.qualify(load_runs(store.root, finished))
    content: dict[str, Any] = {"sweep": request.sweep_name, "scale": request.scale}
    content |= {"qualified": qualified, "checks": checks}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    lines += [f"{g}: {'qualifies' if ok else 'DOES NOT QUALIFY'}" for g, ok in qualified.items()]
    return Answer(content, [*lines, f"saved: {path}"], int(not all(qualified.values())))


# ---------------------------------------------------------------- before training


def runs_of(request: Request, store: RunStore) -> list[Point]:
    """Return the runs of a sweep, or for action=qualify the runs that judge the tasks."""
    points = all_points(request, store)
    return qualifying(points) if request.action == "qualify" else points


def within_limit(request: Request) -> Request:
    """Leave out the runs that need more than exec.max_gpus GPUs, and say how many."""
    kept = Planner(hardware_of(request), request.exec).without_too_large(request.points)
    if len(kept) < len(request.points):
        notifier(request)(
            f"{len(request.points) - len(kept)} runs need more than "
            f"exec.max_gpus={request.exec.max_gpus} GPUs and are left out"
        )
    if request.points and not kept:
        raise SpecError(f"no run is left within exec.max_gpus={request.exec.max_gpus}.")
    return dataclasses.replace(request, points=kept)


def check(request: Request, store: RunStore, points: Sequence[Point]) -> None:
    """Raise an error if the user must correct something before training.

    `points`: all runs, including the second stage and added rounds.
    """
    if request.mirror == "wandb":
        wandb.check()
    if request.cluster.kind == "slurm":
        check_installed("submitit", f"cluster={request.cluster.name}")
    specs = [p.spec for p in request.points]
    if request.exec.world_size > 1:
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
) -> Trained:
    """Train the missing runs of a request here, or submit them as jobs of a cluster.

    `follow`: the task of a follow-up job.
    """
    if request.hardware and hardware_of(request).has_speeds:
        request = within_limit(request)
    store.prepare()
    notify = notifier(request)
    lines = understood.lines(request)  # also refuses rows
    if is_search(request):
        tuned.check_out(request)
        request, left_out = tuned.without_unfit(request)
        lines += [*tuned.outlook_here(request, store), *filter(None, [left_out])]
    for line in lines:
        notify(line)
    points = runs_of(request, store)
    check(request, store, points)
    if request.cluster.kind == "slurm":
        return _train_on_cluster(request, store, trainer, follow)
    try:
        points = _train_here(request, store, points, trainer)
    except (Stopped, KeyboardInterrupt):
        notifier(request, always=True)(
            "stopped; finished runs are kept, unfinished runs resume from their checkpoints when "
            "you run the command again"
        )
        return Trained(points, STOPPED)
    return Trained(points, _status(points, store))


def _train_here(
    request: Request, store: RunStore, points: list[Point], trainer: Trainer | str | None
) -> list[Point]:
    """Train the missing runs on this machine, stage by stage; return the runs of all stages."""
    searched, notify = is_search(request), notifier(request)
    plan = make_plan(points, store, request.exec, detect.this_machine())
    if plan.todo:
        _warn_of_claims(request)
    text = plan_text(request, plan)
    with local.Workers(store, request.exec.world_size) as workers:
        while plan.todo:  # results of the first stage choose the second
            notify(tuned.stage(request, store, points) if searched else text)
            with Display(plan.todo, request) as show:
                local.run_points(points, store, request.exec, show.event, trainer, plan, workers)
            if searched:
                tuned.prune(request, store, points)
            known, points = len(points), runs_of(request, store)
            if len(points) == known:
                break
            plan = make_plan(points, store, request.exec, plan.hardware)
            text = plan_text(request, plan)
            if request.members:  # the first stage's plan has listed the customers
                text = text.partition("\n")[0]
    return points


def _warn_of_claims(request: Request) -> None:
    for _, outlook in answer.outlooks(request.points, request.sweep, request.scale):
        if outlook.warns:
            notifier(request)(outlook.line())


def _status(points: Sequence[Point], store: RunStore) -> int:
    states = store.states(p.id for p in points).values()
    return int(any(state in ("failed", "interrupted") for state in states))


def _train_on_cluster(
    request: Request, store: RunStore, trainer: Trainer | str | None, follow: dict[str, Any] | None
) -> Trained:
    """Submit the missing runs; GaveUp: the last rounds of jobs saved no update of any run."""
    notify, idle = notifier(request), 0
    for line in unpinned_lines(request.points):
        notify(line)
    _warn_of_claims(request)
    if follow is not None:
        updates = updates_of(runs_of(request, store), store)
        idle = follow["idle"] + 1 if updates <= follow["updates"] else 0
        if idle >= MAX_IDLE:
            raise GaveUp(
                f"no run got further in {idle} rounds of jobs, so no more are submitted. "
                "See the causes with action=status."
            )
    named = trainer if isinstance(trainer, str) else None
    done = submit(request, store, lambda: runs_of(request, store), notify, named, idle)
    points = runs_of(request, store)
    if is_search(request):
        tuned.prune(request, store, points)
    sent = _submitted(request, store, done)
    if done.waiting:
        return Trained(points, 0, sent)
    for line in sent.as_text().splitlines():
        notify(line)
    return Trained(points, _status(points, store))


def _submitted(request: Request, store: RunStore, done: Outcome) -> Answer:
    """Return what was submitted, and what stays in the queue."""
    work, lines = done.work, []
    if done.sent:
        jobs = ", ".join(f"{n} job(s) as {number}" for number, n in done.sent.items())
        lines.append(
            f"submitted {done.n_submitted} runs: {jobs}; records and logs in {done.folder}"
        )
    if done.refused:
        lines.append(
            f"Slurm did not accept all jobs: {done.refused}\n"
            "The rest is submitted when jobs have ended, or when you run the command again"
        )
    if work.unknown:
        lines.append(
            f"{work.unknown} runs may be in jobs of another cluster: run the command there. "
            f"If those jobs are gone, delete their folders in {store.root}/.slurm"
        )
    if work.exhausted:
        lines.append(
            f"{work.exhausted} runs were killed {request.exec.max_attempts} times and are not "
            "submitted again: see the causes with action=status, then raise exec.max_attempts"
        )
    if work.n_removed:
        what = f"{work.n_removed} queued run(s) that are no longer part of this command line"
        lines.append(f"cancelled {what}" if done.pruned else f"{what}: prune=true cancels them")
    if done.waiting:
        lines.append(
            f"{done.queued} runs queued, {work.running} running. Watch them with action=status; "
            "the same command answers when they have finished."
        )
    values = {
        "submitted": done.n_submitted,
        "queued": done.queued,
        "running": work.running,
        "removed": work.n_removed,
        "pruned": done.pruned,
        "refused": done.refused,
        "unknown": work.unknown,
        "exhausted": work.exhausted,
        "jobs": [*done.sent, *filter(None, [done.follow])],
    }
    return Answer(values, lines)


def cancel_jobs(request: Request, store: RunStore) -> Answer:
    """Cancel the sweep's jobs on the cluster (Ctrl-C stops local runs)."""
    n_jobs, n_runs = cancel(request, store, notifier(request))
    text = (
        f"cancelled {n_jobs} job(s) with {n_runs} unfinished run(s); finished runs are kept, "
        "unfinished runs resume from their checkpoints when you run the sweep's command again"
    )
    return Answer({"jobs": n_jobs, "runs": n_runs}, text if n_jobs else "nothing to cancel")
