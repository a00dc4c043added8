"""Compute seconds of training and sampling, by component, from shapes and a GPU's data sheet.

TRAINING_SHARE is fitted to published measurements. No sampling was measured on a GPU. Without a
data sheet, a speed per core is assumed until runs have been measured.
"""

from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import (
    WORD_BYTES,
    Load,
    cache_bytes,
    evaluated_completions,
    layer_bytes,
    read_params,
    sampled_lengths,
)
from lorasweep.plan.memory import LOGIT_BYTES, STATE_BYTES, Layout, rounds_of
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec

TRAINING_SHARE = 0.80
"""Share of a card's attainable speed (`Hardware.attainable_share`) that a step's products reach:
median over published figures of A100 and H100 (analysis/results/plan/README.md)."""
ASSUMED_FLOPS_PER_CORE = {"fp32": 6e10, "bf16": 2.5e11, "fp64": 2e10}
"""Operations per second and core by precision, used until runs have been measured. Assumption: the
speeds of tiny128 (fp32) and SmolLM2-135M (bf16) on one core with matrix units (docs/log)."""
SLOW_BF16_FLOPS_PER_CORE = 7e8
"""The same for bf16 on a processor without bf16 instructions. Measured on AVX2 (docs/log)."""
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
KERNELS, ADAPTER_KERNELS = 45, 6
"""Kernels of a layer's and an adapter's forward pass, counted in transformers' Llama; the backward
pass has twice as many."""
LINK_SHARE = 0.8
"""Share of a link's bandwidth that large collectives reach. Assumption."""
CACHE_PASSES = 3
"""Each token reads and writes all of transformers' DynamicCache, and attention reads it again."""
DRAW_BYTES = 150
"""Bytes moved to draw a token, per entry of the vocabulary: logits and logarithms in fp32,
probabilities, their sums and entropy in fp64. Counted in train/sampling.py."""
DRAW_KERNELS = 40
"""Kernels that draw a token, counted in train/sampling.py."""
CAST_BYTES = 6
"""Bytes moved per fp32 weight that autocast reads and rounds to bf16 for every token."""
SERVED_SHARE = 0.9
"""Share of a card's memory that a serving engine takes: vLLM's default gpu_memory_utilization."""


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

    Args:
        row_tokens: mean tokens of a row.
        states: precision of the trained parameters and of Adam (STATE_BYTES).
        stream: see `layer_bytes`.
        share: see TRAINING_SHARE.
    """
    model, again = load.model, layout.checkpointing
    tokens = n_runs * layout.rows * layout.accumulation * row_tokens
    bandwidth = hardware.bandwidth_bytes_s or float("inf")
    attention = hardware.matmul_flops_s.get(precision, float("inf")) / 3
    if precision == "bf16":
        attention = hardware.attention_flops_s or attention
    q = model.n_heads * model.head_size
    # causal scores and values: 2 q x length forward, 2.5 times that backward (they are recomputed)
    word = WORD_BYTES[precision]
    scores = (7 + 2 * again) * q * row_tokens * model.n_layers
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
    """Return the seconds to draw `completions` of each of `n_runs` runs, `group` per prompt.

    Decoding a token takes the longest of three times: to read weights, keys and values, to compute
    products, to launch kernels. A round lasts max_new_tokens tokens. Completions that end earlier
    leave the round.
    """
    if not completions:
        return 0.0
    model, word = load.model, WORD_BYTES[spec.precision]
    at_once, rounds = rounds_of(spec, hardware, n_runs, gpus, completions, group)
    bandwidth = hardware.bandwidth_bytes_s or float("inf")
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
        return float("inf")
    rows = min(rows, completions)
    bandwidth = gpus * (hardware.bandwidth_bytes_s or float("inf"))
    cache = rows * cache_bytes(model, 2) * (prompt + completion / 2)
    reads = (2 * read_params(model, rows) + cache) / bandwidth
    products = 2.0 * model.n_active_params / (gpus * products_flops_s(hardware, "bf16"))
    prefill_s = products * prompt * completions / group
    return completions / rows * completion * max(reads, products * rows) + prefill_s


def served_sampling_s(spec: RunSpec, hardware: Hardware, gpus: int) -> float:
    """Return the `served_s` of all completions of a run: of its updates and its evaluations."""
    draws = [(spec.steps, spec.batch_size, spec.group_size)] if spec.max_new_tokens else []
    draws += [(1, completions, 1) for completions in evaluated_completions(spec)]
    lengths = sampled_lengths(spec)
    return sum(
        n * served_s(spec.model, hardware, gpus, completions, group, *lengths)
        for n, completions, group in draws
    )
