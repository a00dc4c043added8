"""Split a customer's rows into training, validation and test rows, and choose how to render them.

This module needs the base's tokenizer, but no model and no learning rate.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorasweep.customers.read import LONGEST_EXAMPLE
from lorasweep.customers.rules.workload import rounded
from lorasweep.data import fields, load, own, sources, text
from lorasweep.data.fields import Message
from lorasweep.errors import DataError
from lorasweep.plan.load import TEXT_FILL
from lorasweep.spec.dataset import FIRST_RENDER, DatasetSpec

FEWEST = 20
"""Smallest number of a customer's rows from which some are held out. A convention."""
FEWEST_NAMED, LEAST_NAMED = 40, 20
"""FEWEST, and LEAST (below, but at most a quarter of the rows), for a data set given by name. They
are larger because its rows answer a question; a customer's card only shows a gain."""
SHARE, LEAST, MOST = 10, 4, 128
"""Of SHARE rows, one is a validation and one a test row; there are LEAST to MOST of each kind."""
LEFT = 0.5
"""Smallest share of the rows that a split by prompt may leave for training. A convention."""
PLAIN, CHAT = "{prompt}\n", "{prompt}"
"""The template of a prompt as plain text, and as a user's message."""
SPLITS = BY_PROMPT, BY_ROW = "prompt", "row"
"""Training and held-out rows share no prompt, or (in earlier versions) no row."""
EXAMPLES = 20
"""A card shows the shortest of this many first rows as an example."""


@dataclass(frozen=True)
class Rules:
    """How a fleet reads rows, and which layers it adapts. The fleet's folder keeps the rules."""

    template: str | None = None
    render: str | None = None
    """Fields of DatasetSpec; set both or none. None: the base's chat template, else plain text."""
    mask: str | None = None
    """Field of DatasetSpec. None: loss on the completion, or on a conversation's last answer."""
    split: str = BY_PROMPT
    layers: str = "all"

    def form(self, tokenizer: Any) -> dict[str, Any]:
        """Return the fields of DatasetSpec that determine how text is rendered."""
        if self.render is not None and self.template is not None:
            found: dict[str, Any] = {"render": self.render, "template": self.template}
        elif getattr(tokenizer, "chat_template", None):
            found = {"render": "chat_template", "template": CHAT}
        else:
            found = {"render": FIRST_RENDER, "template": PLAIN}
        return found if self.mask is None else {**found, "mask": self.mask}


class Text(NamedTuple):
    """The text of a row, and its prompt: the messages before the first one in the loss."""

    whole: tuple[Message, ...]
    prompt: tuple[Message, ...]


@dataclass(frozen=True)
class Rows:
    """A customer's rows as a data set, with their counts."""

    dataset: DatasetSpec
    n_train: int
    held_out: bool
    """False: too few rows, so losses are measured on training rows."""
    repeated: int = 0
    """Rows that duplicate an earlier row, in the training or the test file."""
    same_prompt: int = 0
    """Rows with the prompt of an earlier row in either file, but with another answer."""
    left_out: int = 0
    """Training rows left out, because a test file or split has the row or its prompt."""
    end: str = ""
    """The text that ends an answer, such as the end token."""
    example: list[list[Any]] = field(default_factory=list)
    """A rendered row with names in place of texts: [text, whether it is in the loss]."""

    @property
    def shared(self) -> bool:
        """Whether training and held-out rows may share prompts."""
        return self.held_out and self.same_prompt > 0 and self.dataset.held_out_by != BY_PROMPT


def rows_of(name: str, data: str, rules: Rules, tokenizer: Any) -> Rows:
    """Read all rows of a customer and split them. `tokenizer`: the tokenizer of the base.

    Held-out rows come from a test file in the same folder, or from a test split on the hub. Without
    these they are taken from the training rows.

    Raises:
        DataError: there are no rows, or one cannot be read.
    """
    spec = dataclasses.replace(own.dataset_of(data, name), **rules.form(tokenizer))
    test = f"{data}[{spec.test_split}]"
    if spec.source != "hub":
        path = Path(data).expanduser()
        folder, split = (path, spec.test_split) if path.is_dir() else (path.parent, path.stem)
        spec = dataclasses.replace(spec, location=str(folder), test_split=split)
        spec, test = _pinned(spec, "."), str(folder / f"test.{spec.source}")
    rows, tested = _texts(spec, ".", test)
    both = [*rows, *(tested or ())]
    n_unique = len({r.whole for r in both})
    repeated, same_prompt = len(both) - n_unique, n_unique - len({r.prompt for r in both})
    changes: dict[str, Any]
    if tested is None and n_unique < FEWEST:
        changes, n_train = {"n_test": len(rows)}, len(rows)
    elif rules.split == BY_ROW or (tested is None and not same_prompt):
        # split by whole text; if no prompt has two answers, a split by prompt is the same
        texts = [r.whole for r in rows]
        if tested is not None:
            held = {r.whole for r in tested}
            first = min(len(held) // 2, MOST)
            changes = {"n_validation": first, "n_test": len(held) - first}
        else:
            each = _share(len(set(texts)))
            held = {texts[group[0]] for group in load.divided(texts, texts)[: 2 * each]}
            changes = {"holdout": 2 * each, "n_validation": each, "n_test": each}
        changes["unseen_rows"] = repeated > 0
        n_train = sum(row not in held for row in texts)
    else:
        changes, n_train = _by_units(spec, rows, tested)
    if not n_train:
        raise DataError(
            f"every row of {spec.train_split} is also in {test}. Add rows to train on, or remove "
            "the held-out rows."
        )
    # no learning curve: with few rows, evaluations would cost as much as training
    spec = dataclasses.replace(spec, n_test_curve=0, **changes)
    left_out = len(rows) - n_train if tested is not None else 0
    return Rows(spec, n_train, spec.n_validation > 0, repeated, same_prompt, left_out)


def named_rows(given: str, named: Mapping[str, str]) -> tuple[DatasetSpec, str, int]:
    """Describe rows that are asked for by a file, a folder or a name on the hub.

    A test file or split is divided into validation and test rows; without one a tenth of the rows
    each, by prompt. `named`: fields of the data set that the command line sets.

    Returns the data set, the folder in which it is found ('' on the hub; a run's id excludes
    paths), and the number of training rows.

    Raises:
        DataError: there are no such rows, one cannot be read, or there are too few.
    """
    spec, folder = own.dataset_of(given, named=named), ""
    if spec.source != "hub":
        folder = spec.location
        split = spec.test_split if spec.train_split == "train" else spec.train_split
        spec = _pinned(dataclasses.replace(spec, location=".", test_split=split), folder)
    rows, tested = _texts(spec, folder, f"{given}, split {spec.test_split}")
    empty = [k for k, row in enumerate(rows) if not row.whole[-1][1].strip()]
    if empty:
        raise DataError(
            f"{given}: {len(empty)} of {len(rows)} rows have no answer, the first is row "
            f"{empty[0] + 1}. Remove these rows, or name the column of the answers: "
            "dataset.completion_field=NAME."
        )
    n_unique = len({row.whole for row in [*rows, *(tested or ())]})
    if n_unique < FEWEST_NAMED:
        raise DataError(
            f"{given}: {n_unique} unique rows. Expected at least {FEWEST_NAMED}: validation rows "
            "choose a learning rate and test rows measure the gain, and fewer tell neither from "
            "noise. Add rows; action=measure data=FILE and a fleet take fewer."
        )
    changes, n_train = _by_units(spec, rows, tested, LEAST_NAMED)
    if not n_train:
        raise DataError(f"{given}: every training row is held out. Add rows to train on.")
    spec = dataclasses.replace(spec, n_test_curve=changes["n_test"], **changes)
    return spec, folder, n_train


def _pinned(spec: DatasetSpec, folder: str) -> DatasetSpec:
    """Return local rows with the present content of their files as revision."""
    files = dict.fromkeys((spec.train_split, spec.test_split))
    if odd := next((name for name in files if set("=,") & set(name)), None):
        raise DataError(f"{odd!r}: a name without '=' and ',' is expected. Rename the file.")
    spec = dataclasses.replace(spec, revision="")
    pins = [f"{f}={sources.find_file(spec, f, [folder])[1][:16]}" for f in files]
    return dataclasses.replace(spec, revision="sha256:" + ",".join(pins))


def _texts(spec: DatasetSpec, folder: str, test: str) -> tuple[list[Text], list[Text] | None]:
    """Return the training rows, and those of the test split; None if both are one split.

    `test`: the test split, for a message.
    """

    def read(source: sources.Source) -> list[Text]:
        found = []
        for where, row in source.rows():
            whole = tuple(fields.messages_of(spec, row, where))
            # with mask=all every token is learned, so a row has no prompt
            prompt = whole if spec.mask == "all" else fields.prompt_of(spec, row, where)
            found.append(Text(whole, prompt))
        return found

    train, held_out = load.sources_of(spec, [folder])
    rows, tested = read(train), None
    if spec.test_split != spec.train_split:
        tested = read(held_out)
        n_unique = len({r.whole for r in tested})
        if n_unique < 2:
            raise DataError(
                f"{test} has {n_unique} unique rows. Expected at least 2, for validation and for "
                "test. Add rows, or remove them all: training rows are then held out."
            )
    return rows, tested


def _share(units: int, least: int = LEAST) -> int:
    """Return the number of validation rows or prompts; there are as many for the test."""
    return max(min(least, units // 4), min(units // SHARE, MOST))


def _by_units(
    spec: DatasetSpec, rows: Sequence[Text], tested: Sequence[Text] | None, least: int = LEAST
) -> tuple[dict[str, Any], int]:
    """Split rows so that splits share no prompt; if prompts are too few, so that they share no row.

    Prompts are too few if rows share some and fewer than FEWEST are left, or if less than LEFT of
    the rows would remain for training. Returns DatasetSpec fields, and the number of training rows.
    """
    pool = rows if tested is None else tested
    for by in SPLITS if spec.mask != "all" else (BY_ROW,):
        of, units = ([r.prompt if by == BY_PROMPT else r.whole for r in x] for x in (rows, pool))
        groups = load.divided(units, [r.whole for r in pool])
        sizes = [len(group) for group in groups]
        if tested is None:
            each = _share(len(groups), least)
            first = _fitting(sizes[:each])
            last = _fitting(sizes[first : first + each])
            held = {units[k] for group in groups[: first + last] for k in group}
        else:
            first = _fitting(sizes[:-1], min(sum(sizes) // 2, MOST))
            last = _fitting(sizes[first:])
            held = set(units)
        n_validation, n_test = sum(sizes[:first]), sum(sizes[first : first + last])
        n_train = sum(unit not in held for unit in of)
        enough = len(groups) >= FEWEST or len(groups) == len({r.whole for r in pool})
        if enough and n_train >= LEFT * len(rows):
            break
    holdout = n_validation + n_test if tested is None else 0
    sizes_of = {"n_validation": n_validation, "n_test": n_test, "holdout": holdout}
    return {"held_out_by": by, **sizes_of}, n_train


def _fitting(sizes: Sequence[int], most: int = MOST) -> int:
    """Return how many of the first units together have at most `most` rows; at least 1."""
    totals = itertools.accumulate(sizes)
    return max(1, sum(total <= most for total in totals))


def with_lengths(
    rows: Rows, tokenizer: Any, max_length: int | None, data_dirs: Sequence[str]
) -> tuple[Rows, float]:
    """Return a customer's rows with max_length and an example, and the mean loss tokens of a row.

    With max_length None a length is chosen with which no row is cut, and with which the planner's
    mean length, TEXT_FILL x max_length, is not below the mean of these rows.

    Raises:
        DataError: a row has no token that bears loss, or no row can be used.
    """
    spec = dataclasses.replace(rows.dataset, max_length=max_length or LONGEST_EXAMPLE)
    train, held_out = load.sources_of(spec, data_dirs)
    found = text.examples(spec, spec.train_split, train, tokenizer, None, "")
    most = spec.n_validation + spec.n_test
    tested = text.examples(spec, spec.test_split, held_out, tokenizer, most, "")
    if not found.n_bytes.any():
        raise DataError(f"all {len(found)} training rows have an empty answer. Fill them in.")
    if max_length is None:
        lengths, held = (np.diff(part.ends, prepend=0) for part in (found, tested))
        longest = max(lengths.max(), held.max())
        max_length = rounded(max(float(longest), float(lengths.mean()) / TEXT_FILL))
    spec = dataclasses.replace(spec, max_length=max_length)
    # the example: the shortest row, with a placeholder such as {user 1} for each message
    first = list(itertools.islice(train.rows(), EXAMPLES))
    if spec.format in fields.LISTS:
        content = fields.LISTS[spec.format][1]
        where, row = min(first, key=lambda r: len(r[1][spec.format]))
        roles = [role for role, _ in fields.messages_of(spec, row, where)]
        names = [f"{{{role} {roles[: k + 1].count(role)}}}" for k, role in enumerate(roles)]
        turns = zip(row[spec.format], names, strict=True)
        row = {spec.format: [{**turn, content: name} for turn, name in turns]}
    else:
        where, names = first[0][0], ["{prompt}", "{completion}"]
        row = {spec.prompt_field: names[0], spec.completion_field: names[1]}
    example = text.rendered(spec, row, where, tokenizer)
    answer = next((piece for piece, in_loss in reversed(example) if in_loss), "")
    last = max(names, key=lambda name: answer.rfind(name))
    end = answer.rpartition(last)[2] if last in answer else ""
    rows = dataclasses.replace(rows, dataset=spec, end=end, example=example)
    return rows, float(found.loss.sum()) / len(found)
