"""Signals, memory and environment of a worker process, and what it does when memory runs out."""

import ctypes
import errno
import gc
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lorasweep.plan.planner import pack_key
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.claims import JOB_VARIABLE
from lorasweep.train.events import LEARNING, phase_of

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WAIT_POLICY = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Makes waiting OpenMP threads sleep. By default they spin: two training processes on two busy
cores are then 100 times slower (docs/log)."""
OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory"
    "|CU(BLAS|SOLVER|DNN)_STATUS_ALLOC_FAILED|Cuda failure (2 )?'out of memory'"
)
"""RuntimeErrors from torch's CPU allocator, CUDA libraries and NCCL (last)."""
REQUEST = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)


class Stopped(Exception):
    """A signal requested a clean stop; checkpoints are written."""


class StopFlag:
    """Flag to finish the update, checkpoint and exit, which signals set.

    A signal later than SAME_S after the first ends the process at once: an update, or loading a
    base, may take long. Inside a job only Ctrl-C does so; Slurm itself kills a job if needed.
    """

    SAME_S = 2.0  # Ctrl-C reaches a worker directly and from its parent

    def __init__(self) -> None:
        self.set, self._since = False, 0.0

    def install(self) -> None:
        """Handle these signals; under nohup a process outlives its terminal."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.set:
            self.set, self._since = True, time.monotonic()
        may_end = number == signal.SIGINT or JOB_VARIABLE not in os.environ
        if may_end and time.monotonic() - self._since > self.SAME_S:
            os._exit(128 + number)


def die_with_parent() -> None:
    """Make Linux stop this process when its parent dies, so that an orphan keeps no claims."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: fewer page faults halve the time of elementwise operations."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # musl does not have it
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26), (-8, 1)):
        mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX


def worker_environment(threads: int) -> dict[str, str]:
    """Return a worker's environment: the path of this code (not the current folder) and threads."""
    root = str(Path(__file__).resolve().parents[2])
    return {
        **WAIT_POLICY,
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONSAFEPATH": "1",
    }


# ---------------------------------------------------------------- memory that runs out


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory of the host or of a device ran out."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


@dataclass(frozen=True)
class Shortage:
    """An out-of-memory error: the phase of training, and the sizes in use (see Limit)."""

    rows: int
    forward_parts: int
    asked: str
    """Size of the failed request, such as ' (asked for 2.50 GiB)'; empty if unknown."""
    phase: str = LEARNING
    divisible: bool = False
    """Whether a larger Exec.forward_parts reduces the memory of the phase."""

    @classmethod
    def of(cls, error: BaseException, exec_: Exec, spec: RunSpec) -> "Shortage":
        """Read the size of the request and the phase from an error in the training of `spec`."""
        found = REQUEST.search(str(error))
        asked = f" (asked for {found[1]})" if found else ""
        rows, phase = exec_.rows_of(spec.batch_size), phase_of(error)
        return cls(rows, exec_.forward_parts, asked, phase.name, phase.divisible)

    def retry_text(self, spec: RunSpec, n_runs: int, instead: str) -> str:
        """Return the message that `n_runs` runs like `spec` do not fit. `instead`: the next try."""
        learning = self.phase == LEARNING
        held = f" with {self.rows} row(s) of each run at a time" if learning else ""
        return (
            f"out of memory in {self.phase}{self.asked}: {n_runs} run(s) of {spec.model.name}"
            f"{held} do not fit. Resuming from the last checkpoint with {instead}."
        )

    def failure_text(self, spec: RunSpec, world_size: int = 1) -> str:
        """Return the message that a single run with one row does not fit, with remedies."""
        return (
            f"out of memory{self.asked}: {spec.model.name} with {spec.method.name} does not fit, "
            f"even as a single run on {world_size} process(es) with one row (up to "
            f"{spec.dataset.max_length} tokens) at a time. Choose more GPUs (exec.world_size), "
            "exec.activation_checkpointing=true, a smaller model=, a smaller dataset.max_length, "
            "or a device with more memory (action=plan shows the expected memory), then add "
            "exec.retry=true."
        )


@dataclass
class Limit:
    """The largest sizes that may fit; None: no limit is known."""

    rows: int | None = None
    """Rows per run, process and forward pass."""
    runs: int | None = None
    """Runs per pack."""
    forward_parts: int = 1

    def lower(self, shortage: Shortage, n_runs: int) -> str:
        """Lower the limit after a shortage; return the next try as text, empty if none is left.

        In the phase `learning` the rows are halved. In other phases forward_parts is doubled, if
        that helps. If neither is possible, the pack of `n_runs` is halved.
        """
        if shortage.phase == LEARNING and shortage.rows > 1:
            self.rows = shortage.rows // 2
            return f"{self.rows} of each run"
        if shortage.divisible:
            self.forward_parts = 2 * shortage.forward_parts
            return f"1/{self.forward_parts} of the usual rows at a time in sampling and evaluation"
        if n_runs > 1:
            self.runs = -(-n_runs // 2)
            return f"packs of {self.runs}"
        return ""


class Limits(dict[object, Limit]):
    """The limits of a worker by kind of run, so that later packs start at a size that fits."""

    def of(self, spec: RunSpec) -> Limit:
        """Return the limit of runs like `spec`, which the caller may lower."""
        return self.setdefault((pack_key(spec), spec.dataset.max_length), Limit())


def free_memory() -> None:
    """Free unreferenced objects, and the cached memory of the GPU."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
