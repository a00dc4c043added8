"""Rows of text: what a source of rows is, and the source that reads JSON Lines in a folder."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

Row = tuple[str, Any]
"""Place of the row (for error messages) and content of the row."""


@dataclass(frozen=True)
class Source:
    """The rows of one split. They are read when `rows` is called."""

    identity: str
    """Name of the rows: SHA-256 of a file, or location on the hub with commit and split; and the
    part that is used. Different rows never share an identity, as it is a key of cached tokens."""
    commit: str | None
    """The hub's commit; None for a local file."""
    rows: Callable[[], Iterator[Row]]


def of_jsonl(spec: DatasetSpec, held_out: bool, data_dirs: Sequence[str]) -> Source:
    """Find the training or held-out rows; DataError if their file is missing or not as pinned."""
    n = spec.holdout
    path, digest = find_jsonl(
        spec, spec.test_split if held_out and not n else spec.train_split, data_dirs
    )
    if not n:
        return Source(digest, None, lambda: jsonl_rows(path))

    def rows() -> Iterator[Row]:
        given = list(jsonl_rows(path))
        check_holdout(spec, path, len(given))
        order = holdout_order(len(given))
        yield from (given[k] for k in (order[:n] if held_out else order[n:]))

    return Source(f"{digest} {'first' if held_out else 'without the first'} {n}", None, rows)


def holdout_order(n_rows: int) -> np.ndarray:
    """Return a shuffled order of rows; the first are held out. It depends only on n_rows."""
    return stream("holdout", 0).permutation(n_rows)


def check_holdout(spec: DatasetSpec, path: Path, n_rows: int) -> None:
    """Raise DataError if no row is left to train on."""
    if spec.holdout and n_rows <= spec.holdout:
        raise DataError(
            f"dataset {spec.name!r}: {path} has {n_rows} rows, expected more than {spec.holdout} "
            "(holdout). Add rows, or hold fewer out."
        )


def find_jsonl(spec: DatasetSpec, split: str, data_dirs: Sequence[str]) -> tuple[Path, str]:
    """Return <data_dir>/<location>/<split>.jsonl and its SHA-256.

    Raises:
        DataError: the file is missing, unreadable, or not the pinned one.
    """
    tried = [Path(folder).expanduser() / spec.location / f"{split}.jsonl" for folder in data_dirs]
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        raise DataError(
            f"dataset {spec.name!r}: no file {' or '.join(map(str, tried))}. Put it there, or set "
            f"exec.data_dir=[FOLDER] for FOLDER/{spec.location}/{split}.jsonl."
        )
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise DataError(
            f"dataset {spec.name!r}: {path} cannot be read ({error.strerror}). Make it readable."
        ) from None
    if spec.revision.startswith("sha256:"):
        wanted = dict(part.split("=") for part in spec.revision[7:].split(",")).get(split)
        if wanted and wanted != digest[:16]:
            raise DataError(
                f"dataset {spec.name!r}: {path} has sha256 {digest[:16]}..., but the revision "
                f"pins {wanted}. Get the pinned file, or write your own dataset file with another "
                "name and revision (for a customer's rows: run the command again, which pins the "
                "present file)."
            )
    return path, digest


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON Lines file; raise DataError for a line that is not JSON."""
    with path.open(encoding="utf-8", errors="strict") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}:{number}: not a JSON row ({error}). Correct or remove the line."
            ) from None
