"""Where and how runs are executed: never hashed, no effect on results but rounding."""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Exec:
    """Where and how runs are executed: never hashed, no effect on results but rounding."""

    runs_dir: str = "runs"
    reports_dir: str = "reports"
    models_dir: list[str] = field(default_factory=lambda: ["models"])
    """Folders searched for weights; the first is where trained recipes and conversions are cached.
    """
    data_dir: list[str] = field(default_factory=lambda: ["data"])
    workers: int | None = None
    """Processes; None: chosen for the machine."""
    threads: int | None = None
    """Threads a worker; None: the cores divided by the workers."""
    pack_size: int | None = None
    """Runs trained together over one base, at most; 1 turns packing off; None: chosen by the
    plan."""
    micro_batch_size: int | None = None
    """Sequences a forward, for each member; None: chosen by the plan."""
    compile: bool = False
    """torch.compile the forward of models that have no passes of our own (on a GPU: all). Not
    verified on a GPU yet; on a CPU compiling takes minutes."""
    checkpoint_s: float = 60.0
    """Seconds between checkpoints."""
    retry: bool = False
    """Try failed runs again."""
    max_attempts: int = 5

    def problems(self) -> Iterator[str]:
        """Yield settings that mean nothing anywhere."""
        if self.max_attempts < 1:
            yield f"exec.max_attempts={self.max_attempts}: at least 1."
        for name in ("workers", "threads", "micro_batch_size", "pack_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"exec.{name}={value}: at least 1, or null to leave it to the plan."


@dataclass(frozen=True)
class Cluster:
    """A place to run; never part of a run's identity. One file of conf/cluster/."""

    name: str = "local"
    kind: str = "local"
    """local: worker processes on this machine. slurm: jobs of a Slurm cluster."""
    partition: str | None = None
    """None: the cluster's default."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: int = 0
    """GPUs a job; each trains packs of its own, side by side."""
    workers: int | None = None
    """Packs that a job trains side by side; None: one a GPU, without GPUs one."""
    cpus: int = 2
    """Processors a worker."""
    mem_gib: float | None = None
    """Memory a job; None: by the plan's estimate."""
    time_min: int | None = None
    """Time limit of a job; None: by the plan's estimate, or the partition's limit where that is
    shorter."""
    warn_s: int = 120
    """Seconds before the limit at which a job writes its checkpoints and queues itself again."""
    work_min: float = 10.0
    """A job holds at least this much expected work, if there is as much ..."""
    work_max: float = 120.0
    """... and at most this much, if a pack is not longer by itself."""
    runs_per_job: int | None = None
    """Runs a job, instead of the two above."""
    parallel: int = 64
    """Tasks of an array that run at once."""
    requeues: int = 50
    """Times a job may queue itself again at its time limit."""
    follow: bool = True
    """When the jobs are over, a small job submits what was lost and the next stage, and at the end
    writes the answer."""
    follow_min: int = 30
    """Time limit of that job."""
    follow_partition: str | None = None
    """Partition of that job, where the others' takes no job without GPUs; None: the same."""
    setup: list[str] = field(default_factory=list)
    """Shell lines at the start of a job, such as module load ...; what it needs of the environment.
    """
    options: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch, by name without dashes; "true" for one that takes no value."""
    submit: bool = True
    """False: write sbatch scripts for the user to submit, for places where submitit cannot run."""
    shared: bool = False
    """The user says that nodes see the run folder, although it looks like this machine's own."""
