"""Hardware as a plain value: a file of `conf/hardware/`, or this machine from `detect.py`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from lorasweep.errors import SpecError
from lorasweep.spec.values import ABOVE_0, Is, Value, build

Amount = Annotated[float, Is("", ABOVE_0)]
AmountOrNone = Annotated[float | None, Is("", ABOVE_0)]


@dataclass(frozen=True)
class Hardware(Value):
    """One machine that trains. None: not known."""

    WHERE: ClassVar[str] = "hardware."

    name: str = "???"
    processor: str | None = None
    """Model of the processor, as the system names it."""
    cores: Annotated[int | None, Is("", 1)] = None
    memory_gib: AmountOrNone = None
    """Memory of the host."""
    gpus: Annotated[int, Is("", 0)] = 0
    """GPUs that train at the same time."""
    gpus_per_node: Annotated[int, Is("", 1)] = 8
    gpu_name: str | None = None
    gpu_memory_gib: AmountOrNone = None
    """Memory of one GPU."""
    matmul_flops_s: dict[str, float] = field(default_factory=dict)
    """Precision -> peak floating-point operations per second of dense products on one GPU."""
    attainable_share: Amount = 0.8
    """Share of the peak in matmul_flops_s that the best large product reaches on the card."""
    attention_flops_s: AmountOrNone = None
    """Operations per second of a fused attention kernel on one GPU; None: a third of the peak."""
    bandwidth_bytes_s: AmountOrNone = None
    """Memory bandwidth of one GPU."""
    link_bytes_s: AmountOrNone = None
    """Bandwidth between a GPU and the other GPUs of its node, in one direction. None: plans for
    several GPUs leave out communication."""
    network_bytes_s: AmountOrNone = None
    """One GPU's share of the bandwidth between nodes, in one direction."""
    price_per_gpu_h: AmountOrNone = None
    """Price of one GPU in US dollars per hour."""
    process_gib: Amount = 500 / 1024
    """Memory of a worker on a CPU before weights: the interpreter, torch, transformers. Measured
    with a torch for CPUs (docs/log)."""
    fast_bf16: bool | None = None
    """False: the processor has no bf16 instructions."""

    @property
    def worker_gib(self) -> float | None:
        """Memory limit of one worker: the memory of one GPU, or without GPUs that of the host."""
        return self.gpu_memory_gib if self.gpus else self.memory_gib

    @property
    def has_speeds(self) -> bool:
        """Whether the speed of training on these GPUs can be computed."""
        return self.gpus > 0 and bool(self.matmul_flops_s) and self.bandwidth_bytes_s is not None

    def problems(self) -> Iterator[str]:
        """Yield problems: impossible numbers, and missing figures that a plan needs."""
        yield from super().problems()
        if self.name == "???":
            yield "hardware.name is missing. Write `name: ...` at the top of its file."
        if any(not peak > 0 for peak in self.matmul_flops_s.values()):
            yield f"hardware.matmul_flops_s={dict(self.matmul_flops_s)}: expected numbers above 0."
        needed = ("gpu_memory_gib",) if self.gpus else ("cores", "memory_gib")
        missing = " and ".join(name for name in needed if getattr(self, name) is None)
        if missing:
            kind = f"{self.gpus} GPU(s)" if self.gpus else "no GPU"
            yield (
                f"hardware {self.name!r} has {kind}, so a plan needs {missing}. Add the figure to "
                "its file in conf/hardware."
            )


def from_plain(values: dict[str, Any]) -> Hardware:
    """Make a Hardware from a file's values; SpecError: a value is unknown, invalid or missing."""
    hardware = build(Hardware, values)
    if hardware.problem:
        raise SpecError(hardware.problem)
    return hardware
