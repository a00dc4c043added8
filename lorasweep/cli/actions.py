"""Run the action that the command line requests, and print the result.

Ties planning, launching and the analysis together. Refuses to know torch (the workers use it).
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasweep.cli import answer, cluster, customers, finished_runs, status, study
from lorasweep.cli.plans import forecast, plan, plan_text
from lorasweep.cli.points import all_points, qualifying
from lorasweep.cli.progress import Display
from lorasweep.config.preflight import check_available, fetch
from lorasweep.errors import SpecError
from lorasweep.launch import local
from lorasweep.launch.distributed import check_world_size
from lorasweep.launch.process import Stopped
from lorasweep.launch.slurm.client import RunningJobs
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.launch.trainer import Trainer, trainer_named
from lorasweep.plan import detect
from lorasweep.plan.estimate import make_plan
from lorasweep.plan.gpu.limits import refuse_unfit, settings_of, within_limit
from lorasweep.plan.same_data import refuse_mixing
from lorasweep.spec.metric import metric_of
from lorasweep.store import files, looks
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import run_names
from lorasweep.sweep.request import Request, question

STOPPED = 130
"""Exit status after Ctrl-C."""
OF_TABLES = {
    "import": finished_runs.import_,
    "advise": customers.advise,
    "measure": customers.measure,
}
"""Actions that are about a table or a file of rows and not about runs that were asked for."""
OF_RUNS = {"verify": finished_runs.verify, "extend": finished_runs.extend}
"""Actions on the finished runs of a sweep."""


def act(
    request: Request, trainer: Trainer | str | None = None, follow: dict[str, Any] | None = None
) -> int:
    """Run the requested action; return the exit status.

    `trainer` replaces the real one in tests and benchmarks. `follow`: the task, inside a follow-up
    job on a cluster.
    """
    store = RunStore(request.exec.runs_dir, jobs=RunningJobs())
    with suppress(OSError):  # not there, or not to be read: the action says so
        files.share_as(store.root)
    action = request.action
    if action == "export":
        points = all_points(request, store) if request.sweep else []
        return finished_runs.export(request, store, points)
    if action in OF_TABLES:
        return OF_TABLES[action](request)
    if request.customers:
        runs = customers.plan_fleet(request)
        if runs.action == "run":
            return customers.fleet(runs, store, lambda r, s: _of_runs(r, s, trainer, follow))
        code = _of_runs(runs, store, trainer, follow) if runs.points else 0
        return max(code, int(any(m["problem"] for m in runs.members)))
    if action == "adapter":
        return finished_runs.adapter(
            request,
            store,
            all_points(request, store) if request.sweep and not request.parts else [],
            trainer_named(trainer) if trainer is None or isinstance(trainer, str) else trainer,
        )
    return _of_runs(request, store, trainer, follow)


def _of_runs(
    request: Request,
    store: RunStore,
    trainer: Trainer | str | None,
    follow: dict[str, Any] | None,
) -> int:
    """Do an action on the runs of a request: a single one, a sweep's, or those of customers."""
    action = request.action
    if action == "fetch":
        fetch((p.spec for part in request.parts or [request] for p in part.points), print)
        return 0
    if request.hardware and hardware_of(request).has_speeds:
        if action == "plan":
            queue = cluster.difference(request, store, _within_limit)
            return forecast.show(request, store, hardware_of(request), queue)
        request = _within_limit(request)
    if request.parts:
        return study.each(
            request, lambda part: act(part, trainer), lambda part: _check(part, store)
        )
    if action in OF_RUNS:
        return OF_RUNS[action](request, store, all_points(request, store))
    if action == "plan":
        return plan.show(request, store)
    if action == "layers":
        return plan.layers(request)
    if action == "status":
        return status.show(request, store, lambda: all_points(request, store))
    if action == "measure_packs":
        return plan.measure(request, store, _notify(request))
    if action == "cancel":
        return cluster.cancel_jobs(request, store, _notify(request))
    if action == "qualify" and (request.sweep is None or request.cluster.kind == "slurm"):
        raise SpecError(
            "action=qualify judges the tasks of a sweep on this machine. Add +sweep=NAME and "
            "cluster=local."
        )
    store.prepare()
    _check(request, store)
    if request.cluster.kind == "slurm":
        return _run_on_cluster(request, store, trainer, follow)
    return _run(request, store, trainer)


def _within_limit(request: Request) -> Request:
    """Return the request without the runs that need more GPUs than one may take, and say so."""
    kept = within_limit(request.points, hardware_of(request), request.exec)
    if len(kept) < len(request.points):
        _notify(request)(
            f"{len(request.points) - len(kept)} runs need more than "
            f"exec.max_gpus={request.exec.max_gpus} GPUs and are left out"
        )
    if request.points and not kept:
        raise SpecError(f"no run is left within exec.max_gpus={request.exec.max_gpus}.")
    return dataclasses.replace(request, points=kept)


def _check(request: Request, store: RunStore) -> None:
    """Check before anything is trained, and raise what the user must correct."""
    specs = [p.spec for p in request.points]
    if request.exec.world_size > 1:
        check_world_size(specs, request.exec, request.cluster, detect.this_machine())
    if request.hardware and (hardware := hardware_of(request)).has_speeds:
        check = settings_of if request.cluster.kind == "slurm" else refuse_unfit
        check(request.points, hardware, request.exec)
    check_available(request)
    answer.check_claims(request.sweep)
    refuse_mixing(_wanted(request, store), store, request.exec)


def _notify(request: Request) -> Callable[[str], None]:
    """Return a function that prints progress messages on stderr; silent with format=json."""
    if request.format == "json":
        return lambda text: None
    return lambda text: print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- run


def _run(request: Request, store: RunStore, trainer: Trainer | str | None) -> int:
    """Run what is missing on this machine, stage by stage, and answer."""
    notify, hardware = _notify(request), detect.this_machine()
    started = False
    try:
        while True:
            points = _wanted(request, store)
            now = make_plan(points, store, request.exec, hardware)
            if not now.todo:
                break
            notify(plan_text.plan_text(request, now))
            if not started and request.format != "json":
                _warn(request)
            started = True
            with Display(now.todo, request.format == "json") as display:
                local.run_points(points, store, request.exec, display.event, trainer)
            if len(_wanted(request, store)) == len(points):
                break
    except (Stopped, KeyboardInterrupt):
        print(
            "stopped; finished runs are kept, the others continue from their checkpoints when you "
            "run the command again",
            file=sys.stderr,
        )
        return STOPPED
    if request.action == "qualify":
        return study.qualify(request, store, points)
    return _end(request, store, points)


def _warn(request: Request) -> None:
    """Print a warning for every claim that the planned runs cannot decide."""
    for found in answer.outlooks(request.points, request.sweep, request.scale):
        if found.warns:
            _notify(request)(found.line())


def _wanted(request: Request, store: RunStore) -> list[Point]:
    """Return the runs of this action: the sweep's, or for qualify those that judge its tasks."""
    points = all_points(request, store)
    return qualifying(points) if request.action == "qualify" else points


def _run_on_cluster(
    request: Request, store: RunStore, trainer: Trainer | str | None, follow: dict[str, Any] | None
) -> int:
    """Submit what is missing and return; if nothing is left to do, answer."""
    for line in plan_text.unpinned_lines(request.points):
        _notify(request)(line)
    _warn(request)
    waiting = cluster.submit_missing(
        request,
        store,
        lambda: all_points(request, store),
        _notify(request),
        trainer if isinstance(trainer, str) else None,
        follow,
    )
    return 0 if waiting else _end(request, store, all_points(request, store))


def _end(request: Request, store: RunStore, points: list[Point]) -> int:
    """Print failures, copy to W&B if requested, and answer, when nothing is left to do."""
    states = store.states(p.id for p in points)
    failed, killed = ([i for i, s in states.items() if s == x] for x in ("failed", "interrupted"))
    if request.customers:  # their outcomes are printed and mirrored elsewhere
        return 1 if failed or killed else 0
    _print_failures(points, failed, killed, store)
    if request.mirror == "wandb":
        from lorasweep.tracking.wandb import mirror

        mirror(points, store, request.sweep_name or "single")
    if request.sweep_name is None:
        _print_single(request, store, points[0])
    else:
        _answer(request, store, points)
    return 1 if failed or killed else 0


def _print_failures(
    points: Sequence[Point], failed: Sequence[str], killed: Sequence[str], store: RunStore
) -> None:
    names = run_names(points)
    for i in failed:
        log = f"{store.folder(i)}/attempts/{store.last_attempt(i)}/log.txt"
        print(
            f"run {i} ({names[i]}) failed: {store.failure(i)}. Log: {log}. "
            "Try again: exec.retry=true",
            file=sys.stderr,
        )
    for i in killed:
        print(
            f"run {i} ({names[i]}) did not finish: its process was killed {store.failures(i)} "
            "times (out of memory?). Try fewer workers (exec.workers) or a smaller "
            "exec.micro_batch_size, and a larger exec.max_attempts.",
            file=sys.stderr,
        )


def _answer(request: Request, store: RunStore, points: list[Point]) -> None:
    """Judge the finished runs, print the answer, write the report and record the look."""
    from lorasweep.store.table import load_runs

    finished = [p.id for p in points if store.result(p.id)]
    if not finished:
        print("no run has finished, so there is no answer yet", file=sys.stderr)
        return
    asked = question(request)
    folder = Path(request.exec.reports_dir) / request.title
    table = load_runs(store.root, finished)
    print(answer.judge(table, asked, folder, as_json=request.format == "json"))
    path = looks.path_of(store.root, request.title)
    looks.note_look(path, answer.claims_hash(asked), asked["rounds"])


def _print_single(request: Request, store: RunStore, point: Point) -> None:
    result = store.result(point.id)
    if result is None:
        return
    if request.format == "json":
        print(json.dumps({k: v for k, v in result.items() if k != "curve"}))
        return
    metric, measure = metric_of(result), ""
    value = metric.value(result)
    if value is not None:
        start = metric.value(result["curve"][0])
        measure = f", {metric.label} {value:.4f} (from {start:.4f})"
    name = run_names([point])[point.id]
    print(f"run {point.id} ({name}): {result['state']}{measure}. Folder: {store.folder(point.id)}")
