"""Rows of text in files and on the hub."""

import csv
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorasweep.data.messages import columns, once, parsed
from lorasweep.errors import DataError, check_installed, from_hub
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.run import COMMIT
from lorasweep.spec.streams import stream

Row = tuple[str, Any]
"""Place of the row (for error messages) and content of the row."""
T = TypeVar("T")
SHOWN = 3
"""Maximum number of refused rows whose reasons are shown."""


@dataclass(frozen=True)
class Source:
    """The rows of one split. They are read when `rows` is called."""

    identity: str
    """Name of the rows: SHA-256 of a file, or location on the hub with commit and split; and the
    part that is used. Different rows never share an identity, as it is a key of cached tokens."""
    commit: str | None
    """The hub's commit; None for a local file."""
    rows: Callable[[], Iterator[Row]]


def each(rows: Iterable[Row], read: Callable[[Any, str], T]) -> Iterator[T]:
    """Yield `read(row, where)` of each row before the first refused one.

    Raises:
        DataError: rows are refused; with the number of all of them, and the first reasons.
    """
    n_read, refused = 0, []
    for where, row in rows:
        n_read += 1
        try:
            found = read(row, where)
        except DataError as error:
            refused.append(str(error))
        else:
            if not refused:
                yield found
    if refused:
        reasons = " ".join(list(dict.fromkeys(refused))[:SHOWN])
        raise DataError(f"{reasons} Refused: {len(refused):,} of {n_read:,} rows.")


def check_count(spec: DatasetSpec, where: str, n_rows: int) -> None:
    """Raise DataError if no row would be left for training."""
    if n_rows <= spec.holdout:
        raise DataError(
            f"dataset {spec.name!r}: {where} has {n_rows or 'no'} rows, expected more than "
            f"{spec.holdout} (holdout). Add rows, name another split, or hold fewer out."
        )


def shuffled(n_rows: int) -> list[int]:
    """Return a shuffled order of rows; the first are held out. It depends only on n_rows."""
    return stream("holdout", 0).permutation(n_rows).tolist()


# ---------------------------------------------------------------- files


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
        order = shuffled(len(given))
        yield from (given[k] for k in (order[:n] if held_out else order[n:]))

    return Source(f"{digest} {'first' if held_out else 'without the first'} {n}", None, rows)


def find_file(spec: DatasetSpec, split: str, data_dirs: Sequence[str]) -> tuple[Path, str]:
    """Return <data_dir>/<location>/<split>.<source> and its SHA-256.

    Of several such files the pinned one; DataError if it is missing.
    """
    name = f"{split}.{spec.source}"
    tried = [Path(folder).expanduser() / spec.location / name for folder in data_dirs]
    pinned = spec.revision.startswith("sha256:")
    pins = dict(part.split("=") for part in spec.revision[7:].split(",")) if pinned else {}
    digests = {}
    for path in filter(Path.is_file, tried):  # later ones are not read: they may be unreadable
        digests[path] = file_sha256(path)
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


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from None


def rows_in(path: Path) -> Iterator[Row]:
    """Yield the rows of a file in one of the forms `spec.dataset.FILES`.

    A .json file holds a list of rows, or an object with one list. Cells of a .csv file are text,
    separated by commas, semicolons or tabs; its first line names the columns.

    Raises:
        DataError: the file has another content than its name says.
    """
    form = path.suffix[1:]
    try:
        if form == "parquet":
            from pyarrow import parquet  # takes a moment to load

            file = parquet.ParquetFile(path)
            once(file.schema_arrow.names)
            lists = (batch.to_pylist() for batch in file.iter_batches())
            for number, row in enumerate(itertools.chain.from_iterable(lists), start=1):
                yield f"{path} row {number}", without_nulls(row, keep=True)
            return
        with path.open(encoding="utf-8-sig", newline="" if form == "csv" else None) as lines:
            if form == "jsonl":
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        try:
                            row = parsed(line)
                        except (ValueError, RecursionError) as error:
                            where = f"{path}:{number}"
                            raise DataError(f"{where}: not a JSON row ({error}).") from None
                        yield f"{path}:{number}", row
            else:
                content: Any = _csv_rows(lines) if form == "csv" else parsed(lines.read())
                if isinstance(content, dict):
                    found = [value for value in content.values() if isinstance(value, list)]
                    content = found[0] if len(found) == 1 else None
                if form == "json" and not isinstance(content, list):
                    raise ValueError("expected a list of rows, or an object with one list")
                for number, row in enumerate(content, start=1):
                    yield f"{path} row {number}", row
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of any type, as of a date beyond the year 9999 in Parquet
        raise DataError(f"{path}: not {form} in UTF-8 ({error}). Correct the file.") from None


def _csv_rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)  # else a text of 131,072 characters is an error
    lines = iter(lines)
    head = next(lines, "")
    rows = csv.DictReader(
        itertools.chain([head], lines), delimiter=max(",;\t", key=head.count), strict=True
    )
    once(rows.fieldnames or ())
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            quote = "as the first line has. Quote texts with a separator"
            raise ValueError(f"row {number}: not {len(rows.fieldnames or ())} cells, {quote}")
        yield row


def without_nulls(given: Any, keep: bool = False) -> Any:
    """Return a value of Arrow without nulls in objects, such as the arguments of a call.

    In Arrow all objects of a column have the same keys: those that one lacks become nulls. `keep`:
    the object is a row, whose columns are kept.
    """
    if isinstance(given, dict):
        return {k: without_nulls(one) for k, one in given.items() if keep or one is not None}
    return [*map(without_nulls, given)] if isinstance(given, list) else given


# ---------------------------------------------------------------- the hub


def of_hub(spec: DatasetSpec, held_out: bool) -> Source:
    """Return the Source of a split, at the commit of the revision. Loads no row yet.

    Raises:
        DataError: the data set is unreachable, or its description lacks the split or a column.
    """
    location, split, builders = _builders(spec, held_out)
    commit = "+".join(dict.fromkeys(builder.hash for builder in builders))
    configs = "+".join(builder.config.name for builder in builders)
    identity = f"{location}/{configs}@{commit}[{split}]"
    if spec.holdout:
        identity += f" {'first' if held_out else 'without the first'} {spec.holdout} shuffled"

    def rows() -> Iterator[Row]:
        import datasets

        for builder in builders:
            _prepare(spec, location, split, builder)
        found = datasets.concatenate_datasets([b.as_dataset(split=split) for b in builders])
        if spec.holdout:
            # mixtures are sorted by source: unshuffled, all held-out rows could be of one source
            found = found.shuffle(seed=0)
            n = spec.holdout
            found = found.select(range(n) if held_out else range(n, len(found)))
        part = spec.test_split if held_out else spec.train_split
        for number, row in enumerate(found):
            yield f"{location}[{part}] row {number}", without_nulls(row, keep=True)

    return Source(identity, commit, rows)


def contents(spec: DatasetSpec) -> tuple[list[str], dict[str, int], str]:
    """Download a data set; return its columns, rows by split, and commit; DataError: it fails."""
    location, _, (builder,) = _builders(spec, False, check=False)
    rows = _prepare(spec, location, "", builder)
    return list(builder.info.features), rows, builder.hash if COMMIT.fullmatch(builder.hash) else ""


def fetch(spec: DatasetSpec) -> int:
    """Download and prepare the rows of both splits; return the number of rows.

    Raises:
        DataError: the download fails, or a split or column is missing.
    """
    rows: dict[tuple[str, str, str], int] = {}
    for held_out in (False, True):
        location, split, builders = _builders(spec, held_out)
        for builder in builders:
            counts = _prepare(spec, location, split, builder)
            rows |= {(location, builder.config.name, s): counts[s] for s in split.split("+")}
    return sum(rows.values())


def _builders(spec: DatasetSpec, held_out: bool, check: bool = True) -> tuple[str, str, list[Any]]:
    """Return location, split (or several joined by '+'), and a builder for each configuration.

    Before the download, a builder may lack a description.
    """
    check_installed("datasets", f"dataset {spec.name!r} of the hub")
    import datasets

    datasets.logging.set_verbosity_error()  # `datasets` warns whenever it reads its cache
    split = spec.test_split if held_out and not spec.holdout else spec.train_split
    location, configs, revision = spec.location, spec.config.split("+"), spec.revision
    if held_out and spec.test_location:
        location, configs, revision = spec.test_location, [""], spec.test_revision
    found = []
    for config in configs if check else [spec.config]:
        try:
            builder = datasets.load_dataset_builder(
                location, config or None, revision=revision or None
            )
        except Exception as error:
            raise DataError(from_hub(f"dataset {spec.name!r}", location, error)) from error
        # Without a network, `datasets` takes the newest folder of its cache, whatever the revision.
        # These folders are named by commits.
        if COMMIT.fullmatch(revision) and builder.hash != revision:
            raise DataError(
                f"dataset {spec.name!r}: {location} is pinned to {revision}, but the hub cannot be "
                f"reached and the cache holds {builder.hash}. Connect once to get the pinned rows."
            )
        if check:
            _check(spec, location, split, builder.info)
        found.append(builder)
    return location, split, found


def _check(spec: DatasetSpec, location: str, split: str, info: Any) -> None:
    """Check columns and splits. Before the download, a description may lack one of them."""
    where, splits = f"{location}[{split}]", split.split("+")
    fields = "format, prompt_field, completion_field or answer_field, or pin another revision"
    for what, wanted, found, remedy in (
        ("column", columns(spec), info.features, fields),
        ("split", splits, info.splits, "train_split and test_split, or holdout=ROWS"),
    ):
        if missing := [name for name in wanted if found and name not in found]:
            raise DataError(
                f"dataset {spec.name!r}: {where} has no {what} {', '.join(missing)}. Found: "
                f"{', '.join(found)}. Set {remedy}."
            )
    if info.splits:
        check_count(spec, where, sum(info.splits[name].num_examples for name in splits))


def _prepare(spec: DatasetSpec, location: str, split: str, builder: Any) -> dict[str, int]:
    """Download the rows, unless they are cached; return the number of rows by split."""
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise DataError(from_hub(f"dataset {spec.name!r}", location, error)) from error
    if split:
        _check(spec, location, split, builder.info)
    return {name: split.num_examples for name, split in builder.info.splits.items()}
