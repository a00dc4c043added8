"""Compute tokens, operations, memory and time of runs from shapes and a GPU's data sheet.

Several GPUs work as in FSDP2: every tensor is split over all GPUs, and two layers are gathered at a
time, the one that computes and the next one. TRAINING_SHARE is fitted to published figures;
analysis/results/plan/README.md compares them. No sampling was measured on a GPU. Without a data
sheet, a speed per core is assumed until runs have been measured.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorasweep.plan.detect import Hardware
from lorasweep.spec.method import Method
from lorasweep.spec.model import LAYER_SETS, Matrix, ModelSpec
from lorasweep.spec.run import RunSpec

TEXT_FILL = 0.4
"""Mean length of text rows, prompts and sampled completions as a share of the longest allowed.
Assumption: the share is 0.37 in GSM8K with at most 512 tokens."""
CURVE_POINTS = 8
"""Number of evaluations on the first held-out rows, before the last evaluation."""
WORD_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of a number in products, by a run's precision."""
STATE_BYTES = {"fp32": (4, 4, 8), "bf16": (2, 2, 4), "fp64": (8, 8, 16)}
"""Precision -> bytes per trained parameter of weight, of gradient, of Adam's two moments."""
LAST = frozenset(
    ("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2")
)
"""Names of the matrices that end attention or an MLP; all others read a norm's output."""

# ---- memory of a GPU
PROCESS_BYTES, NCCL_BYTES = 0.8e9, 1.0e9
"""Bytes of CUDA's context and libraries on a GPU; bytes of NCCL's buffers. Assumptions."""
LOGIT_BYTES = 16
"""Bytes per logit at the peak: logit and gradient in bf16; logit, logarithm, gradient in fp32."""
CHUNK_LOGITS = 1 << 26
"""Logits computed at once (train/objectives/nll.py, GPU_LOGITS)."""

# ---- memory of a CPU
CPU_TEXT_PEAK = 2.0
"""Longest row of an update / mean row, for text. In batches of 8 rows of GSM8K it is 1.6 on average
and 2.0 at the 95th percentile (docs/log/2026-11-28.md)."""
CPU_FRAGMENTATION = 1.3
"""Memory of adapter runs' activations / bytes in use: freed blocks are kept (launch/process.py).
Measured on two processors: 1.2 to 1.8, varying by run (docs/log/2026-11-25.md)."""
SCORE_BYTES = 1024
"""Bytes of a token's scores in the longest row that keeps them (models/forward.py)."""
CPU_LOGITS, CPU_CHUNK_LOGITS = 5, 1 << 24
"""Numbers per logit at the peak, and logits computed at once (train/objectives/nll.py, LOGITS)."""

# ---- sampling (train/sampling.py)
ROWS = 1024
"""Maximum number of completions of a run that are sampled at once."""
CACHE_SHARE = 0.3
"""Share of a GPU's memory for the keys and values of these completions."""
DRAW_PEAK_BYTES, DRAW_BYTES = 44, 150
"""Bytes held at the peak while a token is drawn, and bytes moved, per entry of the vocabulary:
logits and logarithms in fp32, probabilities, their sums and entropy in fp64."""
LEARNING = ("activations", "gradients of activations", "gradients")
"""Components of memory that are freed before completions are sampled."""
CACHE_PASSES = 3
"""Each token reads and writes all of transformers' DynamicCache, and attention reads it again."""
CAST_BYTES = 6
"""Bytes moved per fp32 weight that autocast reads and rounds to bf16 for every token."""
SERVED_SHARE = 0.9
"""Share of a card's memory that a serving engine takes: vLLM's default gpu_memory_utilization."""

# ---- checkpoints (store/checkpoint.py)
SLOT_BYTES, BEST_BYTES = 12, 4
"""Bytes per trained parameter in a checkpoint. SLOT_BYTES: fp32 weight and two moments. BEST_BYTES:
the best weight, kept with early stopping."""
SLOTS = 2
"""Checkpoints kept per run."""

# ---- time
TRAINING_SHARE = 0.80
"""Share of a card's attainable speed (`Hardware.attainable_share`) that a step's products reach:
median over published figures of A100 and H100 (analysis/results/plan/README.md)."""
ASSUMED_FLOPS_PER_CORE = {"fp32": 6e10, "bf16": 2.5e11, "fp64": 2e10}
"""Operations per second and core by precision, until runs have been measured. Assumption: tiny128
(fp32) and SmolLM2-135M (bf16) on one core with matrix units (docs/log/2026-11-25.md)."""
SLOW_BF16_FLOPS_PER_CORE = 7e8
"""The same for bf16 without bf16 instructions. Measured on AVX2 (docs/log/2026-11-25.md)."""
PASSES = 4
"""Memory passes over a kept activation: it and its gradient are each written and read once.
Checkpointing adds one pass."""
ADAPTER_IN, ADAPTER_OUT = 12, 18
"""Bytes per token that an unfused adapter moves for each input and each output of its matrix. The
forward pass reads the input, and writes, scales and adds the output. The backward pass moves the
same bytes, and adds up the two gradients of the input."""
ADAPTER_AGAIN_IN, ADAPTER_AGAIN_OUT = 2, 12
"""Additional bytes when checkpointing repeats the forward pass."""
LAUNCH_S = 6e-6
"""Seconds to launch a kernel. Assumption: 4 to 10 microseconds are common."""
KERNELS, ADAPTER_KERNELS, DRAW_KERNELS = 45, 6, 40
"""Kernels of a layer's and an adapter's forward pass, counted in transformers' Llama; the backward
pass has twice as many. Kernels that draw a token, counted in train/sampling.py."""
LINK_SHARE = 0.8
"""Share of a link's bandwidth that large collectives reach. Assumption."""


# ---------------------------------------------------------------- tokens and operations


def _fill(spec: RunSpec) -> float:
    return 1.0 if spec.dataset.source == "synthetic" else TEXT_FILL


def mean_length(spec: RunSpec) -> int:
    """Return the expected tokens per row."""
    return round(spec.dataset.max_length * _fill(spec))


def sampled_lengths(spec: RunSpec) -> tuple[float, float]:
    """Return the expected tokens of a prompt and of its sampled completion (0: none is sampled)."""
    new = spec.max_new_tokens
    return (spec.dataset.max_length - new) * _fill(spec), new * _fill(spec)


def evaluated_completions(spec: RunSpec) -> list[int]:
    """Return how many completions each evaluation of a run samples, one per prompt.

    The first and the last evaluation use all held-out rows. Those between use the first
    n_test_curve rows, and the last one samples these rows once more. Empty for generated data,
    which need no samples.
    """
    if not spec.max_new_tokens or spec.dataset.source == "synthetic":
        return []
    few, every = spec.dataset.n_test_curve, spec.dataset.n_test
    return [every, *[few] * CURVE_POINTS, every, few] if few else [every, every]


def _sampling_flops(spec: RunSpec, completions: int, prompts: int) -> float:
    """Estimate the operations of a forward pass over prompts and their completions."""
    prompt, completion = sampled_lengths(spec)
    return 2.0 * spec.model.n_active_params * (prompts * prompt + completions * completion)


def train_flops(spec: RunSpec) -> float:
    """Estimate the operations of a run's updates, sampling included (Method.step_flops)."""
    update = spec.method.step_flops(spec.model, spec.batch_size * mean_length(spec))
    if spec.max_new_tokens:
        update += _sampling_flops(spec, spec.batch_size, spec.batch_size // spec.group_size)
    return update * spec.steps


def run_flops(spec: RunSpec) -> float:
    """Estimate the operations of a run: its updates, and the evaluations on held-out rows."""
    if sampled := sum(evaluated_completions(spec)):
        return train_flops(spec) + _sampling_flops(spec, sampled, sampled)
    d = spec.dataset
    few = (d.n_validation or d.n_test_curve) if spec.has_curve else 0
    rows = d.n_test * spec.test_rows + d.n_validation + CURVE_POINTS * few
    return train_flops(spec) + 2.0 * spec.model.n_active_params * mean_length(spec) * rows


# ---------------------------------------------------------------- weights and activations


@dataclass(frozen=True)
class Load:
    """Weights, and operations per token, of a training step (not the load of the glossary)."""

    model: ModelSpec
    trained: int
    """Trained parameters."""
    whole: bool
    """True: all or some weights of the base are trained; False: adapters are trained."""
    norms_trained: bool
    """Whether all weights of the base are trained, including the norms."""
    flops: float
    """Operations per token of forward and backward, without attention scores."""
    adapted: tuple[Matrix, ...]
    """Matrices with adapters."""
    n_adapters: float
    """Number of adapters; a stack of experts has one."""
    inputs: frozenset[str]
    """Names of the trained or adapted matrices: the backward pass needs their inputs."""
    head_params: int
    layer_params: float
    outer_params: float
    """Weights of the unembedding; of one layer; outside the layers (embedding and unembedding)."""
    head_trained: float
    outer_trained: float
    """Trained weights of the unembedding, whether or not it is tied to the embedding; of the base
    outside the layers."""

    def gathered_bytes(self, weight: int, frozen_bytes: int) -> float:
        """Return the bytes of weights outside the layers, which each GPU gathers as stored."""
        return weight * self.outer_trained + frozen_bytes * (self.outer_params - self.outer_trained)


def load_of(model: ModelSpec, method: Method) -> Load:
    """Return the Load of training `method` on `model`."""
    whole, trained = method.TRAINS_BASE, method.n_trainable(model)
    layers = method.target_layers() or LAYER_SETS
    inputs = frozenset(name for layer_set in layers for name in getattr(model, layer_set))
    adapted = () if whole else model.matrices(layers)
    head = model.hidden_size * model.vocab_size
    layer = (model.n_matmul_params - head) / model.n_layers
    outer, norms = model.n_params - model.n_layers * layer, whole and trained == model.n_params
    head_trained = float((whole and not inputs.isdisjoint(model.unembedding)) * head)
    of_all = (model, trained, whole, norms, method.step_flops(model, 1))
    count = sum(m.count / m.n_experts for m in adapted)
    sizes = (head, layer, outer, head_trained, outer if norms else head_trained)
    return Load(*of_all, adapted, count, inputs, *sizes)


def layer_bytes(load: Load, word: int = 2, stream: int | None = None) -> float:
    """Return the bytes per token that one layer keeps for backward, without checkpointing.

    The layer is that of transformers' Llama or Qwen3 with a fused attention kernel. Inputs of
    frozen matrices are not kept. The result is checked in tests/unit/plan/test_plan.py.

    Args:
        word: bytes of a number in products.
        stream: bytes of a number of the residual stream; None: fp32 or wider, as under autocast.
    """
    model, needs = load.model, load.inputs
    stream, exact = stream or max(4, word), max(4, word)
    h, active = model.hidden_size, model.n_active_experts
    q, kv = model.n_heads * model.head_size, model.n_kv_heads * model.head_size
    f = model.mlp_size * max(1, active)
    # norms: their inputs, and for trained weights the normalised inputs
    kept = model.n_norms * h * (exact + stream * load.norms_trained)
    # if the stream is wider than products, each matrix keeps a cast of the norm's output
    attention, mlp = needs & set(model.attention) - LAST, needs & set(model.mlp) - LAST
    for inputs in (attention, frozenset() if model.n_experts else mlp):
        kept += word * h * (len(inputs) if stream > word else bool(inputs))
    kept += word * (2 * q + 2 * kv)  # rotated queries and keys, values, attention's output
    if {"k_proj", "v_proj"}.isdisjoint(model.attention):  # queries, keys and values are one tensor
        kept += word * (q + kv + q * bool(needs & LAST & set(model.attention)))
    if model.qk_norm:
        kept += (exact + word * load.norms_trained) * (q + kv)
    # gate, its activation, up, and their product if the last matrix needs its input
    gated = not {"gate_proj", "gate_up_proj"}.isdisjoint(model.mlp)
    kept += word * f * ((3 if gated else 1) + bool(needs & LAST & set(model.mlp)))
    if model.n_experts:
        # outputs of each expert, and if needed the inputs of the expert and of the router
        kept += word * h * (active * (1 + bool(mlp)) + load.norms_trained)
    return float(kept)


def cache_bytes(model: ModelSpec, word: int) -> float:
    """Return the bytes of the keys and values of one token."""
    return 2.0 * model.n_layers * model.n_kv_heads * model.head_size * word


def read_params(model: ModelSpec, rows: float) -> float:
    """Count the weights read to decode a token of `rows` completions, without unused experts."""
    if not model.n_experts:
        return model.n_matmul_params
    # under a uniform router, the expected share of experts that no row is routed to
    missed = (1 - model.n_active_experts / model.n_experts) ** max(rows, 1)
    idle = model.n_matmul_params - model.n_active_params
    all_experts = idle / (1 - model.n_active_experts / model.n_experts)
    return model.n_matmul_params - missed * all_experts


# ---------------------------------------------------------------- memory


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
    copied = sum(m.size for m in load.adapted) * spec.method.rewrites
    parts["frozen weights"] += STATE_BYTES[states][0] * copied
    if spec.early_stopping:
        parts["best weights"] = parts["trained weights"]
    if not spec.max_new_tokens:
        return parts
    completions = max([spec.batch_size, *evaluated_completions(spec)])
    shape = (n_runs, layout.gpus, completions, spec.group_size)
    rows = n_runs * rounds_of(spec, hardware, *shape)[0]
    model, whole = spec.model, float(word * load.trained * load.whole)
    if layout.gpus > 1:  # each one gathers the model
        outer = load.gathered_bytes(STATE_BYTES[states][0], held)
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
        host: memory of a process on a CPU before its first tensor; None: on a GPU.
        peak: longest row of an update / row_tokens.
    """
    model, n = load.model, layout.gpus
    tokens = n_runs * layout.rows * row_tokens * peak
    kept, h, exact = layer_bytes(load, word, stream), model.hidden_size, max(4, word)
    stream = stream or exact
    chunk, logit_bytes = CHUNK_LOGITS, word / 2 * LOGIT_BYTES
    if host is not None:
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
    weight, gradient, moments = STATE_BYTES[states]
    trained, start = n_runs * load.trained / n, start_bytes if load.whole else 0
    parts = {
        "frozen weights": frozen_bytes * (model.n_params - load.trained * load.whole) / n,
        "weights to start from": start * trained,
        "trained weights": weight * trained,
        "gradients": gradient * trained,
        "moments": moments * trained,
        "activations": tokens * (inputs + layers * kept + last),
        "gradients of activations": word / 2 * tokens * (4 * h + 4 * model.mlp_size),
        "logits": logit_bytes * logits,
    }
    adapters = 0 if load.whole else n_runs * load.trained
    if n == 1:  # weights wider than the type of products are copied to that type
        matmul = min(load.trained, model.n_matmul_params) if load.whole else 0
        wide = (model.n_matmul_params - matmul) * (frozen_bytes > word)
        # copies of frozen weights are held; those of adapters only where activations are kept
        live = 1 / model.n_layers if layout.checkpointing else 1
        copies = word * (wide + (matmul + live * adapters) * (weight > word))
    else:  # two layers are gathered at a time, and always the weights outside the layers
        outer = load.gathered_bytes(weight, frozen_bytes) + gradient * load.head_trained
        added = adapters / model.n_layers
        changed = load.layer_params if load.whole else added
        copies = outer + 2 * word * (load.layer_params + added) + (word + gradient) * changed
        # the embedding's gradient comes last, when the activations have been freed
        freed = parts["activations"] + parts["logits"]
        copies += max(0.0, gradient * (load.outer_trained - load.head_trained) - freed)
    on_card = PROCESS_BYTES + (NCCL_BYTES if n > 1 else 0)
    return parts | {"copies and buffers": copies, "process": on_card if host is None else host}


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


# ---------------------------------------------------------------- time


def products_flops_s(hardware: Hardware, precision: str, share: float = TRAINING_SHARE) -> float:
    """Return the operations per second that products reach on one GPU.

    Without a data sheet: on all cores of the machine, assumed.
    """
    if precision in hardware.matmul_flops_s:
        return hardware.matmul_flops_s[precision] * hardware.attainable_share * share
    slow = precision == "bf16" and hardware.fast_bf16 is False
    per_core = SLOW_BF16_FLOPS_PER_CORE if slow else ASSUMED_FLOPS_PER_CORE[precision]
    return per_core * (hardware.cores or 1)


def step_parts(
    load: Load,
    layout: Layout,
    row_tokens: float,
    hardware: Hardware,
    precision: str = "bf16",
    n_runs: int = 1,
    *,
    states: str = "fp32",
    stream: int | None = None,
    share: float = TRAINING_SHARE,
) -> dict[str, float]:
    """Return the seconds of an update of all runs in a pack, by component; see `step_seconds`.

    `row_tokens`: mean tokens of a row. `states`, `stream`: see `memory_parts`.
    """
    model, again, word = load.model, layout.checkpointing, WORD_BYTES[precision]
    tokens = n_runs * layout.rows * layout.accumulation * row_tokens
    bandwidth = hardware.bandwidth_bytes_s or math.inf
    attention = hardware.matmul_flops_s.get(precision, math.inf) / 3
    if precision == "bf16":
        attention = hardware.attention_flops_s or attention
    # causal scores and values: 2 x queries x length forward, 2.5 times that backward
    scores = (7 + 2 * again) * model.n_heads * model.head_size * row_tokens * model.n_layers
    # checkpointing repeats the forward pass through the layers
    flops = load.flops + again * 2.0 * (model.n_active_params - load.head_params)
    moved = 2.0 * LOGIT_BYTES * model.vocab_size
    for m in load.adapted:
        active = m.count * m.n_active / m.n_experts
        moved += active * m.d_in * (ADAPTER_IN + again * ADAPTER_AGAIN_IN)
        moved += active * m.d_out * (ADAPTER_OUT + again * ADAPTER_AGAIN_OUT)
    moved *= word / 2
    moved += model.n_layers * layer_bytes(load, word, stream) * (PASSES + again)
    state = sum(STATE_BYTES[states])
    kernels = KERNELS * model.n_layers + ADAPTER_KERNELS * load.n_adapters
    communication = 0.0
    if layout.gpus > 1 and hardware.link_bytes_s is not None:
        # Every weight is gathered twice, and gradients are reduced. A GPU receives all but its part
        # from its node. A node receives all but its part from other nodes, over all of its GPUs.
        gathered = 2 * word * model.n_params + STATE_BYTES[states][1] * load.trained
        inside = min(layout.gpus, hardware.gpus_per_node)
        communication = gathered * (inside - 1) / inside / (LINK_SHARE * hardware.link_bytes_s)
        nodes = layout.gpus / inside
        if nodes > 1 and hardware.network_bytes_s is not None:
            between = gathered * (nodes - 1) / nodes / inside
            communication = max(communication, between / (LINK_SHARE * hardware.network_bytes_s))
    return {
        "products": tokens * flops / products_flops_s(hardware, precision, share),
        "attention": tokens * scores / attention,
        "activations": tokens * moved / bandwidth,
        "optimizer": 2 * state * n_runs * load.trained / layout.gpus / bandwidth,
        "launch": layout.accumulation * kernels * (3 + again) * LAUNCH_S * hardware.has_speeds,
        "communication": layout.accumulation * communication,
    }


def step_seconds(parts: dict[str, float]) -> float:
    """Return the seconds of an update. Kernels are launched while earlier ones run.

    Communication overlaps with nothing: assuming an overlap with products fits published figures
    worse.
    """
    return max(sum(parts.values()) - parts["launch"], parts["launch"])


def sampling_s(
    spec: RunSpec, hardware: Hardware, n_runs: int, gpus: int, completions: int, group: int
) -> float:
    """Return the seconds to draw `completions` of each of `n_runs` runs, `group` per prompt.

    Decoding a token takes the longest of three times: to read weights, keys and values, to compute
    products, to launch kernels. A round lasts max_new_tokens tokens. Completions that end earlier
    leave the round.
    """
    model, word = spec.model, WORD_BYTES[spec.precision]
    load = load_of(model, spec.method)
    at_once, rounds = rounds_of(spec, hardware, n_runs, gpus, completions, group)
    bandwidth = hardware.bandwidth_bytes_s or math.inf
    speed, rows = products_flops_s(hardware, spec.precision), n_runs * at_once
    prompt, completion = sampled_lengths(spec)
    alive = rows * completion / spec.max_new_tokens  # on average over the tokens of a round
    weights = float(word * read_params(model, alive))
    if load.whole and gpus == 1 and word == 2:
        weights += CAST_BYTES * load.trained
    cache = CACHE_PASSES * cache_bytes(model, word) * (prompt + completion / 2)
    products = 2.0 * model.n_active_params * alive / speed
    memory = (weights + alive * (cache + DRAW_BYTES * model.vocab_size)) / bandwidth
    kernels = KERNELS * model.n_layers + ADAPTER_KERNELS * load.n_adapters + DRAW_KERNELS
    token_s = max(memory, products, kernels * LAUNCH_S * hardware.has_speeds)
    prefill_s = 2.0 * model.n_active_params * rows / group * prompt / speed
    return rounds * (prefill_s + spec.max_new_tokens * token_s)


def served_s(
    model: ModelSpec,
    hardware: Hardware,
    gpus: int,
    completions: int,
    group: int,
    prompt: float,
    completion: float,
) -> float:
    """Return the least seconds in which a serving engine draws `completions` in bf16.

    The engine splits the weights over the GPUs, reads a prompt once per group, and batches
    continuously. Launches and communication are not counted. Infinite if the weights leave no
    memory for one completion. `prompt`, `completion`: mean tokens.
    """
    memory = gpus * SERVED_SHARE * (hardware.gpu_memory_gib or 0) * 2**30
    rows = (memory - 2 * model.n_params) / (cache_bytes(model, 2) * (prompt + completion))
    if rows < 1:
        return math.inf
    rows = min(rows, completions)
    bandwidth = gpus * (hardware.bandwidth_bytes_s or math.inf)
    cache = rows * cache_bytes(model, 2) * (prompt + completion / 2)
    reads = (2 * read_params(model, rows) + cache) / bandwidth
    products = 2.0 * model.n_active_params / (gpus * products_flops_s(hardware, "bf16"))
    prefill_s = products * prompt * completions / group
    return completions / rows * completion * max(reads, products * rows) + prefill_s
