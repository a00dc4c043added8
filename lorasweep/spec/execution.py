"""Where and how runs are executed. Never hashed: these settings change results by rounding only."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from lorasweep.spec.values import ABOVE_0, Is, misfits

Count = Annotated[int, Is("", 1)]
CountOrNone = Annotated[int | None, Is("", 1)]
Amount = Annotated[float, Is("", ABOVE_0)]
AmountOrNone = Annotated[float | None, Is("", ABOVE_0)]
FIXED = {"job-name", "array", "output", "error", "signal", "dependency", "nodes", "requeue"}
FIXED |= {"ntasks-per-node"}
"""Options of sbatch on which jobs depend."""


@dataclass(frozen=True)
class Exec:
    """Settings of execution: folders, processes, packs, checkpoints."""

    runs_dir: str = "runs"
    reports_dir: str = "reports"
    models_dir: list[str] = field(default_factory=lambda: ["models"])
    """Folders searched for weights. The first also caches trained recipes and conversions."""
    data_dir: list[str] = field(default_factory=lambda: ["data"])
    workers: CountOrNone = None
    """Worker processes; None: chosen for the machine."""
    threads: CountOrNone = None
    """Threads per worker; None: the cores divided by the workers."""
    pack_size: CountOrNone = None
    """Maximum number of runs in a pack. 1: no packing. None: the plan chooses."""
    micro_batch_size: CountOrNone = None
    """Sequences per forward pass and run of the pack; None: the plan chooses."""
    max_gpus: CountOrNone = None
    """Maximum number of GPUs of a run. Runs that need more are left out. None: no limit."""
    forward_parts: Count = 1
    """Parts into which sampling and evaluation are split, to take less memory; the backward pass is
    not split. The worker doubles this number when either of the two runs out of memory."""
    world_size: Count = 1
    """Processes that train one run together, one per GPU if there are GPUs. Above 1: the model is
    sharded (FSDP2) and runs are not packed. 1: with cluster=slurm and hardware=NAME, the plan
    chooses for each run."""
    activation_checkpointing: bool = False
    """Keep only each layer's input, and recompute activations in the backward pass: a third more
    operations, much less memory. False: with cluster=slurm and hardware=NAME, the plan chooses."""
    checkpoint_s: float = 60.0
    """Seconds between checkpoints."""
    keep_weights: bool = False
    """Keep the weights of finished runs in their folders: only adapters trained by one process."""
    prune_weights: str = ""
    """Name of a search that keeps weights for itself, and deletes its own but for the best runs."""
    short_steps: int | None = None
    """Runs of this many updates keep their final state. A longer run that differs from one in its
    updates only, at a constant learning rate, starts from that state."""
    skip_broken_data: bool = False
    """True: bad data fails only the runs that use it (for data sets of different owners). False:
    bad data stops the command before anything starts."""
    retry: bool = False
    """Try failed runs again."""
    max_attempts: Count = 5
    trainer_files: list[str] = field(default_factory=list)
    """Paths of trainer.script and trainer.files, of which the spec has the hashes."""
    trainer_max_h: Amount = 24.0
    """Hours after which a foreign trainer is stopped; set by trainer.max_h."""

    def rows_of(self, batch_size: int) -> int:
        """Return the rows of a forward pass, per run of the pack and process."""
        share = batch_size // self.world_size
        return min(self.micro_batch_size or share, share)

    def problems(self) -> Iterator[str]:
        """Yield the problems that the settings have on every machine."""
        yield from misfits(self, "exec.")
        if self.world_size > 1 and (self.pack_size or 1) > 1:
            yield (
                f"exec.pack_size={self.pack_size} with exec.world_size={self.world_size}: several "
                "processes train one run at a time. Leave one of them out."
            )


@dataclass(frozen=True)
class Cluster:
    """A place to run: one file in conf/cluster/. Run ids do not depend on it."""

    name: str = "local"
    kind: Literal["local", "slurm"] = "local"
    """local: worker processes on this machine. slurm: jobs of a Slurm cluster."""
    partition: str | None = None
    """None: the cluster's default."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: Annotated[int, Is("", 0)] = 0
    """Minimum number of GPUs per job; a run that needs more gets more, on as few nodes as possible.
    Each GPU trains separate packs. 0: no GPU, unless hardware=NAME names GPUs."""
    gpus_per_node: CountOrNone = None
    """Maximum number of GPUs of a node that one job takes. None: as many as a node has."""
    workers: CountOrNone = None
    """Packs that a job trains in parallel. None: as many as its GPUs allow, or one without GPUs."""
    cpus: Count = 2
    """CPU cores per process of a worker."""
    mem_gib: AmountOrNone = None
    """Memory per job and node; None: from the plan's estimate."""
    time_min: CountOrNone = None
    """Time limit of a job in minutes. None: the plan's estimate, at most the partition's limit."""
    warn_s: Count = 120
    """Seconds before the limit at which a job writes its checkpoints and requeues itself."""
    work_min: Amount = 10.0
    """Minimum expected minutes of work per job (less only if less work is left in the sweep)."""
    work_max: Amount = 120.0
    """Maximum expected minutes of work per job (more only if a single pack takes longer)."""
    runs_per_job: CountOrNone = None
    """Runs per job; replaces work_min and work_max."""
    parallel: Count = 64
    """Tasks of a job array that run at the same time."""
    requeues: Annotated[int, Is("", 0)] = 50
    """How often a job may requeue itself at its time limit."""
    follow: bool = True
    """Also submit a small follow-up job. When the other jobs have ended, it resubmits lost work,
    submits the next stage, and finally writes the answer."""
    follow_min: Count = 30
    """Time limit of the follow-up job in minutes."""
    follow_partition: str | None = None
    """Partition of the follow-up job, if `partition` takes no jobs without GPUs. None: the same."""
    container: str | None = None
    """Image in which jobs train: a .sqsh or .sif file, or an image's name for pyxis, such as
    nvcr.io#nvidia/pytorch:25.06-py3. Its `python3` has lorasweep's dependencies. None: none."""
    container_kind: Literal["pyxis", "apptainer"] | None = None
    """pyxis (an option of srun) or apptainer. None: apptainer for a .sif file, otherwise pyxis."""
    container_mounts: list[str] = field(default_factory=list)
    """More folders to see inside, FOLDER or FOLDER:FOLDER_INSIDE. The run folder, reports, models,
    data, the hub's cache and the current folder are there at their own paths."""
    setup: list[str] = field(default_factory=list)
    """Shell lines at the start of a job, outside a container, such as `module load ...`."""
    options: dict[str, str] = field(default_factory=dict)
    """More sbatch options, by name without dashes. Write "true" for an option without a value."""
    shared: bool = False
    """True: the nodes share the run folder, although it looks local to this machine."""

    def problems(self) -> Iterator[str]:
        """Yield the problems that the settings have on every cluster."""
        inside, uneven = not self.container, self.workers and self.gpus % self.workers
        fixed = FIXED & {name.replace("_", "-") for name in self.options}
        yield from misfits(
            self,
            "cluster.",
            [
                ("container_kind", inside and self.container_kind, "a cluster.container=IMAGE"),
                ("container_mounts", inside and self.container_mounts, "a cluster.container=IMAGE"),
                ("work_max", self.work_max < self.work_min, "at least cluster.work_min"),
                ("gpus", uneven, "a multiple of cluster.workers"),
                ("options", fixed, f"none of {', '.join(sorted(FIXED))}"),
            ],
        )
