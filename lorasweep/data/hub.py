"""Rows of data sets of the Hugging Face hub; splits and columns are checked before rows load."""

from collections.abc import Iterator
from typing import Any

from lorasweep.data.messages import columns
from lorasweep.data.sources import Row, Source, check_count, without_nulls
from lorasweep.errors import DataError, check_installed, from_hub
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.run import COMMIT


def source_of(spec: DatasetSpec, held_out: bool) -> Source:
    """Return the Source of a split, at the commit of the revision. Loads no row yet.

    Raises:
        DataError: the data set is unreachable, or its description lacks the split or a column.
    """
    split, location, configs, _ = place = _place(spec, held_out)
    builders = _builders(spec, place)
    commit = "+".join(dict.fromkeys(builder.hash for builder in builders))
    identity = f"{location}/{'+'.join(configs)}@{commit}[{split}]"
    if spec.holdout:
        identity += f" {'first' if held_out else 'without the first'} {spec.holdout} shuffled"

    def rows() -> Iterator[Row]:
        import datasets

        for builder in builders:
            _prepare(spec, place, builder)
        found = datasets.concatenate_datasets([b.as_dataset(split=split) for b in builders])
        if spec.holdout:
            # mixtures are sorted by source: unshuffled, all held-out rows could be of one source
            found = found.shuffle(seed=0)
            n = spec.holdout
            found = found.select(range(n) if held_out else range(n, len(found)))
        part = spec.test_split if held_out else spec.train_split
        for number, row in enumerate(found):
            where = f"{location}[{part}] row {number}"
            yield where, {column: without_nulls(given) for column, given in row.items()}

    return Source(identity, commit, rows)


def contents(spec: DatasetSpec) -> tuple[list[str], dict[str, int], str]:
    """Download a data set; return its columns, rows by split, and commit; DataError: it fails."""
    place = _place(spec, False)
    (builder,) = _builders(spec, place, check=False)
    rows = _prepare(spec, place, builder, check=False)
    return list(builder.info.features), rows, builder.hash if COMMIT.fullmatch(builder.hash) else ""


def fetch(spec: DatasetSpec) -> int:
    """Download and prepare the rows of both splits; return the number of rows.

    Raises:
        DataError: the download fails, or a split or column is missing.
    """
    rows: dict[tuple[str, ...], int] = {}
    for place in (_place(spec, held_out) for held_out in (False, True)):
        for config, builder in zip(place[2], _builders(spec, place)):
            counts = _prepare(spec, place, builder)
            rows |= {(place[1], config, name): counts[name] for name in place[0].split("+")}
    return sum(rows.values())


Place = tuple[str, str, tuple[str, ...], str]
"""Split (or several joined by '+'), location, configurations and revision."""


def _place(spec: DatasetSpec, held_out: bool) -> Place:
    split = spec.test_split if held_out and not spec.holdout else spec.train_split
    if held_out and spec.test_location:
        return split, spec.test_location, ("",), spec.test_revision
    return split, spec.location, tuple(spec.config.split("+")), spec.revision


def _builders(spec: DatasetSpec, place: Place, check: bool = True) -> list[Any]:
    """Return a builder for each configuration; without a download it may lack a description."""
    check_installed("datasets", f"dataset {spec.name!r} of the hub")
    import datasets

    datasets.logging.set_verbosity_error()  # `datasets` warns whenever it reads its cache
    _, location, configs, revision = place
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
            _check(spec, place, builder.info)
        found.append(builder)
    return found


def _check(spec: DatasetSpec, place: Place, info: Any) -> None:
    """Check columns and splits. Before the download, a description may lack one of them."""
    where, splits = f"{place[1]}[{place[0]}]", place[0].split("+")
    for what, wanted, found, remedy in (
        (
            "column",
            columns(spec),
            info.features,
            "format, prompt_field, completion_field or answer_field, or pin a revision with these",
        ),
        ("split", splits, info.splits, "train_split and test_split, or holdout=ROWS"),
    ):
        if missing := [name for name in wanted if found and name not in found]:
            raise DataError(
                f"dataset {spec.name!r}: {where} has no {what} {', '.join(missing)}. Found: "
                f"{', '.join(found)}. Set {remedy}."
            )
    if info.splits:
        check_count(spec, where, sum(info.splits[name].num_examples for name in splits))


def _prepare(spec: DatasetSpec, place: Place, builder: Any, check: bool = True) -> dict[str, int]:
    """Download the rows, unless they are cached; return the number of rows by split."""
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise DataError(from_hub(f"dataset {spec.name!r}", place[1], error)) from error
    if check:
        _check(spec, place, builder.info)
    return {name: split.num_examples for name, split in builder.info.splits.items()}
