"""Load a data set: find its source, give its training examples by index and its held-out examples.

Needs a tokenizer for text; no torch.
"""

from collections.abc import Sequence
from typing import Any

from lorasweep.data import text
from lorasweep.data.examples import Data, shuffled
from lorasweep.data.synthetic import dialect, facts, skills
from lorasweep.errors import DataError, unknown
from lorasweep.spec.dataset import DatasetSpec


def load(spec: DatasetSpec, data_dirs: Sequence[str], tokenizer: Any = None) -> Data:
    """Load a data set. `tokenizer` is needed for text, and not looked at for synthetic tokens."""
    if spec.source == "synthetic":
        return _generator(spec.location).load(spec)
    if tokenizer is None:
        raise DataError(
            f"dataset {spec.name!r} is text, but the model has no tokenizer. Use a model with one "
            "(source hub, folder or gguf), or a synthetic data set (dialect, skills)."
        )
    train = text.examples(spec, spec.train_split, data_dirs, tokenizer, spec.n_train)
    test = text.examples(spec, spec.test_split, data_dirs, tokenizer, spec.n_test)
    return Data(train=shuffled(spec, train), test=test, n_train=len(train))


def check_available(spec: DatasetSpec, data_dirs: Sequence[str]) -> None:
    """Raise DataError if a data set of local files is not there (saying how to get it) or a row is
    unreadable.

    Needs no tokenizer: whether a row has a token that bears loss is seen when the split is loaded.
    """
    if spec.source == "synthetic":
        _generator(spec.location).check(spec)
    elif spec.source == "jsonl":
        for split in (spec.train_split, spec.test_split):
            text.check_jsonl(spec, split, data_dirs)


def generator_vocab(spec: DatasetSpec) -> int | None:
    """Return the number of symbols of a synthetic data set; None for text."""
    return _generator(spec.location).VOCAB if spec.source == "synthetic" else None


def _generator(name: str) -> Any:
    known = {"dialect": dialect, "facts": facts, "skills": skills}
    if name not in known:
        raise DataError(unknown("synthetic data set", name, known))
    return known[name]
