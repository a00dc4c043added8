"""The table of actions, which settings they take, and the call of the requested one."""

import inspect
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from lorasweep.cli import answer as answers
from lorasweep.cli.printed import Answer
from lorasweep.errors import ClusterError, GaveUp, LorasweepError, SpecError, StoreError, unknown
from lorasweep.launch.slurm.job import INTERRUPTED, TRY_AGAIN, Signals
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.launch.slurm.queue import RunningJobs
from lorasweep.launch.trainer import Trainer
from lorasweep.plan.budget import parse_budget
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.request import Request, Settings, from_plain

FLEET_SETTINGS = ("customers", "rates", "instead_of_full", "serve", "out")
OF_SEARCH = ("run", "plan", "status", "cancel")
"""Actions that take all settings of a search's command, such as out=DIR."""
OF_FLEET = ("plan", "status", "cancel", "measure_packs", "fetch")
"""Actions that with customers=FILE are about the runs of a fleet."""
WHOLE_STUDY = ("export", "adapter", "fetch")
"""Actions that are called once for a sweep of sweeps; all others are called once per part."""
OF_PLANNED_RUNS = ("status", "cancel", "verify", "extend", "measure_packs", "layers")
"""Actions that, like training, leave out the runs that need more than exec.max_gpus GPUs."""


class Action(NamedTuple):
    """One action of the command line: action=NAME."""

    does: str
    """The function: (request), and any of store, trainer and follow; it returns an Answer."""
    help: str
    example: str = ""
    """Settings that --help shows after the name."""
    reads: tuple[str, ...] = ()
    """Settings that only some actions read, this one among them."""
    about: str = ""
    """What it is about, if not the runs of a sweep."""


ACTIONS = {
    "run": Action(
        "lorasweep.cli.train:run",
        "train what is missing and print the answer (the default). With +sweep=tune: budget=2h, "
        "90min, 40runs or 500gpuh; out=DIR writes the best adapter or weights",
        reads=("out",),
    ),
    "plan": Action(
        "lorasweep.cli.plans:show",
        "show what would run and what it costs, here or on other machines (conf/hardware). "
        "budget=500gpuh: which claims to ask first, and what stays open",
        "hardware=h100",
        ("hardware", "out"),
    ),
    "status": Action(
        "lorasweep.cli.status:show",
        "show what is done, running, diverged and failed",
        "watch=true",
        ("watch", "out"),
    ),
    "cancel": Action(
        "lorasweep.cli.train:cancel_jobs", "cancel the sweep's jobs on the cluster", reads=("out",)
    ),
    "export": Action(
        "lorasweep.cli.finished_runs:export",
        "write finished runs as .parquet or .csv",
        "table=FILE",
        ("table",),
    ),
    "import": Action(
        "lorasweep.cli.finished_runs:import_",
        "read the runs of a table into the run folder",
        "table=FILE",
        ("table",),
    ),
    "adapter": Action(
        "lorasweep.cli.finished_runs:adapter",
        "retrain a finished run and save its adapter for PEFT (full fine-tuning: its weights), "
        "unless the final loss differs; max_difference=0.02 accepts a difference of up to 0.02",
        "run=ID out=DIR",
        ("run", "out", "max_difference"),
    ),
    "verify": Action(
        "lorasweep.cli.finished_runs:verify",
        "retrain finished runs alone, to check that packing changes no result",
        "sample=3",
        ("sample",),
    ),
    "extend": Action(
        "lorasweep.cli.finished_runs:extend",
        "add the runs that help most to undecided claims; start none",
    ),
    "qualify": Action(
        "lorasweep.cli.train:qualify",
        "train full fine-tuning and the largest LoRA, to check that the tasks are suitable",
    ),
    "measure_packs": Action(
        "lorasweep.cli.plans:measure",
        "time updates alone and in packs on this machine, for later plans",
    ),
    "layers": Action(
        "lorasweep.cli.plans:layers",
        "show what is trained of each layer set, with counts; needs no weights",
    ),
    "fetch": Action(
        "lorasweep.cli.plans:fetch",
        "download the weights and data of the runs from the hub, for nodes without network",
    ),
    "check_gpu": Action(
        "lorasweep.cli.check:check_gpu",
        "measure this machine's GPU in five parts, compare it with the plan, and write a page and "
        "a hardware file; the same command goes on where it was. With cluster=slurm: as a job. "
        "Without a GPU: the same with small shapes",
        reads=("hardware",),
        about="one machine",
    ),
    "advise": Action(
        "lorasweep.cli.customers:advise",
        "LoRA or full fine-tuning, with which rank, learning rate and batch size, at what cost: "
        "for each row of a CSV or YAML table, or for one customer (+customer.model=llama-3.1-8b "
        "+customer.task=sft ...). out=FILE.html: the page; why=NAME: all reasons, and the command "
        "that tests the advice",
        "customers=FILE",
        ("customers", "customer", "why", "out", "hardware"),
        about="customers",
    ),
    "measure": Action(
        "lorasweep.cli.customers:measure",
        "measure the information in steps x batch_size rows of FILE (or of dataset=NAME), in "
        "bits, under the base model and online during training; action=advise uses the result for "
        "a customer with these data",
        "data=FILE",
        ("data", "rates"),
        about="one model and one data set",
    ),
    "fleet": Action(
        "lorasweep.cli.customers:fleet",
        "train an adapter for each customer of a table (column data: a .jsonl, .json, .csv or "
        ".parquet file, or a folder with train and test). rates=N: exactly N learning rates "
        "around the advised one, or rates=advised; instead_of_full=lora; serve=vllm: adapters for "
        f"vLLM; out=DIR. action={', '.join(OF_FLEET)} take customers=FILE, too",
        "customers=FILE",
        FLEET_SETTINGS,
        about="customers",
    ),
    "verify_served": Action(
        "lorasweep.cli.served:verify",
        "check the folders of a fleet's adapters, and with url=http://host:port ask a running "
        "server of the OpenAI API whether each adapter does there what it did in training. "
        "Several servers: url=[URL,URL]",
        "customers=FILE url=URL",
        (*FLEET_SETTINGS, "url"),
        about="customers",
    ),
}


def check(request: Request) -> None:
    """Raise SpecError if the action does not exist, or does not take a setting that was given."""
    name, sweep, fleet = request.action, request.sweep_name, bool(request.customers)
    if name not in ACTIONS:
        raise SpecError(unknown("action", name, ACTIONS))
    action, hardware = ACTIONS[name], hardware_of(request) if request.hardware else None
    about = "customers" if fleet else action.about
    searches = request.sweep is not None and request.sweep.search is not None
    budget = parse_budget(request.budget, 1)
    on_gpus = hardware is not None and hardware.has_speeds
    of_claims = sweep and name == "plan" and on_gpus and budget and budget.unit == "gpuh"
    defaults = {**vars(Settings()), "rates": 3}
    taken = {*action.reads, "hardware", *(FLEET_SETTINGS if fleet and name in OF_FLEET else ())}
    all_read = dict.fromkeys(key for other in ACTIONS.values() for key in other.reads)
    given = [k for k in all_read if k not in taken and getattr(request, k) != defaults[k]]
    readers = [f"action={n}" for n, a in ACTIONS.items() if given and given[0] in a.reads]
    hint = " (of a customer: +customer.data)" if given[:1] == ["data"] else ""
    for wrong, why in (
        (sweep and about, f"action={name} is about {about}. Leave +sweep={sweep} out."),
        (
            name in ("fleet", "verify_served") and not fleet,
            f"action={name} is about the rows of a table. Add customers=FILE (CSV or YAML, with "
            "the columns name, model, task and data).",
        ),
        (
            given,
            f"{given and given[0]} is only for {' and '.join(readers)}. Use that action, or leave "
            f"it out{hint}.",
        ),
        (
            hardware and "hardware" not in action.reads and request.cluster.kind != "slurm",
            f"hardware={hardware and hardware.name} with action={name}: only action=plan, "
            "action=advise and cluster=slurm are for other hardware. Add action=plan, or leave "
            "hardware out.",
        ),
        (
            budget and not searches and not of_claims,
            f"budget={request.budget} is for a sweep that searches learning rates, such as "
            "+sweep=tune, or in hours of GPUs with a data sheet for the claims of a sweep: "
            "action=plan +sweep=NAME hardware=h100 budget=500gpuh.",
        ),
        (
            request.out and name in OF_SEARCH and not searches and not fleet,
            "out= is for a sweep that searches learning rates, such as +sweep=tune, and for "
            "action=adapter, action=advise and action=fleet. Leave it out.",
        ),
        (
            request.prune and not sweep and not fleet,
            "prune=true cancels queued runs that are no longer part of a sweep, so it needs "
            "+sweep=NAME, or customers=FILE.",
        ),
    ):
        if wrong:
            raise SpecError(why)


def function_of(name: str) -> Callable[..., Any]:
    """Import the function of an action."""
    module, _, function = ACTIONS[name].does.partition(":")
    return getattr(import_module(module), function)


def act(
    request: Request, trainer: Trainer | str | None = None, follow: dict[str, Any] | None = None
) -> int:
    """Do the requested action and print its answer; return the exit status.

    A sweep of sweeps is answered part by part, as one JSON object with format=json.

    `trainer`: replaces the real trainer in tests and benchmarks. `follow`: task of a follow-up job.
    """
    from lorasweep.cli import customers, train  # --help needs neither

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
                faults = [{"name": m["name"], "error": m["problem"]} for m in request.members]
                Answer(faults, "").show(request.format == "json")
                return status
    do, as_json = function_of(name), request.format == "json"
    context = {"trainer": trainer, "follow": follow, "store": store}
    context = {k: v for k, v in context.items() if k in inspect.signature(do).parameters}
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
            done = do(part, **context)
            for k, answer in enumerate([done] if isinstance(done, Answer) else done):
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
