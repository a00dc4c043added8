"""Which weights a run starts from, and their shape.

Knows the shape of a decoder's matrices, so that costs are known without loading anything.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from lorasweep.errors import SpecError
from lorasweep.spec.canonical import check, once, one_of

MODEL_SOURCES = ("hub", "folder", "gguf", "recipe")


class Matrix(NamedTuple):
    """`count` weight matrices of one shape; d_in and d_out in units."""

    d_in: int
    d_out: int
    count: int


@dataclass
class Recipe:
    """How a small base model is pretrained. Its weights are cached by the hash of these fields and
    the shape."""

    dataset: str = "dialect"
    """Synthetic generator that the base is pretrained on."""
    knobs: dict[str, float] = field(default_factory=dict)
    """Settings of that generator (the pretraining language)."""
    length: int = 64
    """Tokens a sequence."""
    steps: int = 1000
    batch_size: int = 256
    lr: float = 3e-3
    """Peak learning rate; linear warm-up over the first 5% of steps, cosine to a tenth."""
    precision: str = "fp32"
    seed: int = 0


@dataclass
class ModelSpec:
    """Which weights, and their shape (so that costs are known without loading anything)."""

    name: str = "???"
    source: str = "???"
    """hub (transformers name), folder (a local folder), gguf (one file), recipe (trained here
    once)."""
    location: str = ""
    """Hub name, or file or folder name looked up under exec.models_dir; empty for recipe."""
    revision: str = ""
    """Hub commit or tag, or 'sha256:...' of the GGUF file: what makes two loads the same weights.
    """
    hidden_size: int = 0
    n_layers: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    head_size: int = 0
    mlp_size: int = 0
    vocab_size: int = 0
    tied: bool = False
    """True: the unembedding is the embedding's own matrix."""
    qk_norm: bool = False
    """True: a norm over each head's query and key (Qwen3)."""
    attention: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Last name parts of the nn.Linear modules that 'attention' means."""
    mlp: list[str] = field(default_factory=lambda: ["gate_proj", "up_proj", "down_proj"])
    unembedding: list[str] = field(default_factory=lambda: ["lm_head"])
    recipe: Recipe | None = None

    def matrices(self, layers: tuple[str, ...]) -> list[Matrix]:
        """List the matrices of the layer sets; raise SpecError if a set matches nothing."""
        return once(self, f"matrices {layers}", lambda: self._matrices(layers))

    def _matrices(self, layers: tuple[str, ...]) -> list[Matrix]:
        h, q, kv = self.hidden_size, self.n_heads * self.head_size, self.n_kv_heads * self.head_size
        shape = {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, self.mlp_size),
            "up_proj": (h, self.mlp_size),
            "down_proj": (self.mlp_size, h),
            "lm_head": (h, self.vocab_size),
        }
        found = []
        for layer_set in layers:
            names = getattr(self, layer_set)
            strangers = [n for n in names if n not in shape]
            if strangers or not names:
                raise SpecError(
                    f"model {self.name!r}: layer set {layer_set!r} is {names}, which matches no known nn.Linear. "
                    f"Known: {', '.join(shape)}. Mixture-of-experts weights are not nn.Linear modules and are "
                    "refused: choose another layer set or a dense model."
                )
            count = 1 if layer_set == "unembedding" else self.n_layers
            found += [Matrix(*shape[name], count) for name in names]
        return found

    def set_of(self, name: str) -> str:
        """Return the layer set that a parameter's or module's name belongs to, or 'rest'
        (embedding, norms)."""
        parts = name.split(".")
        return next(
            (
                s
                for s in ("attention", "mlp", "unembedding")
                if not set(getattr(self, s)).isdisjoint(parts)
            ),
            "rest",
        )

    def n_matmul_params(self) -> int:
        """Count the weights that take part in matrix products, the unembedding included."""
        return sum(
            m.d_in * m.d_out * m.count for m in self.matrices(("attention", "mlp", "unembedding"))
        )

    def n_params(self) -> int:
        """Count all parameters: matrices, embedding and norms (no biases: Llama and Qwen3 have
        none)."""
        embedding = 0 if self.tied else self.vocab_size * self.hidden_size
        norms = (
            2 * self.n_layers + 1
        ) * self.hidden_size + self.qk_norm * 2 * self.head_size * self.n_layers
        return self.n_matmul_params() + embedding + norms


def validate_model(model: ModelSpec) -> None:
    """Raise SpecError for a model that cannot be loaded and trained."""
    where = f"model {model.name!r}: "
    one_of(where + "source", model.source, MODEL_SOURCES)
    shape = (
        "hidden_size",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_size",
        "mlp_size",
        "vocab_size",
    )
    for name in shape:
        check(getattr(model, name) >= 1, f"{where}{name}={getattr(model, name)}: at least 1.")
    check(
        model.n_heads % model.n_kv_heads == 0, f"{where}n_heads must be a multiple of n_kv_heads."
    )
    check(
        (model.source == "recipe") == (model.recipe is not None),
        f"{where}source=recipe and a recipe block go together.",
    )
    check(model.source == "recipe" or bool(model.location), f"{where}location is missing.")
