"""The matrices of a loaded model that layer sets name, and how its experts compute.

A matrix is an nn.Linear, or one of a stack in the module of a layer's experts; a router's is a
parameter of that router.

Shapes: N runs of a pack, E experts.
"""

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
    """Map the names of modules to what holds the matrices of the layer sets, each set complete.

    Raises:
        ModelError: a module is missing, or is of another kind or shape than described.
    """
    found: dict[str, Target] = {}
    for layer_set in layers:
        names, count = spec.modules(layer_set)
        matching = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in names}
        targets = {n: _target(m, spec, layer_set) for n, m in matching.items()}
        known = {n: t for n, t in targets.items() if t is not None}
        wrong = sorted(matching.keys() - known.keys())
        if wrong or len(matching) != count:
            raise ModelError(
                f"model {spec.name!r}: layer set {layer_set!r}: expected {count} modules named "
                f"{sorted(names)} that are {_kind(spec, layer_set)}, found {len(matching)}, of "
                f"which something else: {wrong[:3] or 'none'}. Correct the model's file in "
                "conf/model (a model with experts needs n_experts and n_active_experts), or leave "
                "this layer set out of method.layers."
            )
        found |= known
    return found


def _kind(spec: ModelSpec, layer_set: str) -> str:
    experts, hidden, width = spec.n_experts, spec.hidden_size, spec.mlp_size
    if layer_set == ROUTER:
        return f"routers with weight [{experts}, {hidden}]"
    if layer_set == "mlp" and experts:
        return (
            f"experts with gate_up_proj [{experts}, {2 * width}, {hidden}], gate before up, and "
            f"down_proj [{experts}, {hidden}, {width}], without biases"
        )
    return "nn.Linear"


def _target(module: Any, spec: ModelSpec, layer_set: str) -> Target | None:
    """Return the target that a module is for its layer set; None for another kind or shape."""
    experts, hidden, width = spec.n_experts, spec.hidden_size, spec.mlp_size

    def shape(name: str) -> tuple[int, ...]:
        p = getattr(module, name, None)
        return tuple(p.shape) if isinstance(p, nn.Parameter) else ()

    if layer_set == ROUTER:
        return Router(module) if shape("weight") == (experts, hidden) else None
    if layer_set == "mlp" and experts:
        fits = (
            shape("gate_up_proj") == (experts, 2 * width, hidden)
            and shape("down_proj") == (experts, hidden, width)
            and len(list(module.parameters())) == 2
            and not getattr(module, "is_transposed", False)
            and getattr(module, "is_concatenated", True)
        )
        return Experts(module, spec.n_active_experts) if fits else None
    return module if isinstance(module, nn.Linear) else None


# ---------------------------------------------------------------- experts


def use_grouped_experts(model: Any, spec: ModelSpec) -> None:
    """Let the model compute its experts by `experts_forward`, with and without adapters.

    transformers' default fails in float64, and computes in fp32 under autocast.

    Raises:
        ModelError: the experts are of another layout, or have biases.
    """
    if spec.n_experts:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        find_targets(model, spec, ("mlp",))
        ALL_EXPERTS_FUNCTIONS.register(GROUPED_EXPERTS, experts_forward)
        model.set_experts_implementation(GROUPED_EXPERTS)


class ExpertTokens:
    """Count the tokens that each expert gets in training, padding included.

    Only passes with gradients count, and not those that a backward pass repeats. A model without
    experts has no counts.
    """

    def __init__(self, model: Any) -> None:
        named = model.named_modules()
        self._layers = [m for n, m in named if n.rpartition(".")[2] == "experts"]
        self._found: list[list[torch.Tensor]] = [[] for _ in self._layers]
        self._hooks = [
            m.register_forward_pre_hook(self._counter(found))
            for m, found in zip(self._layers, self._found)
        ]

    def _counter(self, found: list[torch.Tensor]) -> Any:
        def count(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            in_backward = torch._C._current_graph_task_id() != -1
            if in_backward or not torch.is_grad_enabled():
                return
            adapted = isinstance(module, StackedExperts)
            n_runs, base = (module.n_runs, module.base) if adapted else (1, module)
            chosen, n_experts = args[1].view(n_runs, -1), len(base.down_proj)
            ones = torch.ones_like(chosen)
            found.append(chosen.new_zeros(n_runs, n_experts).scatter_add_(1, chosen, ones))

        return count

    def take(self, n_runs: int, mesh: Mesh) -> list[list[list[int]]]:
        """Return each run's counts since the last call, by layer and expert, of all processes."""
        if not self._layers:
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
