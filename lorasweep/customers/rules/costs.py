"""What LoRA and full fine-tuning cost side by side: memory, GPUs, time, dollars, files, serving."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from lorasweep.customers.evidence import Case, Sure
from lorasweep.customers.read import RowError
from lorasweep.customers.rules.capacity import LAYERS, trained
from lorasweep.customers.rules.workload import GROUP, Workload
from lorasweep.errors import unknown
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.gpu.load import Load, load_of
from lorasweep.plan.gpu.placement import (
    MEMORY_ERROR,
    MOST_GPUS,
    SPEED_ERROR,
    Misfit,
    Placement,
    place,
)
from lorasweep.plan.gpu.sampling import served_s
from lorasweep.plan.gpu.time import step_parts, step_seconds
from lorasweep.plan.hardware import Hardware
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
class Placed:
    """One method on given GPUs. None where it fits on no number of them."""

    gpus: int | None
    """All available GPUs, or the fewest that hold it."""
    peak_gib: float | None
    """Expected peak of one GPU."""
    step_s: float | None
    why: str = ""
    """Why it fits nowhere, and what would help."""


@dataclass(frozen=True)
class Arm:
    """What one method costs a customer."""

    placed: Placed
    fits: bool
    """Whether the customer's GPUs hold it."""
    hours: float | None
    """Wall time of the updates."""
    gpu_hours: float | None
    cost_usd: float | None
    file_mib: float
    """What is shipped: an adapter, or the whole model."""
    serving_gib: float
    """Weights in memory to serve all of the customer's adapters, or copies."""


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
                [
                    f"column hardware: {unknown('hardware', name, known.machines)} Your own card "
                    "is a file in DIR/hardware with --config-dir DIR."
                ]
            )
        found = known.machines[name]()
    if not found.has_speeds:
        raise RowError([f"column hardware: {found.name} has no GPU whose speed is known."])
    if c.price_per_gpu_h is not None:
        found = replace(found, price_per_gpu_h=c.price_per_gpu_h)
    return found


def costs_of(case: Case, rank: int, work: Workload, hardware: Hardware) -> Costs:
    """Return what both methods cost, LoRA at this rank."""
    c, model = case.customer, replace(case.model, weights_dtype="bf16")  # as frozen on GPUs
    at = _Where(model, work.batch_size, work.max_length, _Machine(hardware))
    n_lora, n_full = trained(case.model, rank), case.model.n_params
    adapter, base = (WORD * n / 2**30 for n in (n_lora, n_full))
    served = base + c.adapters_served * adapter, c.adapters_served * base
    lora, full = (
        _arm(case, work, _placed(case, at, r, work), hardware, file, serving)
        for r, file, serving in zip((rank, 0), (adapter, base), served, strict=True)
    )
    ratio = _method(rank).step_flops(case.model, 1) / _method(0).step_flops(case.model, 1)
    found = Costs(hardware, lora, full, ratio)
    _note(case, work, found, n_lora, n_full)
    _warn(case, found)
    return found


def _arm(
    case: Case, work: Workload, placed: Placed, hardware: Hardware, file_gib: float, serving: float
) -> Arm:
    hours = gpu_hours = cost = None
    if placed.step_s is not None and placed.gpus is not None and work.steps is not None:
        hours = placed.step_s * work.steps / 3600
        gpu_hours = hours * placed.gpus
        if hardware.price_per_gpu_h is not None:
            cost = gpu_hours * hardware.price_per_gpu_h
    fits = placed.gpus is not None and placed.gpus <= (case.customer.gpus or MOST_GPUS)
    return Arm(placed, fits, hours, gpu_hours, cost, file_gib * 1024, serving)


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
    where = {"name": "customer", "source": "jsonl", "location": "customer"}
    dataset = DatasetSpec(**where, max_length=at.max_length)
    method, batch = _method(rank), at.batch_size
    spec = RunSpec(
        model=at.model, dataset=dataset, method=method, batch_size=batch, precision="bf16"
    )
    return place([spec], at.machine.hardware, gpus=gpus)


@lru_cache(maxsize=1024)
def _load(model: ModelSpec, rank: int) -> Load:
    return load_of(model, _method(rank))


def _placed(case: Case, at: _Where, rank: int, work: Workload) -> Placed:
    """Place one method on all available GPUs, if they hold it, else on the fewest that do.

    In RL an update includes what a serving engine on the same GPUs needs to sample its completions.
    """
    c, machine = case.customer, at.machine.hardware
    found = _place(at, rank, None)
    if isinstance(found, Misfit):
        return Placed(None, None, None, f"{found.why}. Give {found.remedy}")
    gpus = found.layout.gpus
    while 2 * gpus <= (c.gpus or 1) and at.batch_size % (2 * gpus) == 0:
        gpus *= 2
    found = _place(at, rank, gpus)
    assert isinstance(found, Placement)  # it fits on fewer
    step_s = step_seconds(step_parts(_load(at.model, rank), found.layout, work.row_tokens, machine))
    if c.task == "rl":
        group = min(GROUP, work.batch_size)
        lengths = (work.row_tokens - work.tokens, work.tokens)
        step_s += served_s(at.model, machine, gpus, work.batch_size, group, *lengths)
    return Placed(gpus, found.memory_gib, step_s)


# ---------------------------------------------------------------- reasons and warnings


def _note(case: Case, work: Workload, found: Costs, n_lora: int, n_full: int) -> None:
    note, card = case.trace.note, found.hardware.name
    sampled = "; and sampling by a serving engine, at best" if case.customer.task == "rl" else ""
    for name, arm, n in (("lora", found.lora, n_lora), ("full", found.full, n_full)):
        note(
            f"peak_gib_{name}",
            arm.placed.peak_gib,
            arm.placed.why
            or "weights, gradients, moments, activations, logits and buffers of one of "
            f"{arm.placed.gpus} GPU(s): all available, or the fewest that hold it with "
            f"{MEMORY_ERROR:.0%} on top",
            "lorasweep.plan.gpu.memory; analysis/results/plan compares it with published figures",
            Sure.PLANNED if name == "lora" else Sure.ASSUMED,
            trained=n,
            rows_an_update=work.batch_size,
            max_length=work.max_length,
        )
        note(
            f"hours_{name}",
            arm.hours,
            "updates x seconds of an update: products, attention, activations, optimizer and "
            f"communication; +-{SPEED_ERROR:.0%}{sampled}",
            f"lorasweep.plan.gpu.time; conf/hardware/{card}.yaml, data sheets",
            Sure.PLANNED,
            updates=work.steps,
            seconds=arm.placed.step_s,
            tokens_a_row=work.row_tokens,
            gpus=arm.placed.gpus,
        )
        note(
            f"cost_usd_{name}",
            arm.cost_usd,
            "hours x GPUs x price of a GPU and hour",
            f"price of {card}: price_per_gpu_h of the row, or of conf/hardware",
            Sure.PLANNED,
            price_per_gpu_h=found.hardware.price_per_gpu_h,
        )
        note(
            f"serving_gib_{name}",
            arm.serving_gib,
            "one base and all adapters" if name == "lora" else "a copy of the model for each",
            "2 bytes a weight, without the cache of keys and values",
            Sure.EXACT,
            adapters_served=case.customer.adapters_served,
            mib_each=arm.file_mib,
        )
    note(
        "flops_ratio",
        found.flops_ratio,
        "(4 x active weights + 6 x active adapter weights) / (6 x active weights); 2/3 + 2R/N on a "
        "square matrix of width N at rank R",
        "LoRA Without Regret (Thinking Machines, 2025), its count of operations",
        Sure.EXACT,
    )


def _warn(case: Case, found: Costs) -> None:
    c, warn = case.customer, case.trace.warn
    for name, arm in (("LoRA", found.lora), ("full fine-tuning", found.full)):
        if arm.placed.gpus is None:
            warn(f"{name} does not fit: {arm.placed.why}")
        elif not arm.fits:
            available = f"{c.gpus} {'is' if c.gpus == 1 else 'are'} available"
            warn(f"{name} takes {arm.placed.gpus} {found.hardware.name} GPUs, and {available}")
    placed = (found.lora.placed, found.full.placed)
    lora, full = (p.step_s * p.gpus if p.step_s and p.gpus else None for p in placed)
    if lora and full and lora > NOT_FASTER * full:
        times = f"{lora / full:.2f} times full fine-tuning's GPU time an update"
        warn(f"LoRA is not faster here: {times}")
    if c.task == "rl" and (found.lora.gpu_hours or found.full.gpu_hours):
        warn(
            "hours and dollars contain sampling as a serving engine does it at best, on the same "
            "GPUs: weights, keys and values read once a token"
        )
