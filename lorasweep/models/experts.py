"""How transformers' models compute their experts here, and how many tokens each expert gets.

Refuses to know adapters.
"""

from typing import Any

import torch

from lorasweep.methods.stacked.experts import StackedExperts, experts_forward
from lorasweep.models.sharding import Mesh
from lorasweep.models.targets import find_targets
from lorasweep.spec.model import ModelSpec

NAME = "sorted_by_member"


def use_grouped_experts(model: Any, spec: ModelSpec) -> None:
    """Let the model compute its experts by `experts_forward`, with and without adapters.

    transformers' default fails in float64, and computes in fp32 under autocast.

    Raises:
        ModelError: its experts are of another layout, or have biases.
    """
    if spec.n_experts:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        find_targets(model, spec, ("mlp",))
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
        model.set_experts_implementation(NAME)


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
            members, base = (module.members, module.base) if adapted else (1, module)
            chosen, n_experts = args[1].view(members, -1), len(base.down_proj)
            ones = torch.ones_like(chosen)
            found.append(chosen.new_zeros(members, n_experts).scatter_add_(1, chosen, ones))

        return count

    def take(self, members: int, mesh: Mesh) -> list[list[list[int]]]:
        """Return the counts of each member since the last call, by layer and expert.

        Of all processes together.
        """
        if not self._layers:
            return [[]] * members
        by_layer = torch.stack([torch.stack(found).sum(0) for found in self._found])
        for found in self._found:
            found.clear()
        mesh.sum_(by_layer)
        return by_layer.transpose(0, 1).tolist()

    def close(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()
