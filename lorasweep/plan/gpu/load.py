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
    def norms_trained(self) -> bool:
        """All weights of the base are trained, those of the norms too."""
        return self.whole and self.trained == self.model.n_params

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

    @property
    def outer_trained(self) -> float:
        """Trained weights of the base outside the layers."""
        return self.outer_params if self.norms_trained else self.head_trained

    @property
    def head_trained(self) -> float:
        """Trained weights of the unembedding, whether or not it is tied to the embedding."""
        trained = self.whole and not self.inputs.isdisjoint(self.model.unembedding)
        return float(trained * self.model.hidden_size * self.model.vocab_size)


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


def layer_bytes(load: Load, word: int = 2, stream: int | None = None) -> float:
    """Return the bytes a token that one layer keeps for the backward pass without checkpointing.

    What a layer of transformers' Llama or Qwen3 keeps with a fused attention kernel, held to saved
    tensors in tests/unit/plan/test_saved_tensors.py. Of frozen matrices no input is kept.

    - Each of two norms: the input in fp32 at least, and if the weight is trained the normalised
      input.
    - Inputs of q, k, v and of gate, up: if the stream is wider than the products, each matrix makes
      and keeps a cast of the norm's output; else they share it.
    - Rotated queries and keys, values, and attention's output. Norms of queries and keys keep their
      input in fp32 at least.
    - gate, the activation of gate, up, and their product where the last matrix needs its input.

    Args:
        word: bytes of a number in products.
        stream: bytes of a number of the residual stream; None: as autocast over weights of fp32
            leaves it, which is fp32.
    """
    model, needs = load.model, load.inputs
    stream, exact = stream or max(4, word), max(4, word)
    h, active = model.hidden_size, model.n_active_experts
    q, kv = model.n_heads * model.head_size, model.n_kv_heads * model.head_size
    f = model.mlp_size * max(1, active)
    kept = 2 * exact * h + 2 * stream * h * load.norms_trained
    mlp_inputs = frozenset() if model.n_experts else MLP_INPUTS
    for inputs in (needs & QKV, needs & mlp_inputs):
        kept += word * h * (len(inputs) if stream > word else bool(inputs))
    kept += word * (2 * q + 2 * kv)
    if model.qk_norm:
        kept += (exact + word * load.norms_trained) * (q + kv)
    kept += word * f * ((3 if "gate_proj" in model.mlp else 1) + ("down_proj" in needs))
    if model.n_experts:
        # results of each expert, its inputs if they are needed, and the router's
        kept += word * h * (active * (1 + bool(needs & MLP_INPUTS)) + load.norms_trained)
    return float(kept)
