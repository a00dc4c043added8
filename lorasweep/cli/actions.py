"""The table of actions: their verbs, the settings they take, their call, and the help.

`lorasweep plan lr_ratio scale=small` is rewritten as +sweep=lr_ratio action=plan scale=small.
"""

import dataclasses
import inspect
import json
import os
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

from lorasweep.config.catalogue import conf_dir
from lorasweep.config.compose import GROUPS, Composer, literal, quoted
from lorasweep.errors import SpecError, unknown
from lorasweep.launch.slurm.queue import RunningJobs
from lorasweep.launch.torch_trainer import Trainer
from lorasweep.plan.detect import hardware_of
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.request import Request, Settings
from lorasweep.work.answer import refuse_claims
from lorasweep.work.printed import Answer

FLEET_SETTINGS = "customers rates instead_of_full serve out score"
OF_SEARCH = ("run", "plan", "status", "cancel")
"""Actions that take all settings of a search's command, such as out=DIR."""
OF_FLEET = ("plan", "status", "cancel", "fetch")
"""Actions that with customers=FILE are about the runs of a fleet."""
WHOLE_STUDY = ("export", "adapter", "fetch")
"""Actions that are called once for a sweep of sweeps; all others are called once per part."""
SEARCHED = ("out", "budget", "score")
OURS, STUDY, MANY, HERE = BLOCKS = (
    "My model and my rows",
    "A question of the study",
    "Many customers",
    "This machine or cluster",
)
"""Parts of the front page."""


SWEEP = ("sweep", *GROUPS)
"""Words of a sweep: its name, and another base and data set for all its runs."""
OF_SWEEP = " ".join(SWEEP)


class Action(NamedTuple):
    """One action of the command line: its verb is the name with - for _, or action=NAME."""

    does: str
    """The function of this package: (request), store and, if it trains, trainer -> Answer."""
    example: str
    """What may follow the verb."""
    help: str
    """Its first clause, up to the first semicolon, stands on the front page."""
    more: str = ""
    """Further settings that only some actions read, this one among them."""
    words: str = OF_SWEEP
    """Settings that the words after the verb give, in this order."""
    block: str = STUDY
    """The part of the front page where it stands."""
    about: str = ""
    """What it is about, if not the runs of a sweep."""

    @property
    def reads(self) -> list[str]:
        """Return the settings that only some actions read, this one among them."""
        return [w for w in (*self.words.split(), *self.more.split()) if w not in SWEEP]


SEARCH = Action(
    "lorasweep.work.run:run",
    "./my-model rows.csv budget=2h out=best",
    "find method, rank and learning rate for a model and rows; budget=2h, 90min, 40runs or "
    "500gpuh; out=DIR writes the best adapter or weights. It is a sweep: lorasweep plan tune ./m "
    "rows.csv shows the cost",
    "budget out score",
    "model dataset",
    OURS,
)
ACTIONS = {
    "measure": Action(
        "lorasweep.work.measure:measure",
        "./my-model rows.csv",
        "measure how much information is in rows, in bits; lorasweep advise uses it. data=FILE, "
        "or dataset=NAME for all its rows; rates=N learning rates",
        "rates",
        *("model data", OURS, "one model and one data set"),
    ),
    "rate": Action(
        "lorasweep.cli.plans:rate",
        "./my-model full_lr=1e-5 alpha=32 steps=1000",
        "predict LoRA's learning rate from full fine-tuning's, or the reverse; trains nothing. "
        "lora_lr=2e-4 at_alpha=16: from LoRA's at another alpha; rank=, layers=",
        "full_lr lora_lr at_alpha at_steps",
        *("model", OURS, "one model"),
    ),
    "fit": Action(
        "lorasweep.cli.runs:fit",
        "runs.csv",
        "fit the best learning rates in a table of runs of any trainer; docs/usage.md has the "
        "columns; out=FILE.json writes the fits, out=FILE.html a page. +columns.lr=THEIRS: their "
        "name of a column; higher=COLUMN: a metric of which more is better; show=ratio or "
        "show=drift: LoRA's against full fine-tuning's, and over rank; within=0.01: width of the "
        "band",
        "out columns higher show within",
        *("table", OURS, "a table of runs"),
    ),
    "adapter": Action(
        "lorasweep.work.again:adapter",
        "RUN_ID out=DIR",
        "save the adapter of a finished run for PEFT, or its weights; it trains the run again and "
        "writes nothing if the final loss differs; max_difference=0.02 accepts a difference",
        "out max_difference",
        *("run", OURS),
    ),
    "run": Action(
        "lorasweep.work.run:run",
        "lr_ratio",
        "train what is missing and print the answer; run may be left out",
    ),
    "plan": Action(
        "lorasweep.cli.plans:show",
        "lr_ratio hardware=h100",
        "show what would run and what it costs; here, or on a machine of conf/hardware",
        "hardware",
    ),
    "status": Action(
        "lorasweep.cli.status:status",
        "lr_ratio watch=5s",
        "show what is done, running, diverged, failed; watch=5s: again, until all runs have ended",
        "watch",
    ),
    "report": Action(
        "lorasweep.cli.runs:report",
        "lr_ratio",
        "judge the finished runs and print the answer; train nothing",
    ),
    "answer": Action(
        "lorasweep.cli.runs:answer_again",
        "lr_ratio",
        "print an answer that was given, judged again from its table: yours, else the kept one; "
        "study: all claims in one table; lr_ratio-small: that report. table=FILE out=DIR judges "
        "other runs; study out=DIR writes the pages",
        "table out",
        words="name",
        about="a report",
    ),
    "extend": Action(
        "lorasweep.cli.runs:extend",
        "lr_ratio",
        "add the runs that help most to undecided claims; start none",
    ),
    "verify": Action(
        "lorasweep.work.again:verify",
        "lr_ratio sample=3",
        "train finished runs again, alone, to check that packing changes no result",
        "sample",
    ),
    "export": Action(
        "lorasweep.cli.runs:export",
        "lr_ratio out=runs.csv",
        "write finished runs as .parquet or .csv",
        "out",
    ),
    "import": Action(
        "lorasweep.cli.runs:import_",
        "runs.csv",
        "read the runs of an exported table into the run folder",
        words="table",
    ),
    "advise": Action(
        "lorasweep.cli.plans:advise",
        "customers.csv",
        "LoRA or full fine-tuning, which settings, at what cost, for each row of a table; or for "
        "one customer (+customer.model=llama-3.1-8b +customer.task=sft ...). out=FILE.html: the "
        "page; why=NAME: all reasons",
        "customer why out hardware",
        *("customers", MANY, "customers"),
    ),
    "fleet": Action(
        "lorasweep.work.fleet:fleet",
        "customers.csv out=adapters",
        "train an adapter for each customer of a table; column data: a file of rows, or a folder "
        "with train and test. rates=N learning rates around the advised one, or rates=advised; "
        "instead_of_full=lora; serve=vllm: adapters for vLLM. "
        f"{', '.join(OF_FLEET)} fleet customers.csv are about its runs",
        FLEET_SETTINGS,
        *("customers", MANY, "customers"),
    ),
    "verify_served": Action(
        "lorasweep.work.fleet:verify_served",
        "customers.csv out=adapters url=http://host:8000",
        "check the folders of adapters, and at url= (or a list) whether vLLM serves them right",
        f"url {FLEET_SETTINGS}",
        *("customers", MANY, "customers"),
    ),
    "check_gpu": Action(
        "lorasweep.cli.check:check_gpu",
        "",
        "compare this machine's GPU with the plan; writes a page and a hardware file. The same "
        "command resumes. In a Slurm job: with srun. Without a GPU: small shapes",
        "hardware",
        *("", HERE, "one machine"),
    ),
    "matrices": Action(
        "lorasweep.cli.plans:matrices",
        "layers",
        "show what each layer set trains, with counts; needs no weights",
        block=HERE,
    ),
    "fetch": Action(
        "lorasweep.cli.plans:fetch",
        "lr_ratio scale=paper",
        "download weights and data of the runs from the hub, for nodes without a network",
        block=HERE,
    ),
    "cancel": Action(
        "lorasweep.cli.runs:cancel_jobs",
        "lr_ratio",
        "cancel the sweep's jobs on the cluster",
        block=HERE,
    ),
}
VERBS = {name.replace("_", "-"): name for name in ACTIONS}
_SETTING = re.compile(r"\+{0,2}[A-Za-z_][\w.@]*=|[~+][A-Za-z_][\w.@]*$|~[A-Za-z_][\w.]*=")


def as_overrides(typed: Sequence[str], sweeps: Collection[str]) -> list[str]:
    """Rewrite verbs and words as Hydra's overrides, the words as literals.

    Words are what is no setting (KEY=VALUE). The first is a verb or one of `sweeps`.

    Raises:
        SpecError: there is no such verb or sweep, a word is too many, or given as a setting, too.
    """
    words = [t for t in typed if not _SETTING.match(t)]
    settings = ["+" * t.startswith("sweep=") + t for t in typed if _SETTING.match(t)]
    if not words:
        return settings
    first, *given = words
    verb, keys, head = first, list(SWEEP), list[str]()
    if first in VERBS:  # also if a sweep of the user's or of a package has the name
        head = [f"action={VERBS[first]}"] if first != "run" else []
        keys = ACTIONS[VERBS[first]].words.split()
        if first == "rate":
            settings = [re.sub(r"^(alpha|rank|layers)=", r"method.\1=", s) for s in settings]
        if given[:1] == ["fleet"] and first in OF_FLEET:
            keys, given = ["customers"], given[1:]
        if keys and not given and not settings:
            raise SpecError(f"{first} needs more:\n{usage(first)}")
    elif first in sweeps:
        verb, given = f"[run] {first}", words
        if words == ["tune"] and not any(s.startswith("model=") for s in settings):
            raise SpecError(f"tune needs more:\n{usage('tune')}")
    elif Path(first).expanduser().exists():
        raise SpecError(f"{first!r} is no command. To find its settings: lorasweep tune {first}")
    else:
        raise SpecError(unknown("command", first, [*VERBS, *sweeps, "help"]))
    if keys[:1] == ["sweep"] and given and given[0] not in sweeps:
        raise SpecError(unknown("sweep", given[0], sweeps))
    if len(given) > len(keys):
        raise SpecError(
            f"{given[len(keys)]!r} is one word too many after {verb}: expected "
            f"{' '.join(map(str.upper, keys)) or 'only settings'}. Settings are KEY=VALUE; a file "
            "whose name has = in it is ./NAME."
        )
    for key, word in zip(keys, given):
        text = word if key in SWEEP else literal(word)
        head.append(f"+sweep={word}" if key == "sweep" else f"{key}={quoted(text)}")
    named = {text.lstrip("+").partition("=")[0] for text in head}
    if twice := [t for t in settings if t.lstrip("+~").partition("=")[0] in named]:
        raise SpecError(
            f"{twice[0]!r} sets what a word of the command has set. Leave one of them out."
        )
    return [*head, *settings]


def check(request: Request) -> None:
    """Raise SpecError if the action does not exist, or does not take a setting that was given."""
    name, sweep, fleet = request.action, request.sweep_name, bool(request.customers)
    if name not in ACTIONS:
        raise SpecError(unknown("action", name, ACTIONS))
    if request.sweep is not None:
        refuse_claims(request)
    action, hardware = ACTIONS[name], hardware_of(request.hardware) if request.hardware else None
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
        taken |= {"budget", *(["out", "score"] if name in OF_SEARCH else [])}
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
    from lorasweep.cli.status import watch
    from lorasweep.work import fleet, run  # --help needs neither

    store = RunStore(request.exec.runs_dir, jobs=RunningJobs(request.exec.runs_dir))
    with suppress(FileNotFoundError, PermissionError):  # the action reports them
        os.scandir(store.root).close()
    name, as_json = request.action, request.format == "json"
    if request.customers and name != "advise":
        request = fleet.plan_fleet(request)
        name = "fleet" if request.action == "run" else name
    if request.watch:
        return watch(request, store, lambda: act(dataclasses.replace(request, watch="")))
    status = int(name != "fleet" and any(m["problem"] for m in request.members))
    if name != "fleet" and request.members and not request.points:
        faults = [{"name": m["name"], "error": m["problem"]} for m in request.members]
        Answer(faults).show(as_json)
        return status
    do = resolve_name(ACTIONS[name].does)
    trains = {"trainer": trainer} if "trainer" in inspect.signature(do).parameters else {}
    on_gpus = bool(request.hardware) and hardware_of(request.hardware).has_speeds
    if on_gpus and (
        name in ("fleet", "plan") or not (name in (*WHOLE_STUDY, "import") or ACTIONS[name].about)
    ):
        given, request = request, run.within_limit(request)
        had, has = (any(p.points for p in r.parts or [r]) for r in (given, request))
        if had and not has:
            raise SpecError(f"no run is left within exec.max_gpus={request.exec.max_gpus}.")
    whole = name in WHOLE_STUDY or (on_gpus and name == "plan")
    studied = request.parts if not whole else []
    if name == "report":  # of the parts that have a finished run
        studied = [p for p in studied if any(store.result(q.id) for q in p.points)]
    parts = studied or [request]
    for part in parts if studied and name == "run" else ():  # before the first part starts
        run.check(part)
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
        if status >= run.STOPPED:
            break
    if studied and as_json:
        print(json.dumps(values))
    elif studied and name == "run" and status < run.STOPPED and request.cluster.kind == "local":
        where = f"exec.reports_dir={request.exec.reports_dir}"
        print(f"these answers and the kept ones: lorasweep answer study {where} out=DIR")
    return status


# ---------------------------------------------------------------- help

MORE = """\
One run: lorasweep model=./my-model dataset=rows.csv method.rank=16 lr=2e-4 steps=100
On a Slurm cluster: lorasweep lr_ratio cluster=slurm cluster.gpus=1 submits; later it answers.
Running a command again is safe: finished runs are not repeated, interrupted runs resume.
Help: lorasweep help plan (a command), lorasweep help lr_ratio (a sweep), lorasweep --help (all)
"""
SETTINGS = """\
Settings
  format=json: one JSON object on stdout    mirror=wandb
  exec.runs_dir=DIR (or LORASWEEP_RUNS)     'exec.models_dir=[DIR]' (LORASWEEP_MODELS)
  'exec.data_dir=[DIR]' (LORASWEEP_DATA)    exec.reports_dir=DIR (LORASWEEP_REPORTS)
  exec.workers=N exec.threads=N exec.pack_size=N exec.micro_batch_size=N exec.retry=true
  exec.world_size=4 exec.activation_checkpointing=true       a run on four GPUs
  cluster=slurm cluster.partition=gpu       submit and return; later the same command answers
  model=NAME,NAME dataset=NAME              other bases and data sets, for all arms of a sweep
  lora.rank=1,16 lora.lr=1e-3,2e-3          a setting of all arms of a method
  '+sweep.axes.batch_size=[4,8]' 'sweep.arms.lora.rank=[1,16]' '~sweep.arms.fullft'
  'sweep.arms.lora.lr=${geom:1e-4,1e-2,4}'  4 learning rates per decade
  'sweep.arms.lora.lr=${around:1e-3,7,2}'   7 learning rates around 1e-3, a factor of 2 apart
  model=FOLDER, FILE.gguf or owner/name@revision
  dataset=FILE (.jsonl, .json, .csv, .parquet), FOLDER or owner/name:configuration@revision
  --config-dir DIR: your files in DIR/sweep, DIR/model and DIR/dataset
"""


def front_page(compose: Composer) -> str:
    """Return the page that is shown without arguments."""
    lines = ["lorasweep: LoRA or full fine-tuning, and with which learning rate, rank and batch?"]
    verbs = {"tune": SEARCH, **{verb: ACTIONS[name] for verb, name in VERBS.items()}}
    for block in BLOCKS:
        shown = (
            (f"lorasweep {verb} {a.example}".rstrip(), a.help.partition(";")[0])
            for verb, a in verbs.items()
            if a.block == block
        )
        lines += ["", block, *_columns(shown)]
        if block == STUDY:
            lines += ["  Questions", *_columns(compose.about("sweep", "question").items(), "    ")]
            sizes = compose.about("scale", "scale.about").items()
            lines += ["  Sizes", *_columns(((f"scale={k}", v) for k, v in sizes), "    ")]
    return "\n".join([*lines, "", MORE.rstrip()])


def _columns(pairs: Iterable[tuple[str, str]], indent: str = "  ") -> list[str]:
    """Return rows of two columns, at most 110 characters wide."""
    pairs, lines = list(pairs), list[str]()
    width = max(len(left) for left, _ in pairs) + len(indent) + 2
    for left, right in pairs:
        head = f"{indent}{left}".ljust(width)
        lines += textwrap.wrap(head + right, 110, subsequent_indent=" " * width)
    return lines


def usage(verb: str) -> str:
    """Return the help of a verb: its words, what it does, its own settings, and an example."""
    action = SEARCH if verb == "tune" else ACTIONS[VERBS[verb]]
    words, settings = action.words.split(), action.more.split()
    lines = [" ".join(["lorasweep", verb, *(f"[{w.upper()}]" for w in words), "[KEY=VALUE ...]"])]
    lines += textwrap.wrap(action.help, 96, initial_indent="  ", subsequent_indent="  ")
    lines += [f"  settings: {' '.join(f'{key}=' for key in settings)}"] if settings else []
    return "\n".join([*lines, f"  example: lorasweep {verb} {action.example}".rstrip()])


def help_of(words: Sequence[str], compose: Composer) -> str:
    """Return the help of a verb or a sweep; without words, of everything."""
    if words and (name := words[0]) in ("tune", *VERBS):
        return usage(name)
    questions = compose.about("sweep", "question") if words else {}
    if words and name in questions:
        how = textwrap.wrap(compose.about("sweep", "how")[name], 100)
        return "\n".join([f"{name}: {questions[name]}", *how, f"lorasweep plan {name}: its cost"])
    if words:
        raise SpecError(unknown("command", name, [*VERBS, *questions]))
    groups = sorted({"method", *(p.name for p in conf_dir().iterdir() if p.is_dir())})
    options = [f"{group}: {', '.join(compose.options(group))}" for group in groups]
    end = ["Groups (group=option)", *options, "Show the composed configuration: add --cfg job"]
    verbs = "\n".join(map(usage, ("tune", *VERBS)))
    return "\n".join(["lorasweep VERB [WORD ...] [KEY=VALUE ...]", verbs, SETTINGS, *end])
