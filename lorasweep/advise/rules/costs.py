"""Compute the costs of LoRA and full fine-tuning: memory, GPUs, time, dollars, files, serving."""

from dataclasses import dataclass, replace
from functools import lru_cache, partial

from lorasweep.advise.evidence import Case
from lorasweep.advise.read import RowError
from lorasweep.advise.rules.capacity import LAYERS, trained
from lorasweep.advise.rules.workload import GROUP, Workload
from lorasweep.errors import unknown
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import Load, load_of, served_s, step_parts, step_seconds
from lorasweep.plan.planner import MEMORY_ERROR, MOST_GPUS, SPEED_ERROR, Placement, place
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.method import Method
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec

HARDWARE = "h100"
"""GPU of customers who state none."""
WORD = 2
"""Bytes of a weight in served and shipped models, which are in bf16."""
NOT_FASTER = 0.95
"""LoRA counts as not faster above this share of full fine-tuning's GPU time."""


@dataclass(frozen=True)
class Arm:
    """The costs of one method. None: it fits on no number of GPUs, or the value is not known."""

    trained: int
    file_mib: float
    """Size of the shipped adapter, or of the fully fine-tuned model."""
    serving_gib: float
    """Memory of the weights that serve all adapters, or all full copies, of the customer."""
    why: str = ""
    """Why the method fits on no number of GPUs, and what would help."""
    gpus: int | None = None
    """GPUs of the run: as many as are available, or the fewest that hold it."""
    fits: bool = False
    """Whether the customer's GPUs hold the run."""
    peak_gib: float | None = None
    """Expected peak memory of one GPU."""
    step_s: float | None = None
    hours: float | None = None
    """Wall time of the updates."""
    cost_usd: float | None = None


@dataclass(frozen=True)
class Costs:
    """Costs of both methods on the customer's hardware."""

    hardware: Hardware
    lora: Arm
    full: Arm
    flops_ratio: float
    """Operations of a LoRA update divided by those of a full fine-tuning update."""


def hardware_of(case: Case) -> Hardware:
    """Return a customer's hardware; RowError: it is unknown, or no speed of a GPU is known."""
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
    """Return the costs of full fine-tuning, and of LoRA at this rank."""
    lora, full = (_arm(case, r, work, hardware) for r in (rank, 0))
    ratio = _method(rank).step_flops(case.model, 1) / _method(0).step_flops(case.model, 1)
    case.note("flops_ratio", ratio)
    gpu_s = [a.step_s * a.gpus if a.step_s and a.gpus else None for a in (lora, full)]
    if gpu_s[0] and gpu_s[1] and gpu_s[0] > NOT_FASTER * gpu_s[1]:
        case.warn("not_faster", times=gpu_s[0] / gpu_s[1])
    if case.customer.task == "rl" and (lora.hours or full.hours):
        case.warn("with_sampling")
    return Costs(hardware, lora, full, ratio)


def _arm(case: Case, rank: int, work: Workload, hardware: Hardware) -> Arm:
    """Return the costs of LoRA at a rank (0: full fine-tuning); record reasons and warnings."""
    c, base, price = case.customer, case.model.n_params, hardware.price_per_gpu_h
    model = replace(case.model, weights_dtype="bf16")  # frozen weights on GPUs
    n = trained(case.model, rank) if rank else base
    served = base + c.adapters_served * n if rank else c.adapters_served * n
    files = (WORD * n / 2**20, WORD * served / 2**30)
    unpriced = replace(hardware, price_per_gpu_h=None)
    place_on = partial(_place, model, work.batch_size, work.max_length, unpriced, rank)
    found = place_on(None)
    if not found.why:  # use all available GPUs if they hold the run
        gpus = found.layout.gpus
        while 2 * gpus <= (c.gpus or 1) and work.batch_size % (2 * gpus) == 0:
            gpus *= 2
        found = place_on(gpus)
    if found.why:
        arm = Arm(n, *files, why=f"{found.why}. Give {found.remedy.replace('dataset.', '')}")
    else:
        gpus = found.layout.gpus
        parts = step_parts(_load(model, rank), found.layout, work.row_tokens, hardware)
        step_s = step_seconds(parts)
        if c.task == "rl":  # a serving engine on the same GPUs samples an update's completions
            group = min(GROUP, work.batch_size)
            lengths = (work.row_tokens - work.tokens, work.tokens)
            step_s += served_s(model, hardware, gpus, work.batch_size, group, *lengths)
        hours = None if work.steps is None else step_s * work.steps / 3600
        cost = None if hours is None or price is None else hours * gpus * price
        fits = gpus <= (c.gpus or MOST_GPUS)
        arm = Arm(n, *files, "", gpus, fits, found.memory_gib, step_s, hours, cost)
    name, method = ("lora", "LoRA") if rank else ("full", "full fine-tuning")
    memory = (
        f"weights, gradients, moments, activations, logits and buffers of one of {arm.gpus} "
        f"GPU(s): all available, or the fewest that hold it with {MEMORY_ERROR:.0%} on top"
    )
    batch = {"trained": n, "rows_an_update": work.batch_size, "max_length": work.max_length}
    steps = {"updates": work.steps, "seconds": arm.step_s, "tokens_a_row": work.row_tokens}
    sampled = "; and sampling by a serving engine, at best" if c.task == "rl" else ""
    words = {"card": hardware.name, "error": SPEED_ERROR, "sampled": sampled}
    shipped = {"adapters_served": c.adapters_served, "mib_each": arm.file_mib}
    case.note(f"peak_gib_{name}", arm.peak_gib, name, batch, why=arm.why or memory)
    case.note(f"hours_{name}", arm.hours, "", {**steps, "gpus": arm.gpus}, **words)
    case.note(f"cost_usd_{name}", arm.cost_usd, "", {"price_per_gpu_h": price}, **words)
    case.note(f"serving_gib_{name}", arm.serving_gib, name, shipped)
    if arm.gpus is None:
        case.warn("no_fit", method=method, why=arm.why)
    elif not arm.fits:
        available = f"{c.gpus} {'is' if c.gpus == 1 else 'are'}"
        words = {"gpus": arm.gpus, "card": hardware.name, "available": available}
        case.warn("too_few_gpus", method=method, **words)
    return arm


def _method(rank: int) -> Method:
    """Return LoRA at a rank; rank 0 stands for full fine-tuning."""
    return LoRA(rank=rank, layers=LAYERS) if rank else FullFT()


@lru_cache(maxsize=1024)
def _load(model: ModelSpec, rank: int) -> Load:
    return load_of(model, _method(rank))


@lru_cache(maxsize=4096)
def _place(
    model: ModelSpec, batch: int, length: int, hardware: Hardware, rank: int, gpus: int | None
) -> Placement:
    """Place one method on `gpus` GPUs; None: on the fewest that hold the run."""
    dataset = DatasetSpec(name="customer", source="jsonl", location="customer", max_length=length)
    spec = RunSpec(
        model=model, dataset=dataset, method=_method(rank), batch_size=batch, precision="bf16"
    )
    return place(spec, hardware, gpus=gpus, checkpointing=(False, True))
