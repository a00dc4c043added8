"""The interface of a fine-tuning method: its fields, its costs, and how it attaches to a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from lorasweep.errors import SpecError
from lorasweep.spec.model import LAYER_SETS, Matrix, ModelSpec
from lorasweep.spec.values import Value, misfits

if TYPE_CHECKING:
    from torch import nn

    from lorasweep.methods.trainables import Target, Trainables


@dataclass(frozen=True)
class Method(Value):
    """Fields of a method. Each subclass has a file `lorasweep/methods/<name>.py`."""

    WHERE: ClassVar[str] = "method."
    name: str = "???"
    MAX_PACK: ClassVar[int | None] = None
    """How many runs may share a pack; None: no limit."""
    TRAINS_BASE: ClassVar[bool] = False
    """Whether the trained tensors are weights of the base."""
    LIBRARY: ClassVar[str] = ""
    """Package that makes the adapter, in one process; results have its version."""
    PACKED_FIELDS: ClassVar[tuple[str, ...]] = ()
    """Fields that may differ inside a pack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "layers" in vars(self):  # canonical order: one hash per choice
            vars(self)["layers"] = "+".join(parse_layers(vars(self)["layers"]))

    def check(self, model: ModelSpec) -> None:
        """Raise SpecError if this method cannot be applied to `model`. Changes nothing."""
        for problem in misfits(self, self.WHERE):
            raise SpecError(problem)

    def n_trainable(self, model: ModelSpec) -> int:
        """Count the trained parameters of one run, from the model's shape alone."""
        raise NotImplementedError

    def step_flops(self, model: ModelSpec, n_tokens: int) -> float:
        """Estimate the floating-point operations of forward and backward over `n_tokens` tokens."""
        raise NotImplementedError

    def rank_of(self, matrix: Matrix) -> int | None:
        """Return the rank of the adapter on a kind of matrix; None without adapters."""
        return getattr(self, "rank", None)

    @property
    def rewrites(self) -> bool:
        """Whether the run holds changed copies of its matrices, in fp32."""
        return False

    def target_layers(self) -> tuple[str, ...]:
        """Return the layer sets of the matrices that `attach` needs."""
        return parse_layers(vars(self)["layers"])

    def attach(
        self,
        base: "nn.Module",
        targets: "dict[str, Target]",
        methods: "Sequence[Any]",
        seeds: Sequence[int],
    ) -> "Trainables":
        """Attach the trainables of len(methods) runs; `targets`: modules of target_layers()."""
        raise NotImplementedError


@cache
def parse_layers(layers: str) -> tuple[str, ...]:
    """Split 'attention+mlp' into layer sets, in canonical order; 'all' means all of them."""
    parts = LAYER_SETS if layers == "all" else tuple(p.strip() for p in layers.split("+"))
    bad = [p for p in parts if p not in LAYER_SETS]
    if bad:
        raise SpecError(
            f"layers={layers!r}: unknown layer set {', '.join(map(repr, bad))}. "
            f"Allowed: {', '.join(LAYER_SETS)}, joined by '+', or 'all'. "
            "Example: method.layers=attention+mlp"
        )
    return tuple(p for p in LAYER_SETS if p in parts)
