"""Compute the tokens, operations, weights and activations of a run from shapes alone."""

from dataclasses import dataclass

from lorasweep.spec.method import Method
from lorasweep.spec.model import LAYER_SETS, ROUTER, Matrix, ModelSpec
from lorasweep.spec.run import RunSpec

TEXT_FILL = 0.4
"""Mean length of text rows, prompts and sampled completions as a share of the longest allowed.
Assumption: the share is 0.37 in GSM8K with at most 512 tokens."""
CURVE_POINTS = 8
"""Number of evaluations on the first held-out rows, before the last evaluation."""
WORD_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of a number in products, by a run's precision."""
LAST = frozenset(
    ("o_proj", "down_proj", "out_proj", "dense", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2")
)
"""Names of the matrices that end attention or an MLP; all others read a norm's output."""


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


def updates_with_evaluations(spec: RunSpec) -> float:
    """Return the number of updates with as many operations as a whole run with evaluations."""
    return spec.steps * run_flops(spec) / train_flops(spec)


# ---------------------------------------------------------------- weights and activations


@dataclass(frozen=True)
class Load:
    """Weights, and operations per token, of a training step (not the load of the glossary)."""

    model: ModelSpec
    trained: int
    """Trained parameters."""
    whole: bool
    """True: all or some weights of the base are trained; False: adapters are trained."""
    flops: float
    """Operations per token of forward and backward, without attention scores."""
    adapted: tuple[Matrix, ...]
    """Matrices with adapters."""
    inputs: frozenset[str]
    """Names of the trained or adapted matrices: the backward pass needs their inputs."""

    @property
    def norms_trained(self) -> bool:
        """Whether all weights of the base are trained, including the norms."""
        return self.whole and self.trained == self.model.n_params

    @property
    def head_params(self) -> int:
        """Weights of the unembedding."""
        return self.model.hidden_size * self.model.vocab_size

    @property
    def layer_params(self) -> float:
        """Weights of one layer."""
        return (self.model.n_matmul_params - self.head_params) / self.model.n_layers

    @property
    def outer_params(self) -> float:
        """Weights outside the layers: embedding and unembedding."""
        return self.model.n_params - self.model.n_layers * self.layer_params

    @property
    def outer_trained(self) -> float:
        """Trained weights of the base outside the layers."""
        return self.outer_params if self.norms_trained else self.head_trained

    @property
    def head_trained(self) -> float:
        """Trained weights of the unembedding, whether or not it is tied to the embedding."""
        trained = self.whole and not self.inputs.isdisjoint(self.model.unembedding)
        return float(trained * self.head_params)

    @property
    def n_adapters(self) -> float:
        """Number of adapters; a stack of experts has one."""
        return sum(m.count / m.n_experts for m in self.adapted)


def load_of(model: ModelSpec, method: Method) -> Load:
    """Return the Load of training `method` on `model`."""
    whole = method.MAX_PACK == 1
    layers = method.target_layers() or LAYER_SETS
    return Load(
        model=model,
        trained=method.n_trainable(model),
        whole=whole,
        flops=method.step_flops(model, 1),
        adapted=() if whole else model.matrices(layers),
        inputs=frozenset(
            name
            for layer_set in layers
            for name in ((ROUTER,) if layer_set == ROUTER else getattr(model, layer_set))
        ),
    )


def layer_bytes(load: Load, word: int = 2, stream: int | None = None) -> float:
    """Return the bytes per token that one layer keeps for backward, without checkpointing.

    The layer is that of transformers' Llama or Qwen3 with a fused attention kernel. Inputs of
    frozen matrices are not kept. The result is checked in tests/unit/plan/test_saved_tensors.py.

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
        router = load.norms_trained or ROUTER in needs
        kept += word * h * (active * (1 + bool(mlp)) + router)
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
