"""Find the matrices of layer sets in a loaded model, compute experts, count tokens of experts."""

from functools import partial
from typing import Any

import torch
from torch import nn

from lorasweep.errors import ModelError
from lorasweep.methods.stacked.modules import StackedExperts, experts_forward
from lorasweep.methods.trainables import Experts, Router, Target
from lorasweep.models.sharding import Mesh
from lorasweep.spec.model import ROUTER, ModelSpec

GROUPED_EXPERTS = "sorted_by_run"
"""Name under which transformers finds `experts_forward`."""


def find_targets(model: nn.Module, spec: ModelSpec, layers: tuple[str, ...]) -> dict[str, Target]:
    """Map module names to the nn.Linear, Experts or Router with matrices of the layer sets.

    Raises:
        ModelError: a module is missing, or its kind or shape differs from `spec`.
    """
    n_experts, hidden, width = spec.n_experts, spec.hidden_size, spec.mlp_size
    gate_up, down = (n_experts, 2 * width, hidden), (n_experts, hidden, width)

    def shape(module: nn.Module, name: str) -> tuple[int, ...]:
        p = getattr(module, name, None)
        return tuple(p.shape) if isinstance(p, nn.Parameter) else ()

    def target(module: Any, layer_set: str) -> Target | None:
        """Return the Target of a module; None if its kind or shape differs from `spec`."""
        if layer_set == ROUTER:
            return Router(module) if shape(module, "weight") == (n_experts, hidden) else None
        if layer_set != "mlp" or not n_experts:
            return module if isinstance(module, nn.Linear) else None
        fits = (
            (shape(module, "gate_up_proj"), shape(module, "down_proj")) == (gate_up, down)
            and len(list(module.parameters())) == 2
            and not getattr(module, "is_transposed", False)
            and getattr(module, "is_concatenated", True)
        )
        return Experts(module, spec.n_active_experts) if fits else None

    kinds = {ROUTER: f"routers with weight {[n_experts, hidden]}"}
    if n_experts:
        kinds["mlp"] = (
            f"experts with gate_up_proj {[*gate_up]}, gate before up, and down_proj {[*down]}, "
            "without biases"
        )
    found: dict[str, Target] = {}
    for layer_set in layers:
        names, count = spec.modules(layer_set)
        matching = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in names}
        targets = {n: target(m, layer_set) for n, m in matching.items()}
        known = {n: t for n, t in targets.items() if t is not None}
        wrong = sorted(matching.keys() - known.keys())
        if wrong or len(matching) != count:
            raise ModelError(
                f"model {spec.name!r}: layer set {layer_set!r}: expected {count} modules named "
                f"{sorted(names)} that are {kinds.get(layer_set, 'nn.Linear')}, found "
                f"{len(matching)} with these names. Not of that kind: {wrong[:3] or 'none'}. "
                "Correct the model's file in conf/model (a model with experts needs n_experts and "
                "n_active_experts), or leave this layer set out of method.layers."
            )
        found |= known
    return found


def use_grouped_experts(model: Any, spec: ModelSpec) -> None:
    """Let the model compute its experts by `experts_forward`, with and without adapters.

    The default of transformers fails in float64, and computes in fp32 under autocast. Raises
    ModelError if the experts have another layout, or biases.
    """
    if spec.n_experts:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        find_targets(model, spec, ("mlp",))
        ALL_EXPERTS_FUNCTIONS.register(GROUPED_EXPERTS, experts_forward)
        model.set_experts_implementation(GROUPED_EXPERTS)


class ExpertTokens:
    """Count the tokens that each expert gets in training, padding included.

    Passes without gradients and passes repeated by a backward pass do not count.
    """

    def __init__(self, model: Any) -> None:
        named = model.named_modules()
        layers = [m for n, m in named if n.rpartition(".")[2] == "experts"]
        self._found: list[list[torch.Tensor]] = [[] for _ in layers]
        self._hooks = [
            m.register_forward_pre_hook(partial(self._count, found))
            for m, found in zip(layers, self._found)
        ]

    @staticmethod
    def _count(found: list[torch.Tensor], module: Any, args: tuple[torch.Tensor, ...]) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward or not torch.is_grad_enabled():
            return
        adapted = isinstance(module, StackedExperts)
        n_runs, base = (module.n_runs, module.base) if adapted else (1, module)
        chosen = args[1].view(n_runs, -1)
        counts = chosen.new_zeros(n_runs, len(base.down_proj))
        found.append(counts.scatter_add_(1, chosen, torch.ones_like(chosen)))

    def take(self, n_runs: int, mesh: Mesh) -> list[list[list[int]]]:
        """Return each run's counts since the last call by layer and expert; empty if no experts."""
        if not self._found:
            return [[]] * n_runs
        by_layer = torch.stack([torch.stack(found).sum(0) for found in self._found])
        for found in self._found:
            found.clear()
        mesh.sum_(by_layer)
        return by_layer.transpose(0, 1).tolist()

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
