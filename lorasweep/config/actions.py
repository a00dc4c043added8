"""The table of actions: name, help, settings. `lorasweep.cli.actions` has their functions.

A setting that only some actions read is refused with the other actions.
"""

from dataclasses import dataclass
from typing import Any

from lorasweep.errors import SpecError, unknown


@dataclass(frozen=True)
class Action:
    """One action of the command line: action=NAME."""

    name: str
    help: str
    example: str = ""
    """Settings that --help shows after the name."""
    reads: tuple[str, ...] = ()
    """Settings that only some actions read, this one among them."""
    about: str = "the runs of a sweep or a single run"
    allows_sweep: bool = True
    needs_run: bool = True
    """Without a sweep, the action uses the single run of the command line, or a fleet's runs."""
    of_search: bool = False
    """A search's command takes the action with all its settings, such as out=DIR."""
    of_fleet: bool = False
    """With customers=FILE, the action uses the runs of a fleet."""


FLEET_SETTINGS = ("customers", "rates", "instead_of_full", "serve", "out")

ACTIONS: dict[str, Action] = {
    action.name: action
    for action in (
        Action(
            "run",
            "train what is missing and print the answer (the default). With +sweep=tune: "
            "budget=2h, 90min, 40runs or 500gpuh; out=DIR writes the best adapter or weights",
            reads=("out",),
            of_search=True,
        ),
        Action(
            "plan",
            "show what would run and what it costs, here or on other machines (conf/hardware). "
            "budget=500gpuh: which claims to ask first, and what stays open",
            "hardware=h100",
            reads=("hardware", "out"),
            of_search=True,
            of_fleet=True,
        ),
        Action(
            "status",
            "show what is done, running, diverged and failed",
            "watch=true",
            reads=("watch", "out"),
            of_search=True,
            of_fleet=True,
        ),
        Action(
            "cancel",
            "cancel the sweep's jobs on the cluster",
            reads=("out",),
            of_search=True,
            of_fleet=True,
        ),
        Action(
            "export",
            "write finished runs as .parquet or .csv",
            "table=FILE",
            reads=("table",),
            needs_run=False,
        ),
        Action(
            "import",
            "read the runs of a table into the run folder",
            "table=FILE",
            reads=("table",),
            needs_run=False,
        ),
        Action(
            "adapter",
            "retrain a finished run and save its adapter for PEFT (full fine-tuning: its weights), "
            "unless the final loss differs; max_difference=0.02 accepts a difference of up to 0.02",
            "run=ID out=DIR",
            reads=("run", "out", "max_difference"),
            needs_run=False,
        ),
        Action(
            "verify",
            "retrain finished runs alone, to check that packing changes no result",
            "sample=3",
            reads=("sample",),
        ),
        Action(
            "extend", "add the runs that help most to undecided claims; start none", needs_run=False
        ),
        Action(
            "qualify",
            "train full fine-tuning and the largest LoRA, to check that the tasks are suitable",
            needs_run=False,
        ),
        Action(
            "measure_packs",
            "time updates alone and in packs on this machine, for later plans",
            of_fleet=True,
        ),
        Action("layers", "show what is trained of each layer set, with counts; needs no weights"),
        Action(
            "fetch",
            "download the weights and data of the runs from the hub, for nodes without network",
            of_fleet=True,
        ),
        Action(
            "check_gpu",
            "measure this machine's GPU in five parts, compare it with the plan, and write a page "
            "and a hardware file; the same command goes on where it was. With cluster=slurm: as a "
            "job. Without a GPU: the same with small shapes",
            reads=("hardware",),
            about="one machine",
            allows_sweep=False,
            needs_run=False,
        ),
        Action(
            "advise",
            "LoRA or full fine-tuning, with which rank, learning rate and batch size, at what "
            "cost: for each row of a CSV or YAML table, or for one customer "
            "(+customer.model=llama-3.1-8b +customer.task=sft ...). out=FILE.html: the page; "
            "why=NAME: all reasons, and the command that tests the advice",
            "customers=FILE",
            reads=("customers", "customer", "why", "out", "hardware"),
            about="customers",
            allows_sweep=False,
            needs_run=False,
        ),
        Action(
            "measure",
            "measure the information in steps x batch_size rows of FILE (or of dataset=NAME), in "
            "bits, under the base model and online during training; action=advise uses the result "
            "for a customer with these data",
            "data=FILE",
            reads=("data", "rates"),
            about="one model and one data set",
            allows_sweep=False,
        ),
        Action(
            "fleet",
            "train an adapter for each customer of a table (column data: a .jsonl, .json, .csv or "
            ".parquet file, or a folder with train and test). rates=N: exactly N learning rates "
            "around the advised one, or rates=advised; instead_of_full=lora; serve=vllm: adapters "
            "for vLLM; out=DIR. action=plan, status, cancel, fetch and measure_packs take "
            "customers=FILE, too",
            "customers=FILE",
            reads=FLEET_SETTINGS,
            about="customers",
            allows_sweep=False,
        ),
        Action(
            "verify_served",
            "check the folders of a fleet's adapters, and with url=http://host:port ask a running "
            "server of the OpenAI API whether each adapter does there what it did in training. "
            "Several servers: url=[URL,URL]",
            "customers=FILE url=URL",
            reads=(*FLEET_SETTINGS, "url"),
            about="customers",
            allows_sweep=False,
        ),
    )
}


def check_action(config: Any, sweep_name: str | None) -> Action:
    """Return the requested action of a composed configuration (`schema.Config`).

    Raises:
        SpecError: the action does not exist, or does not read a setting that was given.
    """
    if config.action not in ACTIONS:
        raise SpecError(unknown("action", config.action, ACTIONS))
    action = ACTIONS[config.action]
    about = "customers" if config.customers else action.about
    if sweep_name is not None and (about == "customers" or not action.allows_sweep):
        raise SpecError(f"action={action.name} is about {about}. Leave +sweep={sweep_name} out.")
    if action.name in ("fleet", "verify_served") and not config.customers:
        what = "trains an adapter for each row" if action.name == "fleet" else "checks the adapters"
        raise SpecError(
            f"action={action.name} {what} of a table. Add customers=FILE (CSV or YAML, with the "
            "columns name, model, task and data)."
        )
    of_fleet = action.of_fleet and bool(config.customers)
    allowed = {*action.reads, *(FLEET_SETTINGS if of_fleet else ())}
    defaults = type(config)()
    for key in dict.fromkeys(key for other in ACTIONS.values() for key in other.reads):
        if key == "hardware" or key in allowed:  # compose checks hardware
            continue
        if getattr(config, key) != getattr(defaults, key):
            readers = " and ".join(f"action={a.name}" for a in ACTIONS.values() if key in a.reads)
            hint = " (of a customer: +customer.data)" if key == "data" else ""
            raise SpecError(
                f"{key} is only for {readers}. Use that action, or leave {key} out{hint}."
            )
    return action
