"""An index of finished runs, so that ten thousand of them are counted in a fraction of a second.

It is a cache, `.index/runs.json` in the run folder, and is rebuilt from the results if it is
missing, damaged or out of date. An entry is valid while the size and modification time of its
result.json stay the same; results are written once.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lorasweep.spec.metric import metric_of
from lorasweep.store import files

VERSION = 3


class Entry(NamedTuple):
    """The part of a result that the index keeps."""

    size: int
    mtime_ns: int
    state: str
    metric: str
    """Name of the metric that the run is judged by."""
    higher_is_better: bool
    value: float | None
    wall_s: float | None
    threads: int | None
    data_sha256: str | None
    """Fingerprint of the data; None for results of versions without one."""


def read(
    root: Path,
    ids: Iterable[str],
    result: Callable[[str], dict[str, Any] | None],
    known: dict[str, list[Any]],
) -> dict[str, Entry]:
    """Return the entries of the finished runs among `ids`. Raises StoreError like files.read.

    `result` reads and checks a run that is not in the index yet. `known` is the caller's cache
    between calls; if it is empty, it is filled from the index file.
    """
    # in a folder of its own, since in one with the sticky bit nobody replaces another user's file
    path = root / ".index" / "runs.json"
    if not known:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            stored = json.loads(path.read_bytes())
            runs, fields = stored["runs"], len(Entry._fields)
            if stored["version"] == VERSION and all(len(e) == fields for e in runs.values()):
                known |= runs
    found: dict[str, Entry] = {}
    behind = 0
    prefix = f"{root}{os.sep}"
    for rid in ids:
        result_path = f"{prefix}{rid}{os.sep}result.json"
        try:
            stat = os.stat(result_path)
        except files.NOT_THERE:
            continue
        except OSError:
            again = files.status(Path(result_path))
            if again is None:
                continue
            stat = again
        entry = known.get(rid)
        if entry is None or entry[0] != stat.st_size or entry[1] != stat.st_mtime_ns:
            body = result(rid)
            if body is None:
                continue  # damaged: not finished
            entry = [
                stat.st_size,
                stat.st_mtime_ns,
                body["state"],
                metric_of(body).name,
                metric_of(body).higher_is_better,
                metric_of(body).value(body),
                *map(body.get, ("wall_s", "threads", "data_sha256")),
            ]
            known[rid] = entry
            behind += 1
        found[rid] = Entry(*entry)
    if behind > 20 + len(known) // 50:
        with suppress(OSError):  # a full disk or another user's folder: fine, it is only a cache
            path.parent.mkdir(exist_ok=True)
            files.write_atomic(path, json.dumps({"version": VERSION, "runs": known}).encode())
    return found
