"""Recognise that memory ran out, and free what a failed attempt held. Does not import torch."""

import errno
import gc
import re
import sys

ALLOCATOR_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""torch raises these as plain RuntimeErrors."""
REQUEST = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory of the host or of a device ran out."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(m in str(error) for m in ALLOCATOR_MESSAGES)


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
