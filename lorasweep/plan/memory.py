"""Estimate the memory and disk space of runs from shapes and hardware alone."""

from collections.abc import Iterable

from lorasweep.plan.flops import evaluated_answers, mean_length
from lorasweep.plan.gpu.load import load_of
from lorasweep.plan.gpu.memory import Layout, memory_parts
from lorasweep.plan.gpu.sampling import DRAW_PEAK_BYTES, ROWS, cache_bytes
from lorasweep.plan.gpu.time import WORD_BYTES
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.run import RunSpec

TEXT_PEAK = 1.2
"""Tokens of the longest batch of text rows divided by the mean. Measured on GSM8K, batches of 8
(LOG.md)."""
SLOT_BYTES, BEST_BYTES = 12, 4
"""Bytes per trained parameter in a checkpoint: fp32 weight and two moments; with early stopping
also the best weight."""
SLOTS = 2
"""Checkpoints kept per run (store/checkpoint.py)."""
PROCESS_BYTES = 450 * 2**20
"""Memory of a worker before weights: the interpreter, torch, transformers. Measured (LOG.md)."""
FRAGMENTATION = 1.4
"""Memory of adapters' activations on a CPU divided by the bytes in use. Freed blocks are kept
(launch/process.py), and not every new tensor fits into one. Measured on two processors: 1.2 to 1.8,
varying from run to run (LOG.md)."""
CHUNK_BYTES = 320 * 2**20
"""Largest size of a chunk of the unembedding: logits, their logarithms and temporaries
(models/cpu_llama/head.py, LOGITS)."""


def pack_bytes(
    members: int,
    spec: RunSpec,
    hardware: Hardware,
    micro_batch_size: int | None = None,
    processes: int = 1,
    checkpointing: bool = False,
    join_rows: bool = False,
) -> float:
    """Estimate the peak memory, in bytes, of a process that trains `members` runs like `spec`.

    In bf16 on a GPU: see gpu/memory.py. Else, base: its weights, in bf16 if they are published so
    and computed so, and bf16 copies of weights that are not. Each member: parameter, gradient and
    two moments of 4 bytes each, and with early stopping the best parameter; full fine-tuning keeps
    the base to start from. Activations: what
    the hand-written decoder keeps for the backward pass. `micro_batch_size`: rows per member and
    forward pass; None: the whole batch.
    """
    model, word = spec.model, WORD_BYTES[spec.precision]
    master = 8 if spec.precision == "fp64" else 4
    whole = spec.method.MAX_PACK == 1
    rows = min(micro_batch_size or spec.batch_size, spec.batch_size)
    length = mean_length(spec)
    tokens = members * rows * length * (1.0 if spec.dataset.source == "synthetic" else TEXT_PEAK)
    held = 2 if model.weights_dtype == spec.precision == "bf16" else master
    if hardware.gpus and word == 2:
        load = load_of(model, spec.method)
        layout = Layout(processes, rows, checkpointing, joined=join_rows)
        longest = round(tokens / (members * rows))
        parts = memory_parts(load, layout, longest, members, frozen_bytes=held, start_bytes=held)
        best = parts["trained weights"] if spec.early_stopping else 0.0
        return sum(parts.values()) + best
    copies = 0  # bytes for each weight of a product
    if word == 2 and (whole or held > word):
        copies += 2
    if word == 2 and not whole:
        copies += 2  # frozen weights are also kept transposed
    weights = model.n_params * held + model.n_matmul_params * copies
    words = 5 if spec.early_stopping else 4
    trained = members * spec.method.n_trainable(model) * words * master
    h, f, kv = model.hidden_size, model.mlp_size, model.n_kv_heads * model.head_size
    scores = model.n_heads * (length if length <= 256 else (length + 256) / 2)
    layer = tokens * (2 * h * master + word * (4 * h + 2 * kv + 4 * f + scores))
    # a chunk of logits, their logarithms, gradients and temporaries
    chunk = 5 * master * tokens * model.vocab_size
    logits = min(CHUNK_BYTES, chunk)
    layer *= 1 if whole or hardware.gpus else FRAGMENTATION
    learning = model.n_layers * layer + logits
    return PROCESS_BYTES + weights + trained + max(learning, _sampling_bytes(members, spec))


def _sampling_bytes(members: int, spec: RunSpec) -> float:
    """Return the bytes of sampling on a CPU: keys and values, and what draws a token."""
    answers = max([spec.batch_size, *evaluated_answers(spec)]) if spec.max_new_tokens else 0
    rows = members * min(ROWS, answers)
    token = cache_bytes(spec.model, WORD_BYTES[spec.precision])
    return rows * (spec.dataset.max_length * token + DRAW_PEAK_BYTES * spec.model.vocab_size)


def checkpoint_bytes(specs: Iterable[RunSpec]) -> float:
    """Return the disk space, in bytes, of the checkpoints of these runs while they train."""
    return SLOTS * sum(
        (SLOT_BYTES + (BEST_BYTES if s.early_stopping else 0)) * s.method.n_trainable(s.model)
        for s in specs
    )
