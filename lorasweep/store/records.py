"""metrics.jsonl: the records of a run, one a line, in its folder."""

import json
from pathlib import Path
from typing import Any

from lorasweep.store import files, results

Record = dict[str, Any]
"""What an update brought: plain values, at least `step`."""
RECENT_BYTES = 2**14
"""How much of the end of a run's records is read by those that watch it; a record has 250 bytes."""


def read(folder: Path, start: int = 0) -> list[Record]:
    """Return the records from byte `start` on; a torn last line is passed over."""
    try:
        with open(_path(folder), "rb") as file:
            file.seek(start)
            if start:
                file.readline()  # the rest of a line
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # nothing after damage is trusted
    return found


def read_end(folder: Path) -> list[Record]:
    """Return the last records, some 60."""
    return read(folder, max(0, size(folder) - RECENT_BYTES))


def append(folder: Path, record: Record) -> None:
    """Append one record. A value that is not finite is written as null."""
    files.append(_path(folder), (results.finite_json(record) + "\n").encode())


def size(folder: Path) -> int:
    """Return the size of the records in bytes; 0 if there are none."""
    try:
        return _path(folder).stat().st_size
    except FileNotFoundError:
        return 0


def sync(folder: Path) -> None:
    """Bring the records to the disk."""
    files.sync(_path(folder))


def cut(folder: Path, to_bytes: int) -> None:
    """Cut the records back to a size; missing ones count as empty."""
    files.truncate(_path(folder), to_bytes)


def _path(folder: Path) -> Path:
    return folder / "metrics.jsonl"
