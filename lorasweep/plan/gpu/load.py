"""What training a method on a model asks of a GPU: weights, operations and activations a token.

Plain numbers from shapes, so that memory and time are computed from the same ones.
"""

from dataclasses import dataclass

from lorasweep.spec.method import Method
from lorasweep.spec.model import LAYER_SETS, Matrix, ModelSpec

QKV, MLP_INPUTS = frozenset(("q_proj", "k_proj", "v_proj")), frozenset(("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Load:
    """One run's demands."""

    model: ModelSpec
    trained: int
    """Trained parameters."""
    whole: bool
    """All or some of the base's own weights are trained; otherwise adapters are."""
    flops: float
    """Operations a token of forward and backward, without attention scores."""
    adapted: tuple[Matrix, ...]
    """Matrices with adapters."""
    inputs: frozenset[str]
    """Names of the matrices whose inputs the backward pass needs: the trained or adapted ones."""

    @property
    def recomputed_flops(self) -> float:
        """Operations a token of a second forward pass through the layers, for checkpointing."""
        head = self.model.hidden_size * self.model.vocab_size
        return 2.0 * (self.model.n_active_params - head)

    @property
    def layer_params(self) -> float:
        """Weights of one layer."""
        head = self.model.hidden_size * self.model.vocab_size
        return (self.model.n_matmul_params - head) / self.model.n_layers

    @property
    def outer_params(self) -> float:
        """Weights outside the layers: embedding and unembedding."""
        return self.model.n_params - self.model.n_layers * self.layer_params


def load_of(model: ModelSpec, method: Method) -> Load:
    """Return what `method` asks on `model`."""
    whole = method.MAX_PACK == 1
    layers = method.target_layers() or LAYER_SETS
    return Load(
        model=model,
        trained=method.n_trainable(model),
        whole=whole,
        flops=method.step_flops(model, 1),
        adapted=() if whole else model.matrices(layers),
        inputs=frozenset(name for layer_set in layers for name in getattr(model, layer_set)),
    )


def layer_bytes(load: Load) -> float:
    """Return the bytes a token that one layer keeps for the backward pass without checkpointing.

    Computed in bf16 with a fused attention kernel; norms keep their input in fp32. Of frozen
    matrices no input is kept. What a layer of transformers' Llama keeps, read from its code:
    two norms (4 h each, and their outputs where a matrix behind them needs its input), rotated
    queries and keys, values, attention's output; gate, its activation, up, and their product where
    the last matrix needs its input.
    """
    model, needs = load.model, load.inputs
    h = model.hidden_size
    q, kv = model.n_heads * model.head_size, model.n_kv_heads * model.head_size
    gated = "gate_proj" in model.mlp
    f = model.mlp_size * max(1, model.n_active_experts)
    kept = 2 * 4 * h
    kept += 2 * h * (bool(needs & QKV) + bool(needs & MLP_INPUTS))
    kept += 2 * (2 * q + 2 * kv)
    kept += 2 * f * ((3 if gated else 1) + ("down_proj" in needs))
    if model.n_experts:
        kept += 2 * 2 * h * model.n_active_experts  # tokens sorted by expert, and their results
    return float(kept)
