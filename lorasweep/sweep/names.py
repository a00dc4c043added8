"""Format text for people: short names of runs, and aligned tables. No program parses this text."""

from collections.abc import Collection, Sequence
from typing import Any

from lorasweep.spec.method import Method
from lorasweep.spec.values import fields
from lorasweep.sweep.grid import Point

FIRST = ("model", "dataset", "rank", "alpha", "layers", "scope", "batch_size", "steps")
"""Fields that come first in a name, in this order."""


def run_names(points: Sequence[Point]) -> dict[str, str]:
    """Return the name of each run id: arm, the fields in which the runs differ, learning rate."""
    # fast for ten thousand runs: read each distinct model, data set and method only once
    found: dict[str, set[Any]] = {}
    specs = [p.spec for p in points]
    for name, _ in specs[0].values() if specs else ():
        if name in ("model", "dataset"):
            distinct = {id(part): part for part in (getattr(s, name) for s in specs)}
            found[name] = {part.name for part in distinct.values()}
        elif name not in ("lr", "method"):
            found[name] = {getattr(s, name) for s in specs}
    for method in {id(s.method): s.method for s in specs}.values():
        for key, value in _of_method(method).items():
            found.setdefault(key, set()).add(str(value))
    varied = [k for k in dict.fromkeys((*FIRST, *found)) if len(found.get(k, ())) > 1]
    shows_seed = "seed" in varied or len(points) == 1
    named = {}
    for p in points:
        parts = {"model": p.spec.model.name, "dataset": p.spec.dataset.name}
        f = {**dict(p.spec.values()), **_of_method(p.spec.method), **parts}
        shown = [
            f"r{f[k]}" if k == "rank" else f"{k}={f[k]}" for k in varied if k in f and k != "seed"
        ]
        seed = [f"seed={p.spec.seed}"] if shows_seed else []
        named[p.id] = " ".join([p.arm, *shown, f"lr={p.spec.lr:g}", *seed])
    return named


def _of_method(method: Method) -> dict[str, Any]:
    """Return a method's fields by their keys on the command line."""
    return {f.key: getattr(method, f.name) for f in fields(type(method)) if f.name != "name"}


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
