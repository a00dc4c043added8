"""What a pack does when memory runs out: is an error that, and which sizes are tried next."""

import errno
import gc
import re
import sys
from dataclasses import dataclass

from lorasweep.plan.planner import pack_key
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import LEARNING, phase_of

OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory"
    "|CU(BLAS|SOLVER|DNN)_STATUS_ALLOC_FAILED|Cuda failure (2 )?'out of memory'"
    "|unable to mmap [^:]*: Cannot allocate memory"
)
"""RuntimeErrors from torch's CPU allocator, CUDA libraries, NCCL, and files of weights (last)."""
REQUEST = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)


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
