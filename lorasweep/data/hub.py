"""Rows of data sets of the Hugging Face hub; splits and columns are checked before rows load."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from lorasweep.data.fields import columns
from lorasweep.data.sources import Row, Source, without_nulls
from lorasweep.errors import DataError, check_installed
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.run import is_commit


class _Place(NamedTuple):
    """Where the rows of a split are."""

    location: str
    configs: tuple[str, ...]
    revision: str
    split: str
    """Split of the hub, or several joined by '+'."""

    @property
    def splits(self) -> list[str]:
        return self.split.split("+")


def _place(spec: DatasetSpec, held_out: bool) -> _Place:
    split = spec.test_split if held_out and not spec.holdout else spec.train_split
    if held_out and spec.test_location:
        return _Place(spec.test_location, ("",), spec.test_revision, split)
    return _Place(spec.location, tuple(spec.config.split("+")), spec.revision, split)


def source_of(spec: DatasetSpec, held_out: bool) -> Source:
    """Return the Source of a split, at the commit of the revision. Loads no row yet.

    Raises:
        DataError: the data set is unreachable, or its description lacks the split or a column.
    """
    place = _place(spec, held_out)
    builders = [_builder(spec, place, config) for config in place.configs]
    for builder in builders:
        _check(spec, place, builder.info)
    commit = "+".join(dict.fromkeys(builder.hash for builder in builders))
    identity = f"{place.location}/{'+'.join(place.configs)}@{commit}[{place.split}]"
    if spec.holdout:
        identity += f" {'first' if held_out else 'without the first'} {spec.holdout} shuffled"

    def rows() -> Iterator[Row]:
        import datasets

        for builder in builders:
            _prepare(spec, place, builder)
            _check(spec, place, builder.info)
        parts = [builder.as_dataset(split=place.split) for builder in builders]
        found = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        if spec.holdout:
            # mixtures are sorted by source: unshuffled, all held-out rows could be of one source
            found = found.shuffle(seed=0)
            n = spec.holdout
            found = found.select(range(n) if held_out else range(n, len(found)))
        part = spec.test_split if held_out else spec.train_split
        for number, row in enumerate(found):
            where = f"{place.location}[{part}] row {number}"
            yield where, {column: without_nulls(given) for column, given in row.items()}

    return Source(identity, commit, rows)


def contents(spec: DatasetSpec) -> tuple[list[str], dict[str, int], str]:
    """Download a data set; return its columns, rows by split, and commit; DataError: it fails."""
    place = _place(spec, False)
    builder = _builder(spec, place, spec.config)
    rows = _prepare(spec, place, builder)
    return list(builder.info.features), rows, builder.hash if is_commit(builder.hash) else ""


def fetch(spec: DatasetSpec) -> int:
    """Download and prepare the rows of both splits; return the number of rows.

    Raises:
        DataError: the download fails, or a split or column is missing.
    """
    rows: dict[tuple[str, ...], int] = {}
    for place in (_place(spec, held_out) for held_out in (False, True)):
        for config in place.configs:
            builder = _builder(spec, place, config)
            _check(spec, place, builder.info)
            splits = _prepare(spec, place, builder)
            _check(spec, place, builder.info)
            rows |= {(place.location, config, name): splits[name] for name in place.splits}
    return sum(rows.values())


def _builder(spec: DatasetSpec, place: _Place, config: str) -> Any:
    check_installed("datasets", f"dataset {spec.name!r} of the hub")
    import datasets

    datasets.logging.set_verbosity_error()  # `datasets` warns whenever it reads its cache
    try:
        builder = datasets.load_dataset_builder(
            place.location, config or None, revision=place.revision or None
        )
    except Exception as error:
        raise _unavailable(spec, place, error) from error
    # Without a network, `datasets` takes the newest folder of its cache, whatever the revision.
    # These folders are named by commits.
    if is_commit(place.revision) and builder.hash != place.revision:
        raise DataError(
            f"dataset {spec.name!r}: {place.location} is pinned to {place.revision}, but the hub "
            f"cannot be reached and the cache holds {builder.hash}. Connect to the hub once to get "
            "the pinned rows."
        )
    return builder


def _check(spec: DatasetSpec, place: _Place, info: Any) -> None:
    """Check columns and splits. Before the download, a description may lack one of them."""
    where = f"dataset {spec.name!r}: {place.location}"
    wanted, found = columns(spec), info.features
    missing = [name for name in wanted if found is not None and name not in found]
    if missing:
        raise DataError(
            f"{where}[{place.split}] has no column {', '.join(missing)}. Found: "
            f"{', '.join(found)}. Expected (format={spec.format}): {', '.join(wanted)}. Set "
            "format, prompt_field, completion_field or answer_field to existing columns, or pin a "
            "revision that has these columns."
        )
    if not info.splits:
        return
    absent = [name for name in place.splits if name not in info.splits]
    if absent:
        raise DataError(
            f"{where} has no split {absent[0]!r}. Found: {', '.join(info.splits)}. Set train_split "
            "and test_split to these, or holdout=ROWS to hold rows of the training split out."
        )
    rows = sum(info.splits[name].num_examples for name in place.splits)
    if not rows:
        raise DataError(f"{where}[{place.split}] has no rows. Name a split that has some.")
    if rows <= spec.holdout:
        raise DataError(
            f"{where}[{place.split}] has {rows} rows, expected more than {spec.holdout} "
            "(holdout). Name a split with more rows, or hold fewer out."
        )


def _prepare(spec: DatasetSpec, place: _Place, builder: Any) -> dict[str, int]:
    """Download the rows, unless they are cached; return the number of rows by split."""
    try:
        builder.download_and_prepare()
        return {name: split.num_examples for name, split in builder.info.splits.items()}
    except Exception as error:
        raise _unavailable(spec, place, error) from error


def _unavailable(spec: DatasetSpec, place: _Place, error: Exception) -> DataError:
    import datasets
    from huggingface_hub import get_token

    said = " ".join(str(error).split())
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        who = "this account has no access to it" if get_token() else "no one is logged in"
        remedy = (
            f"It does not exist, or {who}. Correct location and revision, or accept the terms at "
            f"https://huggingface.co/datasets/{place.location} and log in with `hf auth login` (or "
            "set HF_TOKEN)."
        )
    elif isinstance(error, ValueError):
        remedy = "Set location, config and revision to existing ones."
    else:
        remedy = (
            "Check the network; for machines without one, give the same command with action=fetch "
            "where the hub can be reached; or use local files: a dataset with source=jsonl."
        )
    return DataError(
        f"dataset {spec.name!r}: cannot load {place.location!r} from the hub "
        f"({type(error).__name__}: {said}). {remedy}"
    )
