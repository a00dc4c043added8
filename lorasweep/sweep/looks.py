"""Further rounds of a sweep: the runs that were added after a look at the answer, recorded so that
looks are counted.

Knows files and points; what to add is the analysis' business.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError, StoreError
from lorasweep.spec.run import validate
from lorasweep.store.files import write_atomic
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request


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
        raise StoreError(
            f"{path} is damaged: restore it, or remove it to forget the sweep's further rounds "
            "(their runs are kept)."
        ) from None


def points(rounds: Sequence[dict[str, Any]], known: Sequence[Point]) -> list[Point]:
    """Return the runs of recorded rounds: each is like a known run but for learning rate and seed.

    Runs whose pattern is no longer part of the sweep (it was edited, or another part of it is asked
    for) are left out.
    """
    by_id = {p.id: p for p in known}
    extra: dict[str, Point] = {}
    for entry in (e for r in rounds for e in r["runs"]):
        like = by_id.get(entry["like"])
        if like is not None:
            spec = dataclasses.replace(like.spec, lr=entry["lr"], seed=entry["seed"])
            validate(spec)
            extra.setdefault(spec.id, Point(like.arm, spec, spec.id))
    return [p for p in extra.values() if p.id not in by_id]


def note_look(path: Path, claims_hash: str, planned: int) -> None:
    """Record, once, under which claims and for how many rounds a sweep was first answered."""
    if not path.is_file():
        _write(path, {"claims_hash": claims_hash, "planned": planned, "rounds": []})


def append(
    path: Path, runs: Sequence[dict[str, Any]], claims_hash: str, known: Sequence[Point]
) -> int:
    """Record one more round and return its number.

    Raises:
        SpecError: the sweep was never answered, its planned rounds are used up, its claims were
            changed since the first
            look, or the round holds no run that the sweep has not.
    """
    if not path.is_file():
        raise SpecError(
            "the sweep has no answer yet, so there is no round to follow. Ask without action=extend first."
        )
    read(path)  # says so if the file is damaged
    told = json.loads(path.read_text())
    if told["claims_hash"] != claims_hash:
        raise SpecError(
            "the sweep's claims, margins or rounds were changed since its first answer: a question is not changed after a "
            "look at the runs. Restore them, or ask it as a sweep of another name."
        )
    if len(told["rounds"]) + 1 >= told["planned"]:
        raise SpecError(
            f"the sweep plans {told['planned']} round(s) and has had {len(told['rounds']) + 1}: looking on until it decides is "
            "optional stopping. Plan more before a new sweep's first run (sweep.rounds, at most 5)."
        )
    number = len(told["rounds"]) + 2
    told["rounds"].append({"round": number, "runs": list(runs)})
    if not points(told["rounds"][-1:], known):
        raise SpecError("every run of that round is already part of the sweep.")
    _write(path, told)
    return number


def _write(path: Path, told: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(told, indent=1) + "\n").encode())
