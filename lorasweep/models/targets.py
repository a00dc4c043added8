"""Find the matrices of a loaded model that layer sets name, for a method to train or adapt.

A matrix is an nn.Linear, or one of a stack in the module of a layer's experts; a router's is a
parameter of its own. Refuses to know methods.
"""

from typing import Any

from torch import nn

from lorasweep.errors import ModelError
from lorasweep.methods.trainables import Experts, Router, Target
from lorasweep.spec.model import ROUTER, ModelSpec


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
    """Return what the module is for its layer set; None if it is of another kind or shape."""
    experts, hidden, width = spec.n_experts, spec.hidden_size, spec.mlp_size
    if layer_set == ROUTER:
        is_router = _shape(module, "weight") == (experts, hidden)
        return Router(module) if is_router else None
    if layer_set == "mlp" and experts:
        fits = (
            _shape(module, "gate_up_proj") == (experts, 2 * width, hidden)
            and _shape(module, "down_proj") == (experts, hidden, width)
            and len(list(module.parameters())) == 2
            and not getattr(module, "is_transposed", False)
            and getattr(module, "is_concatenated", True)
        )
        return Experts(module, spec.n_active_experts) if fits else None
    return module if isinstance(module, nn.Linear) else None


def _shape(module: Any, name: str) -> tuple[int, ...]:
    p = getattr(module, name, None)
    return tuple(p.shape) if isinstance(p, nn.Parameter) else ()
