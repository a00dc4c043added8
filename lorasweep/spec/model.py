"""The base model of a run: where its weights are, and the shapes that costs are computed from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, ClassVar, Literal

from lorasweep.errors import SpecError
from lorasweep.spec.values import UNSET, Is, Value, later, misfits

LAYER_SETS = ("attention", "mlp", "unembedding")
ROUTER = "router"
"""The routers of a model with experts, as a set of matrices. Adapters leave them frozen."""
EXPERT_MATRICES = ("gate_proj", "up_proj", "down_proj")
SHAPE = re.compile(r"[1-9]\d*x[1-9]\d*")
Count = Annotated[int, Is("", 0)]
Size = Annotated[int, Is("", 1)]


@dataclass(frozen=True)
class Matrix:
    """`count` weight matrices with d_in inputs and d_out outputs."""

    d_in: int
    d_out: int
    count: int
    n_experts: int = 1
    """Experts of a layer; 1: a matrix that every token passes through."""
    n_active: int = 1
    """Experts of a layer that a token passes through."""

    @property
    def size(self) -> int:
        """Weights of all `count` matrices."""
        return self.d_in * self.d_out * self.count

    @property
    def smaller(self) -> int:
        """The smaller side of a matrix, which bounds the rank of an adapter."""
        return min(self.d_in, self.d_out)


@dataclass(frozen=True)
class Recipe(Value):
    """How to pretrain a small base model. A hash of recipe and shape names the weights file."""

    WHERE: ClassVar[str] = "model.recipe."

    dataset: str = "dialect"
    """Name of a synthetic generator."""
    generator_params: dict[str, float] = field(default_factory=dict, metadata={"stored": "knobs"})
    length: int = 64
    """Tokens per sequence."""
    steps: int = 1000
    batch_size: int = 256
    lr: float = 3e-3
    """Peak learning rate, times a linear warm-up over 5% of steps and a cosine from 1 to 0.1."""
    precision: str = "fp32"
    seed: int = 0


@dataclass(frozen=True)
class ModelSpec(Value):
    """A base model: where its weights are, and its shape."""

    WHERE: ClassVar[str] = "model."

    name: str = "???"
    source: Literal["hub", "folder", "gguf", "recipe"] = UNSET
    """hub, folder (local, in transformers' format), gguf (one file), or recipe (see Recipe)."""
    location: str = ""
    """Hub name, or name of a file or folder under exec.models_dir; empty for recipe."""
    revision: str = ""
    """Hub commit or tag, or 'sha256:...' of a GGUF file or a folder. It pins the weights."""
    hidden_size: Size = 0
    n_layers: Size = 0
    n_heads: Size = 0
    n_kv_heads: Size = 0
    head_size: Size = 0
    mlp_size: Size = 0
    """Width of the MLP, or of one expert."""
    vocab_size: Size = 0
    tied: bool = False
    """Whether the unembedding and the embedding are the same matrix."""
    qk_norm: bool = False
    """Whether query and key are normalised in each head (Qwen3)."""
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the nn.Linear modules in layer set 'attention' (last part of the full name)."""
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    unembedding: tuple[str, ...] = ("lm_head",)
    recipe: Recipe | None = None
    weights_dtype: Literal["fp32", "bf16"] = later("fp32")
    """Type of the published weights, fp32 or bf16. With precision=bf16, frozen bf16 matrices stay
    in bf16: half the memory, the same results."""
    n_experts: Count = later(0)
    """Experts in the MLP of every layer, with separate matrices; 0: a dense MLP."""
    n_active_experts: Count = later(0)
    """Experts that the router chooses for a token."""
    shapes: dict[str, str] = field(default_factory=dict, metadata={"added": {}})
    """Inputs and outputs of a matrix by its name, where Llama has no such matrix or another shape,
    such as fused matrices: {qkv_proj: 3072x9216}."""
    n_norms: Count = later(2)
    """Norms of a layer over the hidden size; Gemma 3 has 4."""
    n_other_params: Count = later(0)
    """Parameters outside the matrices: embedding, norms, biases. 0: as many as Llama or Qwen3."""
    context_length: Count = later(0)
    """Positions that the model was built for, as its config says; 0: not stated."""

    def matrices(self, layers: tuple[str, ...]) -> tuple[Matrix, ...]:
        """List the matrices of layer sets; raise SpecError if a set matches nothing."""
        if layers not in self._matrices:
            self._matrices[layers] = tuple(m for s in layers for m in self._matrices_of(s))
        return self._matrices[layers]

    @cached_property
    def _matrices(self) -> dict[tuple[str, ...], tuple[Matrix, ...]]:
        return {}  # filled by `matrices`: thousands of specs of a grid share one model

    @cached_property
    def known_shapes(self) -> dict[str, tuple[int, ...]]:
        """Inputs and outputs of matrices by name: those of Llama and Qwen3, and `shapes`."""
        h, q, kv = self.hidden_size, self.n_heads * self.head_size, self.n_kv_heads * self.head_size
        return {
            "q_proj": (h, q),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (q, h),
            "gate_proj": (h, self.mlp_size),
            "up_proj": (h, self.mlp_size),
            "down_proj": (self.mlp_size, h),
            "lm_head": (h, self.vocab_size),
            **{name: tuple(map(int, text.split("x"))) for name, text in self.shapes.items()},
        }

    def _matrices_of(self, layer_set: str) -> list[Matrix]:
        if layer_set == ROUTER:
            return [Matrix(self.hidden_size, self.n_experts, self.n_layers)]
        shape, names = self.known_shapes, getattr(self, layer_set)
        if not names or not set(names) <= shape.keys():
            raise SpecError(
                f"model {self.name!r}: layer set {layer_set!r} is {list(names)}, which matches no "
                f"known matrix. Known: {', '.join(shape)}; give others in shapes. Experts have "
                "these names too: give the model's n_experts and n_active_experts."
            )
        count = 1 if layer_set == "unembedding" else self.n_layers
        experts = (1, 1)
        if layer_set == "mlp" and self.n_experts:
            experts = (self.n_experts, self.n_active_experts)
        sides = (shape[name] for name in names)
        return [Matrix(n_in, n_out, count * experts[0], *experts) for n_in, n_out in sides]

    def modules(self, layer_set: str) -> tuple[tuple[str, ...], int]:
        """Return the names (last part) of the modules of a layer set, and the number of modules.

        The experts of a layer are one module.
        """
        if layer_set == ROUTER:
            return ("gate",), self.n_layers
        if layer_set == "mlp" and self.n_experts:
            return ("experts",), self.n_layers
        names = getattr(self, layer_set)
        return names, len(names) * (1 if layer_set == "unembedding" else self.n_layers)

    def set_of(self, name: str) -> str:
        """Return the layer set of a parameter or module; 'rest' for embedding and norms."""
        parts = name.split(".")
        sets = (*LAYER_SETS, ROUTER) if self.n_experts else LAYER_SETS
        found = (s for s in sets if not set(self.modules(s)[0]).isdisjoint(parts))
        return next(found, "rest")

    @cached_property
    def n_matmul_params(self) -> int:
        """Number of weights in matrix products, the unembedding and the routers included."""
        routers = self.n_layers * self.n_experts * self.hidden_size
        return sum(m.size for m in self.matrices(LAYER_SETS)) + routers

    @cached_property
    def n_active_params(self) -> int:
        """Number of weights in the matrix products of one token; of experts, only active ones."""
        idle = (
            m.size * (m.n_experts - m.n_active) // m.n_experts for m in self.matrices(LAYER_SETS)
        )
        return self.n_matmul_params - sum(idle)

    @cached_property
    def n_params(self) -> int:
        """Number of all parameters: matrices, embedding, norms, biases."""
        if self.n_other_params:
            return self.n_matmul_params + self.n_other_params
        embedding = 0 if self.tied else self.vocab_size * self.hidden_size
        norms = (self.n_norms * self.n_layers + 1) * self.hidden_size
        head_norms = 2 * self.head_size * self.n_layers if self.qk_norm else 0
        return self.n_matmul_params + embedding + norms + head_norms

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with single fields, then with fields together."""
        n, active, from_recipe = self.n_experts, self.n_active_experts, self.source == "recipe"
        odd = not all(SHAPE.fullmatch(v) for v in self.shapes.values())
        uneven = self.n_kv_heads > 0 and self.n_heads % self.n_kv_heads
        together = (
            ("n_heads", uneven, f"a multiple of n_kv_heads={self.n_kv_heads}"),
            ("n_active_experts", not min(n, 1) <= active <= n, f"1 to n_experts={n}, or 0 of 0"),
            ("shapes", odd, "inputs x outputs by name, such as 3072x9216"),
            ("mlp", n and self.mlp != EXPERT_MATRICES, f"{EXPERT_MATRICES}, which experts have"),
            ("recipe", from_recipe != bool(self.recipe), "a block with source=recipe, else none"),
            ("location", not (from_recipe or self.location), "a hub name, or a file or folder"),
        )
        yield from misfits(self, f"model {self.name!r}: ", together)
