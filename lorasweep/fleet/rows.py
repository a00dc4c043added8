"""Where a customer's rows are, in which form, and which of them are held out.

Refuses to know models and rates.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.advise.rules.workload import rounded
from lorasweep.data import fields, load, own, sources, text
from lorasweep.data.render import Message
from lorasweep.errors import DataError
from lorasweep.plan.flops import TEXT_FILL
from lorasweep.spec.dataset import DatasetSpec

FEWEST = 20
"""Rows below which none is held out: of fewer, four that choose and four that report would be most
of what there is to learn from. A convention."""
SHARE, LEAST, MOST = 10, 4, 128
"""One row in SHARE chooses the rate, and as many report: at least LEAST, at most MOST."""
Says = tuple[Message, ...]
"""What a row says: its messages, or its prompt and completion."""
LONGEST = 131_072
"""Tokens of a row that are looked at where no max_length is stated: no public row is as long."""


@dataclass(frozen=True)
class Rows:
    """A customer's rows as a data set, and how many there are for what."""

    dataset: DatasetSpec
    n_train: int
    held_out: bool
    """False: too few rows to hold any out, so what is measured is measured on training rows."""
    repeated: int = 0
    """Rows that say the same as one before them, in either file."""


def rows_of(name: str, data: str, form: DatasetSpec) -> Rows:
    """Find a customer's rows and check that each can be read.

    `form`: a data set whose settings say how text is rendered. Rows that are held out come from
    test.jsonl beside train.jsonl, or a split of the hub; without one, from the training rows.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    if own.is_on_hub(data):
        return _of_hub(name, data, form)
    spec, path = own.dataset_of(data, name), Path(data).expanduser()
    folder, split = (path, "train") if path.is_dir() else (path.parent, path.stem)
    if set("=,") & set(split):
        raise DataError(f"{path}: a name without '=' and ',' is expected. Rename the file.")
    spec = dataclasses.replace(
        spec,
        location=str(folder),
        template=form.template,
        render=form.render,
        revision="",
    )
    test = folder / "test.jsonl"
    there = path.is_dir() and test.is_file()
    spec = dataclasses.replace(spec, test_split="test" if there else split)
    says = _says(spec, sources.jsonl_rows(folder / f"{split}.jsonl"))
    tested = _says(spec, sources.jsonl_rows(test)) if there else None
    rows = _held_out(spec, says, tested, str(test))
    files = dict.fromkeys((spec.train_split, spec.test_split))
    pins = [f"{f}={sources.find_jsonl(spec, f, ['.'])[1][:16]}" for f in files]
    pinned = dataclasses.replace(rows.dataset, revision="sha256:" + ",".join(pins))
    return dataclasses.replace(rows, dataset=pinned)


def _of_hub(name: str, data: str, form: DatasetSpec) -> Rows:
    spec = own.on_hub(data, name)
    spec = dataclasses.replace(spec, template=form.template, render=form.render)
    train, test = (source.rows() for source in load.sources_of(spec, []))
    there = spec.test_split != spec.train_split
    tested = _says(spec, test) if there else None
    return _held_out(spec, _says(spec, train), tested, f"{data}[{spec.test_split}]")


def _says(spec: DatasetSpec, rows: Iterable[tuple[str, Any]]) -> list[Says]:
    return [tuple(fields.messages_of(spec, row, where)) for where, row in rows]


def _held_out(
    spec: DatasetSpec, says: Sequence[Says], tested: Sequence[Says] | None, test: str
) -> Rows:
    """Divide rows by what they say: what is held out once is trained on nowhere.

    `tested`: rows of a file or split of their own, `test`; None: there is none.
    """
    distinct = list(dict.fromkeys(says if tested is None else tested))
    changes: dict[str, Any]
    held: set[Says] = set()
    if tested is not None:
        n = len(distinct)
        if n < 2:
            raise DataError(
                f"{test} has {n} rows that differ. Expected at least 2: some choose the rate, "
                "the others report. Add rows, or remove them: training rows are then held out."
            )
        first = min(n // 2, MOST)
        changes = {"n_validation": first, "n_test": n - first}
        held = set(distinct)
    elif len(distinct) < FEWEST:
        changes = {"n_test": len(says)}
    else:
        each = max(LEAST, min(len(distinct) // SHARE, MOST))
        changes = {"holdout": 2 * each, "n_validation": each, "n_test": each}
        held = set(load.held_out(says, 2 * each))
    both = [*says, *(tested or ())]
    repeated = len(both) - len(set(both))
    # few updates on few rows: learning curves that nobody reads would cost as much as the training
    changes |= {"n_test_curve": 0, "unseen_rows": bool(held) and repeated > 0}
    spec = dataclasses.replace(spec, **changes)
    n_train = sum(row not in held for row in says)
    if not n_train:
        raise DataError(
            f"every row of {spec.train_split} stands in {test}, too. Add rows to train on, or "
            "remove the held-out rows."
        )
    return Rows(spec, n_train, spec.n_validation > 0, repeated)


def with_lengths(
    rows: Rows, tokenizer: Any, max_length: int | None, data_dirs: Sequence[str]
) -> tuple[Rows, float]:
    """Tokenize a customer's rows; return them with their max_length, and the mean loss tokens.

    A max_length that is not stated is that of the longest row, and more where the plan's mean of
    text rows (TEXT_FILL) would be below theirs; it cuts no row.

    Raises:
        DataError: a row has no token that bears loss, or none can be used.
    """
    spec = dataclasses.replace(rows.dataset, max_length=max_length or LONGEST)
    train, held_out = load.sources_of(spec, data_dirs)
    found = text.examples(spec, spec.train_split, train, tokenizer, None, "")
    tested = text.examples(spec, spec.test_split, held_out, tokenizer, None, "")
    if not found.n_bytes.any():
        raise DataError(
            f"every answer is empty, in all {len(found)} rows that are trained on. Fill them in."
        )
    lengths = np.diff(np.concatenate([[0], found.ends]))
    if max_length is None:
        longest = max(int(lengths.max()), int(np.diff(np.concatenate([[0], tested.ends])).max()))
        max_length = rounded(max(longest, float(lengths.mean()) / TEXT_FILL))
    spec = dataclasses.replace(spec, max_length=max_length)
    return dataclasses.replace(rows, dataset=spec), float(found.loss.sum()) / len(found)
