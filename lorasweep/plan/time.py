"""Seconds of training and sampling, by component, from shapes and the hardware's data sheet.

One constant is fitted: the share of a GPU's attainable speed that the products of a training step
reach. It is the median over published measurements (analysis/results/plan/README.md), and the same
for an A100 and an H100. Communication is added in full: assuming that it overlaps with the products
fits the published figures worse. Without a data sheet a speed per core is assumed until runs were
measured.

Sampling uses transformers' forward pass with its cache (train/sampling.py). Decoding a token reads
every weight once for all completions, and their keys and values; it computes little. A token takes
the longest of three times: of memory, of products (with many completions at once), or of launching
kernels. No sampling was measured on a GPU.
"""

from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import (
    WORD_BYTES,
    Load,
    cache_bytes,
    completion_tokens,
    evaluated_completions,
    layer_bytes,
    prompt_tokens,
    read_params,
)
from lorasweep.plan.memory import LOGIT_BYTES, STATE_BYTES, Layout, rounds_of
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec

TRAINING_SHARE = 0.80
"""Share of a card's attainable speed (`Hardware.attainable_share`) that a step's products reach."""
ASSUMED_FLOPS_PER_CORE = {"fp32": 6e10, "bf16": 2.5e11, "fp64": 2e10}
"""Floating-point operations per second and core by precision, used until runs were measured.
Assumption: what tiny128 (fp32) and SmolLM2-135M (bf16) reached on one core with matrix units
(docs/log)."""
SLOW_BF16_FLOPS_PER_CORE = 7e8
"""The same for bf16 on a processor without bf16 instructions. Measured on AVX2 (docs/log)."""
PASSES = 4
"""Each kept activation is written and read once, and so is its gradient. With checkpointing it is
written twice."""
ADAPTER_IN, ADAPTER_OUT = 12, 18
"""Bytes a token that an unfused adapter moves per input and output of its matrix: input read,
output written, scaled and added; backward the same and the sum of the input's two gradients."""
ADAPTER_AGAIN_IN, ADAPTER_AGAIN_OUT = 2, 12
"""Of these, in a second forward pass."""
LAUNCH_S = 6e-6
"""Seconds of the processor per kernel. Assumption: 4 to 10 microseconds are common."""
KERNELS, ADAPTER_KERNELS = 45, 6
"""Kernels of a layer's forward pass, and of an adapter's; the backward pass has twice as many.
Counted in transformers' Llama."""
LINK_SHARE = 0.8
"""Share of a link's bandwidth that large collectives reach. Assumption."""
CACHE_PASSES = 3
"""The cache grows by concatenation, so a token reads and writes all of it, and attention reads it
(transformers' DynamicCache)."""
DRAW_BYTES = 150
"""Bytes moved to draw a token, per entry of the vocabulary: logits in fp32, their logarithms, and
in fp64 probabilities, their sums and entropy. Counted in train/sampling.py."""
DRAW_KERNELS = 40
"""Kernels that draw a token, counted there."""
CAST_BYTES = 6
"""Bytes moved per weight of fp32 that autocast rounds to bf16 at every token: read and written. In
a run on several GPUs weights arrive rounded."""
SERVED_SHARE = 0.9
"""Share of a card's memory that a serving engine takes: vLLM's default gpu_memory_utilization."""


def assumed_flops(precision: str, hardware: Hardware) -> float:
    """Return the assumed floating-point operations per second of the whole machine."""
    if hardware.gpus and precision in hardware.matmul_flops_s:
        return _products_flops_s(hardware, precision) * hardware.gpus
    slow = precision == "bf16" and hardware.fast_bf16 is False
    per_core = SLOW_BF16_FLOPS_PER_CORE if slow else ASSUMED_FLOPS_PER_CORE[precision]
    return per_core * (hardware.cores or 1)


def _products_flops_s(hardware: Hardware, precision: str, share: float = TRAINING_SHARE) -> float:
    """Operations per second that the products of a step reach on one GPU."""
    return hardware.matmul_flops_s[precision] * hardware.attainable_share * share


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
    """Return the seconds of an update of all runs in a pack by component, on each of its GPUs.

    `launch` runs at the same time as the others: `step_seconds` adds up.

    Args:
        row_tokens: mean tokens of a row.
        states: precision of what is trained.
        stream: bytes of a number of the residual stream (`layer_bytes`).
        share: share of the attainable speed that products reach.
    """
    model, again = load.model, layout.checkpointing
    tokens = n_runs * layout.rows * layout.accumulation * row_tokens
    bandwidth = hardware.bandwidth_bytes_s or float("inf")
    fused = hardware.attention_flops_s if precision == "bf16" else None
    attention = fused or hardware.matmul_flops_s[precision] / 3
    q = model.n_heads * model.head_size
    # causal scores and values: 2 q x length forward, 2.5 times that backward (they are recomputed)
    word = WORD_BYTES[precision]
    scores = (7 + 2 * again) * q * row_tokens * model.n_layers
    flops = load.flops + again * load.recomputed_flops
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
        # every weight is gathered twice, and gradients are reduced: within a node a GPU receives
        # all but its own part; between nodes, a node all but its own, over all its GPUs
        gathered = 2 * word * model.n_params + STATE_BYTES[states][1] * load.trained
        inside = min(layout.gpus, hardware.gpus_per_node)
        communication = gathered * (inside - 1) / inside / (LINK_SHARE * hardware.link_bytes_s)
        nodes = layout.gpus / inside
        if nodes > 1 and hardware.network_bytes_s is not None:
            between = gathered * (nodes - 1) / nodes / inside
            communication = max(communication, between / (LINK_SHARE * hardware.network_bytes_s))
    return {
        "products": tokens * flops / _products_flops_s(hardware, precision, share),
        "attention": tokens * scores / attention,
        "activations": tokens * moved / bandwidth,
        "optimizer": 2 * state * n_runs * load.trained / layout.gpus / bandwidth,
        "launch": layout.accumulation * kernels * (3 + again) * LAUNCH_S,
        "communication": layout.accumulation * communication,
    }


def step_seconds(parts: dict[str, float]) -> float:
    """Add up the components of an update."""
    return max(sum(parts.values()) - parts["launch"], parts["launch"])


# ---------------------------------------------------------------- sampling


def sampling_s(
    load: Load,
    spec: RunSpec,
    hardware: Hardware,
    n_runs: int,
    gpus: int,
    completions: int,
    group: int,
) -> float:
    """Return the seconds to draw `completions` of each of `n_runs` runs, `group` a prompt.

    Some completion of a round has max_new_tokens; the others end before, and are then left out.
    """
    if not completions:
        return 0.0
    model, precision = load.model, spec.precision
    word = WORD_BYTES[precision]
    at_once, rounds = rounds_of(spec, hardware, n_runs, gpus, completions, group)
    bandwidth = hardware.bandwidth_bytes_s or float("inf")
    speed = _products_flops_s(hardware, precision)
    rows = n_runs * at_once
    prompt, completion = prompt_tokens(spec), completion_tokens(spec)
    alive = rows * completion / spec.max_new_tokens  # on average over the tokens of a round
    weights = float(word * read_params(model, alive))
    if load.whole and gpus == 1 and word == 2:
        weights += CAST_BYTES * load.trained
    cache = CACHE_PASSES * cache_bytes(model, word) * (prompt + completion / 2)
    products = 2.0 * model.n_active_params * alive / speed
    memory = (weights + alive * (cache + DRAW_BYTES * model.vocab_size)) / bandwidth
    kernels = KERNELS * model.n_layers + ADAPTER_KERNELS * load.n_adapters + DRAW_KERNELS
    token_s = max(memory, products, kernels * LAUNCH_S)
    prefill_s = 2.0 * model.n_active_params * rows / group * prompt / speed
    return rounds * (prefill_s + spec.max_new_tokens * token_s)


def evaluation_s(load: Load, spec: RunSpec, hardware: Hardware, n_runs: int, gpus: int) -> float:
    """Return the seconds to draw the completions of held-out prompts over a whole run."""
    return sum(
        sampling_s(load, spec, hardware, n_runs, gpus, completions, 1)
        for completions in evaluated_completions(spec)
    )


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

    It splits the weights over the GPUs, reads a prompt once for its group, and a finished
    completion makes room for the next one. A token takes the time to read weights, keys and values,
    or to compute the products; launches and communication are not counted. Infinite if the weights
    leave no room.

    Args:
        prompt: mean tokens of a prompt.
        completion: mean tokens of a completion.
    """
    memory = gpus * SERVED_SHARE * (hardware.gpu_memory_gib or 0) * 2**30
    rows = (memory - 2 * model.n_params) / (cache_bytes(model, 2) * (prompt + completion))
    if rows < 1:
        return float("inf")
    rows = min(rows, completions)
    bandwidth = gpus * (hardware.bandwidth_bytes_s or float("inf"))
    cache = rows * cache_bytes(model, 2) * (prompt + completion / 2)
    reads = (2 * read_params(model, rows) + cache) / bandwidth
    products = 2.0 * model.n_active_params / (gpus * _products_flops_s(hardware, "bf16"))
    prefill_s = products * prompt * completions / group
    return completions / rows * completion * max(reads, products * rows) + prefill_s
