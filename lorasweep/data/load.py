"""Load a data set: training examples by index, and held-out examples.

Needs a tokenizer for text; needs no torch.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from lorasweep.data import fields, hub, rewards, sources, text
from lorasweep.data.examples import Data, prompts_of, shuffled
from lorasweep.data.fingerprint import fingerprint
from lorasweep.data.sources import Row, Source
from lorasweep.data.synthetic import bandit, dialect, facts, skills, words
from lorasweep.errors import DataError, unknown
from lorasweep.spec.dataset import DatasetSpec

T = TypeVar("T")
OF_A_PROMPT = 8
"""Held-out rows of one prompt that are evaluated, with held_out_by=prompt: further answers to the
same prompt say little more of what was learned."""


def load(
    spec: DatasetSpec,
    data_dirs: Sequence[str],
    tokenizer: Any = None,
    cache: str = "",
    draw: int | None = None,
) -> Data:
    """Load a data set. `tokenizer` is needed for text only.

    `cache`: folder in which text is kept once it is tokenized; empty: it is kept in memory.
    `draw`: with draw_by_seed the number of the draw, which is the run's seed.

    Raises:
        DataError: the data set is missing or cannot be used.
    """
    if spec.source == "synthetic":
        more = {} if draw is None else {"draw": draw}
        return _generator(spec.location).load(spec, **more)
    if tokenizer is None:
        raise DataError(
            f"dataset {spec.name!r} is text, but the model has no tokenizer. Choose a model with a "
            "tokenizer (source hub, folder or gguf), or a synthetic data set (dialect, skills)."
        )
    source, held_out = sources_of(spec, data_dirs)
    train = text.examples(spec, spec.train_split, source, tokenizer, spec.n_train, cache)
    first = spec.n_validation
    test = text.examples(spec, spec.test_split, held_out, tokenizer, first + spec.n_test, cache)
    if len(test) <= first:
        raise DataError(
            f"dataset {spec.name!r}: {len(test)} held-out rows can be used (too_long="
            f"{spec.too_long}, max_length={spec.max_length}), and n_validation={first} of them "
            "choose between runs, so none is left to test on. Hold more rows out, or set a smaller "
            "n_validation."
        )
    if spec.held_out_by == "prompt" and first:  # rows that were too long may have moved the border
        prompts = prompts_of(test)
        while first < len(test) - 1 and prompts[first] == prompts[first - 1]:
            first += 1
    return Data(
        train=shuffled(spec, train),
        test=test[first:],
        validation=test[:first],
        n_train=len(train),
        sha256=fingerprint(train.sha256, test.sha256),
        commit=source.commit,
        rewards=rewards.of_text(spec, tokenizer) if spec.verifier else None,
    )


def sources_of(spec: DatasetSpec, data_dirs: Sequence[str]) -> tuple[Source, Source]:
    """Find the rows of a text data set that are trained on, and the held-out ones.

    Raises:
        DataError: they are missing, or not the pinned ones.
    """
    if spec.held_out_by:
        return _divided(spec, data_dirs)
    if spec.unseen_rows and spec.holdout:
        whole = _found(dataclasses.replace(spec, holdout=0), False, data_dirs)
        train, held_out = (
            dataclasses.replace(
                whole,
                identity=f"{whole.identity} {what} {spec.holdout} that differ",
                rows=partial(_apart, spec, whole, first),
            )
            for first, what in ((False, "without the first"), (True, "first"))
        )
    else:
        train, held_out = (_found(spec, part, data_dirs) for part in (False, True))
    if spec.unseen_rows and not spec.holdout:
        held_out = dataclasses.replace(
            held_out,
            identity=f"{held_out.identity} without repetitions",
            rows=partial(_once, spec, held_out),
        )
        train = _without(spec, train, held_out, fields.messages_of, "rows")
    if spec.unseen_prompts:
        train = _without(spec, train, held_out, fields.opening, "prompts")
    return train, held_out


def _found(spec: DatasetSpec, part: bool, data_dirs: Sequence[str]) -> Source:
    if spec.source == "hub":
        return hub.source_of(spec, part)
    return sources.of_jsonl(spec, part, data_dirs)


def _divided(spec: DatasetSpec, data_dirs: Sequence[str]) -> tuple[Source, Source]:
    """Find rows that are held out in a shuffled order, and training rows that share no unit."""
    whole = _found(dataclasses.replace(spec, holdout=0), False, data_dirs)
    pool = whole if spec.holdout else _found(spec, True, data_dirs)

    def tested() -> tuple[list[Row], list[Hashable]]:
        given = list(pool.rows())
        units = [unit_of(spec, row, where) for where, row in given]
        says = [tuple(fields.messages_of(spec, row, where)) for where, row in given]
        order = [k for rows in divided(units, says) for k in rows][: spec.holdout or None]
        held = [units[k] for k in order] if spec.holdout else units
        return [given[k] for k in order], held

    def trained() -> Iterator[Row]:
        held = set(tested()[1])
        for where, row in whole.rows():
            if unit_of(spec, row, where) not in held:
                yield where, row

    part = f"{spec.holdout or 'all'} of {pool.identity} by {spec.held_out_by}"
    return (
        dataclasses.replace(whole, identity=f"{whole.identity} without {part}", rows=trained),
        dataclasses.replace(pool, identity=part, rows=lambda: iter(tested()[0])),
    )


def unit_of(spec: DatasetSpec, row: Any, where: str) -> Hashable:
    """Return what rows have in common that are never on both sides, with held_out_by.

    Raises:
        DataError: the row has not the columns of the format; the message names file and line.
    """
    if spec.held_out_by == "prompt":
        return fields.prompt_of(spec, row, where)
    return tuple(fields.messages_of(spec, row, where))


def divided(units: Sequence[Hashable], says: Sequence[Hashable]) -> list[list[int]]:
    """Return the rows that may be held out, unit by unit, in the order in which units are.

    Of rows that say the same the first one counts, and of a unit at most OF_A_PROMPT rows.
    """
    rows: dict[Hashable, list[int]] = {}
    first = {said: k for k, said in reversed(list(enumerate(says)))}
    for k, (unit, said) in enumerate(zip(units, says, strict=True)):
        if first[said] == k:
            rows.setdefault(unit, []).append(k)
    found = list(rows.values())
    return [found[k][:OF_A_PROMPT] for k in sources.holdout_order(len(found))]


def held_out(says: Sequence[T], n: int) -> list[T]:
    """Return which `n` rows are held out by what they say, drawn from those that differ."""
    distinct = list(dict.fromkeys(says))
    return [distinct[k] for k in sources.holdout_order(len(distinct))[:n]]


def _apart(spec: DatasetSpec, source: Source, first: bool) -> Iterator[Row]:
    """Yield the rows that are held out, each once, or all that say nothing of what these say."""
    given = list(source.rows())
    says = [tuple(fields.messages_of(spec, row, where)) for where, row in given]
    held = held_out(says, spec.holdout)
    if first:
        at = {said: k for k, said in reversed(list(enumerate(says)))}
        yield from (given[at[said]] for said in held)
    else:
        seen = set(held)
        yield from (row for row, said in zip(given, says) if said not in seen)


def _once(spec: DatasetSpec, source: Source) -> Iterator[Row]:
    """Yield rows but those that say the same as one before."""
    seen = set()
    for where, row in source.rows():
        says = tuple(fields.messages_of(spec, row, where))
        if says not in seen:
            seen.add(says)
            yield where, row


def _without(
    spec: DatasetSpec, train: Source, held_out: Source, part: Callable[..., Any], name: str
) -> Source:
    """Leave out training rows of which a part, such as the prompt, is that of a held-out one."""

    def rows() -> Iterator[Row]:
        seen = {tuple(part(spec, row, where)) for where, row in held_out.rows()}
        for where, row in train.rows():
            if tuple(part(spec, row, where)) not in seen:
                yield where, row

    identity = f"{train.identity} without the {name} of {held_out.identity}"
    return dataclasses.replace(train, identity=identity, rows=rows)


def check_available(spec: DatasetSpec, data_dirs: Sequence[str]) -> None:
    """Check that a data set is there, and that its rows can be read.

    Of local files every row is read. On the hub, access, splits and columns are looked up; rows are
    not fetched. Needs no tokenizer. Whether each row has a loss token is checked when the split is
    loaded.

    Raises:
        DataError: files are missing (the message tells how to get them) or a row is unreadable.
    """
    if spec.source == "synthetic":
        _generator(spec.location).check(spec)
    elif spec.source == "jsonl":
        held_out = spec.train_split if spec.holdout else spec.test_split
        for split in dict.fromkeys((spec.train_split, held_out)):
            text.check_jsonl(spec, split, data_dirs)
    else:
        sources_of(spec, data_dirs)


def generator_vocab(spec: DatasetSpec) -> int | None:
    """Return the number of symbols of a synthetic data set; None for text."""
    return _generator(spec.location).VOCAB if spec.source == "synthetic" else None


def _generator(name: str) -> Any:
    known = {m.__name__.rpartition(".")[2]: m for m in (bandit, dialect, facts, skills, words)}
    if name not in known:
        raise DataError(unknown("synthetic data set", name, known))
    return known[name]
