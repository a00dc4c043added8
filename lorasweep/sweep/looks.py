"""Further rounds of a sweep: runs that were added after an interim analysis.

The analysis decides which runs to add; `store.looks` records them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lorasweep.spec.run import validate
from lorasweep.sweep.grid import Point


def points(rounds: Sequence[dict[str, Any]], known: Sequence[Point]) -> list[Point]:
    """Return the runs of recorded rounds: each is a known run with another learning rate and seed.

    A recorded run is left out if the run that it was derived from is not in `known`: the sweep was
    edited, or only a part of it was requested.
    """
    by_id = {p.id: p for p in known}
    extra: dict[str, Point] = {}
    for entry in (e for r in rounds for e in r["runs"]):
        like = by_id.get(entry["like"])
        if like is not None:
            spec = dataclasses.replace(like.spec, lr=entry["lr"], seed=entry["seed"])
            validate(spec)
            extra.setdefault(spec.id, Point(like.arm, spec))
    return [p for p in extra.values() if p.id not in by_id]
