"""List a cluster's partitions and what their nodes have."""

from dataclasses import dataclass

from lorasweep.errors import ClusterError, unknown
from lorasweep.launch.slurm import client
from lorasweep.spec.execution import Cluster


@dataclass(frozen=True)
class Partition:
    """A partition. Each figure is the largest of any of its nodes."""

    name: str
    default: bool
    cpus: int
    memory_mib: int
    gpus: int
    time_min: float
    """Time limit of jobs; inf: no limit."""
    hosts: frozenset[str]
    nodes: int = 1
    """Number of its nodes."""


def partitions() -> dict[str, Partition]:
    """Return the partitions that are up, by name."""
    fields = "Partition:|,CPUs:|,Memory:|,Gres:|,Time:|,NodeHost:|"
    found: dict[str, Partition] = {}
    for line in client.run("sinfo", "-a", "-h", "-N", "-O", fields).splitlines():
        name, cpus, memory, gres, limit, host = (cell.strip() for cell in line.split("|")[:6])
        before = found.get(name.rstrip("*"))
        hosts = before.hosts if before else frozenset()
        found[name.rstrip("*")] = Partition(
            name.rstrip("*"),
            name.endswith("*"),
            max(int(cpus), before.cpus if before else 0),
            max(int(memory), before.memory_mib if before else 0),
            max(_gpus(gres), before.gpus if before else 0),
            _minutes(limit),
            hosts | {host},
            1 + (before.nodes if before else 0),
        )
    return found


def _gpus(gres: str) -> int:
    """Count the GPUs in a node's GRES: gpu:2, gpu:a100:4(S:0-1), gpu:a:1,gpu:b:2."""
    total = 0
    for item in gres.split(","):
        kind, *rest = item.partition("(")[0].split(":")
        if kind == "gpu":
            total += int(rest[-1]) if rest and rest[-1].isdigit() else 1
    return total


def _minutes(limit: str) -> float:
    """Parse a time limit into minutes: minutes, h:m:s, d-h, d-h:m:s, infinite."""
    if limit.lower() in ("infinite", "unlimited", "n/a"):
        return float("inf")
    days, _, rest = limit.rpartition("-")
    parts = [float(x) for x in rest.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0.0, 0.0)[:3]
    else:
        hours, minutes, seconds = (0.0, *parts, 0.0)[:3] if len(parts) < 3 else parts
    return float(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def partition_of(cluster: Cluster, known: dict[str, Partition]) -> Partition:
    """Return the partition that jobs go to.

    Raises:
        ClusterError: it does not exist, or there is no default; the message lists all partitions.
    """
    if cluster.partition is not None:
        if cluster.partition not in known:
            raise ClusterError(
                unknown("partition", cluster.partition, known) + " Set cluster.partition."
            )
        return known[cluster.partition]
    default = next((p for p in known.values() if p.default), None)
    if default is None:
        raise ClusterError(
            "the cluster has no default partition. Set cluster.partition to one of: "
            f"{', '.join(sorted(known))}."
        )
    return default
