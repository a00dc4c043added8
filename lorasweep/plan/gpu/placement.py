"""Place a pack on GPUs: the fewest that hold it, rows a forward pass, and what that takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorasweep.plan.flops import evaluated_answers, mean_length, run_flops, train_flops
from lorasweep.plan.gpu.load import Load, load_of
from lorasweep.plan.gpu.memory import Layout, memory_parts
from lorasweep.plan.gpu.sampling import evaluation_s, sampling_memory, sampling_s
from lorasweep.plan.gpu.time import WORD_BYTES, step_parts, step_seconds
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.run import RunSpec

MEMORY_ERROR, SPEED_ERROR = 0.17, 0.25
"""Error that nine in ten covered published figures stay below (analysis/results/plan/README.md). A
pack fits if it does with this error on top."""
MOST_GPUS = 512
"""Largest number of GPUs tried for one run."""
FORWARD_TOKENS = 32768
"""Most tokens of a forward pass and GPU: more gain nothing."""


@dataclass(frozen=True)
class Placement:
    """Where a pack trains, and what it takes."""

    layout: Layout
    memory_gib: float
    """Expected peak of one GPU."""
    memory: dict[str, float]
    """Its components, in bytes."""
    step_s: float
    """Expected seconds of an update of all members."""
    step: dict[str, float]
    """Its components, in seconds."""
    seconds: float
    """Expected seconds of the pack, evaluations included."""
    tokens: float
    """Tokens that it trains on."""
    sampling_s: float = 0.0
    """Seconds of `seconds` in which answers are sampled."""

    @property
    def gpu_hours(self) -> float:
        """Expected GPU-hours of the pack."""
        return self.seconds * self.layout.gpus / 3600


@dataclass(frozen=True)
class Misfit:
    """Why a pack fits on no number of GPUs, and what would make it fit."""

    why: str
    remedy: str


def place(
    specs: Sequence[RunSpec],
    hardware: Hardware,
    rows: int | None = None,
    most_gpus: int = MOST_GPUS,
    *,
    gpus: int | None = None,
    checkpointing: Sequence[bool] = (False, True),
    join_rows: bool = False,
) -> Placement | Misfit:
    """Choose the fewest GPUs, a power of two, on which a pack fits.

    Of keeping activations and computing them again, the faster is chosen.

    Args:
        specs: the pack's runs, of one shape but for their ranks.
        hardware: with the figures that `Hardware.has_speeds` asks for.
        rows: rows a forward pass, member and GPU; None: chosen.
        most_gpus: do not look further.
        gpus: this number of GPUs, which divides the batch; None: chosen.
        checkpointing: whether activations may be kept, computed again, or both.
        join_rows: rows of a forward pass lie end to end (see Exec).
    """
    spec = specs[-1]
    load = load_of(spec.model, spec.method)
    room = (hardware.gpu_memory_gib or 0) * 2**30 / (1 + MEMORY_ERROR)
    numbers = [gpus] if gpus else _numbers(spec.batch_size, most_gpus)
    for n in numbers:
        one_row = [Layout(n, 1, again, joined=join_rows) for again in checkpointing]
        layouts = [_layout(load, specs, layout, room, rows, hardware) for layout in one_row]
        found = [_placement(load, specs, lay, hardware) for lay in layouts if lay is not None]
        if found:
            return min(found, key=lambda p: p.step_s)
    tried = Layout(numbers[-1], rows or 1, checkpointing[-1])
    misfit = _misfit(load, specs, tried, hardware, most_gpus)
    if not gpus and not rows:
        return misfit
    other = place(specs, hardware, None, most_gpus, join_rows=join_rows)
    if isinstance(other, Misfit):
        return misfit
    return Misfit(misfit.why, _settings_of(other.layout))


def _numbers(batch_size: int, most: int) -> list[int]:
    """Return the numbers of GPUs to try: powers of two that divide the batch."""
    powers = (2**k for k in range(most.bit_length()))
    return [n for n in powers if n <= most and batch_size % n == 0]


def _layout(
    load: Load,
    specs: Sequence[RunSpec],
    one_row: Layout,
    room: float,
    asked: int | None,
    hardware: Hardware,
) -> Layout | None:
    """Return the largest forward pass that fits into `room` bytes; None if none does."""
    spec, members = specs[-1], len(specs)
    share = spec.batch_size // one_row.gpus
    most = max(1, FORWARD_TOKENS // (members * spec.dataset.max_length))
    divisors = (n for n in range(min(share, most), 0, -1) if share % n == 0)
    for rows in divisors if asked is None else [min(asked, share)]:
        layout = replace(one_row, rows=rows, accumulation=-(-share // rows))
        if sum(_memory(load, spec, layout, members, hardware).values()) <= room:
            return layout
    return None


def _memory(
    load: Load, spec: RunSpec, layout: Layout, members: int, hardware: Hardware
) -> dict[str, float]:
    """Return the parts of the peak: that of learning, or of sampling if it is higher."""
    length = spec.dataset.max_length  # rows of a forward pass are padded to the longest
    exact = spec.precision == "fp64"
    held = 2 if spec.model.weights_dtype == spec.precision == "bf16" else 8 if exact else 4
    learning = memory_parts(
        load,
        layout,
        length,
        members,
        states="fp64" if exact else "fp32",
        word=WORD_BYTES[spec.precision],
        frozen_bytes=held,
        start_bytes=held,
    )
    if not spec.max_new_tokens:
        return learning
    sampling = sampling_memory(load, spec, hardware, members, layout.gpus, held)
    return max(learning, sampling, key=lambda parts: sum(parts.values()))


def _placement(
    load: Load, specs: Sequence[RunSpec], layout: Layout, hardware: Hardware
) -> Placement:
    spec, members = specs[-1], len(specs)
    memory = _memory(load, spec, layout, members, hardware)
    length, gpus = mean_length(spec), layout.gpus
    step = step_parts(load, layout, length, hardware, spec.precision, members)
    step_s = step_seconds(step)
    updates = [s.steps * run_flops(s) / train_flops(s) for s in specs]
    sampled = evaluated = 0.0
    if spec.max_new_tokens:
        shape = (spec.batch_size, spec.group_size)
        step["sampling"] = sampling_s(load, spec, hardware, members, gpus, *shape)
        step_s += step["sampling"]
        sampled = step["sampling"] * sum(s.steps for s in specs) / members
    if evaluated_answers(spec):
        updates = [float(s.steps) for s in specs]
        evaluated = evaluation_s(load, spec, hardware, members, gpus)
    return Placement(
        layout=layout,
        memory_gib=sum(memory.values()) / 2**30,
        memory=memory,
        step_s=step_s,
        step=step,
        seconds=step_s * sum(updates) / members + evaluated,
        tokens=float(sum(s.steps * s.batch_size * length for s in specs)),
        sampling_s=sampled + evaluated,
    )


def _settings_of(layout: Layout) -> str:
    """Return the settings that train as `layout` says."""
    again = " exec.activation_checkpointing=true" if layout.checkpointing else ""
    return f"exec.world_size={layout.gpus} exec.micro_batch_size={layout.rows}{again}"


def _misfit(
    load: Load, specs: Sequence[RunSpec], tried: Layout, hardware: Hardware, most_gpus: int
) -> Misfit:
    """Say what is missing with the layout that takes least."""
    spec, gpus = specs[-1], tried.gpus
    memory = _memory(load, spec, tried, len(specs), hardware)
    need = sum(memory.values()) * (1 + MEMORY_ERROR) / 2**30
    largest = max(memory, key=lambda name: memory[name])
    why = (
        f"{spec.method.name} of {spec.model.name} takes {need:.0f} GiB a GPU on {gpus} GPU(s), "
        f"{tried.rows} row(s) of {spec.dataset.max_length:,} tokens a forward pass and activations "
        f"{'computed again' if tried.checkpointing else 'kept'} ({largest} "
        f"{memory[largest] / 2**30:.0f} GiB), and {hardware.name} has "
        f"{hardware.gpu_memory_gib:.0f} GiB"
    )
    state = sum(memory[name] for name in memory if name not in PER_TOKEN) / 2**30
    if gpus < min(most_gpus, spec.batch_size):
        remedy = f"a batch_size that a larger power of two divides ({spec.batch_size} given)"
    elif gpus >= most_gpus:
        remedy = f"more than {most_gpus} GPU(s) a run"
    elif state < (hardware.gpu_memory_gib or 0) / (1 + MEMORY_ERROR):
        remedy = f"a dataset.max_length below {spec.dataset.max_length}"
    else:
        remedy = f"a GPU with {need:.0f} GiB, or a batch_size above {spec.batch_size}"
    return Misfit(why, remedy)


PER_TOKEN = (
    "keys and values",
    "activations",
    "gradients of activations",
    "attention masks",
    "logits",
)
"""Components of memory that shorter rows make smaller."""
