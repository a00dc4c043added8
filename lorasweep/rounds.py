"""Further rounds of a sweep: the runs that were added after a look at the answer, recorded so that looks are counted.

Knows files and points; what to add is the analysis' business.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.compose import Request
from lorasweep.errors import SpecError, StoreError
from lorasweep.files import write_atomic
from lorasweep.grid import Point
from lorasweep.spec import checked_id


def file_of(request: Request) -> Path:
    """Return where a sweep's rounds are recorded: beside its runs."""
    return Path(request.exec.runs_dir) / ".rounds" / f"{request.sweep_name}-{request.scale}.json"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rounds recorded after the first; raises StoreError if the file is damaged."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text())["rounds"]
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{path} is damaged: restore it, or remove it to forget the sweep's further rounds "
                         "(their runs are kept).") from None  # fmt: skip


def points(rounds: Sequence[dict[str, Any]], known: Sequence[Point]) -> list[Point]:
    """Return the runs of recorded rounds: each is like a known run but for learning rate and seed.

    Runs whose pattern is no longer part of the sweep (it was edited, or another part of it is asked for) are left out.
    """
    by_id = {p.id: p for p in known}
    extra: dict[str, Point] = {}
    for entry in (e for r in rounds for e in r["runs"]):
        like = by_id.get(entry["like"])
        if like is not None:
            spec = dataclasses.replace(like.spec, lr=entry["lr"], seed=entry["seed"])
            rid = checked_id(spec)
            extra.setdefault(rid, Point(like.arm, spec, rid))
    return [p for p in extra.values() if p.id not in by_id]


def append(path: Path, runs: Sequence[dict[str, Any]], claims_hash: str, allowed: int) -> int:
    """Record one more round and return its number.

    Raises:
        SpecError: the sweep's planned number of rounds is used up, or its claims were changed since the first look.
    """
    before = read(path)
    if len(before) + 1 >= allowed:
        raise SpecError(
            f"the sweep plans {allowed} round(s) and has had {len(before) + 1}: looking on until it decides is optional "
            "stopping. Plan more before a new sweep's first run (sweep.rounds, at most 3)."
        )
    if before and before[-1]["claims_hash"] != claims_hash:
        raise SpecError(f"the sweep's claims or margins were changed since round {before[-1]['round']}. Restore them.")
    number = len(before) + 2
    told = {"rounds": [*before, {"round": number, "claims_hash": claims_hash, "runs": list(runs)}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(told, indent=1) + "\n").encode())
    return number
