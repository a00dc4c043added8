"""The looks at a sweep's answer: under which claims it was first answered, and the rounds of runs
that were added after a look.

One JSON file a sweep, `<runs_dir>/.rounds/<sweep>-<scale>.json`. Which runs a round stands for is
`sweep.looks`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError, StoreError
from lorasweep.store import files
from lorasweep.sweep import looks
from lorasweep.sweep.grid import Point


def path_of(runs_dir: str | Path, sweep: str | None, scale: str) -> Path:
    """Return where a sweep's looks are recorded."""
    return Path(runs_dir) / ".rounds" / f"{sweep}-{scale}.json"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rounds recorded after the first.

    Raises:
        StoreError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text())["rounds"]
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            f"{path} is damaged: restore it, or remove it to forget the sweep's further rounds "
            "(their runs are kept)."
        ) from None


def note_look(path: Path, claims_hash: str, planned: int) -> None:
    """Record, once, under which claims and for how many rounds a sweep was first answered."""
    if not path.is_file():
        _write(path, {"claims_hash": claims_hash, "planned": planned, "rounds": []})


def append(
    path: Path, runs: Sequence[dict[str, Any]], claims_hash: str, known: Sequence[Point]
) -> int:
    """Record one more round and return its number. `known`: all runs of the sweep so far.

    Raises:
        SpecError: the sweep was never answered, its planned rounds are used up, its claims were
            changed since the first look, or the round holds no run that the sweep has not.
    """
    if not path.is_file():
        raise SpecError(
            "the sweep has no answer yet, so no round can follow. Run it first, without "
            "action=extend."
        )
    read(path)  # raises if the file is damaged
    record = json.loads(path.read_text())
    if record["claims_hash"] != claims_hash:
        raise SpecError(
            "the sweep's claims, margins or rounds were changed since its first answer. A question "
            "is not changed after a look at the runs: restore them, or use another sweep name."
        )
    so_far = len(record["rounds"]) + 1
    if so_far >= record["planned"]:
        raise SpecError(
            f"the sweep plans {record['planned']} round(s) and has had {so_far}: adding runs until "
            "it decides is optional stopping. Plan more rounds before a new sweep's first run "
            "(sweep.rounds, at most 5)."
        )
    number = so_far + 1
    record["rounds"].append({"round": number, "runs": list(runs)})
    if not looks.points(record["rounds"][-1:], known):
        raise SpecError("every run of that round is already part of the sweep.")
    _write(path, record)
    return number


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
