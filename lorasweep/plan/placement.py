"""Choose the GPUs and the rows per forward pass of a pack, and estimate its memory and time."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import (
    evaluated_completions,
    load_of,
    mean_length,
    updates_with_evaluations,
)
from lorasweep.plan.memory import Layout, pack_memory
from lorasweep.plan.time import evaluation_s, sampling_s, step_parts, step_seconds
from lorasweep.spec.run import RunSpec

MEMORY_ERROR, SPEED_ERROR = 0.17, 0.25
"""Nine in ten of the covered published figures have a smaller relative error
(analysis/results/plan/README.md). A pack must fit with the error of memory added."""
MOST_GPUS = 512
"""Maximum number of GPUs tried for one run, a power of two."""
FORWARD_TOKENS = 32768
"""Maximum tokens per forward pass and GPU: more are no faster."""
PER_TOKEN = (
    *("keys and values", "activations", "gradients of activations", "attention masks", "logits"),
)
"""Components of memory that shorter rows make smaller."""


@dataclass(frozen=True)
class Placement:
    """Where a pack trains, and its expected memory and time."""

    layout: Layout
    memory: dict[str, float]
    """Peak bytes of one GPU by component."""
    step: dict[str, float]
    """Seconds of an update of all runs in the pack, by component."""
    step_s: float
    seconds: float
    """Seconds of the pack, evaluations included."""
    tokens: float
    """Training tokens of the pack."""
    sampling_s: float = 0.0
    """The part of `seconds` in which completions are sampled."""

    @property
    def memory_gib(self) -> float:
        """Peak memory of one GPU."""
        return sum(self.memory.values()) / 2**30

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the pack."""
        return self.seconds * self.layout.gpus / 3600


@dataclass(frozen=True)
class Misfit:
    """Why a pack fits on no number of GPUs, and what would make it fit."""

    why: str
    remedy: str

    def __str__(self) -> str:
        """Return the cause and the remedy, a sentence each."""
        return f"{self.why}. It fits with {self.remedy}."


def place(
    specs: Sequence[RunSpec],
    hardware: Hardware,
    rows: int | None = None,
    *,
    gpus: int | None = None,
    checkpointing: Sequence[bool] = (False, True),
    join_rows: bool = False,
) -> Placement | Misfit:
    """Choose the fewest GPUs, a power of two, that hold a pack, and the fastest layout on them.

    Args:
        specs: the runs of the pack, which have the same shape except for the rank.
        hardware: the GPUs; `has_speeds` must be true.
        rows: rows per forward pass, run and GPU; None: chosen.
        gpus: number of GPUs, a divisor of the batch size; None: chosen.
        checkpointing: the allowed values of activation checkpointing.
        join_rows: see Exec.
    """
    spec, n_runs = specs[-1], len(specs)
    room = (hardware.gpu_memory_gib or 0) * 2**30 / (1 + MEMORY_ERROR)
    most_rows = max(1, FORWARD_TOKENS // (n_runs * spec.dataset.max_length))
    powers = (2**k for k in range(MOST_GPUS.bit_length()))
    numbers = [gpus] if gpus else [n for n in powers if spec.batch_size % n == 0]
    for n in numbers:
        share, found = spec.batch_size // n, []
        divisors = [k for k in range(min(share, most_rows), 0, -1) if share % k == 0]
        for again in checkpointing:
            for k in divisors if rows is None else [min(rows, share)]:  # the largest that fits
                layout = Layout(n, k, again, -(-share // k), join_rows)
                memory = pack_memory(n_runs, spec, hardware, layout)
                if sum(memory.values()) <= room:
                    found.append(_placement(specs, layout, memory, hardware))
                    break
        if found:
            return min(found, key=lambda p: p.step_s)
    tried = Layout(numbers[-1], rows or 1, checkpointing[-1])
    misfit = _misfit(spec, tried, pack_memory(n_runs, spec, hardware, tried), hardware)
    if not gpus and not rows:
        return misfit
    other = place(specs, hardware, join_rows=join_rows)
    if isinstance(other, Misfit):
        return misfit
    again_too = " exec.activation_checkpointing=true" if other.layout.checkpointing else ""
    settings = f"exec.world_size={other.layout.gpus} exec.micro_batch_size={other.layout.rows}"
    return Misfit(misfit.why, settings + again_too)


def _placement(
    specs: Sequence[RunSpec], layout: Layout, memory: dict[str, float], hardware: Hardware
) -> Placement:
    spec, n_runs, gpus = specs[-1], len(specs), layout.gpus
    load, length = load_of(spec.model, spec.method), mean_length(spec)
    step = step_parts(load, layout, length, hardware, spec.precision, n_runs)
    step_s = step_seconds(step)
    updates = [updates_with_evaluations(s) for s in specs]
    sampled = evaluated = 0.0
    if spec.max_new_tokens:
        shape = (spec.batch_size, spec.group_size)
        step["sampling"] = sampling_s(load, spec, hardware, n_runs, gpus, *shape)
        step_s += step["sampling"]
        sampled = step["sampling"] * sum(s.steps for s in specs) / n_runs
    if evaluated_completions(spec):
        updates = [float(s.steps) for s in specs]
        evaluated = evaluation_s(load, spec, hardware, n_runs, gpus)
    return Placement(
        layout=layout,
        memory=memory,
        step=step,
        step_s=step_s,
        seconds=step_s * sum(updates) / n_runs + evaluated,
        tokens=float(sum(s.steps * s.batch_size * length for s in specs)),
        sampling_s=sampled + evaluated,
    )


def _misfit(spec: RunSpec, tried: Layout, memory: dict[str, float], hardware: Hardware) -> Misfit:
    """Return why the layout `tried`, which needs the least memory, does not fit, and a remedy."""
    need = sum(memory.values()) * (1 + MEMORY_ERROR) / 2**30
    largest = max(memory, key=lambda name: memory[name])
    why = (
        f"{spec.method.name} of {spec.model.name} takes {need:.0f} GiB a GPU on {tried.gpus} "
        f"GPU(s), {tried.rows} row(s) of {spec.dataset.max_length:,} tokens a forward pass and "
        f"activations {'computed again' if tried.checkpointing else 'kept'} ({largest} "
        f"{memory[largest] / 2**30:.0f} GiB), and {hardware.name} has "
        f"{hardware.gpu_memory_gib:.0f} GiB"
    )
    state = sum(memory[name] for name in memory if name not in PER_TOKEN) / 2**30
    if tried.gpus < min(MOST_GPUS, spec.batch_size):
        remedy = f"a batch_size that a larger power of two divides ({spec.batch_size} given)"
    elif tried.gpus >= MOST_GPUS:
        remedy = f"more than {MOST_GPUS} GPU(s) a run"
    elif state < (hardware.gpu_memory_gib or 0) / (1 + MEMORY_ERROR):
        remedy = f"a dataset.max_length below {spec.dataset.max_length}"
    else:
        remedy = f"a GPU with {need:.0f} GiB, or a batch_size above {spec.batch_size}"
    return Misfit(why, remedy)
