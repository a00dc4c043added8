"""Full fine-tuning of all parameters (`scope=all`), or of matrices alone (`scope=matrices`).

The matrices are those that LoRA with the same `layers` adapts. So `scope=matrices` is a control
that differs from LoRA in the parametrisation only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorasweep.errors import SpecError
from lorasweep.methods.trainables import Experts, Trainables, whole
from lorasweep.spec.method import Method, parse_layers
from lorasweep.spec.model import LAYER_SETS, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class FullFT(Method):
    """Fields of full fine-tuning."""

    name: str = "fullft"
    scope: Literal["all", "matrices"] = "all"
    """'all' parameters, or only the 'matrices' that `layers` names."""
    layers: str = "all"
    """Layer sets trained under scope=matrices. Must stay 'all' under scope=all."""
    MAX_PACK: ClassVar[int | None] = 1
    """Runs that train all weights cannot share a base."""
    TRAINS_BASE: ClassVar[bool] = True

    def check(self, model: ModelSpec) -> None:
        super().check(model)
        layers = parse_layers(self.layers)
        if self.scope == "all" and layers != LAYER_SETS:
            what = f"method.layers={self.layers!r} has no effect under method.scope=all"
            raise SpecError(f"{what}. Add method.scope=matrices, or leave layers at 'all'.")
        if self.scope == "matrices":
            model.matrices(layers)
            if model.tied and "unembedding" in layers:
                raise SpecError(
                    f"method.scope=matrices with the unembedding on {model.name!r}: it is tied to "
                    "the embedding and cannot be trained alone. Use method.layers=attention+mlp, "
                    "or fullft.layers=attention+mlp for the arms of a sweep."
                )

    def n_trainable(self, model: ModelSpec) -> int:
        if self.scope == "all":
            return model.n_params
        return sum(m.size for m in model.matrices(parse_layers(self.layers)))

    def step_flops(self, model: ModelSpec, n_tokens: int) -> float:
        # 6 operations per weight and token: 2 forward, 4 backward. Attention scores are left out.
        # Only the active experts of a token count.
        return 6.0 * n_tokens * model.n_active_params

    def target_layers(self) -> tuple[str, ...]:
        return () if self.scope == "all" else super().target_layers()

    def attach(self, base: Any, targets: Any, methods: Sequence[Any], seeds: Sequence[int]) -> Any:
        chosen: list[torch.Tensor] = list(base.parameters()) if self.scope == "all" else []
        for target in targets.values():
            if isinstance(target, Experts):
                chosen += [target.module.gate_up_proj, target.module.down_proj]
            else:
                chosen.append(target.weight)
        return _WholeModel(base, {id(p) for p in chosen})


class _WholeModel(Trainables):
    """The base's own parameters, of one full fine-tuning run."""

    def __init__(self, base: "nn.Module", chosen: set[int]) -> None:
        """Train copies, in fp32 at least, of the parameters with Python ids in `chosen`."""
        import torch

        self._base = base
        self._flags = {name: p.requires_grad for name, p in base.named_parameters()}
        for p in base.parameters():
            p.requires_grad_(id(p) in chosen)
            p.grad = None  # drop gradients from an earlier use of the base
        trained = {n: p for n, p in base.named_parameters() if p.requires_grad}
        self._start = {n: p.data for n, p in trained.items()}
        for p in trained.values():
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32), copy=True)

    def refresh(self) -> None:
        for n, p in self.parameters().items():
            self._start[n] = p.detach().to(self._start[n].dtype, copy=True)

    def parameters(self) -> "dict[str, torch.Tensor]":
        return {n: p for n, p in self._base.named_parameters() if p.requires_grad}

    def norms(self) -> list[dict[str, float]]:
        import torch

        changes = (p.detach() - self._start[n] for n, p in self.parameters().items())
        norms = [whole(torch.linalg.vector_norm(c, dtype=torch.float64)) for c in changes]
        return [{"norm_delta": torch.stack([n.square() for n in norms]).sum().sqrt().item()}]

    def spectra(self) -> list[dict[str, dict[str, float]]]:
        import torch

        from lorasweep.methods.stacked import spectral_norm

        matrices = {n: p for n, p in self.parameters().items() if p.dim() > 1}
        norms = [spectral_norm(whole(p.detach() - self._start[n])) for n, p in matrices.items()]
        names = [n.removesuffix(".weight") for n in matrices]
        return [{n: {"delta": norm} for n, norm in zip(names, torch.stack(norms).tolist())}]

    def detach(self) -> None:
        for name, p in self._base.named_parameters():
            p.grad = None
            if name in self._start:
                p.data = self._start[name]
            p.requires_grad_(self._flags[name])
