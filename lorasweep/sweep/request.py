"""One command of a user, complete and checked; also as JSON, for the follow-up job on a cluster."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import Sweep, added_after, stored_sweep, sweep_from_stored

HASH_DIGITS = 6
"""Hexadecimal digits of the hash in a title: enough for the few requests that share a folder."""


@dataclass
class Settings:
    """Settings of the command itself, with their defaults; no run depends on them."""

    action: str = "run"
    format: str = "text"
    mirror: str = "none"
    table: str = ""
    run: str = ""
    out: str = ""
    sample: int = 3
    """Number of runs that action=verify trains again."""
    max_difference: float | None = None
    """action=adapter: accepted difference of the final metric from the recorded one. None: the
    noise between seeds."""
    watch: bool = False
    """True: action=status keeps updating."""
    prune: bool = False
    """True: cancel queued runs that are no longer part of the sweep."""
    customers: str = ""
    """A table of customers, for action=advise and action=fleet, and for plan and status of a fleet.
    """
    customer: dict[str, Any] = field(default_factory=dict)
    """action=advise: one customer, by column."""
    why: str = ""
    """action=advise: the customer whose reasons are shown."""
    write_sweep: str = ""
    """action=advise: the customer whose sweep is written."""
    data: str = ""
    """action=measure: a file of rows, in place of a data set."""
    instead_of_full: str = ""
    """action=fleet: lora trains it for customers for whom the adviser says full fine-tuning."""


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
    """The machine that action=plan plans for, as in conf/hardware; empty: this machine."""
    parts: list["Request"] = field(default_factory=list)
    """For a sweep that consists of sweeps: their requests, which run one after another."""
    changed: str = ""
    """Short hash of the runs, if the command line changed those of the sweep's file; else empty."""
    changes: list[str] = field(default_factory=list)
    """The options that changed them, as typed."""
    members: list[dict[str, Any]] = field(default_factory=list)
    """action=fleet: the customers whose runs these are, as they were planned."""
    rates: int = 3
    """Number of learning rates that are tried. action=measure: around lr. action=fleet: around the
    advised one; 1 = the advised learning rate only."""
    folders: list[str] = field(default_factory=list)
    """Folders of configuration, the user's first."""
    given: list[str] = field(default_factory=list)
    """Keys of the settings on the command line."""

    @property
    def title(self) -> str:
        """Name of the reports, interim analyses and jobs of this request.

        Two requests that ask for different runs have different titles.
        """
        if not self.sweep_name:
            return f"single-{self.points[0].id}"
        return f"{self.family}-{self.changed}" if self.changed else self.family

    @property
    def family(self) -> str:
        """Common prefix of the titles of this sweep at this scale."""
        return f"{self.sweep_name}-{self.scale}"

    def is_in_family(self, title: str) -> bool:
        """Return whether a title belongs to this sweep at this scale, with any changes."""
        rest = title.removeprefix(self.family)
        return title.startswith(self.family) and (
            not rest or bool(re.fullmatch(rf"-[0-9a-f]{{{HASH_DIGITS}}}", rest))
        )

    def plain(self) -> dict[str, Any]:
        """Return the request as JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = {name: dataclasses.asdict(values[name]) for name in ("exec", "cluster")}
        sweep = stored_sweep(self.sweep) if self.sweep else None
        points = [{"arm": p.arm, "spec": p.spec.plain()} for p in self.points]
        del values["parts"]  # a job handles one sweep
        return {**values, **parts, "sweep": sweep, "points": points}


def from_plain(values: dict[str, Any]) -> Request:
    """Rebuild a request from the values of `Request.plain`."""
    stored = values["sweep"]
    sweep = sweep_from_stored(stored, values["scale"]) if stored else None
    points = [Point(p["arm"], spec_from(p["spec"])) for p in values["points"]]
    parts = {"exec": Exec(**values["exec"]), "cluster": Cluster(**values["cluster"])}
    return Request(**{**values, **parts, "sweep": sweep, "points": points})


def runs_hash(points: Sequence[Point], sweep: Sweep) -> str:
    """Hash the runs of a grid by arm, and the second stage.

    Not claims and margins: they must not change after an interim analysis of the same runs, and
    another title would hide that they did (`store.looks`).
    """
    asked = [sorted((p.arm, p.id) for p in points), dataclasses.asdict(sweep.replicate)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:HASH_DIGITS]


def question(request: Request) -> dict[str, Any]:
    """Return the parts of a sweep that are kept with its report, as JSON values."""
    assert request.sweep is not None, "a single run asks no question"
    sweep = stored_sweep(request.sweep)
    kept = ("question", "source", "how", "withdrawn", "claims", "rounds")
    return {
        "name": request.sweep_name,
        "scale": request.scale,
        "changes": request.changes,
        **{key: sweep[key] for key in kept},
        "added_after": added_after(request.sweep),
        "analysis": sweep["analysis"],
    }
