"""Count trained parameters by layer set, from shapes alone."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.spec.method import Method
from lorasweep.spec.model import LAYER_SETS, ROUTER, ModelSpec
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import aligned

REST = "embedding, norms"
HEAD = ("layer set", "matrices", "inputs x outputs", "rank", "trained", "weights")


@dataclass(frozen=True)
class Trained:
    """Trained parameters of one method in one layer set of a model."""

    layer_set: str
    matrices: int
    """Number of matrices, over all experts."""
    shapes: tuple[str, ...]
    ranks: tuple[int, ...]
    trained: int
    weights: int


def trained_by_set(method: Method, model: ModelSpec) -> list[Trained]:
    """Count trained parameters by layer set, and of the rest; their sum is `method.n_trainable`."""
    found = []
    sets = method.target_layers()
    for layer_set in (*LAYER_SETS, *([ROUTER] if model.n_experts else [])):
        matrices = model.matrices((layer_set,))
        weights = sum(m.size for m in matrices)
        trained = 0 if sets else weights  # a method without layer sets trains all weights
        ranks: set[int] = set()
        if layer_set in sets:
            only: dict[str, Any] = {"layers": layer_set}
            trained = dataclasses.replace(method, **only).n_trainable(model)
            ranks = {r for m in matrices if (r := method.rank_of(m)) is not None}
        shapes = dict.fromkeys(
            f"{m.d_in}x{m.d_out}"
            + (f" of {m.n_experts} experts, {m.n_active} active" if m.n_experts > 1 else "")
            for m in matrices
        )
        count, in_order = sum(m.count for m in matrices), tuple(sorted(ranks))
        found.append(Trained(layer_set, count, tuple(shapes), in_order, trained, weights))
    trained, weights = method.n_trainable(model), model.n_params
    rest = trained - sum(f.trained for f in found), weights - sum(f.weights for f in found)
    return [*found, Trained(REST, 0, (), (), *rest)]


def kinds_of(points: Iterable[Point]) -> list[tuple[ModelSpec, Method]]:
    """List the distinct models and methods of runs, in order."""
    found = {(p.spec.model.name, p.spec.method.canonical): p.spec for p in points}
    return [(s.model, s.method) for s in found.values()]


def trained_text(points: Sequence[Point]) -> str:
    """Return a table for each pair of model and method, as text."""
    tables = []
    for model, method in kinds_of(points):
        rows = [HEAD]
        for f in trained_by_set(method, model):
            shown = str(f.matrices) if f.matrices else "-"
            ranks = ", ".join(map(str, f.ranks)) or "-"
            trained = f"{f.trained:,}" if f.trained else "frozen"
            rows.append((f.layer_set, shown, ", ".join(f.shapes), ranks, trained, f"{f.weights:,}"))
        total = f"{method.n_trainable(model):,}"
        rows.append(("total", "", "", "", total, f"{model.n_params:,}"))
        fields = ", ".join(f"{k}={v}" for k, v in method.plain().items() if k != "name")
        lines = [f"  {line}" for line in aligned(rows, numbers=(1, 3, 4, 5))]
        tables.append("\n".join([f"{method.name} on {model.name} ({fields})", *lines]))
    return "\n\n".join(tables)


def trained_plain(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the tables of `trained_text` as JSON values."""
    return [
        {
            "model": model.name,
            "method": method.plain(),
            "trained": method.n_trainable(model),
            "layer_sets": [dataclasses.asdict(f) for f in trained_by_set(method, model)],
        }
        for model, method in kinds_of(points)
    ]
