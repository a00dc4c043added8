"""Call the function of the requested action; `lorasweep.config.actions` is the table of actions."""

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lorasweep.cli import answer, check, customers, finished_runs, plans, served, status, train
from lorasweep.errors import ClusterError, GaveUp, LorasweepError, SpecError, StoreError
from lorasweep.launch.slurm.client import RunningJobs
from lorasweep.launch.slurm.job import INTERRUPTED, TRY_AGAIN, Signals
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.launch.trainer import Trainer
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.request import Request, from_plain

WHOLE_STUDY = ("export", "adapter", "fetch")
"""Actions that are called once for a sweep of sweeps; all others are called once per part."""
OF_PLANNED_RUNS = ("status", "cancel", "verify", "extend", "measure_packs", "layers")
"""Actions that, like training, leave out the runs that need more than exec.max_gpus GPUs."""


def functions(
    trainer: Trainer | str | None = None, follow: dict[str, Any] | None = None
) -> dict[str, Callable[[Request, RunStore], int]]:
    """Return the function of each action by name; each function returns the exit status."""
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
        "advise": lambda request, store: customers.advise(request),
        "measure": lambda request, store: customers.measure(request),
        "fleet": partial(
            customers.fleet, training=partial(train.train, trainer=trainer, follow=follow)
        ),
        "verify_served": served.verify,
    }


def act(
    request: Request, trainer: Trainer | str | None = None, follow: dict[str, Any] | None = None
) -> int:
    """Call the function of the requested action; return the exit status.

    `trainer`: replaces the real trainer in tests and benchmarks. `follow`: task of a follow-up job.
    """
    store = RunStore(request.exec.runs_dir, jobs=RunningJobs())
    with suppress(FileNotFoundError, PermissionError):  # the action reports them
        os.scandir(store.root).close()
    if request.customers and request.action != "advise":
        runs = customers.plan_fleet(request)
        if runs.action == "run":
            return functions(trainer, follow)["fleet"](runs, store)
        code = _on_runs(runs, store, trainer, follow) if runs.points else 0
        return max(code, int(any(m["problem"] for m in runs.members)))
    return _on_runs(request, store, trainer, follow)


def _on_runs(
    request: Request, store: RunStore, trainer: Trainer | str | None, follow: dict[str, Any] | None
) -> int:
    """Call an action for the runs of a request, or for each part of a sweep of sweeps."""
    do = functions(trainer, follow)[request.action]
    on_gpus = bool(request.hardware) and hardware_of(request).has_speeds
    if on_gpus and request.action in OF_PLANNED_RUNS:
        request = train.within_limit(request)
    as_json = request.format == "json"
    if not request.parts or request.action in WHOLE_STUDY or (on_gpus and request.action == "plan"):
        if as_json and not request.watch:
            return _print_json(do, request, store)
        return do(request, store)
    if request.action == "run":  # find problems before the first part starts
        for part in request.parts:
            train.check(part, store, train.runs_of(part, store))
    if as_json and request.watch:
        raise SpecError("watch=true prints one JSON object after another. Name one sweep instead.")
    code, printed = 0, {}
    try:
        for part in request.parts:
            if as_json:
                with redirect_stdout(io.StringIO()) as out:
                    code = max(code, act(part, trainer))
                printed[part.title] = json.loads(out.getvalue() or "null")
            else:
                print(f"== {part.sweep_name}", flush=True)
                code = max(code, act(part, trainer))
            if code >= train.STOPPED:
                return code
    finally:
        if as_json:
            print(json.dumps(printed))
    if request.action == "run" and request.cluster.kind == "local" and not as_json:
        titles = [part.title for part in request.parts]
        print("\n".join(answer.study(Path(request.exec.reports_dir), titles, request.title)))
    return code


def _print_json(do: Callable[[Request, RunStore], int], request: Request, store: RunStore) -> int:
    """Call an action and print one JSON value: {"output": LINES} if the action prints lines."""
    with redirect_stdout(io.StringIO()) as out:
        code = do(request, store)
    text = out.getvalue()
    try:
        json.loads(text)
    except ValueError:
        text = json.dumps({"output": text.splitlines()}) + "\n"
    print(text, end="")
    return code


def follow_up(path: str) -> int:
    """Run the request of a task file again, in a follow-up job.

    Returns 0 when done, 2 after a permanent error, TRY_AGAIN after one that may be temporary,
    INTERRUPTED after a signal. The file holds {"follow": REQUEST.json, "trainer": name or null,
    "idle": n, "updates": n}.
    """
    Signals()
    task = json.loads(Path(path).read_bytes())
    request = from_plain(json.loads(Path(task["follow"]).read_bytes()))
    try:
        act(request, task.get("trainer"), follow=task)
    except LorasweepError as error:
        print(f"lorasweep: {error}", file=sys.stderr, flush=True)
        temporary = isinstance(error, ClusterError | StoreError) and not isinstance(error, GaveUp)
        return TRY_AGAIN if temporary else 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
