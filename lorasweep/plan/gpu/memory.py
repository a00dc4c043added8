"""Peak memory of training on GPUs, by component, from shapes alone.

Sharded runs follow FSDP2: every tensor is split over all GPUs, a layer is put together while it
computes, and the next one is on its way. Compared with published figures in
analysis/results/plan/README.md.
"""

from dataclasses import dataclass

from lorasweep.plan.gpu.load import Load, layer_bytes

PROCESS_BYTES, NCCL_BYTES = 0.8e9, 1.0e9
"""CUDA's context and libraries on a GPU, and the buffers of communication. Assumption."""
LOGIT_BYTES = 16
"""Bytes per logit at the peak: bf16 logits and their gradient, and in fp32 the logits, their
logarithms and the gradient."""
CHUNK_LOGITS = 1 << 26
"""Logits computed at once (train/objectives/nll.py, GPU_LOGITS)."""
STATE_BYTES = {"fp32": (4, 4, 8), "bf16": (2, 2, 4), "fp64": (8, 8, 16)}
"""Bytes per trained parameter of weight, gradient and Adam's two moments."""


@dataclass(frozen=True)
class Layout:
    """How a pack is spread over GPUs and cut into forward passes."""

    gpus: int
    rows: int
    """Rows a forward pass, member and GPU."""
    checkpointing: bool
    """Activations inside layers are computed again in the backward pass."""
    accumulation: int = 1
    """Forward passes an update."""
    joined: bool = False
    """A member's rows lie end to end in one sequence (Exec.join_rows)."""


def memory_parts(
    load: Load,
    layout: Layout,
    row_tokens: int,
    members: int = 1,
    *,
    states: str = "fp32",
    word: int = 2,
    frozen_bytes: int = 2,
    start_bytes: int = 0,
    stream: int | None = None,
    whole_logits: bool = False,
    process: bool = True,
) -> dict[str, float]:
    """Return the peak bytes of one GPU by component.

    Args:
        load: what one run asks.
        row_tokens: tokens of the longest row.
        members: runs of the pack, which share a frozen base.
        states: precision of what is trained.
        word: bytes of a number in products.
        frozen_bytes: bytes per frozen weight.
        start_bytes: bytes per trained weight of the base, if it is kept to measure the change.
        stream: bytes of a number of the residual stream (see `layer_bytes`).
        whole_logits: the logits of all tokens at once instead of a chunk of them.
        process: include what a process holds before its first tensor.
    """
    model, n = load.model, layout.gpus
    tokens = members * layout.rows * row_tokens
    weight, gradient, moments = STATE_BYTES[states]
    trained = members * load.trained / n
    frozen = model.n_params - load.trained if load.whole else model.n_params
    kept, h, exact = layer_bytes(load, word, stream), model.hidden_size, max(4, word)
    stream = stream or exact
    inputs = stream * h * model.n_layers if layout.checkpointing else 0
    layers = 1 if layout.checkpointing else model.n_layers
    # the last norm's input, its normalised input, and its output, which chunks of logits keep
    last = exact * h + stream * h * (1 + load.norms_trained)
    logits = tokens * model.vocab_size
    if not whole_logits:
        logits = min(logits, max(CHUNK_LOGITS, members * layout.rows * model.vocab_size))
    parts = {
        "frozen weights": frozen_bytes * frozen / n,
        "weights to start from": start_bytes * trained if load.whole else 0.0,
        "trained weights": weight * trained,
        "gradients": gradient * trained,
        "moments": moments * trained,
        "activations": tokens * (inputs + layers * kept + last),
        "gradients of activations": word / 2 * tokens * (4 * h + 4 * model.mlp_size),
        "attention masks": _masks(layout, row_tokens, members, layers, word),
        "logits": word / 2 * LOGIT_BYTES * logits,
        "copies and buffers": _buffers(load, layout, members, states, word, frozen_bytes),
    }
    if n > 1:
        # the embedding's gradient comes last, when activations have left their room to it
        left = parts["activations"] + parts["attention masks"] + parts["logits"]
        embedding = gradient * (load.outer_trained - load.head_trained)
        parts["copies and buffers"] += max(0.0, embedding - left)
    if process:
        parts["process"] = PROCESS_BYTES + (NCCL_BYTES if n > 1 else 0)
    return parts


def _masks(layout: Layout, row_tokens: int, members: int, layers: int, word: int) -> float:
    """Bytes of the masks that keep joined rows apart; alone, a row needs none.

    transformers makes one of a byte an entry, and torch's attention one in the type of the products
    at every call, which that layer keeps for its backward pass. Read from their code, and seen on a
    CPU; its flash attention would need none.
    """
    if not layout.joined or layout.rows == 1:
        return 0.0
    return float(members * (layout.rows * row_tokens) ** 2 * (1 + word * layers))


def outer_bytes(load: Load, weight: int, frozen_bytes: int) -> float:
    """Return the bytes of the whole weights outside the layers, which every process of several has.

    FSDP2 gathers them in their own type: the embedding's rows are read as they are.
    """
    return weight * load.outer_trained + frozen_bytes * (load.outer_params - load.outer_trained)


def _buffers(
    load: Load, layout: Layout, members: int, states: str, word: int, frozen_bytes: int
) -> float:
    """Bytes of copies: weights as products take them, whole layers, gradients on their way.

    Alone, a product has a copy of every weight that is wider than it; of frozen weights and of
    adapters only in layers that are kept. Sharded, two layers are whole at a time, and what is
    outside the layers all the time, in the backward pass with the unembedding's gradient.
    """
    model, (weight, gradient, _) = load.model, STATE_BYTES[states]
    adapters = 0 if load.whole else members * load.trained
    if layout.gpus == 1:
        trained = min(load.trained, model.n_matmul_params) if load.whole else 0
        frozen = (model.n_matmul_params - trained) * (frozen_bytes > word)
        copies = trained * (weight > word)
        live = 1 / model.n_layers if layout.checkpointing else 1
        return word * (copies + live * (frozen + adapters * (weight > word)))
    outer = outer_bytes(load, weight, frozen_bytes) + gradient * load.head_trained
    added = adapters / model.n_layers
    changed = load.layer_params if load.whole else added
    return outer + 2 * word * (load.layer_params + added) + (word + gradient) * changed
