"""What LoRA and full fine-tuning cost side by side: memory, GPUs, time, dollars, files, serving."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from lorasweep.advise.customer import GROUP, Customer, RowError
from lorasweep.advise.rules.capacity import LAYERS, trained
from lorasweep.advise.rules.workload import Workload
from lorasweep.advise.shapes import bf16
from lorasweep.advise.trace import Sure, Trace
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
Machines = Mapping[str, Callable[[], Hardware]]
"""Name -> reads its file."""


@dataclass(frozen=True)
class Placed:
    """One method on given GPUs. None where it fits on no number of them."""

    gpus: int | None
    """All GPUs at hand, or the fewest that hold it."""
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


def hardware_of(c: Customer, machines: Machines, default: Hardware | None) -> Hardware:
    """Return the hardware of a customer, with its price.

    Raises:
        RowError: it is not known, or has no GPU.
    """
    if c.hardware is None and default is not None:
        found = default
    else:
        name = (c.hardware or HARDWARE).lower()
        if name not in machines:
            raise RowError(
                [
                    f"column hardware: {unknown('hardware', name, machines)} Your own card is a "
                    "file in "
                    "DIR/hardware with --config-dir DIR."
                ]
            )
        found = machines[name]()
    if not found.has_speeds:
        raise RowError([f"column hardware: {found.name} has no GPU whose speed is known."])
    if c.price_per_gpu_h is not None:
        found = replace(found, price_per_gpu_h=c.price_per_gpu_h)
    return found


def costs_of(
    c: Customer, model: ModelSpec, rank: int, work: Workload, hardware: Hardware, trace: Trace
) -> Costs:
    """Return what both methods cost, LoRA at this rank."""
    at = _Where(bf16(model), work.batch_size, work.max_length, _Machine(hardware))
    placed = (_placed(at, r, c.gpus, work.row_tokens) for r in (rank, 0))
    lora, full = (_with_sampling(p, c, at, work) for p in placed)
    n_lora, n_full = trained(model, rank), model.n_params
    base = WORD * model.n_params / 2**30
    adapter = WORD * n_lora / 2**30
    ratio = LoRA(rank=rank, layers=LAYERS).step_flops(model, 1) / FullFT().step_flops(model, 1)
    found = Costs(
        hardware=hardware,
        lora=_arm(c, work, hardware, lora, adapter, base + c.adapters_served * adapter),
        full=_arm(c, work, hardware, full, base, c.adapters_served * base),
        flops_ratio=ratio,
    )
    _note(c, work, found, n_lora, n_full, trace)
    _warn(c, work, found, trace)
    return found


def _arm(
    c: Customer, work: Workload, hardware: Hardware, placed: Placed, file: float, serving: float
) -> Arm:
    hours = gpu_hours = cost = None
    if placed.step_s is not None and placed.gpus is not None and work.steps is not None:
        hours = placed.step_s * work.steps / 3600
        gpu_hours = hours * placed.gpus
        if hardware.price_per_gpu_h is not None:
            cost = gpu_hours * hardware.price_per_gpu_h
    fits = placed.gpus is not None and placed.gpus <= (c.gpus or MOST_GPUS)
    return Arm(placed, fits, hours, gpu_hours, cost, file * 1024, serving)


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
    """What a placement depends on, beside the method."""

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
    dataset = DatasetSpec(
        name="customer", source="jsonl", location="customer", max_length=at.max_length
    )
    spec = RunSpec(
        model=at.model,
        dataset=dataset,
        method=_method(rank),
        batch_size=at.batch_size,
        precision="bf16",
    )
    return place([spec], at.machine.hardware, gpus=gpus)


def _placed(at: _Where, rank: int, at_hand: int | None, row_tokens: float) -> Placed:
    """Place one method on all GPUs at hand, if they hold it, else on the fewest that do."""
    found = _place(at, rank, None)
    if isinstance(found, Misfit):
        return Placed(None, None, None, f"{found.why}. Give {found.remedy}")
    gpus = found.layout.gpus
    while 2 * gpus <= (at_hand or 1) and at.batch_size % (2 * gpus) == 0:
        gpus *= 2
    found = _place(at, rank, gpus)
    assert isinstance(found, Placement)  # it fits on fewer
    parts = step_parts(_load(at.model, rank), found.layout, row_tokens, at.machine.hardware)
    return Placed(gpus, found.memory_gib, step_seconds(parts))


def _with_sampling(placed: Placed, c: Customer, at: _Where, work: Workload) -> Placed:
    """Add what a serving engine on the same GPUs needs to sample an update's answers in RL."""
    if c.task != "rl" or placed.gpus is None or placed.step_s is None:
        return placed
    group = min(GROUP, work.batch_size)
    lengths = (work.row_tokens - work.tokens, work.tokens)
    machine = at.machine.hardware
    sampled = served_s(at.model, machine, placed.gpus, work.batch_size, group, *lengths)
    return replace(placed, step_s=placed.step_s + sampled)


@lru_cache(maxsize=1024)
def _load(model: ModelSpec, rank: int) -> Load:
    return load_of(model, _method(rank))


# ---------------------------------------------------------------- what is said of it


def _note(
    c: Customer, work: Workload, found: Costs, n_lora: int, n_full: int, trace: Trace
) -> None:
    card, data_sheet = found.hardware.name, f"conf/hardware/{found.hardware.name}.yaml, data sheets"
    for name, arm, n in (("lora", found.lora, n_lora), ("full", found.full, n_full)):
        trace.note(
            f"peak_gib_{name}",
            arm.placed.peak_gib,
            arm.placed.why
            or f"weights, gradients, moments, activations, logits and buffers of one of "
            f"{arm.placed.gpus} GPU(s): all at hand, or the fewest that hold it with "
            f"{MEMORY_ERROR:.0%} "
            "on top",
            "lorasweep.plan.memory; analysis/results/plan says how published figures lie to it",
            Sure.PLANNED if name == "lora" else Sure.ASSUMED,
            trained=n,
            rows_an_update=work.batch_size,
            max_length=work.max_length,
        )
        trace.note(
            f"hours_{name}",
            arm.hours,
            "updates x seconds of an update: products, attention, activations, optimizer and "
            f"communication; +-{SPEED_ERROR:.0%}"
            + ("; and sampling by a serving engine, at best" if c.task == "rl" else ""),
            f"lorasweep.plan.time; {data_sheet}",
            Sure.PLANNED,
            updates=work.steps,
            seconds=arm.placed.step_s,
            tokens_a_row=work.row_tokens,
            gpus=arm.placed.gpus,
        )
        trace.note(
            f"cost_usd_{name}",
            arm.cost_usd,
            "hours x GPUs x price of a GPU and hour",
            f"price of {card}: price_per_gpu_h of the row, or of conf/hardware",
            Sure.PLANNED,
            price_per_gpu_h=found.hardware.price_per_gpu_h,
        )
        trace.note(
            f"serving_gib_{name}",
            arm.serving_gib,
            "one base and all adapters" if name == "lora" else "a copy of the model for each",
            "2 bytes a weight, without the cache of keys and values",
            Sure.EXACT,
            adapters_served=c.adapters_served,
            mib_each=arm.file_mib,
        )
    trace.note(
        "flops_ratio",
        found.flops_ratio,
        "(4 x active weights + 6 x active adapter weights) / (6 x active weights); 2/3 + 2R/N on a "
        "square matrix of width N at rank R",
        "LoRA Without Regret (Thinking Machines, 2025), its count of operations",
        Sure.EXACT,
    )


def _warn(c: Customer, work: Workload, found: Costs, trace: Trace) -> None:
    for name, arm in (("LoRA", found.lora), ("full fine-tuning", found.full)):
        if arm.placed.gpus is None:
            trace.warn(f"{name} does not fit: {arm.placed.why}")
        elif not arm.fits:
            trace.warn(
                f"{name} takes {arm.placed.gpus} {found.hardware.name} GPUs, and {c.gpus} "
                f"{'is' if c.gpus == 1 else 'are'} at hand"
            )
    lora, full = found.lora.gpu_hours, found.full.gpu_hours
    seconds = found.lora.placed.step_s, found.full.placed.step_s
    if None not in seconds and found.lora.placed.gpus and found.full.placed.gpus:
        a = (seconds[0] or 0.0) * found.lora.placed.gpus
        b = (seconds[1] or math.inf) * found.full.placed.gpus
        if a > NOT_FASTER * b:
            trace.warn(
                f"LoRA is not faster here: {a / b:.2f} times full fine-tuning's GPU time an update"
            )
    if c.task == "rl" and (lora or full):
        trace.warn(
            "hours and dollars contain sampling as a serving engine does it at best, on the same "
            "GPUs: weights, keys and values read once a token"
        )
