"""Text for people: short names of runs, aligned tables, and what is trained of each layer set.

No program parses this text. Trained parameters are counted from shapes alone.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from lorasweep.spec.method import Method
from lorasweep.spec.model import LAYER_SETS, ROUTER, ModelSpec
from lorasweep.spec.values import fields
from lorasweep.sweep.grid import Point

FIRST = ("model", "dataset", "rank", "alpha", "layers", "scope", "batch_size", "steps")
"""Fields that come first in a name, in this order."""
REST = "embedding, norms"
HEAD = ("layer set", "matrices", "inputs x outputs", "rank", "trained", "weights")


def run_names(points: Sequence[Point]) -> dict[str, str]:
    """Return the name of each run id: arm, the fields in which the runs differ, learning rate."""
    rows, found = [], dict[str, set[Any]]()
    for p in points:
        method = {f.key: getattr(p.spec.method, f.name) for f in fields(type(p.spec.method))}
        named = {"model": p.spec.model.name, "dataset": p.spec.dataset.name}
        rows.append({**method, **dict(p.spec.values()), **named})
        for key, value in rows[-1].items():
            if key not in ("lr", "method", "name"):
                found.setdefault(key, set()).add(value)
    varied = [k for k in dict.fromkeys((*FIRST, *found)) if len(found.get(k, ())) > 1]
    names = {}
    for p, row in zip(points, rows):
        shown = [
            f"r{row[k]}" if k == "rank" else f"{k}={row[k]}"
            for k in varied
            if k in row and k != "seed"
        ]
        seed = [f"seed={p.spec.seed}"] if "seed" in varied or len(points) == 1 else []
        names[p.id] = " ".join([p.arm, *shown, f"lr={p.spec.lr:g}", *seed])
    return names


def aligned(rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    """Return a line for each row; `numbers`: indices of columns that are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.rjust(w) if k in numbers else c.ljust(w)
            for k, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


class Trained(NamedTuple):
    """Trained parameters of one method in one layer set of a model."""

    layer_set: str
    matrices: int
    """Number of matrices, over all experts."""
    shapes: list[str]
    ranks: list[int]
    trained: int
    weights: int


def trained_by_set(method: Method, model: ModelSpec) -> list[Trained]:
    """Count trained parameters by layer set, and of the rest; their sum is `method.n_trainable`."""
    found, sets = [], method.target_layers()
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
        count = sum(m.count for m in matrices)
        found.append(Trained(layer_set, count, list(shapes), sorted(ranks), trained, weights))
    trained, weights = method.n_trainable(model), model.n_params
    rest = trained - sum(f.trained for f in found), weights - sum(f.weights for f in found)
    return [*found, Trained(REST, 0, [], [], *rest)]


def trained_plain(points: Iterable[Point]) -> list[dict[str, Any]]:
    """Return what is trained for each pair of model and method, as JSON values."""
    found = {(p.spec.model.name, p.spec.method.canonical): p.spec for p in points}
    return [
        {
            "model": s.model.name,
            "method": s.method.plain(),
            "trained": s.method.n_trainable(s.model),
            "layer_sets": [f._asdict() for f in trained_by_set(s.method, s.model)],
        }
        for s in found.values()
    ]


def trained_text(kinds: Iterable[dict[str, Any]]) -> str:
    """Return the values of `trained_plain` as tables."""
    tables = []
    for kind in kinds:
        sets = [Trained(**f) for f in kind["layer_sets"]]
        rows = [HEAD]
        for f in sets:
            shown, ranks = str(f.matrices or "-"), ", ".join(map(str, f.ranks)) or "-"
            trained = f"{f.trained:,}" if f.trained else "frozen"
            rows.append((f.layer_set, shown, ", ".join(f.shapes), ranks, trained, f"{f.weights:,}"))
        weights = sum(f.weights for f in sets)
        rows.append(("total", "", "", "", f"{kind['trained']:,}", f"{weights:,}"))
        given = ", ".join(f"{k}={v}" for k, v in kind["method"].items() if k != "name")
        lines = [f"  {line}" for line in aligned(rows, numbers=(1, 3, 4, 5))]
        head = f"{kind['method']['name']} on {kind['model']} ({given})"
        tables.append("\n".join([head, *lines]))
    return "\n\n".join(tables)
