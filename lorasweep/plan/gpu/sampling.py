"""What sampling answers takes on GPUs, from shapes and the card's data sheet.

Decoding a token reads every weight once for all answers at once, and their keys and values; it
computes little. So its time is that of memory, of products where many answers are drawn at once, or
of the processor that launches the kernels, whichever is longest. As train/sampling.py does it, with
the forward pass of transformers and its cache; nothing of it was measured on a GPU.
"""

from dataclasses import dataclass

from lorasweep.plan.flops import answer_tokens, evaluated_answers, prompt_tokens
from lorasweep.plan.gpu.load import Load
from lorasweep.plan.gpu.memory import NCCL_BYTES, PROCESS_BYTES, STATE_BYTES, outer_bytes
from lorasweep.plan.gpu.time import ADAPTER_KERNELS, KERNELS, LAUNCH_S, TRAINING_SHARE, WORD_BYTES
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec

ROWS = 1024
"""Most answers of a run that are sampled at once (train/sampling.py)."""
CACHE_SHARE = 0.3
"""Share of a card's memory for the keys and values of the answers at once (train/sampling.py)."""
CACHE_PASSES = 3
"""The cache grows by concatenation, so a token reads and writes all of it, and attention reads it
(transformers' DynamicCache)."""
DRAW_BYTES = 150
"""Bytes moved to draw a token, per entry of the vocabulary: logits in fp32, their logarithms, and
in fp64 probabilities, their sums and entropy. Counted in train/sampling.py."""
DRAW_PEAK_BYTES = 44
"""Bytes of these at the same time, the same way."""
DRAW_KERNELS = 40
"""Kernels that draw a token, the same way."""
CAST_BYTES = 6
"""Bytes moved per weight of fp32 that autocast rounds to bf16 at every token: read and written. Of
a run on several GPUs weights arrive rounded."""


SERVED_SHARE = 0.9
"""Share of a card's memory that a serving engine takes: vLLM's default gpu_memory_utilization."""


@dataclass(frozen=True)
class Rounds:
    """How the answers of an update are drawn on one GPU."""

    rows: int
    """Answers of one run at once."""
    number: int
    """Rounds, one after another."""


def cache_bytes(model: ModelSpec, word: int) -> float:
    """Return the bytes of the keys and values of one token."""
    return 2.0 * model.n_layers * model.n_kv_heads * model.head_size * word


def rounds_of(
    spec: RunSpec, hardware: Hardware, members: int, gpus: int, answers: int, group: int
) -> Rounds:
    """Return how `answers` of each of `members` runs are drawn; a group is never split."""
    each = cache_bytes(spec.model, WORD_BYTES[spec.precision]) * spec.dataset.max_length
    room = CACHE_SHARE * (hardware.gpu_memory_gib or 0) * 2**30
    prompts = max(1, min(ROWS, int(room / (members * each))) // group)
    share = -(-(answers // group) // gpus)  # prompts of one GPU
    return Rounds(min(prompts, share) * group, -(-share // prompts))


def sampling_memory(
    load: Load, spec: RunSpec, hardware: Hardware, members: int, gpus: int, held: int
) -> dict[str, float]:
    """Return the peak bytes of one GPU while answers are drawn, by component.

    `held`: bytes per weight of the base as it lies there. A model on several GPUs is put together
    in each of them, without its gradients.
    """
    model, word = load.model, WORD_BYTES[spec.precision]
    weight, _, moments = STATE_BYTES["fp64" if spec.precision == "fp64" else "fp32"]
    rows = members * rounds_of(spec, hardware, members, gpus, spec.batch_size, spec.group_size).rows
    trained = members * load.trained / gpus
    frozen = model.n_params - load.trained if load.whole else model.n_params
    whole = float(word * load.trained * load.whole)
    if gpus > 1:
        whole = word * model.n_layers * load.layer_params + outer_bytes(load, weight, held)
    return {
        "frozen weights": held * frozen / gpus,
        "weights to start from": held * trained if load.whole else 0.0,
        "trained weights": weight * trained,
        "moments": moments * trained,
        "copies and buffers": whole,
        "keys and values": rows * spec.dataset.max_length * cache_bytes(model, word),
        "logits": float(rows * model.vocab_size * DRAW_PEAK_BYTES),
        "process": PROCESS_BYTES + (NCCL_BYTES if gpus > 1 else 0),
    }


def sampling_s(
    load: Load,
    spec: RunSpec,
    hardware: Hardware,
    members: int,
    gpus: int,
    answers: int,
    group: int,
) -> float:
    """Return the seconds in which `answers` of each of `members` runs are drawn, `group` a prompt.

    Some answer of a round goes on to max_new_tokens; the others end before, and are left out then.
    """
    if not answers:
        return 0.0
    model, precision = load.model, spec.precision
    word, found = WORD_BYTES[precision], rounds_of(spec, hardware, members, gpus, answers, group)
    bandwidth = hardware.bandwidth_bytes_s or float("inf")
    speed = hardware.matmul_flops_s[precision] * hardware.attainable_share * TRAINING_SHARE
    rows = members * found.rows
    prompt, answer = prompt_tokens(spec), answer_tokens(spec)
    alive = rows * answer / spec.max_new_tokens  # on average over the tokens of a round
    weights = float(word * _read_params(model, alive))
    if load.whole and gpus == 1 and word == 2:
        weights += CAST_BYTES * load.trained
    cache = CACHE_PASSES * cache_bytes(model, word) * (prompt + answer / 2)
    products = 2.0 * model.n_active_params * alive / speed
    memory = (weights + alive * (cache + DRAW_BYTES * model.vocab_size)) / bandwidth
    adapters = sum(m.count / m.n_experts for m in load.adapted)
    kernels = KERNELS * model.n_layers + ADAPTER_KERNELS * adapters + DRAW_KERNELS
    token_s = max(memory, products, kernels * LAUNCH_S)
    prefill_s = 2.0 * model.n_active_params * rows / group * prompt / speed
    return found.number * (prefill_s + spec.max_new_tokens * token_s)


def evaluation_s(load: Load, spec: RunSpec, hardware: Hardware, members: int, gpus: int) -> float:
    """Return the seconds of drawing the answers to held-out prompts over a whole run."""
    return sum(
        sampling_s(load, spec, hardware, members, gpus, answers, 1)
        for answers in evaluated_answers(spec)
    )


def served_s(
    model: ModelSpec,
    hardware: Hardware,
    gpus: int,
    answers: int,
    group: int,
    prompt: float,
    answer: float,
) -> float:
    """Return the seconds in which a serving engine draws answers in bf16, at best.

    It splits the weights over the GPUs, reads a prompt once for its group, and a finished answer
    makes room for the next one. A token takes the time to read weights, keys and values, or to
    compute the products; launches and communication are not counted. Infinite if the weights leave
    no room.

    Args:
        prompt: mean tokens of a prompt.
        answer: mean tokens of an answer.
    """
    memory = gpus * SERVED_SHARE * (hardware.gpu_memory_gib or 0) * 2**30
    rows = (memory - 2 * model.n_params) / (cache_bytes(model, 2) * (prompt + answer))
    if rows < 1:
        return float("inf")
    rows = min(rows, answers)
    bandwidth = gpus * (hardware.bandwidth_bytes_s or float("inf"))
    peak = hardware.matmul_flops_s["bf16"]
    speed = gpus * peak * hardware.attainable_share * TRAINING_SHARE
    cache = rows * cache_bytes(model, 2) * (prompt + answer / 2)
    reads = (2 * _read_params(model, rows) + cache) / bandwidth
    products = 2.0 * model.n_active_params / speed
    prefill_s = products * prompt * answers / group
    return answers / rows * answer * max(reads, products * rows) + prefill_s


def _read_params(model: ModelSpec, rows: float) -> float:
    """Return the weights of products read for a token of `rows` answers; of experts, those hit."""
    if not model.n_experts:
        return model.n_matmul_params
    # no expert is hit by all rows or none: the expected share of a uniform router
    missed = (1 - model.n_active_experts / model.n_experts) ** max(rows, 1)
    idle = model.n_matmul_params - model.n_active_params
    all_experts = idle / (1 - model.n_active_experts / model.n_experts)
    return model.n_matmul_params - missed * all_experts
