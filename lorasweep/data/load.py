"""Load a data set of any source. Text needs a tokenizer; nothing needs torch."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

from lorasweep.data import fields, hub, rewards, sources, text
from lorasweep.data.examples import Data, fingerprint, prompts_of, shuffled
from lorasweep.data.sources import Row, Source
from lorasweep.data.synthetic.generators import generator
from lorasweep.errors import DataError
from lorasweep.spec.dataset import FILES, DatasetSpec

OF_A_PROMPT = 8
"""Maximum number of held-out rows per prompt (held_out_by=prompt). More would add little."""


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
        more = {} if draw is None else {"draw": draw}
        return generator(spec.location).load(spec, **more)
    if tokenizer is None:
        raise DataError(
            f"dataset {spec.name!r} is text, but the model has no tokenizer. Choose a model with a "
            "tokenizer (source hub, folder or gguf), or a synthetic data set (dialect, skills)."
        )
    source, held_out = sources_of(spec, data_dirs)
    train = text.examples(spec, spec.train_split, source, tokenizer, spec.n_train, cache)
    first = spec.n_validation
    test = text.examples(spec, spec.test_split, held_out, tokenizer, first + spec.n_test, cache)
    fits = text.fits_of(train, test)
    if len(test) <= first:
        enough = max(fit[-1] for fit in fits.values())
        raise DataError(
            f"dataset {spec.name!r}: {len(test)} held-out rows can be used (too_long="
            f"{spec.too_long}, max_length={spec.max_length}), and n_validation={first} of them "
            f"are validation rows, so no test row is left. With max_length={enough} 99% are whole. "
            "Set it, hold more rows out, or set a smaller n_validation."
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
    if spec.held_out_by or (spec.unseen_rows and spec.holdout):
        whole = _found(dataclasses.replace(spec, holdout=0), False, data_dirs)
        pool = whole if spec.holdout else _found(spec, True, data_dirs)
        # what is held out as a whole: rows with one prompt, or rows with the same content
        unit_of = fields.prompt_of if spec.held_out_by == "prompt" else fields.whole_of

        def drawn() -> Iterator[Row]:
            given = list(pool.rows())
            units = [unit_of(spec, row, where) for where, row in given]
            contents = [fields.whole_of(spec, row, where) for where, row in given]
            order = [k for rows in divided(units, contents) for k in rows]
            yield from (given[k] for k in order[: spec.holdout or None])

        unit = spec.held_out_by or "row"
        identity = f"{spec.holdout or 'all'} of {pool.identity} by {unit}"
        held_out = dataclasses.replace(pool, identity=identity, rows=drawn)
        # all rows of a test split are held out, also those beyond OF_A_PROMPT
        unseen = held_out if spec.holdout else pool
        train = _without(spec, whole, unseen, unit_of, f"{unit}s")
    else:
        train, held_out = (_found(spec, part, data_dirs) for part in (False, True))
        if spec.unseen_rows:
            identity = f"{held_out.identity} without repetitions"
            rows = partial(_distinct, spec, held_out.rows)
            held_out = dataclasses.replace(held_out, identity=identity, rows=rows)
            train = _without(spec, train, held_out, fields.whole_of, "rows")
    if spec.unseen_prompts:
        train = _without(spec, train, held_out, fields.opening, "prompts")
    return train, held_out


def _found(spec: DatasetSpec, held_out: bool, data_dirs: Sequence[str]) -> Source:
    if spec.source == "hub":
        return hub.source_of(spec, held_out)
    return sources.of_files(spec, held_out, data_dirs)


def divided(units: Sequence[Hashable], contents: Sequence[Hashable]) -> list[list[int]]:
    """Return the row numbers of each unit, in a shuffled order of units.

    Duplicates are left out, and a unit has at most OF_A_PROMPT rows.
    """
    rows: dict[Hashable, list[int]] = {}
    first = {content: k for k, content in reversed(list(enumerate(contents)))}
    for k, (unit, content) in enumerate(zip(units, contents, strict=True)):
        if first[content] == k:
            rows.setdefault(unit, []).append(k)
    found = list(rows.values())
    return [found[k][:OF_A_PROMPT] for k in sources.holdout_order(len(found))]


def _distinct(spec: DatasetSpec, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    seen = set()
    for where, row in rows():
        content = fields.whole_of(spec, row, where)
        if content not in seen:
            seen.add(content)
            yield where, row


def _without(
    spec: DatasetSpec, train: Source, held_out: Source, part: Callable[..., Any], name: str
) -> Source:
    """Leave out training rows that share a part, such as the prompt, with a held-out row."""

    def rows() -> Iterator[Row]:
        seen = {part(spec, row, where) for where, row in held_out.rows()}
        yield from (r for r in train.rows() if part(spec, r[1], r[0]) not in seen)

    identity = f"{train.identity} without the {name} of {held_out.identity}"
    return dataclasses.replace(train, identity=identity, rows=rows)


def check_available(spec: DatasetSpec, data_dirs: Sequence[str]) -> None:
    """Raise DataError if a data set is missing or a row is unreadable. Needs no tokenizer.

    Every row of local files is read. On the hub only access, splits and columns are checked.
    """
    if spec.source == "synthetic":
        generator(spec.location).check(spec)
    elif spec.source in FILES:
        for held_out in (False, True):
            for where, row in sources.of_files(spec, held_out, data_dirs).rows():
                fields.whole_of(spec, row, where)
    else:
        sources_of(spec, data_dirs)


def generator_vocab(spec: DatasetSpec) -> int | None:
    """Return the number of symbols of a synthetic data set; None for text."""
    return generator(spec.location).vocab if spec.source == "synthetic" else None
