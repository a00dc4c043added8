"""Hardware as a plain value: what the planner has to know of the machine that trains.

One file of `conf/hardware/` describes one machine; `detect.py` describes the one it runs on.
Everything else in this room is given a `Hardware` and asks no system.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lorasweep.errors import SpecError, unknown


@dataclass(frozen=True)
class Hardware:
    """One machine that trains. None: not known."""

    name: str
    processor: str | None = None
    """Model of the processor, as the system names it."""
    cores: int | None = None
    memory_gib: float | None = None
    """Memory of the host."""
    gpus: int = 0
    gpu_name: str | None = None
    gpu_memory_gib: float | None = None
    """Memory of one GPU."""
    matmul_flops_s: dict[str, float] = field(default_factory=dict)
    """Precision -> peak of dense matrix products on one GPU, floating-point operations a second."""
    bandwidth_bytes_s: float | None = None
    """Memory bandwidth of one GPU."""
    price_per_h: float | None = None
    """US dollars for the whole machine."""
    fast_bf16: bool | None = None
    """False: the device has no bf16 instructions."""

    @property
    def worker_gib(self) -> float | None:
        """Memory that bounds one worker: a GPU's, or the host's where there is none."""
        return self.gpu_memory_gib if self.gpus else self.memory_gib


def from_plain(values: dict[str, Any]) -> Hardware:
    """Make a Hardware from the values of a file of conf/hardware.

    Raises:
        SpecError: a field that does not exist, a number that is not positive, or a machine that
            lacks the figures a plan needs.
    """
    names = [f.name for f in dataclasses.fields(Hardware)]
    for key in values:
        if key not in names:
            raise SpecError(unknown("hardware field", key, names))
    hardware = Hardware(**values)
    for key in ("cores", "memory_gib", "gpu_memory_gib", "bandwidth_bytes_s", "price_per_h"):
        value = values.get(key)
        if value is not None and not value > 0:
            raise SpecError(f"hardware.{key}={value}: expected a number above 0, or null.")
    needed = ("gpu_memory_gib",) if hardware.gpus else ("cores", "memory_gib")
    missing = [key for key in needed if getattr(hardware, key) is None]
    if missing:
        kind = f"{hardware.gpus} GPU(s)" if hardware.gpus else "no GPU"
        raise SpecError(
            f"hardware {hardware.name!r} has {kind}, so a plan needs {' and '.join(missing)}. "
            "Add the figure to its file in conf/hardware."
        )
    return hardware
