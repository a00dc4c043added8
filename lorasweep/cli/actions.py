"""Call the function of the requested action; `lorasweep.config.actions` is the table of actions."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lorasweep.cli import answer as answers
from lorasweep.cli import check, customers, finished_runs, plans, served, status, train
from lorasweep.cli.printed import Answer
from lorasweep.errors import ClusterError, GaveUp, LorasweepError, SpecError, StoreError
from lorasweep.launch.slurm.job import INTERRUPTED, TRY_AGAIN, Signals
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.launch.slurm.queue import RunningJobs
from lorasweep.launch.trainer import Trainer
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.request import Request, from_plain

WHOLE_STUDY = ("export", "adapter", "fetch")
"""Actions that are called once for a sweep of sweeps; all others are called once per part."""
OF_PLANNED_RUNS = ("status", "cancel", "verify", "extend", "measure_packs", "layers")
"""Actions that, like training, leave out the runs that need more than exec.max_gpus GPUs."""


def functions(
    trainer: Trainer | str | None = None, follow: dict[str, Any] | None = None
) -> dict[str, Callable[[Request, RunStore], Any]]:
    """Return the function of each action by name; it returns an Answer, or yields several."""
    return {
        "run": partial(train.run, trainer=trainer, follow=follow),
        "plan": plans.show,
        "status": status.show,
        "cancel": train.cancel_jobs,
        "export": finished_runs.export,
        "import": finished_runs.import_,
        "adapter": partial(finished_runs.adapter, trainer=trainer),
        "verify": finished_runs.verify,
        "extend": finished_runs.extend,
        "qualify": partial(train.qualify, trainer=trainer),
        "measure_packs": plans.measure,
        "layers": plans.layers,
        "check_gpu": check.check_gpu,
        "fetch": plans.fetch,
        "advise": customers.advise,
        "measure": customers.measure,
        "fleet": partial(
            customers.fleet, training=partial(train.train, trainer=trainer, follow=follow)
        ),
        "verify_served": served.verify,
    }


def act(
    request: Request, trainer: Trainer | str | None = None, follow: dict[str, Any] | None = None
) -> int:
    """Do the requested action and print its answer; return the exit status.

    A sweep of sweeps is answered part by part, as one JSON object with format=json.

    `trainer`: replaces the real trainer in tests and benchmarks. `follow`: task of a follow-up job.
    """
    store = RunStore(request.exec.runs_dir, jobs=RunningJobs(request.exec.runs_dir))
    with suppress(FileNotFoundError, PermissionError):  # the action reports them
        os.scandir(store.root).close()
    name, status = request.action, 0
    if request.customers and name != "advise":
        request = customers.plan_fleet(request)
        if request.action == "run":
            name = "fleet"
        else:
            status = int(any(m["problem"] for m in request.members))
            if not request.points:
                return status
    do, as_json = functions(trainer, follow)[name], request.format == "json"
    on_gpus = bool(request.hardware) and hardware_of(request).has_speeds
    whole = name in WHOLE_STUDY or (on_gpus and name == "plan")
    parts = [] if whole else request.parts
    if parts and as_json and request.watch:
        raise SpecError("watch=true prints one JSON object after another. Name one sweep instead.")
    for part in parts if name == "run" else ():  # find problems before the first part starts
        train.check(part, store, train.runs_of(part, store))
    values = {}
    try:
        for part in parts or [request]:
            if parts and not as_json:
                print(f"== {part.sweep_name}", flush=True)
            if on_gpus and name in OF_PLANNED_RUNS:
                part = train.within_limit(part)
            for k, answer in enumerate(_answers(do, part, store)):
                status = max(status, answer.status)
                if parts and as_json:
                    values[part.title] = answer.plain()
                    continue
                if k and not as_json and sys.stdout.isatty():
                    print("\033[2J\033[H", end="")  # a watched table is shown in place
                answer.show(as_json)
            if parts and status >= train.STOPPED:
                return status
    finally:
        if parts and as_json:
            print(json.dumps(values))
    if parts and name == "run" and request.cluster.kind == "local" and not as_json:
        titles = [part.title for part in parts]
        page = answers.study(Path(request.exec.reports_dir), titles, request.title)
        print("\n".join(page))
    return status


def _answers(
    do: Callable[[Request, RunStore], Any], request: Request, store: RunStore
) -> Iterator[Answer]:
    """Yield what an action returns. Until all are ported, one may print, and return a status."""
    out = io.StringIO()
    with redirect_stdout(out) if request.format == "json" else nullcontext():
        done = do(request, store)
    if isinstance(done, int):
        try:
            value = json.loads(out.getvalue())
        except ValueError:
            value = {"output": out.getvalue().splitlines()}
        yield Answer(value, status=done)
    else:
        yield from [done] if isinstance(done, Answer) else done


def follow_up(path: str) -> int:
    """Run the request of a task file again, in a follow-up job.

    Returns 0 when done, 2 after a permanent error, TRY_AGAIN after one that may be temporary,
    INTERRUPTED after a signal. The last line of the file is {"follow": request, "trainer": name or
    null, "idle": n, "updates": n}.
    """
    Signals()
    task = json.loads(Path(path).read_text().splitlines()[-1])
    request = from_plain(task["follow"])
    try:
        act(request, task.get("trainer"), follow=task)
    except LorasweepError as error:
        print(f"lorasweep: {error}", file=sys.stderr, flush=True)
        temporary = isinstance(error, ClusterError | StoreError) and not isinstance(error, GaveUp)
        return TRY_AGAIN if temporary else 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
