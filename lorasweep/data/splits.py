"""Load a data set of any source, in training, validation and test rows. Nothing needs torch."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from lorasweep.data import rewards, sources, tokenizing
from lorasweep.data.examples import Data, fingerprint, prompts_of, shuffled
from lorasweep.data.messages import Conversation, read
from lorasweep.data.sources import Row, Source
from lorasweep.data.synthetic import generators
from lorasweep.errors import DataError
from lorasweep.spec.dataset import FILES, DatasetSpec

OF_A_PROMPT = 8
"""Maximum number of held-out rows per prompt (held_out_by=prompt). More would add little."""
Part = Callable[[Conversation], Hashable]
"""Gives the part of a row, such as its prompt, by which rows are held out or compared."""


def load(
    spec: DatasetSpec,
    data_dirs: Sequence[str],
    tokenizer: Any = None,
    cache: str = "",
    draw: int | None = None,
) -> Data:
    """Load a data set; raise DataError if it is missing or cannot be used.

    Args:
        tokenizer: for text.
        cache: folder for tokenized text; empty: it stays in memory.
        draw: with draw_by_seed, `RunSpec.draw`.
    """
    if spec.source == "synthetic":
        return generators.load(spec, draw)
    if tokenizer is None:
        raise DataError(
            f"dataset {spec.name!r} is text, but the model has no tokenizer. Choose a model with a "
            "tokenizer (source hub, folder or gguf), or a synthetic data set (dialect, skills)."
        )
    source, held_out = sources_of(spec, data_dirs)
    train = tokenizing.examples(spec, spec.train_split, source, tokenizer, spec.n_train, cache)
    first = spec.n_validation
    most = first + spec.n_test
    test = tokenizing.examples(spec, spec.test_split, held_out, tokenizer, most, cache)
    fits = tokenizing.fits_of(train, test)
    if len(test) <= first:
        enough = max(fit[-1] for fit in fits.values())
        raise DataError(
            f"dataset {spec.name!r}: of {len(test)} held-out rows (too_long={spec.too_long}, "
            f"max_length={spec.max_length}) n_validation={first} leave no test row. Set max_length="
            f"{enough}, with which 99% are whole, hold more rows out, or lower n_validation."
        )
    if spec.held_out_by == "prompt" and first:
        # Too-long rows were dropped, so a prompt may have validation and test rows. Move all of
        # its rows to validation.
        prompts = prompts_of(test)
        while first < len(test) - 1 and prompts[first] == prompts[first - 1]:
            first += 1
    return Data(
        train=shuffled(spec, train),
        test=test[first:],
        validation=test[:first],
        n_train=len(train),
        fits=fits,
        sha256=fingerprint(train.sha256, test.sha256),
        commit=source.commit,
        rewards=rewards.of_text(spec, tokenizer) if spec.verifier else None,
    )


def sources_of(spec: DatasetSpec, data_dirs: Sequence[str]) -> tuple[Source, Source]:
    """Find training and held-out rows of text; DataError: they are missing, or not as pinned."""

    def found(spec: DatasetSpec, held_out: bool) -> Source:
        if spec.source == "hub":
            return sources.of_hub(spec, held_out)
        return sources.of_files(spec, held_out, data_dirs)

    def without(train: Source, held_out: Source, part: Part, name: str) -> Source:
        """Leave out training rows that share a part, such as the prompt, with a held-out row."""

        def rows() -> Iterator[Row]:
            seen = {part(read(spec, row, where)) for where, row in held_out.rows()}
            yield from (r for r in train.rows() if part(read(spec, r[1], r[0])) not in seen)

        identity = f"{train.identity} without the {name} of {held_out.identity}"
        return dataclasses.replace(train, identity=identity, rows=rows)

    def whole_of(row: Conversation) -> Hashable:
        return row.whole

    if spec.held_out_by or (spec.unseen_rows and spec.holdout):
        whole = found(dataclasses.replace(spec, holdout=0), False)
        pool = whole if spec.holdout else found(spec, True)
        # what is held out as a whole: rows with one prompt, or rows with the same content
        by_prompt, unit = spec.held_out_by == "prompt", spec.held_out_by or "row"
        unit_of: Part = (lambda row: row.prompt) if by_prompt else whole_of

        def drawn() -> Iterator[Row]:
            given = list(pool.rows())
            known = [read(spec, row, where) for where, row in given]
            groups = divided([unit_of(row) for row in known], [row.whole for row in known])
            order = [k for rows in groups for k in rows]
            yield from (given[k] for k in order[: spec.holdout or None])

        identity = f"{spec.holdout or 'all'} of {pool.identity} by {unit}"
        held_out = dataclasses.replace(pool, identity=identity, rows=drawn)
        # all rows of a test split are held out, also those beyond OF_A_PROMPT
        train = without(whole, held_out if spec.holdout else pool, unit_of, f"{unit}s")
    else:
        train, every = (found(spec, part) for part in (False, True))
        held_out = every
        if spec.unseen_rows:

            def distinct() -> Iterator[Row]:
                first: dict[Hashable, Row] = {}
                for where, row in every.rows():
                    first.setdefault(read(spec, row, where).whole, (where, row))
                yield from first.values()

            identity = f"{every.identity} without repetitions"
            held_out = dataclasses.replace(every, identity=identity, rows=distinct)
            train = without(train, held_out, whole_of, "rows")
    if spec.unseen_prompts:
        train = without(train, held_out, lambda row: row.opening, "prompts")
    return train, held_out


def divided(units: Sequence[Hashable], contents: Sequence[Hashable]) -> list[list[int]]:
    """Return the row numbers of each unit, in a shuffled order of units.

    Duplicates are left out, and a unit has at most OF_A_PROMPT rows.
    """
    first: dict[Hashable, int] = {}
    rows: dict[Hashable, list[int]] = {}
    for k, (unit, content) in enumerate(zip(units, contents, strict=True)):
        if first.setdefault(content, k) == k:
            rows.setdefault(unit, []).append(k)
    found = list(rows.values())
    return [found[k][:OF_A_PROMPT] for k in sources.shuffled(len(found))]


def check_available(spec: DatasetSpec, data_dirs: Sequence[str]) -> None:
    """Raise DataError if a data set is missing or a row is unreadable. Needs no tokenizer.

    Every row of local files is read. On the hub only access, splits and columns are checked.
    """
    if spec.source == "synthetic":
        generators.check(spec)
    elif spec.source in FILES:
        for held_out in (False, True):
            for where, row in sources.of_files(spec, held_out, data_dirs).rows():
                read(spec, row, where)
    else:
        sources_of(spec, data_dirs)
