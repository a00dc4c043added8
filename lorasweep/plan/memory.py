"""Compute the peak memory of training by component, and the disk space of checkpoints, from shapes.

Several GPUs work as in FSDP2: every tensor is split over all GPUs, and two layers are gathered at a
time, the one that computes and the next one. analysis/results/plan/README.md compares the results
with published figures.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import (
    WORD_BYTES,
    Load,
    cache_bytes,
    evaluated_completions,
    layer_bytes,
    load_of,
    mean_length,
)
from lorasweep.spec.run import RunSpec

STATE_BYTES = {"fp32": (4, 4, 8), "bf16": (2, 2, 4), "fp64": (8, 8, 16)}
"""Precision -> bytes per trained parameter of weight, of gradient, of Adam's two moments."""

# ---- a GPU
PROCESS_BYTES, NCCL_BYTES = 0.8e9, 1.0e9
"""Bytes of CUDA's context and libraries on a GPU; bytes of NCCL's buffers. Assumptions."""
LOGIT_BYTES = 16
"""Bytes per logit at the peak: logit and gradient in bf16; logit, logarithm, gradient in fp32."""
CHUNK_LOGITS = 1 << 26
"""Logits computed at once (train/objectives/nll.py, GPU_LOGITS)."""

# ---- a CPU
CPU_TEXT_PEAK = 2.0
"""Longest row of an update / mean row, for text. In batches of 8 rows of GSM8K it is 1.6 on average
and 2.0 at the 95th percentile (docs/log)."""
CPU_FRAGMENTATION = 1.4
"""Memory of the activations of adapter runs / their bytes in use: freed blocks are kept
(launch/process.py). Measured on two processors: 1.2 to 1.8, varying by run (docs/log)."""
SCORE_BYTES = 1024
"""Bytes of a token's scores in the longest row that keeps them (models/attention.py)."""
CPU_CHUNK_BYTES = 320 * 2**20
"""Five fp32 numbers for each of 2^24 logits, the chunk of train/objectives/nll.py (LOGITS)."""

# ---- sampling (train/sampling.py)
ROWS = 1024
"""Maximum number of completions of a run that are sampled at once."""
CACHE_SHARE = 0.3
"""Share of a GPU's memory for the keys and values of these completions."""
DRAW_PEAK_BYTES = 44
"""Peak bytes held while a token is drawn, per entry of the vocabulary (moved: time.DRAW_BYTES)."""

# ---- checkpoints (store/checkpoint.py)
SLOT_BYTES, BEST_BYTES = 12, 4
"""Bytes per trained parameter in a checkpoint. SLOT_BYTES: fp32 weight and two moments. BEST_BYTES:
the best weight, kept with early stopping."""
SLOTS = 2
"""Checkpoints kept per run."""


@dataclass(frozen=True)
class Layout:
    """How a pack is spread over GPUs and cut into forward passes."""

    gpus: int
    rows: int
    """Rows per forward pass, run and GPU."""
    checkpointing: bool = False
    """Exec.activation_checkpointing."""
    accumulation: int = 1
    """Forward passes per update."""
    joined: bool = False
    """Exec.join_rows."""


def pack_bytes(
    n_runs: int,
    spec: RunSpec,
    hardware: Hardware,
    micro_batch_size: int | None = None,
    processes: int = 1,
    checkpointing: bool = False,
    join_rows: bool = False,
) -> float:
    """Estimate the peak memory of a process in bytes; micro_batch_size None: the whole batch."""
    rows = min(micro_batch_size or spec.batch_size, spec.batch_size)
    layout = Layout(processes, rows, checkpointing, joined=join_rows)
    return sum(pack_memory(n_runs, spec, hardware, layout).values())


def pack_memory(n_runs: int, spec: RunSpec, hardware: Hardware, layout: Layout) -> dict[str, float]:
    """Return the peak bytes of a process that trains `n_runs` runs like `spec`, by component.

    Runs that sample completions have two phases, learning and sampling. The result is for the one
    with the higher peak.
    """
    load, word = load_of(spec.model, spec.method), WORD_BYTES[spec.precision]
    states = "fp64" if spec.precision == "fp64" else "fp32"
    held = 2 if spec.model.weights_dtype == spec.precision == "bf16" else max(4, word)
    if hardware.gpus:
        parts = memory_parts(
            load,
            layout,
            spec.dataset.max_length,  # rows of a forward pass are padded to the longest
            n_runs,
            states=states,
            word=word,
            frozen_bytes=held,
            start_bytes=held,
        )
    else:
        parts = _cpu_memory(load, spec, layout, n_runs, states, held)
        parts["process"] = hardware.process_gib * 2**30
    if spec.early_stopping:
        parts["best weights"] = parts["trained weights"]
    if not spec.max_new_tokens:
        return parts
    if hardware.gpus:
        sampling = sampling_memory(load, spec, hardware, n_runs, layout.gpus, held)
    else:
        rows = n_runs * min(ROWS, max([spec.batch_size, *evaluated_completions(spec)]))
        sampling = parts | {
            "activations": 0.0,
            "keys and values": rows * spec.dataset.max_length * cache_bytes(spec.model, word),
            "logits": float(rows * DRAW_PEAK_BYTES * spec.model.vocab_size),
        }
    return max(parts, sampling, key=lambda found: sum(found.values()))


def checkpoint_bytes(specs: Iterable[RunSpec]) -> float:
    """Return the bytes on disk of the checkpoints of these runs while they train."""
    return SLOTS * sum(
        (SLOT_BYTES + (BEST_BYTES if s.early_stopping else 0)) * s.method.n_trainable(s.model)
        for s in specs
    )


def _state(
    load: Load, n_runs: int, states: str, frozen_bytes: int, start_bytes: int, n: int = 1
) -> dict[str, float]:
    """Return the bytes of weights, gradients and moments, split over `n` devices."""
    weight, gradient, moments = STATE_BYTES[states]
    trained = n_runs * load.trained / n
    frozen = load.model.n_params - load.trained if load.whole else load.model.n_params
    return {
        "frozen weights": frozen_bytes * frozen / n,
        "weights to start from": start_bytes * trained if load.whole else 0.0,
        "trained weights": weight * trained,
        "gradients": gradient * trained,
        "moments": moments * trained,
    }


# ---------------------------------------------------------------- a CPU


def _cpu_memory(
    load: Load, spec: RunSpec, layout: Layout, n_runs: int, states: str, held: int
) -> dict[str, float]:
    """Return the peak bytes of learning on a CPU."""
    model, word, length = load.model, WORD_BYTES[spec.precision], mean_length(spec)
    exact = STATE_BYTES[states][0]
    peak = 1.0 if spec.dataset.source == "synthetic" else CPU_TEXT_PEAK
    tokens = n_runs * layout.rows * length * peak
    h, f, kv = model.hidden_size, model.mlp_size, model.n_kv_heads * model.head_size
    scores = model.n_heads * min(length, SCORE_BYTES / word)
    layer = 2 * h * exact + word * (4 * h + 2 * kv + 4 * f + scores)
    copied = word == 2 and (load.whole or held > word)  # bf16 products copy wider weights
    return _state(load, n_runs, states, held, held) | {
        "copies and buffers": float(2 * copied * model.n_matmul_params),
        "activations": tokens * model.n_layers * layer * (1 if load.whole else CPU_FRAGMENTATION),
        # a chunk of logits, their logarithms, gradients and temporaries
        "logits": min(CPU_CHUNK_BYTES, 5 * exact * tokens * model.vocab_size),
    }


# ---------------------------------------------------------------- a GPU


def memory_parts(
    load: Load,
    layout: Layout,
    row_tokens: int,
    n_runs: int = 1,
    *,
    states: str = "fp32",
    word: int = 2,
    frozen_bytes: int = 2,
    start_bytes: int = 0,
    stream: int | None = None,
    whole_logits: bool = False,
    process: bool = True,
) -> dict[str, float]:
    """Return the peak bytes of learning on one GPU by component.

    Args:
        load: the Load of one run.
        row_tokens: tokens of the longest row.
        states: precision of the trained parameters and of Adam (STATE_BYTES).
        word, stream: see `layer_bytes`.
        frozen_bytes: bytes per frozen weight.
        start_bytes: bytes per trained weight of the base, if a copy is kept to measure the change.
        whole_logits: compute the logits of all tokens at once instead of in chunks.
        process: include a process's memory before its first tensor.
    """
    model, n = load.model, layout.gpus
    tokens = n_runs * layout.rows * row_tokens
    kept, h, exact = layer_bytes(load, word, stream), model.hidden_size, max(4, word)
    stream = stream or exact
    inputs = stream * h * model.n_layers if layout.checkpointing else 0
    layers = 1 if layout.checkpointing else model.n_layers
    # the last norm's input, its normalised input, and its output, which chunks of logits keep
    last = exact * h + stream * h * (1 + load.norms_trained)
    logits = tokens * model.vocab_size
    if not whole_logits:
        logits = min(logits, max(CHUNK_LOGITS, n_runs * layout.rows * model.vocab_size))
    masks = 0.0
    if layout.joined and layout.rows > 1:
        # transformers' mask of bytes, and torch's mask in the type of products, which each layer
        # keeps. Read from the code of both and seen on a CPU. Flash attention needs no mask.
        masks = float(n_runs * (layout.rows * row_tokens) ** 2 * (1 + word * layers))
    parts = _state(load, n_runs, states, frozen_bytes, start_bytes, n) | {
        "activations": tokens * (inputs + layers * kept + last),
        "gradients of activations": word / 2 * tokens * (4 * h + 4 * model.mlp_size),
        "attention masks": masks,
        "logits": word / 2 * LOGIT_BYTES * logits,
    }
    weight, gradient, _ = STATE_BYTES[states]
    adapters = 0 if load.whole else n_runs * load.trained
    if n == 1:  # weights wider than the type of products are copied to that type
        trained = min(load.trained, model.n_matmul_params) if load.whole else 0
        frozen = (model.n_matmul_params - trained) * (frozen_bytes > word)
        # copies of frozen weights are held; those of adapters only where activations are kept
        live = 1 / model.n_layers if layout.checkpointing else 1
        copies = frozen + (trained + live * adapters) * (weight > word)
        parts["copies and buffers"] = word * copies
    else:  # two layers are gathered at a time, and always the weights outside the layers
        outer = _outer_bytes(load, weight, frozen_bytes) + gradient * load.head_trained
        added = adapters / model.n_layers
        changed = load.layer_params if load.whole else added
        whole = outer + 2 * word * (load.layer_params + added) + (word + gradient) * changed
        # the embedding's gradient comes last, when the activations have been freed
        freed = parts["activations"] + masks + parts["logits"]
        embedding = gradient * (load.outer_trained - load.head_trained)
        parts["copies and buffers"] = whole + max(0.0, embedding - freed)
    if process:
        parts["process"] = PROCESS_BYTES + (NCCL_BYTES if n > 1 else 0)
    return parts


def _outer_bytes(load: Load, weight: int, frozen_bytes: int) -> float:
    """Return the bytes of weights outside the layers, which each process gathers as stored."""
    return weight * load.outer_trained + frozen_bytes * (load.outer_params - load.outer_trained)


def rounds_of(
    spec: RunSpec, hardware: Hardware, n_runs: int, gpus: int, completions: int, group: int
) -> tuple[int, int]:
    """Return the completions per run and round that a GPU draws (whole groups), and the rounds."""
    each = cache_bytes(spec.model, WORD_BYTES[spec.precision]) * spec.dataset.max_length
    room = CACHE_SHARE * (hardware.gpu_memory_gib or 0) * 2**30
    prompts = max(1, min(ROWS, int(room / (n_runs * each))) // group)
    share = -(-(completions // group) // gpus)  # prompts of one GPU
    return min(prompts, share) * group, -(-share // prompts)


def sampling_memory(
    load: Load, spec: RunSpec, hardware: Hardware, n_runs: int, gpus: int, held: int
) -> dict[str, float]:
    """Return the peak bytes of one GPU while completions are drawn, by component.

    `held`: bytes per frozen weight. With several GPUs, each one gathers the model, not gradients.
    """
    model, word = load.model, WORD_BYTES[spec.precision]
    states = "fp64" if spec.precision == "fp64" else "fp32"
    at_once, _ = rounds_of(spec, hardware, n_runs, gpus, spec.batch_size, spec.group_size)
    rows = n_runs * at_once
    whole = float(word * load.trained * load.whole)
    if gpus > 1:
        outer = _outer_bytes(load, STATE_BYTES[states][0], held)
        whole = word * model.n_layers * load.layer_params + outer
    return _state(load, n_runs, states, held, held, gpus) | {
        "gradients": 0.0,
        "copies and buffers": whole,
        "keys and values": rows * spec.dataset.max_length * cache_bytes(model, word),
        "logits": float(rows * model.vocab_size * DRAW_PEAK_BYTES),
        "process": PROCESS_BYTES + (NCCL_BYTES if gpus > 1 else 0),
    }
