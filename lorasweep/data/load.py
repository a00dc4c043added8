"""Load a data set: training examples by index, and held-out examples.

Needs a tokenizer for text; needs no torch.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lorasweep.data import fields, hub, rewards, sources, text
from lorasweep.data.examples import Data, shuffled
from lorasweep.data.fingerprint import fingerprint
from lorasweep.data.sources import Row, Source
from lorasweep.data.synthetic import bandit, dialect, facts, skills, words
from lorasweep.errors import DataError, unknown
from lorasweep.spec.dataset import DatasetSpec


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
    if spec.source == "hub":
        train, held_out = (hub.source_of(spec, part) for part in (False, True))
    else:
        train, held_out = (sources.of_jsonl(spec, part, data_dirs) for part in (False, True))
    if not spec.unseen_prompts:
        return train, held_out

    def rows() -> Iterator[Row]:
        seen = {fields.opening(spec, row, where) for where, row in held_out.rows()}
        for where, row in train.rows():
            if fields.opening(spec, row, where) not in seen:
                yield where, row

    identity = f"{train.identity} without the prompts of {held_out.identity}"
    return dataclasses.replace(train, identity=identity, rows=rows), held_out


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
