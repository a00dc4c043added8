"""Record the looks (interim analyses) at a sweep and the runs that were added after each.

Each request has a JSON file, `<runs_dir>/.rounds/<title>.json`. Its keys call a look a round.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError, StoreError
from lorasweep.store import files
from lorasweep.sweep.grid import Point, added_points

LOCK_S = 60.0
"""Seconds to wait for another command that adds runs."""


def path_of(runs_dir: str | Path, title: str) -> Path:
    """Return the file with the looks of the request with this title."""
    return Path(runs_dir) / ".rounds" / f"{title}.json"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the looks after the first, {round, runs}; raise StoreError if the file is damaged."""
    if (content := files.read(path)) is None:
        return []
    try:
        return json.loads(content)["rounds"]
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            f"{path} is damaged. Restore it, or delete it to forget its looks (interim analyses); "
            "runs are kept."
        ) from None


def note_look(path: Path, claims_hash: str, planned: int) -> None:
    """Record claims and number of planned looks at the first look. Later calls do nothing."""
    if files.status(path) is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        first = {"claims_hash": claims_hash, "planned": planned, "rounds": []}
        files.create_once(path, json.dumps(first, indent=1).encode())


def first_claims(path: Path) -> str | None:
    """Return the hash of the claims of the first look; None if there was none."""
    content = files.read_json(path)
    return content.get("claims_hash") if isinstance(content, dict) else None


def append(
    path: Path, runs: Sequence[dict[str, Any]], claims_hash: str, known: Sequence[Point]
) -> int:
    """Record the runs added for one more look, under a lock; return the number of that look.

    `known`: all runs of the sweep so far, as this command has seen them.

    Raises:
        SpecError: no look so far, all planned looks are used, the claims were changed since the
            first look, or no run is new.
        StoreError: the file is damaged, or another process keeps the lock.
    """
    if first_claims(path) is None:
        raise SpecError("the sweep has no answer yet. Run it first, without action=extend.")
    with files.locked(path.parent / ".lock", LOCK_S):
        before, record = read(path), json.loads(path.read_text())
        number, known = len(before) + 2, [*known, *added_points(before, known)]
        record["rounds"].append({"round": number, "runs": list(runs)})
        if record["claims_hash"] != claims_hash:
            raise SpecError(
                "the sweep's claims, margins or rounds were changed since its first answer. They "
                "must not change after a look (interim analysis): restore them, or use another "
                "sweep name."
            )
        if number > record["planned"]:
            raise SpecError(
                f"all {record['planned']} planned look(s) (interim analyses) are used. Adding runs "
                "until the answer is clear would be optional stopping. Plan more looks before the "
                "first run of a new sweep: sweep.rounds, at most 5."
            )
        if not added_points(record["rounds"][-1:], known):
            raise SpecError("every run to add is already part of the sweep: nothing to add.")
        files.write_atomic(path, json.dumps(record, indent=1).encode())
        return number
