"""Before runs are submitted for given GPUs: which are left out, and which are refused."""

from collections.abc import Sequence

from lorasweep.errors import SpecError
from lorasweep.plan.gpu.forecast import Forecaster, Kind
from lorasweep.plan.gpu.placement import MEMORY_ERROR, Misfit
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.memory import pack_bytes
from lorasweep.spec.execution import Exec
from lorasweep.sweep.grid import Point


def within_limit(points: Sequence[Point], hardware: Hardware, exec_: Exec) -> list[Point]:
    """Return the runs that need no more GPUs than exec.max_gpus."""
    planner = Forecaster(hardware, exec_)
    return [p for p in points if not planner.kind(p.spec).left_out]


def refuse_unfit(points: Sequence[Point], hardware: Hardware, exec_: Exec) -> None:
    """Check that every run fits as it would be trained.

    A run is trained on one GPU and keeps its activations: the loop does neither shard nor compute
    activations again, so far.

    Raises:
        SpecError: some do not; the message says which, and what would make them fit.
    """
    planner = Forecaster(hardware, exec_)
    kinds = {id(k): k for k in (planner.kind(p.spec) for p in points)}
    problems = [text for text in (_problem(k, hardware) for k in kinds.values()) if text]
    if problems:
        raise SpecError("\n".join(["runs that do not fit, so nothing was submitted:", *problems]))


def _problem(kind: Kind, hardware: Hardware) -> str | None:
    """Return why runs of a kind do not fit, and what would help; None if they do."""
    if isinstance(kind.place, Misfit):
        return f"  {kind.place.why}. Give {kind.place.remedy}."
    need = pack_bytes(1, kind.spec, hardware, 1) * (1 + MEMORY_ERROR) / 2**30
    if need <= (hardware.gpu_memory_gib or 0):
        return None
    layout = kind.place.layout
    again = ", and activations computed again" if layout.checkpointing else ""
    return (
        f"  {kind.label} takes {need:.0f} GiB, and one {hardware.name} has "
        f"{hardware.gpu_memory_gib:.0f}. It would fit on {layout.gpus} GPU(s){again}; a run trains "
        "on one GPU and keeps its activations, so far. Leave it out with exec.max_gpus=1, "
        "~sweep.arms.NAME or sweep.axes.model=[...], or choose larger GPUs."
    )
