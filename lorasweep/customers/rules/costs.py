"""What LoRA and full fine-tuning cost side by side: memory, GPUs, time, dollars, files, serving."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from lorasweep.customers.evidence import Case
from lorasweep.customers.read import RowError
from lorasweep.customers.rules.capacity import LAYERS, trained
from lorasweep.customers.rules.workload import GROUP, Workload
from lorasweep.errors import unknown
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import Load, load_of
from lorasweep.plan.placement import (
    MEMORY_ERROR,
    MOST_GPUS,
    SPEED_ERROR,
    Misfit,
    Placement,
    place,
)
from lorasweep.plan.time import served_s, step_parts, step_seconds
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.method import Method
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec

HARDWARE = "h100"
"""The card where none is stated."""
WORD = 2
"""Bytes of a weight as it is served or shipped, bf16."""
NOT_FASTER = 0.95
"""LoRA counts as not faster where it takes more than this share of full fine-tuning's GPU time."""


@dataclass(frozen=True)
class Arm:
    """What one method costs a customer. None: it fits on no number of GPUs, or is not known."""

    trained: int
    """Parameters."""
    gpus: int | None
    """All available GPUs, or the fewest that hold it."""
    fits: bool
    """Whether the customer's GPUs hold it."""
    why: str
    """Why it fits nowhere, and what would help."""
    peak_gib: float | None
    """Expected peak of one GPU."""
    step_s: float | None
    hours: float | None
    """Wall time of the updates."""
    cost_usd: float | None
    file_mib: float
    """What is shipped: an adapter, or the whole model."""
    serving_gib: float
    """Weights in memory to serve all of the customer's adapters, or copies."""

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all GPUs."""
        return self.hours and self.gpus and self.hours * self.gpus


@dataclass(frozen=True)
class Costs:
    """Both methods on the customer's hardware."""

    hardware: Hardware
    lora: Arm
    full: Arm
    flops_ratio: float
    """Operations of an update, LoRA's over full fine-tuning's."""


def hardware_of(case: Case) -> Hardware:
    """Return the hardware of a customer, with its price.

    Raises:
        RowError: it is not known, or has no GPU.
    """
    c, known = case.customer, case.known
    if c.hardware is None and known.hardware is not None:
        found = known.hardware
    else:
        name = (c.hardware or HARDWARE).lower()
        if name not in known.machines:
            raise RowError(
                f"column hardware: {unknown('hardware', name, known.machines)} Your own card "
                "is a file in DIR/hardware with --config-dir DIR."
            )
        found = known.machines[name]()
    if not found.has_speeds:
        raise RowError(f"column hardware: {found.name} has no GPU whose speed is known.")
    if c.price_per_gpu_h is not None:
        found = replace(found, price_per_gpu_h=c.price_per_gpu_h)
    return found


def costs_of(case: Case, rank: int, work: Workload, hardware: Hardware) -> Costs:
    """Return what both methods cost, LoRA at this rank."""
    model = replace(case.model, weights_dtype="bf16")  # as frozen on GPUs
    at = _Where(model, work.batch_size, work.max_length, _Machine(hardware))
    lora, full = (_arm(case, at, r, work) for r in (rank, 0))
    ratio = _method(rank).step_flops(model, 1) / _method(0).step_flops(model, 1)
    found = Costs(hardware, lora, full, ratio)
    _note(case, work, found)
    _warn(case, found)
    return found


def _arm(case: Case, at: "_Where", rank: int, work: Workload) -> Arm:
    c, machine = case.customer, at.machine.hardware
    base, n = case.model.n_params, trained(case.model, rank) if rank else case.model.n_params
    served = base + c.adapters_served * n if rank else c.adapters_served * n
    files = {"file_mib": WORD * n / 2**20, "serving_gib": WORD * served / 2**30}
    found = _placed(at, rank, c.gpus)
    if isinstance(found, Misfit):
        why = f"{found.why}. Give {found.remedy}"
        return Arm(n, None, False, why, None, None, None, None, **files)
    gpus, layout = found.layout.gpus, found.layout
    step_s = step_seconds(step_parts(_load(at.model, rank), layout, work.row_tokens, machine))
    if c.task == "rl":  # a serving engine on the same GPUs samples an update's completions
        group = min(GROUP, work.batch_size)
        lengths = (work.row_tokens - work.tokens, work.tokens)
        step_s += served_s(at.model, machine, gpus, work.batch_size, group, *lengths)
    hours = cost = None
    if work.steps is not None:
        hours = step_s * work.steps / 3600
        if machine.price_per_gpu_h is not None:
            cost = hours * gpus * machine.price_per_gpu_h
    fits = gpus <= (c.gpus or MOST_GPUS)
    return Arm(n, gpus, fits, "", found.memory_gib, step_s, hours, cost, **files)


# ---------------------------------------------------------------- where it fits


class _Machine:
    """Hardware as a key of a cache: by its name and speeds, not by its price."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.key = repr(replace(hardware, price_per_gpu_h=None))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Machine) and other.key == self.key


class _Where(NamedTuple):
    """What a placement depends on, apart from the method."""

    model: ModelSpec
    batch_size: int
    max_length: int
    machine: _Machine


def _method(rank: int) -> Method:
    """Return LoRA of a rank, or with rank 0 full fine-tuning."""
    return LoRA(rank=rank, layers=LAYERS) if rank else FullFT()


@lru_cache(maxsize=4096)
def _place(at: _Where, rank: int, gpus: int | None) -> Placement | Misfit:
    """Place one method on a number of GPUs; None: on the fewest that hold it."""
    where: dict[str, Any] = {"name": "customer", "source": "jsonl", "location": "customer"}
    dataset = DatasetSpec(**where, max_length=at.max_length)
    method, batch = _method(rank), at.batch_size
    spec = RunSpec(
        model=at.model, dataset=dataset, method=method, batch_size=batch, precision="bf16"
    )
    return place([spec], at.machine.hardware, gpus=gpus)


@lru_cache(maxsize=1024)
def _load(model: ModelSpec, rank: int) -> Load:
    return load_of(model, _method(rank))


def _placed(at: _Where, rank: int, available: int | None) -> Placement | Misfit:
    """Place one method on all available GPUs, if they hold it, else on the fewest that do."""
    found = _place(at, rank, None)
    if isinstance(found, Misfit):
        return found
    gpus = found.layout.gpus
    while 2 * gpus <= (available or 1) and at.batch_size % (2 * gpus) == 0:
        gpus *= 2
    return _place(at, rank, gpus)


# ---------------------------------------------------------------- reasons and warnings


def _note(case: Case, work: Workload, found: Costs) -> None:
    words = {"card": found.hardware.name, "error": SPEED_ERROR}
    rewarded = case.customer.task == "rl"
    words["sampled"] = "; and sampling by a serving engine, at best" if rewarded else ""
    price = {"price_per_gpu_h": found.hardware.price_per_gpu_h}
    for name, arm in (("lora", found.lora), ("full", found.full)):
        memory = (
            "weights, gradients, moments, activations, logits and buffers of one of "
            f"{arm.gpus} GPU(s): all available, or the fewest that hold it with "
            f"{MEMORY_ERROR:.0%} on top"
        )
        rows = {"trained": arm.trained, "rows_an_update": work.batch_size}
        rows["max_length"] = work.max_length
        steps = {"updates": work.steps, "seconds": arm.step_s}
        steps |= {"tokens_a_row": work.row_tokens, "gpus": arm.gpus}
        files = {"adapters_served": case.customer.adapters_served, "mib_each": arm.file_mib}
        case.note(f"peak_gib_{name}", arm.peak_gib, name, rows, why=arm.why or memory)
        case.note(f"hours_{name}", arm.hours, "", steps, **words)
        case.note(f"cost_usd_{name}", arm.cost_usd, "", price, **words)
        case.note(f"serving_gib_{name}", arm.serving_gib, name, files)
    case.note("flops_ratio", found.flops_ratio)


def _warn(case: Case, found: Costs) -> None:
    c, card = case.customer, found.hardware.name
    for name, arm in (("LoRA", found.lora), ("full fine-tuning", found.full)):
        if arm.gpus is None:
            case.warn("no_fit", method=name, why=arm.why)
        elif not arm.fits:
            available = f"{c.gpus} {'is' if c.gpus == 1 else 'are'}"
            case.warn("too_few_gpus", method=name, gpus=arm.gpus, card=card, available=available)
    arms = (found.lora, found.full)
    lora, full = (a.step_s * a.gpus if a.step_s and a.gpus else None for a in arms)
    if lora and full and lora > NOT_FASTER * full:
        case.warn("not_faster", times=lora / full)
    if c.task == "rl" and (found.lora.gpu_hours or found.full.gpu_hours):
        case.warn("with_sampling")
