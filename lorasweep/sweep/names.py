"""Short names of runs, aligned tables, and counts of what is trained of each layer set."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from lorasweep.spec.method import Method
from lorasweep.spec.model import LAYER_SETS, ROUTER, ModelSpec
from lorasweep.spec.values import fields
from lorasweep.sweep.grid import Point

FIRST = ("model", "dataset", "rank", "alpha", "layers", "scope", "batch_size", "steps")
"""Fields that come first in a name, in this order."""
REST = "embedding, norms"


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


def trained_by_set(method: Method, model: ModelSpec) -> list[dict[str, Any]]:
    """Count trained parameters by layer set, and of the rest; their sum is `method.n_trainable`.

    Counts are made from shapes alone; `matrices` counts those of all experts.
    """
    keys = ("layer_set", "matrices", "shapes", "ranks", "trained", "weights")
    found, sets = list[dict[str, Any]](), method.target_layers()
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
        row = (layer_set, count, list(shapes), sorted(ranks), trained, weights)
        found.append(dict(zip(keys, row)))
    trained = method.n_trainable(model) - sum(f["trained"] for f in found)
    weights = model.n_params - sum(f["weights"] for f in found)
    return [*found, dict(zip(keys, (REST, 0, [], [], trained, weights)))]
