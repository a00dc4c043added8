"""Find the matrices of a loaded model that layer sets name, for a method to train or adapt.

Refuses to know methods.
"""

from torch import nn

from lorasweep.errors import ModelError
from lorasweep.spec.model import ModelSpec


def find_targets(
    model: nn.Module, spec: ModelSpec, layers: tuple[str, ...]
) -> dict[str, nn.Linear]:
    """Map names to nn.Linear modules for each matrix in the layer sets.

    Raises:
        ModelError: a matrix is missing or is not an nn.Linear.
    """
    found: dict[str, nn.Linear] = {}
    for layer_set in layers:
        names = set(getattr(spec, layer_set))
        matching = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in names}
        linears = {n: m for n, m in matching.items() if isinstance(m, nn.Linear)}
        wrong = sorted(matching.keys() - linears.keys())
        count = sum(m.count for m in spec.matrices((layer_set,)))
        if wrong or len(matching) != count:
            raise ModelError(
                f"model {spec.name!r}: layer set {layer_set!r}: expected {count} nn.Linear modules "
                f"named {sorted(names)}, found {len(matching)}, of which not nn.Linear: "
                f"{wrong[:3] or 'none'}. Fused experts are not supported: leave this layer set out "
                "of method.layers, or use a dense model."
            )
        found |= linears
    return found
