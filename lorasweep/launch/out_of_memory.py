"""Recognise that memory ran out, say so, and free what a failed attempt held.

Does not import torch.
"""

import errno
import gc
import re
import sys

from lorasweep.errors import ModelError
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import LEARNING, Phase

ALLOCATOR_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "Cuda failure 2 'out of memory'",
    "Cuda failure 'out of memory'",
)
"""Parts of messages, which torch raises as RuntimeErrors: of the allocator for CPUs, and of
libraries that take memory without torch's allocator; the last two are NCCL's."""
REQUEST = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory of the host or of a device ran out."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(m in str(error) for m in ALLOCATOR_MESSAGES)


class OutOfMemoryTogether(ModelError):
    """Memory of one of the processes that train a run ran out; the others wait for it.

    All have to be started again, with fewer rows.
    """

    def __init__(self, run: str, exec_: Exec, rows: int, asked: str, phase: Phase) -> None:
        """Set up; `asked`: the request that did not fit, as `request` returns it."""
        super().__init__(f"out of memory{_asked(asked)} in one of the processes of a run")
        self.run, self.rows, self.asked = run, rows, asked
        self.forward_parts = exec_.forward_parts
        self.phase, self.divisible = phase.name, phase.divisible


def _asked(size: str) -> str:
    return f" (asked for {size})" if size else ""


def does_not_fit(spec: RunSpec, asked: str, world_size: int = 1) -> str:
    """Say that a run alone, one row at a time, does not fit, and what would help."""
    processes, more = "", ""
    if world_size > 1:
        processes = f", on {world_size} processes"
        more = "more of them (exec.world_size), exec.activation_checkpointing=true, "
    return (
        f"out of memory{_asked(asked)}: {spec.model.name} with {spec.method.name} does not fit, "
        f"alone{processes} and one row of at most {spec.dataset.max_length} tokens at a time. "
        f"Choose {more}a smaller model=, a smaller dataset.max_length, or a device with more "
        "memory (action=plan says how much is expected), then add exec.retry=true."
    )


def goes_on(
    spec: RunSpec, n_runs: int, rows: int, asked: str, instead: str, phase: str = LEARNING
) -> str:
    """Say that `rows` rows of each of `n_runs` runs do not fit, and what is tried instead."""
    where, held = "", f" with {rows} row(s) of each at a time"
    if phase != LEARNING:
        where, held = f" in {phase}", ""
    return (
        f"out of memory{where}{_asked(asked)}: {n_runs} run(s) of {spec.model.name}{held} "
        f"do not fit. Going on from the last checkpoint with {instead}."
    )


def request(error: BaseException) -> str:
    """Return the size of the failed request, such as '2.50 GiB'; empty if the error has none."""
    found = REQUEST.search(str(error))
    if found is None:
        return ""
    number, unit = found[1].split()
    return f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else found[1]


def free_memory() -> None:
    """Free what nothing refers to any more, and give a device's cached memory back."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()
