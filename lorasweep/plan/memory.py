"""Compute the peak memory of training by component, and the disk space of checkpoints, from shapes.

Several GPUs work as in FSDP2: every tensor is split over all GPUs, and two layers are gathered at a
time, the one that computes and the next one. analysis/results/plan/README.md compares the results
with published figures.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
CPU_FRAGMENTATION = 1.3
"""Memory of the activations of adapter runs / their bytes in use: freed blocks are kept
(launch/process.py). Measured on two processors: 1.2 to 1.8, varying by run (docs/log)."""
SCORE_BYTES = 1024
"""Bytes of a token's scores in the longest row that keeps them (models/attention.py)."""
CPU_LOGITS, CPU_CHUNK_LOGITS = 5, 1 << 24
"""Numbers per logit at the peak, and logits computed at once (train/objectives/nll.py, LOGITS)."""

# ---- sampling (train/sampling.py)
ROWS = 1024
"""Maximum number of completions of a run that are sampled at once."""
CACHE_SHARE = 0.3
"""Share of a GPU's memory for the keys and values of these completions."""
DRAW_PEAK_BYTES = 44
"""Peak bytes held while a token is drawn, per entry of the vocabulary (moved: time.DRAW_BYTES)."""

LEARNING = ("activations", "gradients of activations", "attention masks", "gradients")
"""Components that are freed before completions are sampled."""

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
    accumulation: float = 1
    """Forward passes per update."""
    joined: bool = False
    """Exec.join_rows."""


def pack_memory(n_runs: int, spec: RunSpec, hardware: Hardware, layout: Layout) -> dict[str, float]:
    """Return the peak bytes of a process that trains `n_runs` runs like `spec`, by component.

    Runs that sample completions have two phases, learning and sampling. The result is for the one
    with the higher peak.
    """
    load, word = load_of(spec.model, spec.method), WORD_BYTES[spec.precision]
    states = "fp64" if spec.precision == "fp64" else "fp32"
    held = 2 if spec.model.weights_dtype == spec.precision == "bf16" else max(4, word)
    length, peak, process = spec.dataset.max_length, 1.0, None  # rows are padded to the longest
    if not hardware.gpus:
        length, process = mean_length(spec), hardware.process_gib * 2**30
        peak = 1.0 if spec.dataset.source == "synthetic" else CPU_TEXT_PEAK
    how: dict[str, Any] = {"frozen_bytes": held, "start_bytes": held, "peak": peak, "host": process}
    parts = memory_parts(load, layout, length, n_runs, states=states, word=word, **how)
    if spec.early_stopping:
        parts["best weights"] = parts["trained weights"]
    if not spec.max_new_tokens:
        return parts
    completions = max([spec.batch_size, *evaluated_completions(spec)])
    shape = (n_runs, layout.gpus, completions, spec.group_size)
    rows = n_runs * rounds_of(spec, hardware, *shape)[0]
    model, whole = spec.model, float(word * load.trained * load.whole)
    if layout.gpus > 1:  # each one gathers the model
        outer = _outer_bytes(load, STATE_BYTES[states][0], held)
        whole = word * model.n_layers * load.layer_params + outer
    sampling = {name: 0.0 if name in LEARNING else value for name, value in parts.items()} | {
        "copies and buffers": whole,
        "keys and values": rows * spec.dataset.max_length * cache_bytes(model, word),
        "logits": float(rows * model.vocab_size * DRAW_PEAK_BYTES),
    }
    return max(parts, sampling, key=lambda found: sum(found.values()))


def checkpoint_bytes(specs: Iterable[RunSpec]) -> float:
    """Return the bytes on disk of the checkpoints of these runs while they train."""
    return SLOTS * sum(
        (SLOT_BYTES + (BEST_BYTES if s.early_stopping else 0)) * s.method.n_trainable(s.model)
        for s in specs
    )


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
    host: float | None = None,
    peak: float = 1.0,
) -> dict[str, float]:
    """Return the peak bytes of learning on one GPU, or in a process on a CPU, by component.

    Args:
        load: the Load of one run.
        row_tokens: tokens of a row.
        states: precision of the trained parameters and of Adam (STATE_BYTES).
        word, stream: see `layer_bytes`.
        frozen_bytes: bytes per frozen weight.
        start_bytes: bytes per trained weight of the base, if a copy is kept to measure the change.
        whole_logits: compute the logits of all tokens at once instead of in chunks.
        process: include a process's memory before its first tensor.
        host: this memory on a CPU; None: on a GPU.
        peak: longest row of an update / row_tokens.
    """
    model, n, on_gpu = load.model, layout.gpus, host is None
    tokens = n_runs * layout.rows * row_tokens * peak
    kept, h, exact = layer_bytes(load, word, stream), model.hidden_size, max(4, word)
    stream = stream or exact
    chunk, logit_bytes = CHUNK_LOGITS, word / 2 * LOGIT_BYTES
    if not on_gpu:
        kept += word * model.n_heads * min(row_tokens, SCORE_BYTES / word)
        kept *= 1 if load.whole else CPU_FRAGMENTATION
        chunk, logit_bytes = CPU_CHUNK_LOGITS, CPU_LOGITS * exact
    inputs = stream * h * model.n_layers if layout.checkpointing else 0
    layers = 1 if layout.checkpointing else model.n_layers
    # the last norm's input, its normalised input, and its output, which chunks of logits keep
    last = exact * h + stream * h * (1 + load.norms_trained)
    logits = tokens * model.vocab_size
    if not whole_logits:
        logits = min(logits, max(chunk, n_runs * layout.rows * model.vocab_size))
    masks = 0.0
    if layout.joined and layout.rows > 1:
        # transformers' mask of bytes, and torch's mask in the type of products, which each layer
        # keeps. Read from the code of both and seen on a CPU. Flash attention needs no mask.
        masks = float(n_runs * (layout.rows * row_tokens) ** 2 * (1 + word * layers))
    weight, gradient, moments = STATE_BYTES[states]
    trained, start = n_runs * load.trained / n, start_bytes if load.whole else 0
    frozen = model.n_params - load.trained * load.whole
    parts = {
        "frozen weights": frozen_bytes * frozen / n,
        "weights to start from": start * trained,
        "trained weights": weight * trained,
        "gradients": gradient * trained,
        "moments": moments * trained,
        "activations": tokens * (inputs + layers * kept + last),
        "gradients of activations": word / 2 * tokens * (4 * h + 4 * model.mlp_size),
        "attention masks": masks,
        "logits": logit_bytes * logits,
    }
    adapters = 0 if load.whole else n_runs * load.trained
    if n == 1:  # weights wider than the type of products are copied to that type
        matmul = min(load.trained, model.n_matmul_params) if load.whole else 0
        wide = (model.n_matmul_params - matmul) * (frozen_bytes > word)
        # copies of frozen weights are held; those of adapters only where activations are kept
        live = 1 / model.n_layers if layout.checkpointing else 1
        parts["copies and buffers"] = word * (wide + (matmul + live * adapters) * (weight > word))
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
        on_card = PROCESS_BYTES + (NCCL_BYTES if n > 1 else 0)
        parts["process"] = on_card if host is None else host
    return parts


def _outer_bytes(load: Load, weight: int, frozen_bytes: int) -> float:
    """Return the bytes of weights outside the layers, which each process gathers as stored."""
    return weight * load.outer_trained + frozen_bytes * (load.outer_params - load.outer_trained)


def rounds_of(
    spec: RunSpec, hardware: Hardware, n_runs: int, gpus: int, completions: int, group: int
) -> tuple[int, int]:
    """Return the completions per run and round that a GPU draws (whole groups), and the rounds."""
    most = ROWS
    if hardware.gpus:
        each = cache_bytes(spec.model, WORD_BYTES[spec.precision]) * spec.dataset.max_length
        room = CACHE_SHARE * (hardware.gpu_memory_gib or 0) * 2**30
        most = min(ROWS, int(room / (n_runs * each)))
    prompts, share = max(1, most // group), -(-(completions // group) // gpus)
    return min(prompts, share) * group, -(-share // prompts)
