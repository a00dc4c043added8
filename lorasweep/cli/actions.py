"""The table of actions, the settings they take, the call of the requested one, and the help."""

import inspect
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pkgutil import resolve_name
from typing import NamedTuple

from lorasweep.cli.printed import Answer
from lorasweep.errors import SpecError, unknown
from lorasweep.launch.slurm.queue import RunningJobs
from lorasweep.launch.slurm.submit import hardware_of
from lorasweep.launch.trainer import Trainer
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.request import Request, Settings

FLEET_SETTINGS = "customers rates instead_of_full serve out"
OF_SEARCH = ("run", "plan", "status", "cancel")
"""Actions that take all settings of a search's command, such as out=DIR."""
OF_FLEET = ("plan", "status", "cancel", "fetch")
"""Actions that with customers=FILE are about the runs of a fleet."""
WHOLE_STUDY = ("export", "adapter", "fetch")
"""Actions that are called once for a sweep of sweeps; all others are called once per part."""
SEARCHED = ("out", "budget")


class Action(NamedTuple):
    """One action of the command line: action=NAME."""

    does: str
    """The function of this package: (request), store and, if it trains, trainer -> Answer."""
    help: str
    example: str = ""
    """Settings that --help shows after the name."""
    more: str = ""
    """Further settings that only some actions read, this one among them."""
    about: str = ""
    """What it is about, if not the runs of a sweep."""

    @property
    def reads(self) -> list[str]:
        """Return the settings that only some actions read, this one among them."""
        return [*(word.partition("=")[0] for word in self.example.split()), *self.more.split()]


ACTIONS = {
    "run": Action(
        "runs:run",
        "train what is missing and print the answer (the default). With +sweep=tune: budget=2h, "
        "90min, 40runs or 500gpuh; out=DIR writes the best adapter or weights",
    ),
    "plan": Action(
        "plans:show",
        "show what would run and what it costs, here or on other machines (conf/hardware).",
        "hardware=h100",
    ),
    "status": Action("status:status", "show what is done, running, diverged and failed"),
    "cancel": Action("runs:cancel_jobs", "cancel the sweep's jobs on the cluster"),
    "export": Action("runs:export", "write finished runs as .parquet or .csv", "table=FILE"),
    "import": Action("runs:import_", "read the runs of a table into the run folder", "table=FILE"),
    "adapter": Action(
        "runs:adapter",
        "retrain a finished run and save its adapter for PEFT (full fine-tuning: its weights), "
        "unless the final loss differs; max_difference=0.02 accepts a difference of up to 0.02",
        "run=ID out=DIR",
        "max_difference",
    ),
    "verify": Action(
        "runs:verify",
        "retrain finished runs alone, to check that packing changes no result",
        "sample=3",
    ),
    "extend": Action("runs:extend", "add the runs that help most to undecided claims; start none"),
    "layers": Action(
        "plans:layers", "show what is trained of each layer set, with counts; needs no weights"
    ),
    "fetch": Action(
        "plans:fetch",
        "download the weights and data of the runs from the hub, for nodes without network",
    ),
    "check_gpu": Action(
        "check:check_gpu",
        "compare this machine's GPU with the plan, and write a page and a hardware file; the same "
        "command goes on where it was. In a Slurm job: with srun. Without a GPU: small shapes",
        more="hardware",
        about="one machine",
    ),
    "advise": Action(
        "customers:advise",
        "LoRA or full fine-tuning, with which rank, learning rate and batch size, at what cost: "
        "for each row of a table, or for one customer (+customer.model=llama-3.1-8b "
        "+customer.task=sft ...). out=FILE.html: the page; why=NAME: all reasons",
        "customers=FILE",
        "customer why out hardware",
        about="customers",
    ),
    "measure": Action(
        "customers:measure",
        "measure the information in rows of FILE (or of dataset=NAME), in bits, for action=advise",
        "data=FILE",
        "rates",
        about="one model and one data set",
    ),
    "fleet": Action(
        "customers:fleet",
        "train an adapter for each customer of a table (column data: a file of rows, or a folder "
        "with train and test). rates=N learning rates around the advised one, or rates=advised; "
        "instead_of_full=lora; serve=vllm: adapters for vLLM; out=DIR. "
        f"action={', '.join(OF_FLEET)} take customers=FILE, too",
        "customers=FILE",
        FLEET_SETTINGS,
        about="customers",
    ),
    "verify_served": Action(
        "customers:verify_served",
        "check the folders of a fleet's adapters, and with url=http://host:port (or a list) ask "
        "vLLM whether each adapter does there what it did in training",
        "customers=FILE url=URL",
        FLEET_SETTINGS,
        about="customers",
    ),
}


def check(request: Request) -> None:
    """Raise SpecError if the action does not exist, or does not take a setting that was given."""
    name, sweep, fleet = request.action, request.sweep_name, bool(request.customers)
    if name not in ACTIONS:
        raise SpecError(unknown("action", name, ACTIONS))
    action, hardware = ACTIONS[name], hardware_of(request) if request.hardware else None
    if sweep and (about := "customers" if fleet else action.about):
        raise SpecError(f"action={name} is about {about}. Leave +sweep={sweep} out.")
    if name in ("fleet", "verify_served") and not fleet:
        raise SpecError(
            f"action={name} is about the rows of a table. Add customers=FILE (CSV or YAML, with "
            "the columns name, model, task and data)."
        )
    if hardware and "hardware" not in action.reads and request.cluster.kind != "slurm":
        raise SpecError(
            f"hardware={hardware.name} with action={name}: only action=plan, action=advise and "
            "cluster=slurm are for other hardware. Add action=plan, or leave hardware out."
        )
    taken = {*action.reads, "hardware"}
    if fleet and name in OF_FLEET:
        taken |= {*FLEET_SETTINGS.split()}
    if request.sweep is not None and request.sweep.search is not None:
        taken |= {"budget", *(["out"] if name in OF_SEARCH else [])}
    defaults = vars(Settings())
    for key in dict.fromkeys([*SEARCHED, *(key for a in ACTIONS.values() for key in a.reads)]):
        if key not in taken and getattr(request, key) != defaults[key]:
            readers = [f"action={n}" for n, a in ACTIONS.items() if key in a.reads]
            readers += ["a search (+sweep=tune)"] * (key in SEARCHED)
            raise SpecError(f"{key} is only for {' and '.join(readers)}, so leave it out here.")


def act(request: Request, trainer: Trainer | str | None = None) -> int:
    """Do the requested action and print its answer; return the exit status.

    A sweep of sweeps is answered part by part, as one JSON object with format=json.

    `trainer`: replaces the real trainer in tests and benchmarks.
    """
    from lorasweep.cli import customers, runs  # --help needs neither

    store = RunStore(request.exec.runs_dir, jobs=RunningJobs(request.exec.runs_dir))
    with suppress(FileNotFoundError, PermissionError):  # the action reports them
        os.scandir(store.root).close()
    name, as_json = request.action, request.format == "json"
    if request.customers and name != "advise":
        request = customers.plan_fleet(request)
        name = "fleet" if request.action == "run" else name
    status = int(name != "fleet" and any(m["problem"] for m in request.members))
    if name != "fleet" and request.members and not request.points:
        faults = [{"name": m["name"], "error": m["problem"]} for m in request.members]
        Answer(faults).show(as_json)
        return status
    do = resolve_name(f"lorasweep.cli.{ACTIONS[name].does}")
    trains = {"trainer": trainer} if "trainer" in inspect.signature(do).parameters else {}
    on_gpus = bool(request.hardware) and hardware_of(request).has_speeds
    if on_gpus and (
        name in ("fleet", "plan") or not (name in (*WHOLE_STUDY, "import") or ACTIONS[name].about)
    ):
        given, request = request, runs.within_limit(request)
        had, has = (any(p.points for p in r.parts or [r]) for r in (given, request))
        if had and not has:
            raise SpecError(f"no run is left within exec.max_gpus={request.exec.max_gpus}.")
    whole = name in WHOLE_STUDY or (on_gpus and name == "plan")
    studied = request.parts if not whole else []
    parts = studied or [request]
    for part in parts if studied and name == "run" else ():  # before the first part starts
        runs.check(part)
    values = {}
    for part in parts:
        if studied and not as_json:
            print(f"== {part.sweep_name}", flush=True)
        answer = do(part, store, **trains)
        status = max(status, answer.status)
        if studied and as_json:
            values[part.title] = answer.plain()
        else:
            answer.show(as_json)
        if status >= runs.STOPPED:
            break
    if studied and as_json:
        print(json.dumps(values))
    elif studied and name == "run" and status < runs.STOPPED and request.cluster.kind == "local":
        command = f"python -m analysis study --reports-dir {request.exec.reports_dir} --out FOLDER"
        print(f"a table and pages of these answers and the kept ones: {command}")
    return status


# ---------------------------------------------------------------- help

START = """\
lorasweep: when does LoRA match full fine-tuning, and with which learning rate?

Ask a question (a sweep), or train one run:
  python -m lorasweep +sweep=lr_ratio action=plan     show what would run and what it costs
  python -m lorasweep +sweep=lr_ratio                 run what is missing, print the answer
  python -m lorasweep +sweep=lr_ratio action=status   show what is done, running, failed
  python -m lorasweep model=tiny128 dataset=dialect method=lora method.rank=16 lr=2e-3
  python -m lorasweep model=./my-model dataset=rows.csv method.rank=16 lr=2e-4 steps=100
Choose the size of a sweep with scale=smoke, tiny (the default), small, ...
Running a command again is safe: finished runs are not repeated, interrupted runs resume.
"""
MORE = """\
More commands
  python -m lorasweep +sweep=study                   all questions, one after another
  python -m analysis --help                          judge runs of your own, or all kept answers
On a Slurm cluster (docs/clusters.md) a command submits what is missing and returns; the same
command prints the answer later:
  python -m lorasweep +sweep=lr_ratio cluster=slurm cluster.partition=gpu cluster.gpus=1
"""
SETTINGS = """\
Settings
  format=json                               one JSON object on stdout
  exec.runs_dir=DIR (or LORASWEEP_RUNS)     exec.models_dir=[DIR] (LORASWEEP_MODELS)
  exec.data_dir=[DIR] (LORASWEEP_DATA)      exec.reports_dir=DIR (LORASWEEP_REPORTS)
  exec.workers=N exec.threads=N exec.pack_size=N exec.micro_batch_size=N
  exec.checkpoint_s=60 exec.retry=true                       mirror=wandb
  exec.world_size=4 exec.activation_checkpointing=true       a run on four GPUs
Changing a sweep's grid: sweep.arms.lora.rank=[1,16] +sweep.axes.batch_size=[4,8] ~sweep.arms.fullft
  'sweep.arms.lora.lr=${geom:1e-4,1e-2,4}'  4 learning rates per decade
  'sweep.arms.lora.lr=${around:1e-3,7,2}'   7 learning rates around 1e-3, a factor of 2 apart
Your own model and rows
  model=FOLDER, FILE.gguf or owner/name@revision
  dataset=FILE (.jsonl, .json, .csv, .parquet), FOLDER or owner/name:configuration@revision
  files in DIR/sweep, DIR/model, DIR/dataset: --config-dir DIR +sweep=mine model=mine
"""


def front_page(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the page that is shown without arguments; `groups`: as of `help_page`."""
    lists = {"Sweeps": groups["sweep"], "Scales": groups["scale"], "Actions": ACTIONS}
    filled = [textwrap.fill(f"{k}: {', '.join(v)}", 90) for k, v in lists.items()]
    return "\n".join([START, *filled, "", MORE, "All settings: python -m lorasweep --help"])


def help_page(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the page of --help; `groups`: the options of each group of configuration files."""
    lines = ["Actions (action=NAME)"]
    for name, action in ACTIONS.items():
        head = f"  {f'{name} {action.example}'.strip():24} "
        lines += textwrap.wrap(head + action.help, 118, subsequent_indent=" " * len(head))
    options = [f"{group}: {', '.join(names)}" for group, names in groups.items()]
    end = ["Groups (group=option)", *options, "Show the composed configuration: add --cfg job"]
    return "\n".join([START, MORE, *lines, SETTINGS, *end])
