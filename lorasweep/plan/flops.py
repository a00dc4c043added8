"""What a run costs: floating-point operations, memory, disk. From shapes alone; standard library
only."""

from lorasweep.plan import hardware as machine
from lorasweep.spec.run import RunSpec

TEXT_FILL = 0.4
"""Mean length of text rows as a share of max_length. Assumption: GSM8K has 0.37 of 512."""
TEXT_PEAK = 1.2
"""Tokens of the longest batch of text rows over the mean one's. Measured on GSM8K, batches of 8
(LOG.md)."""
CHECKPOINT_BYTES = 12
"""Bytes a trained parameter of one checkpoint slot: fp32 weight and two moments; there are two
slots."""
PROCESS_BYTES = 450 * 2**20
"""A worker before any weights: the interpreter, torch, transformers. Measured (LOG.md)."""
HOLES = 1.4
"""Memory that adapters' activations take on a CPU over what is alive at once: freed blocks are kept
(process.py), and the next one does not fit every hole. Measured on two processors: 1.2 to 1.8, and
not the same twice (LOG.md)."""
CHUNK_BYTES = 320 * 2**20
"""The chunks of the unembedding at a large vocabulary: logits, their logarithms, temporaries. See
loss.LOGITS."""


def mean_length(spec: RunSpec) -> int:
    """Return the expected tokens a row: the data set's longest, times TEXT_FILL for text."""
    return round(
        spec.dataset.max_length * (1.0 if spec.dataset.source == "synthetic" else TEXT_FILL)
    )


def train_flops(spec: RunSpec) -> float:
    """Estimate the floating-point operations of a run's updates (Method.step_flops gives the
    formula)."""
    return spec.method.step_flops(spec.model, spec.batch_size * mean_length(spec)) * spec.steps


def run_flops(spec: RunSpec) -> float:
    """Estimate a run's floating-point operations: its updates, and the evaluations of the held-out
    loss."""
    rows = spec.dataset.n_test + 8 * spec.dataset.n_test_curve
    return train_flops(spec) + 2.0 * spec.model.n_matmul_params() * mean_length(spec) * rows


def pack_bytes(members: int, spec: RunSpec, micro_batch_size: int | None = None) -> float:
    """Estimate the peak memory of a process that trains `members` runs like `spec` together, in
    bytes.

    Base: fp32 weights (and their bf16 copies under bf16). A member: parameter, gradient and two
    moments of 4 bytes each, for full fine-tuning also the start's copy. Activations: what
    decoder._Layer keeps for the way back.
    """
    model, word = spec.model, {"bf16": 2, "fp32": 4, "fp64": 8}[spec.precision]
    master = 8 if spec.precision == "fp64" else 4
    whole = spec.method.MAX_PACK == 1
    copies = (2 if whole else 4) if word == 2 else 0  # frozen weights are kept turned round as well
    weights = model.n_params() * master + model.n_matmul_params() * copies
    trained = members * spec.method.n_trainable(model) * (5 if whole else 4) * master
    rows = min(micro_batch_size or spec.batch_size, spec.batch_size)
    length = mean_length(spec)
    tokens = members * rows * length * (1.0 if spec.dataset.source == "synthetic" else TEXT_PEAK)
    h, f, kv = model.hidden_size, model.mlp_size, model.n_kv_heads * model.head_size
    scores = model.n_heads * (length if length <= 256 else (length + 256) / 2)
    layer = tokens * (2 * h * master + word * (4 * h + 2 * kv + 4 * f + scores))
    logits = (
        5 * master * tokens * model.vocab_size
    )  # fp32 values: logits, their logarithms, gradients, temporaries
    if not machine.gpus():
        logits = min(CHUNK_BYTES, logits)
        layer *= 1 if whole else HOLES
    if whole:
        logits += tokens * model.vocab_size * word / 2  # half of the places bear loss
    return PROCESS_BYTES + weights + trained + model.n_layers * layer + logits
