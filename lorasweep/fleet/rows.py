"""Where a customer's rows are, in which form, and which of them are held out.

Refuses to know models and rates.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.advise.rules.workload import rounded
from lorasweep.data import fields, load, own, sources, text
from lorasweep.errors import DataError
from lorasweep.plan.flops import TEXT_FILL
from lorasweep.spec.dataset import DatasetSpec

FEWEST = 20
"""Rows below which none is held out: of fewer, four that choose and four that report would be most
of what there is to learn from. A convention."""
SHARE, LEAST, MOST = 10, 4, 128
"""One row in SHARE chooses the rate, and as many report: at least LEAST, at most MOST."""
LONGEST = 131_072
"""Tokens of a row that are looked at where no max_length is stated: no public row is as long."""


@dataclass(frozen=True)
class Rows:
    """A customer's rows as a data set, and how many there are for what."""

    dataset: DatasetSpec
    n_train: int
    held_out: bool
    """False: too few rows to hold any out, so what is measured is measured on training rows."""


def rows_of(name: str, data: str, form: DatasetSpec) -> Rows:
    """Find a customer's rows and check that each can be read.

    `form`: a data set whose settings say how text is rendered. Rows that are held out come from
    test.jsonl beside train.jsonl; without one, from the training rows.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    spec, path = own.dataset_of(data, name), Path(data).expanduser()
    folder, split = (path, "train") if path.is_dir() else (path.parent, path.stem)
    if set("=,") & set(split):
        raise DataError(f"{path}: a name without '=' and ',' is expected. Rename the file.")
    spec = dataclasses.replace(
        spec,
        location=str(folder),
        test_split=split,
        template=form.template,
        render=form.render,
        revision="",
    )
    given = list(sources.jsonl_rows(folder / f"{split}.jsonl"))
    tested = path.is_dir() and (folder / "test.jsonl").is_file()
    for where, row in [*given, *(sources.jsonl_rows(folder / "test.jsonl") if tested else ())]:
        fields.messages_of(spec, row, where)
    return _held_out(spec, len(given), folder if tested else None)


def _held_out(spec: DatasetSpec, n_rows: int, folder: Path | None) -> Rows:
    """Divide the rows; `folder`: where a test.jsonl is."""
    files = [spec.train_split]
    changes: dict[str, Any]
    n_train = n_rows
    if folder is not None:
        n = sum(1 for _ in sources.jsonl_rows(folder / "test.jsonl"))
        if n < 2:
            raise DataError(
                f"{folder / 'test.jsonl'} has {n} rows. Expected at least 2: some choose the rate, "
                "the others report. Add rows, or remove the file: training rows are then held out."
            )
        files.append("test")
        first = min(n // 2, MOST)
        changes = {"test_split": "test", "n_validation": first, "n_test": n - first}
    elif n_rows < FEWEST:
        changes = {"n_test": n_rows}
    else:
        each = max(LEAST, min(n_rows // SHARE, MOST))
        changes = {"holdout": 2 * each, "n_validation": each, "n_test": each}
        n_train -= 2 * each
    # few updates on few rows: learning curves that nobody reads would cost as much as the training
    spec = dataclasses.replace(spec, **changes, n_test_curve=0)
    pins = [f"{f}={sources.find_jsonl(spec, f, ['.'])[1][:16]}" for f in dict.fromkeys(files)]
    spec = dataclasses.replace(spec, revision="sha256:" + ",".join(pins))
    return Rows(spec, n_train, spec.n_validation > 0)


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
    lengths = np.diff(np.concatenate([[0], found.ends]))
    if max_length is None:
        longest = max(int(lengths.max()), int(np.diff(np.concatenate([[0], tested.ends])).max()))
        max_length = rounded(max(longest, float(lengths.mean()) / TEXT_FILL))
    spec = dataclasses.replace(spec, max_length=max_length)
    return dataclasses.replace(rows, dataset=spec), float(found.loss.sum()) / len(found)
