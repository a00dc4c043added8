"""Read and write metrics.jsonl in a run's folder: one record per line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.store import files, results

Record = dict[str, Any]
"""What one update measured: JSON values, at least `step`."""
RECENT_BYTES = 2**14
"""Bytes that `read_end` reads; a record has about 250."""


def read(folder: Path, start: int = 0) -> list[Record]:
    """Return the records from byte `start` on, without an incomplete last line."""

    def lines() -> list[bytes]:
        with open(_path(folder), "rb") as file:
            file.seek(start)
            if start:
                file.readline()  # skip the rest of a line
            return file.read().split(b"\n")

    found = []
    for line in (files.patiently(_path(folder), lines) or [])[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # ignore everything after a damaged line
    return found


def read_end(folder: Path) -> list[Record]:
    """Return about the last 60 records."""
    return read(folder, max(0, size(folder) - RECENT_BYTES))


def append(folder: Path, new: Sequence[Record]) -> None:
    """Append records, in one write. Values that are not finite are written as null."""
    if new:
        text = "".join(results.finite_json(record) + "\n" for record in new)
        files.append(_path(folder), text.encode())


def size(folder: Path) -> int:
    """Return the size of the records in bytes; 0 if there are none."""
    status = files.status(_path(folder))
    return status.st_size if status else 0


def sync(folder: Path) -> None:
    """Flush the records to the disk."""
    files.sync(_path(folder))


def cut(folder: Path, to_bytes: int) -> None:
    """Cut the records back to `to_bytes`; a missing file counts as empty."""
    files.truncate(_path(folder), to_bytes)


def _path(folder: Path) -> Path:
    return folder / "metrics.jsonl"
