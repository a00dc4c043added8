"""Seconds of training on GPUs, by component, from shapes and the card's data sheet.

One constant is from neither: the share of the attainable speed that the products of a training step
reach. It is the median over published measurements (analysis/results/plan/README.md), and the same
for an A100 and an H100. Communication is added in full: to assume that it hides behind the products
fits the published figures worse.
"""

from lorasweep.plan.gpu.load import Load, layer_bytes
from lorasweep.plan.gpu.memory import LOGIT_BYTES, STATE_BYTES, Layout
from lorasweep.plan.hardware import Hardware

TRAINING_SHARE = 0.80
"""Share of a card's attainable speed (`Hardware.attainable_share`) that a step's products reach."""
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
WORD_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
LINK_SHARE = 0.8
"""Share of a link's bandwidth that large collectives reach. Assumption."""


def step_parts(
    load: Load,
    layout: Layout,
    row_tokens: float,
    hardware: Hardware,
    precision: str = "bf16",
    members: int = 1,
    *,
    states: str = "fp32",
    stream: int | None = None,
    share: float = TRAINING_SHARE,
) -> dict[str, float]:
    """Return the seconds of an update of all members by component, on each of its GPUs.

    `launch` is what the processor needs beside the others: `step_seconds` adds up.

    Args:
        row_tokens: mean tokens of a row.
        states: precision of what is trained.
        stream: bytes of a number of the residual stream (`layer_bytes`).
        share: share of the attainable speed that products reach.
    """
    model, again = load.model, layout.checkpointing
    tokens = members * layout.rows * layout.accumulation * row_tokens
    peak = hardware.matmul_flops_s[precision]
    bandwidth = hardware.bandwidth_bytes_s or float("inf")
    fused = hardware.attention_flops_s if precision == "bf16" else None
    attention = fused or peak / 3
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
    kernels = KERNELS * model.n_layers + ADAPTER_KERNELS * sum(
        m.count / m.n_experts for m in load.adapted
    )
    return {
        "products": tokens * flops / (peak * hardware.attainable_share * share),
        "attention": tokens * scores / attention,
        "activations": tokens * moved / bandwidth,
        "optimizer": 2 * state * members * load.trained / layout.gpus / bandwidth,
        "launch": layout.accumulation * kernels * (3 + again) * LAUNCH_S,
        "communication": layout.accumulation
        * _communication_s(load, layout.gpus, hardware, states, word),
    }


def step_seconds(parts: dict[str, float]) -> float:
    """Add up the components of an update."""
    return max(sum(parts.values()) - parts["launch"], parts["launch"])


def _communication_s(load: Load, gpus: int, hardware: Hardware, states: str, word: int) -> float:
    """Seconds of a forward and backward pass's collectives.

    Every weight is gathered twice, and gradients are reduced. Within a node a GPU receives
    all but its own part; between nodes, each node receives all but its own, over all its GPUs.
    """
    if gpus == 1 or hardware.link_bytes_s is None:
        return 0.0
    gathered = 2 * word * load.model.n_params + STATE_BYTES[states][1] * load.trained
    inside = min(gpus, hardware.gpus_per_node)
    seconds = gathered * (inside - 1) / inside / (LINK_SHARE * hardware.link_bytes_s)
    nodes = gpus / inside
    if nodes > 1 and hardware.network_bytes_s is not None:
        between = gathered * (nodes - 1) / nodes / inside
        seconds = max(seconds, between / (LINK_SHARE * hardware.network_bytes_s))
    return seconds
