"""LoRA: W' = W + (alpha/rank) B A on the chosen layer sets (Hu et al., arXiv 2106.09685).

Defaults follow the study: alpha 32 for every rank, A uniform in +-1/sqrt(d_in), B zero, one
learning rate for both. The other fields test its claims about the parametrisation: a factor on the
start of A, another learning rate for B, another power of the rank in the scaling, B random instead
of A. The module that a pack trains is in `lorasweep.methods.stacked.linear`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lorasweep.errors import SpecError
from lorasweep.spec.canonical import not_allowed
from lorasweep.spec.method import Method, parse_layers
from lorasweep.spec.model import Matrix, ModelSpec

if TYPE_CHECKING:
    from torch import nn

    from lorasweep.methods.stacked.linear import StackedAdapters

SCALINGS = ("rank", "sqrt_rank", "none")
RANDOM_FACTORS = ("a", "b")


def _later(value: Any) -> Any:
    """Make a field added after the first release; `value` reproduces the earlier behaviour."""
    return field(default=value, metadata={"added": value})


@dataclass(frozen=True)
class LoRA(Method):
    """Fields of LoRA."""

    name: str = "lora"
    rank: int = 16
    """Rows of A and columns of B; at most the smaller side of every adapted matrix."""
    alpha: float = 32.0
    """Numerator of scaling = alpha/rank. The study uses 32 everywhere."""
    layers: str = "all"
    """Layer sets joined by '+': attention, mlp, unembedding. 'all' means all three."""
    scaling_by: str = _later("rank")
    """What alpha is divided by: rank (the study), sqrt_rank (rsLoRA, arXiv 2312.03732), or none."""
    init_scale: float = _later(1.0)
    """Factor on the random start of A (of B under start=b)."""
    lr_b_ratio: float = _later(1.0)
    """Learning rate of B divided by that of A, which is `lr`. LoRA+ (arXiv 2402.12354) uses about
    16."""
    random_factor: str = field(default="a", metadata={"added": "a", "key": "start"})
    """Factor that starts random, uniform in +-1/sqrt(its inputs). The other starts at zero."""
    init_seed: int = _later(0)
    """Seed of another random start on the same batches. It shows how much two adapters differ by
    chance."""
    PACKED_FIELDS: ClassVar[tuple[str, ...]] = (
        "alpha",
        "rank",
        "scaling_by",
        "init_scale",
        "lr_b_ratio",
        "random_factor",
        "init_seed",
    )

    @property
    def scaling(self) -> float:
        """Factor on B A x."""
        divisors = {"rank": self.rank, "sqrt_rank": math.sqrt(self.rank), "none": 1.0}
        return self.alpha / divisors[self.scaling_by]

    def rank_of(self, matrix: Matrix) -> int:
        """Return the rank of the adapter of one matrix.

        Every expert has an adapter of its own, of rank / active experts: the study's way to keep
        the parameters that a token passes through at those of a dense MLP.
        """
        return self.rank // matrix.n_active

    def check(self, model: ModelSpec) -> None:
        matrices = model.matrices(parse_layers(self.layers))
        smallest = min(min(m.d_in, m.d_out) for m in matrices)
        active = max(m.n_active for m in matrices)
        if self.rank % active:
            raise SpecError(
                f"method.rank={self.rank} on model {model.name!r} with layers {self.layers}: every "
                f"expert gets rank/{active}, as {active} are active. Expected a multiple of "
                f"{active}: {active}, {2 * active}, {4 * active}, ..., or method.layers=attention."
            )
        if not 1 <= self.rank <= smallest:
            raise SpecError(
                f"method.rank={self.rank}. Allowed on model {model.name!r} with layers "
                f"{self.layers}: from 1 to {smallest}, the smallest side of an adapted matrix."
            )
        if not 0 < self.alpha < 1e6:
            raise SpecError(
                f"method.alpha={self.alpha}: expected a number above 0 and below 1e6. "
                "The study uses 32."
            )
        if self.scaling_by not in SCALINGS:
            raise SpecError(not_allowed("method.scaling_by", self.scaling_by, SCALINGS))
        if self.random_factor not in RANDOM_FACTORS:
            raise SpecError(not_allowed("method.start", self.random_factor, RANDOM_FACTORS))
        for name in ("init_scale", "lr_b_ratio"):
            if not 0 < getattr(self, name) < 1e6:
                raise SpecError(
                    f"method.{name}={getattr(self, name)}: expected a number above 0 and below "
                    "1e6. The study uses 1."
                )
        if not 0 <= self.init_seed < 2**31:
            raise SpecError(
                f"method.init_seed={self.init_seed}: expected a whole number from 0 to 2^31 - 1."
            )

    def n_trainable(self, model: ModelSpec) -> int:
        return sum(
            self.rank_of(m) * (m.d_in + m.d_out) * m.count
            for m in model.matrices(parse_layers(self.layers))
        )

    def step_flops(self, model: ModelSpec, n_tokens: int) -> float:
        # 4 per frozen weight and token (forward, gradient of the input), 6 per adapter weight: the
        # study's 2N^2 + 6NR against 3N^2 multiply-adds (study.md section 4). Attention scores are
        # left out. Of experts those count that a token passes through.
        adapters = sum(
            self.rank_of(m) * (m.d_in + m.d_out) * m.count * m.n_active // m.n_experts
            for m in model.matrices(parse_layers(self.layers))
        )
        return n_tokens * (4.0 * model.n_active_params + 6.0 * adapters)

    def target_layers(self) -> tuple[str, ...]:
        return parse_layers(self.layers)

    def attach(
        self,
        base: "nn.Module",
        targets: "dict[str, nn.Linear]",
        methods: "Sequence[LoRA]",
        seeds: Sequence[int],
    ) -> "StackedAdapters":
        from lorasweep.methods.stacked.linear import StackedAdapters

        return StackedAdapters(base, targets, methods, seeds)


METHOD = LoRA
