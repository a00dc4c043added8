"""What the user asked for, complete and checked; as plain values it waits in a file until a cluster
job takes it up."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.sweep.grid import Claim, Point, Second, Sweep


@dataclass
class Request:
    """One command."""

    action: str
    format: str
    mirror: str
    table: str
    run: str
    out: str
    sample: int
    """Runs that action=verify trains again."""
    watch: bool
    """action=status goes on showing."""
    prune: bool
    """Runs that are queued but no longer part of the sweep are cancelled."""
    scale: str
    exec: Exec
    cluster: Cluster
    sweep_name: str | None
    sweep: Sweep | None
    points: list[Point]
    hardware: dict[str, Any] = field(default_factory=dict)
    """What action=plan plans for, as in conf/hardware; empty: the machine that plans."""
    parts: list["Request"] = field(default_factory=list)
    """Of a sweep that is made of sweeps: they are asked one after another."""

    @property
    def title(self) -> str:
        """Return the name that its reports and jobs carry."""
        return (
            f"{self.sweep_name}-{self.scale}" if self.sweep_name else f"single-{self.points[0].id}"
        )

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = {name: dataclasses.asdict(told[name]) for name in ("exec", "cluster")}
        sweep = dataclasses.asdict(self.sweep) if self.sweep else None
        points = [{"arm": p.arm, "spec": p.spec.plain()} for p in self.points]
        del told["parts"]  # a job is given one sweep
        return {**told, **parts, "sweep": sweep, "points": points}


def from_file(told: dict[str, Any]) -> Request:
    """Return the request that `Request.plain` described."""
    sweep = told["sweep"]
    if sweep is not None:
        claims = {name: Claim(**claim) for name, claim in sweep["claims"].items()}
        sweep = Sweep(**{**sweep, "claims": claims, "second": Second(**sweep["second"])})
    points = []
    for p in told["points"]:
        spec = spec_from(p["spec"])
        points.append(Point(p["arm"], spec, spec.id))
    parts = {"exec": Exec(**told["exec"]), "cluster": Cluster(**told["cluster"])}
    return Request(**{**told, **parts, "sweep": sweep, "points": points})


def question(request: Request) -> dict[str, Any]:
    """Return what the analysis must know of the sweep: plain values, kept beside the report."""
    sweep = dataclasses.asdict(request.sweep)
    return {
        "name": request.sweep_name,
        "scale": request.scale,
        "question": sweep["question"],
        "source": sweep["source"],
        "how": sweep["how"],
        "claims": sweep["claims"],
        "rounds": sweep["rounds"],
        "analysis": sweep["analysis"],
    }
