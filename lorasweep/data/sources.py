"""Rows of text: what a source of rows is, and the source that reads files in a folder."""

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lorasweep.errors import DataError
from lorasweep.spec.dataset import FILES, DatasetSpec
from lorasweep.spec.streams import stream

Row = tuple[str, Any]
"""Place of the row (for error messages) and content of the row."""
T = TypeVar("T")
SHOWN = 3
"""Maximum number of refused rows whose reasons are shown."""
READ_ON = 100_000
"""Number of rows after which refused ones are no longer counted."""


@dataclass(frozen=True)
class Source:
    """The rows of one split. They are read when `rows` is called."""

    identity: str
    """Name of the rows: SHA-256 of a file, or location on the hub with commit and split; and the
    part that is used. Different rows never share an identity, as it is a key of cached tokens."""
    commit: str | None
    """The hub's commit; None for a local file."""
    rows: Callable[[], Iterator[Row]]


def of_files(spec: DatasetSpec, held_out: bool, data_dirs: Sequence[str]) -> Source:
    """Find the training or held-out rows; DataError if their file is missing or not as pinned."""
    n = spec.holdout
    split = spec.test_split if held_out and not n else spec.train_split
    path, digest = find_file(spec, split, data_dirs)
    if not n:
        return Source(digest, None, lambda: rows_in(path))

    def rows() -> Iterator[Row]:
        given = list(rows_in(path))
        check_count(spec, str(path), len(given))
        order = holdout_order(len(given))
        yield from (given[k] for k in (order[:n] if held_out else order[n:]))

    return Source(f"{digest} {'first' if held_out else 'without the first'} {n}", None, rows)


def check_count(spec: DatasetSpec, where: str, n_rows: int) -> None:
    """Raise DataError if no row would be left for training."""
    if n_rows <= spec.holdout:
        raise DataError(
            f"dataset {spec.name!r}: {where} has {n_rows or 'no'} rows, expected more than "
            f"{spec.holdout} (holdout). Add rows, name another split, or hold fewer out."
        )


def holdout_order(n_rows: int) -> np.ndarray:
    """Return a shuffled order of rows; the first are held out. It depends only on n_rows."""
    return stream("holdout", 0).permutation(n_rows)


def find_file(spec: DatasetSpec, split: str, data_dirs: Sequence[str]) -> tuple[Path, str]:
    """Return <data_dir>/<location>/<split>.<source> and its SHA-256.

    Of several such files the pinned one, wherever it is.

    Raises:
        DataError: the file is missing, unreadable, or not the pinned one.
    """
    name = f"{split}.{spec.source}"
    tried = [Path(folder).expanduser() / spec.location / name for folder in data_dirs]
    pinned = spec.revision.startswith("sha256:")
    pins = dict(part.split("=") for part in spec.revision[7:].split(",")) if pinned else {}
    digests = {}
    for path in filter(Path.is_file, tried):
        try:
            digests[path] = file_sha256(path)
        except OSError as error:
            raise DataError(f"dataset {spec.name!r}: {path}: {error.strerror}.") from None
        if digests[path].startswith(pins.get(split, "")):
            return path, digests[path]
    if not digests:
        raise DataError(
            f"dataset {spec.name!r}: no file {' or '.join(map(str, tried))}. Put it there, or set "
            f"exec.data_dir=[FOLDER] for FOLDER/{Path(spec.location, name)}."
        )
    found = " and ".join(f"{path} has sha256 {sha[:16]}..." for path, sha in digests.items())
    raise DataError(
        f"dataset {spec.name!r}: {found}, but the revision pins {pins[split]}. Get the pinned "
        "file, or describe this one in a dataset file with another name and revision (for a "
        "customer's rows: run the command again, which pins the present file)."
    )


def each(rows: Iterable[Row], read: Callable[[Any, str], T]) -> Iterator[T]:
    """Yield `read(row, where)` of each row before the first refused one.

    Raises:
        DataError: rows are refused; with the number of all of them, and the first reasons.
    """
    n_read, refused = 0, []
    for n_read, (where, row) in enumerate(rows, start=1):
        try:
            found = read(row, where)
        except DataError as error:
            refused.append(str(error))
        except RecursionError as error:
            refused.append(f"{where}: {error}.")
        if not refused:
            yield found
        elif n_read >= READ_ON:
            break
    if refused:
        reasons = " ".join(list(dict.fromkeys(refused))[:SHOWN])
        raise DataError(f"{reasons} Refused: {len(refused):,} of {n_read:,} rows.")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parsed(content: str) -> Any:
    """Return the value of a JSON text; ValueError: it is none, or an object has a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice([key for key, _ in pairs])
        return dict(pairs)

    try:
        return json.loads(content, object_pairs_hook=once)
    except RecursionError as error:  # thousands of brackets
        raise ValueError(str(error)) from None


def _refuse_twice(names: Sequence[str]) -> None:
    """Raise ValueError if a name comes twice, as only one of its values would be read."""
    if len(names) > len({*names}) and (twice := {n for n in names if n and names.count(n) > 1}):
        raise ValueError(f"{min(twice)!r} is named twice: remove or rename one")


def without_nulls(given: Any) -> Any:
    """Return a value of Arrow without nulls in objects, such as the arguments of a call.

    In Arrow all objects of a column have the same keys: those that one lacks become nulls.
    """
    if isinstance(given, dict):
        return {key: without_nulls(one) for key, one in given.items() if one is not None}
    return [*map(without_nulls, given)] if isinstance(given, list) else given


def rows_in(path: Path) -> Iterator[Row]:
    """Yield the rows of a file in one of the forms `spec.dataset.FILES`.

    A .json file holds a list of rows, or an object with one list. Cells of a .csv file are text,
    separated by commas, semicolons or tabs; its first line names the columns.

    Raises:
        DataError: the file has another content than its name says.
    """
    form, between = path.suffix[1:], ":" if path.suffix == ".jsonl" else " row "
    try:
        for number, row in READERS[form](path):
            yield f"{path}{between}{number}", row
    except DataError:
        raise
    except (ValueError, csv.Error, NotImplementedError) as error:  # Arrow's are of these, too
        raise DataError(f"{path}: not {form} in UTF-8 ({error}). Correct the file.") from None


Numbered = Iterator[tuple[int, Any]]


def _jsonl_rows(path: Path) -> Numbered:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = parsed(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not a JSON row ({error}).") from None
                yield number, row


def _json_rows(path: Path) -> Numbered:
    content = parsed(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else None
    if not isinstance(content, list):
        raise ValueError("expected a list of rows, or an object with one list")
    yield from enumerate(content, start=1)


def _csv_rows(path: Path) -> Numbered:
    csv.field_size_limit(2**31 - 1)  # else a text of 131,072 characters is an error
    with path.open(encoding="utf-8-sig", newline="") as lines:
        head = next(lines, "")
        delimiter = max(",;\t", key=head.count)
        rows = csv.DictReader(itertools.chain([head], lines), delimiter=delimiter, strict=True)
        _refuse_twice(names := rows.fieldnames or ())
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values():
                quote = "as the first line has. Quote texts with a separator"
                raise ValueError(f"row {number}: not {len(names)} cells, {quote}")
            yield number, row


def _parquet_rows(path: Path) -> Numbered:
    from pyarrow import parquet  # takes a moment to load

    file = parquet.ParquetFile(path)
    _refuse_twice(file.schema_arrow.names)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
    for number, row in enumerate(rows, start=1):
        yield number, {column: without_nulls(given) for column, given in row.items()}


READERS = dict(zip(FILES, (_jsonl_rows, _json_rows, _csv_rows, _parquet_rows), strict=True))
