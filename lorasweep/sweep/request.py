"""One command of a user, complete and checked, and its JSON form for the follow-up job."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.spec.run import LR_RANGE
from lorasweep.spec.values import ABOVE_0, Is
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import ADDED_AFTER, Sweep, made

HASH_DIGITS = 6
"""Hexadecimal digits of the hash in a title. 6 suffice: a folder holds few titles."""


@dataclass
class Settings:
    """Settings of the command that do not affect any run."""

    action: str = "run"
    format: Literal["text", "json"] = "text"
    mirror: Literal["none", "wandb"] = "none"
    table: str = ""
    run: str = ""
    name: str = ""
    """action=answer: a question, the folder of one of its reports, or study for all."""
    columns: dict[str, Any] = field(default_factory=dict)
    """action=fit: the table's name of a column, by our name."""
    higher: str = ""
    """action=fit: the column of a metric of which more is better; empty: the loss."""
    within: Annotated[float, Is("units of the metric", ABOVE_0)] = 0.01
    """action=fit: how much more loss than the lowest the band of learning rates allows."""
    show: Literal["", "ratio", "drift"] = ""
    """action=fit: what follows from the fits, in their place."""
    out: str = ""
    sample: Annotated[int, Is("runs", 1)] = 3
    """action=verify: number of runs to train again."""
    max_difference: Annotated[float | None, Is("nats", 0)] = None
    """action=adapter: accepted difference of the final metric; None: the noise between seeds."""
    watch: str = ""
    """action=status: time between pictures, such as 5s or 1min; empty: one picture."""
    customers: str = ""
    """A table of customers, for action=advise, action=fleet and actions on the runs of a fleet."""
    customer: dict[str, Any] = field(default_factory=dict)
    """action=advise: one customer, by column."""
    why: str = ""
    """action=advise: the customer whose reasons are shown."""
    data: str = ""
    """action=measure: a file of rows, in place of a data set."""
    budget: str = ""
    """What a search of learning rates may use, such as 2h, 90min, 40runs or 500gpuh; empty: until
    it is decided."""
    instead_of_full: Literal["", "lora"] = ""
    """action=fleet: "lora" trains LoRA where the adviser says full fine-tuning."""
    score: Literal["auto", "always", "never"] = "auto"
    """Whether exact answers to test prompts are counted (fleet/score.py). auto: if it is fast."""
    url: Any = ""
    """action=verify_served: address of a vLLM, or a list; empty: only folders are checked."""
    serve: str = "peft"
    """action=fleet: the server of the adapters, by a file in conf/serve."""
    full_lr: Annotated[float | None, Is("learning rate", *LR_RANGE)] = None
    lora_lr: Annotated[float | None, Is("learning rate", *LR_RANGE)] = None
    """action=rate: the known best learning rate of one method."""
    at_alpha: Annotated[float | None, Is("", ABOVE_0, 1e6)] = None
    at_steps: Annotated[int | None, Is("updates", 1)] = None
    """action=rate: alpha and updates at which `lora_lr` is the best; None: those asked for."""
    rates: Any = 3
    """Number of learning rates, around lr (action=measure) or the advised one (action=fleet)."""


@dataclass(kw_only=True)
class Request(Settings):
    """One command: its settings, the sweep or run, and where it runs."""

    scale: str
    exec: Exec
    cluster: Cluster
    sweep_name: str | None
    sweep: Sweep | None
    points: list[Point]
    hardware: dict[str, Any] = field(default_factory=dict)
    """Values of a file in conf/hardware; empty: this machine."""
    parts: list["Request"] = field(default_factory=list)
    """The requests of the sweeps that this sweep consists of, which run one after another."""
    changed: str = ""
    """Hash of the runs, if the command line changed the runs of the sweep's file; else empty."""
    changes: list[str] = field(default_factory=list)
    """The options that changed the runs, as typed."""
    members: list[dict[str, Any]] = field(default_factory=list)
    """The customers of a fleet, in the form of `fleet.runs.Member.plain`."""
    folders: list[str] = field(default_factory=list)
    """Folders of configuration; the folder of the user comes first."""
    given: list[str] = field(default_factory=list)
    """Keys set on the command line."""
    refused: list[str] = field(default_factory=list)
    """Names of the sweep's claims that its trainer's runs cannot decide; they are left out."""
    described: list[str] = field(default_factory=list)
    """Names of the models and data sets that no configuration file describes."""
    task: dict[str, Any] = field(default_factory=dict)
    """The task of the follow-up job that gives this command; empty: a user does."""

    @property
    def title(self) -> str:
        """Name of reports, interim analyses and jobs. Requests with other runs get other titles."""
        if not self.sweep_name:
            return f"single-{self.points[0].id}"
        changed = f"-{self.changed}" if self.changed else ""
        return f"{self.sweep_name}-{self.scale}{changed}"

    def plain(self) -> dict[str, Any]:
        """Return the request as JSON values."""
        values = {k: v for k, v in vars(self).items() if k not in ("parts", "task")}  # of one sweep
        parts = ("exec", "cluster", "sweep")
        values |= {name: values[name] and dataclasses.asdict(values[name]) for name in parts}
        return values | {"points": [{"arm": p.arm, "spec": p.spec.plain()} for p in self.points]}


def from_plain(values: dict[str, Any]) -> Request:
    """Rebuild a request from the values of `Request.plain`."""
    sweep = made(values["sweep_name"], values["sweep"]) if values["sweep"] else None
    points = [Point(p["arm"], spec_from(p["spec"])) for p in values["points"]]
    parts = {"exec": Exec(**values["exec"]), "cluster": Cluster(**values["cluster"])}
    return Request(**{**values, **parts, "sweep": sweep, "points": points})


def runs_hash(points: Sequence[Point], sweep: Sweep) -> str:
    """Hash the runs of a grid by arm, and the second stage.

    Claims are left out of the hash, so that a sweep with changed claims keeps its title. Then
    `store.looks` sees whether they changed after an interim analysis of the same runs.
    """
    asked = [sorted((p.arm, p.id) for p in points), dataclasses.asdict(sweep.replicate)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:HASH_DIGITS]


def question(request: Request) -> dict[str, Any]:
    """Return the parts of a sweep that its report keeps, as JSON values."""
    assert request.sweep is not None, "a single run asks no question"
    kept = ("question", "source", "how", "withdrawn", "claims", "rounds", "analysis", "variants")
    sweep = dataclasses.asdict(request.sweep)
    return {
        "name": request.sweep_name,
        "scale": request.scale,
        "changes": request.changes,
        ADDED_AFTER: [
            {"arm": arm, **axes[ADDED_AFTER]}
            for arm, axes in request.sweep.arms.items()
            if axes.get(ADDED_AFTER)
        ],
        **{key: sweep[key] for key in (*kept, "estimands")},
    }
