"""LoRA: W' = W + (alpha/rank) B A on the chosen layer sets (Hu et al., arXiv 2106.09685).

Defaults follow the study: alpha 32 for every rank, A uniform in +-1/sqrt(d_in), B zero, one
learning rate for A and B. Every expert of a layer has separate adapters for gate, up and down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from lorasweep.errors import RankTooLarge, SpecError
from lorasweep.spec.method import Method, parse_layers
from lorasweep.spec.model import Matrix, ModelSpec
from lorasweep.spec.values import ABOVE_0, Is, later


@dataclass(frozen=True)
class LoRA(Method):
    """Fields of LoRA."""

    name: str = "lora"
    rank: int = 16
    """Rows of A and columns of B; at most the smaller side of every adapted matrix."""
    alpha: Annotated[float, Is("the study: 32", ABOVE_0, 1e6)] = 32.0
    """Numerator of scaling = alpha/rank. The study uses 32 everywhere."""
    layers: str = "all"
    """Layer sets joined by '+': attention, mlp, unembedding. 'all' means all three."""
    scaling_by: Literal["rank", "sqrt_rank", "none"] = later("rank")
    """Divisor of alpha: rank (the study), sqrt_rank (rsLoRA, arXiv 2312.03732), or none."""
    init_scale: Annotated[float, Is("the study: 1", ABOVE_0, 1e6)] = later(1.0)
    """Factor on the initial values of the random factor."""
    lr_b_ratio: Annotated[float, Is("the study: 1", ABOVE_0, 1e6)] = later(1.0)
    """Learning rate of B divided by that of A (`lr`). LoRA+ (arXiv 2402.12354) uses about 16."""
    random_factor: Literal["a", "b"] = field(default="a", metadata={"added": "a", "key": "start"})
    """Factor (a or b) that starts random, uniform in +-1/sqrt(its inputs). The other is zero."""
    init_seed: Annotated[int, Is("", 0, 2**31 - 1)] = later(0)
    """Second seed of the initial values; batches stay the same. It shows differences by chance."""
    expert_rank: Literal["active", "all", "whole"] = later("active")
    """Rank of an expert's adapter. active: rank / active experts (the study; NeMo Automodel). all:
    rank / all experts of the layer (SkyRL, PEFT's documentation). whole: rank (Tinker)."""
    expert_alpha: Annotated[float | None, Is("", ABOVE_0, 1e6)] = later(None)
    """Alpha of an expert's adapter; `scaling_by` refers to the rank of that adapter. None: `alpha`,
    as in NeMo Automodel and Megatron-Bridge; the study does not say."""
    expert_outer: Literal["own", "shared"] = later("own")
    """The factor on the hidden side (A of gate and up, B of down). own: one per expert. shared: one
    per layer (Tinker)."""
    PACKED_FIELDS: ClassVar[tuple[str, ...]] = (
        *("alpha", "rank", "scaling_by", "init_scale", "lr_b_ratio", "random_factor", "init_seed"),
        *("expert_rank", "expert_alpha"),
    )

    @property
    def scaling(self) -> float:
        """Factor on B A x of a matrix outside experts."""
        return self._scaling(self.alpha, self.rank)

    def expert_scaling(self, rank: int) -> float:
        """Return the factor on B A x of an expert with an adapter of this rank."""
        return self._scaling(self.alpha if self.expert_alpha is None else self.expert_alpha, rank)

    def _scaling(self, alpha: float, rank: int) -> float:
        return alpha / {"rank": rank, "sqrt_rank": math.sqrt(rank), "none": 1.0}[self.scaling_by]

    def expert_rank_of(self, n_experts: int, n_active: int) -> int:
        """Return the rank of an expert's adapter."""
        return self.rank // self._divisor(n_experts, n_active)

    def _divisor(self, n_experts: int, n_active: int) -> int:
        return {"active": n_active, "all": n_experts, "whole": 1}[self.expert_rank]

    def rank_of(self, matrix: Matrix) -> int:
        one = matrix.n_experts == 1
        return self.rank if one else self.expert_rank_of(matrix.n_experts, matrix.n_active)

    def n_trained(self, model: ModelSpec, matrix: Matrix, active: bool = False) -> int:
        """Count the trained parameters of a kind of matrix; `active`: those that one token uses."""
        if matrix.n_experts == 1:
            return self.rank * (matrix.d_in + matrix.d_out) * matrix.count
        inner = matrix.d_in + matrix.d_out - model.hidden_size
        of_inner = matrix.n_active if active else matrix.n_experts
        of_outer = of_inner if self.expert_outer == "own" else 1
        layers = matrix.count // matrix.n_experts
        return self.rank_of(matrix) * (of_inner * inner + of_outer * model.hidden_size) * layers

    def check(self, model: ModelSpec) -> None:
        matrices = model.matrices(parse_layers(self.layers))
        where = f"on model {model.name!r} with layers {self.layers}"
        smallest = min((m.smaller for m in matrices if m.n_experts == 1), default=self.rank)
        if not 1 <= self.rank <= smallest:
            raise RankTooLarge(
                f"method.rank={self.rank}. Allowed {where}: from 1 to {smallest}, the smallest "
                "side of an adapted matrix."
            )
        super().check(model)
        experts = [m for m in matrices if m.n_experts > 1]
        if not experts:
            for f in fields(self):
                value = getattr(self, f.name)
                if f.name.startswith("expert_") and value != f.default:
                    raise SpecError(
                        f"method.{f.name}={value} has no effect {where}: no expert is adapted. "
                        "Leave it out, or add mlp to method.layers of a model with experts."
                    )
            return
        divisor = self._divisor(experts[0].n_experts, experts[0].n_active)
        smallest = min(m.smaller for m in experts)
        if self.rank % divisor or self.rank // divisor > smallest:
            raise SpecError(
                f"method.rank={self.rank} {where}: every expert gets rank/{divisor} by method."
                f"expert_rank={self.expert_rank}, at most the smallest side of its matrices. "
                f"Expected a multiple of {divisor} up to {smallest * divisor}; or another "
                "method.expert_rank (active, all, whole), or method.layers=attention."
            )

    def n_trainable(self, model: ModelSpec) -> int:
        return sum(self.n_trained(model, m) for m in model.matrices(parse_layers(self.layers)))

    def step_flops(self, model: ModelSpec, n_tokens: int) -> float:
        # 4 operations per frozen weight and token (forward, gradient of the input), 6 per adapter
        # weight. The study has the same ratio to full fine-tuning: 2N^2 + 6NR against 3N^2
        # multiply-adds. Attention scores are left out. Only the active experts of a token count.
        matrices = model.matrices(parse_layers(self.layers))
        adapters = sum(self.n_trained(model, m, active=True) for m in matrices)
        return n_tokens * (4.0 * model.n_active_params + 6.0 * adapters)

    def attach(self, base: Any, targets: Any, methods: Sequence[Any], seeds: Sequence[int]) -> Any:
        from lorasweep.methods.stacked import StackedAdapters

        return StackedAdapters(base, targets, methods, seeds)
