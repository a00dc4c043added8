"""Split a customer's rows into training, validation and test rows, and choose how to render them.

This module needs the base's tokenizer, but no model and no learning rate.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.advise.read import LONGEST, RowError
from lorasweep.advise.rules import rounded
from lorasweep.data import column_names, messages, sources, splits, tokenizing
from lorasweep.data.messages import Message
from lorasweep.errors import DataError
from lorasweep.plan.needs import TEXT_FILL
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
EXAMPLES = 20
"""A card shows the shortest of this many first rows as an example."""
Text = tuple[tuple[Message, ...], tuple[Message, ...]]
"""The text of a row, and its prompt: the messages before the first one in the loss."""


@dataclass(frozen=True)
class Rules:
    """How a fleet reads rows, and what it adapts for which server. Its folder keeps the rules."""

    template: str | None = None
    render: str | None = None
    """Fields of DatasetSpec; set both or none. None: the base's chat template, else plain text."""
    mask: str | None = None
    """Field of DatasetSpec. None: loss on the completion, on `answers` of messages, or on the last
    answer of conversations."""
    layers: str = "all"
    counted_layers: str = "all"
    """Layers whose parameters the adviser counted to choose ranks. New fleets: LAYERS of
    lorasweep/spec/recommended.py, for both fields, unless method.layers is given."""
    answers: str = "last"
    """Answers of messages in the loss if there is no mask: all or last. New fleets: all."""
    serve: str = "peft"
    """Name of the serving profile."""
    whole_prompt: bool = False
    """Fields whole_prompt and bos of DatasetSpec, without a chat template. New fleets: true."""

    def form(self, format: str, tokenizer: Any) -> dict[str, Any]:
        """Return the fields of DatasetSpec that determine how text is rendered and learned."""
        chat = "chat_template" if getattr(tokenizer, "chat_template", None) else FIRST_RENDER
        found = column_names.as_served(format, self.render or chat)
        if self.template is not None:
            found["template"] = self.template
        found["whole_prompt"] &= self.whole_prompt
        found["bos"] &= self.whole_prompt and bool(
            tokenizing.bos_of(DatasetSpec(bos=True), tokenizer)
        )
        if self.mask is not None or (self.answers == "last" and format == "messages"):
            found["mask"] = self.mask or "last_assistant"
        return found


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
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The example as a client sends it to a server."""
    stop: dict[str, list[Any]] = field(default_factory=dict)
    """What a request needs for generation to end with an answer; empty: the end token ends it."""
    warning: str = ""
    """What max_length does to training rows, if it is much."""


def rows_of(
    name: str,
    data: str,
    rules: Rules,
    tokenizer: Any,
    validation: str | None = None,
    max_length: int | None = None,
) -> tuple[Rows, float]:
    """Read and split a customer's rows; also return the mean loss tokens of a training row.

    Held-out rows come from the file `validation`, from a test file in the folder `data`, or from a
    test split on the hub. Without these they are taken from the training rows. With max_length None
    a length is chosen with which no row is cut, and with which the planner's mean length, TEXT_FILL
    x max_length, is not below the mean of these rows.

    Raises:
        DataError: there are no rows, one cannot be read or has no token that bears loss, max_length
            leaves out or cuts over half of the rows, or servers could not render the first EXAMPLES
            rows in the form of training.
        RowError: the file `validation` is not beside the training rows.
    """
    spec = column_names.dataset_of(data, name)
    spec = dataclasses.replace(spec, **rules.form(spec.format, tokenizer))
    if spec.source != "hub":
        path = Path(data).expanduser()
        folder, split = (path, spec.test_split) if path.is_dir() else (path.parent, path.stem)
        if validation is not None:
            train, held = column_names.path_of(data), Path(validation).expanduser().absolute()
            apart = held == train or held.resolve().parent != train.resolve().parent
            if apart or not held.is_file() or held.suffix != train.suffix:
                raise RowError(
                    f"column validation: {validation} is no other file beside {train.name} with "
                    f"the same ending. Put the rows into {train.parent}/NAME{train.suffix}."
                )
            split = held.stem
        spec = dataclasses.replace(spec, location=str(folder), test_split=split)
        spec = _pinned(spec, ".")
    elif validation is not None:
        raise RowError(
            f"column validation: {validation}, but the rows are on the hub, where a split test or "
            "validation is held out. Leave the column empty."
        )
    rows, tested = _texts(spec, ".")
    both = [*rows, *(tested or ())]
    n_unique = len({whole for whole, _ in both})
    repeated, same_prompt = len(both) - n_unique, n_unique - len({prompt for _, prompt in both})
    changes: dict[str, Any] = {"n_test": len(rows)}
    n_train, by_row = len(rows), tested is None and not same_prompt
    if tested is not None or n_unique >= FEWEST:
        changes, n_train = _divided(rows, tested, by_row or spec.mask == "all", LEAST)
        if by_row:  # which is then also by prompt
            changes |= {"held_out_by": "", "unseen_rows": repeated > 0}
    if not n_train:
        raise DataError(
            f"every row of {spec.train_split} is also in {spec.test_split}. Add rows to train on, "
            "or remove the held-out rows."
        )
    # no learning curve: with few rows, evaluations would cost as much as training
    length = max_length or LONGEST
    spec = dataclasses.replace(spec, n_test_curve=0, max_length=length, **changes)
    train_rows, held_out_rows = splits.sources_of(spec, ["."])
    found = tokenizing.examples(spec, spec.train_split, train_rows, tokenizer, None, "")
    most = spec.n_validation + spec.n_test
    other = tokenizing.examples(spec, spec.test_split, held_out_rows, tokenizer, most, "")
    if not found.n_bytes.any():
        raise DataError(f"all {len(found)} training rows have an empty answer. Fill them in.")
    fits = tokenizing.fits_of(found, other)
    warning = tokenizing.check_fit(spec, fits, "the column max_length to ")
    if max_length is None:
        lengths, held_lengths = (np.diff(part.ends, prepend=0) for part in (found, other))
        longest = float(max(lengths.max(), held_lengths.max()))
        length = rounded(max(longest, float(lengths.mean()) / TEXT_FILL))
        spec = dataclasses.replace(spec, max_length=length)
    first = list(itertools.islice(train_rows.rows(), EXAMPLES))
    tokenizing.check_rows(spec, first, tokenizer)
    left_out = len(rows) - n_train if tested is not None else 0
    counts = (len(found), spec.n_validation > 0, repeated, same_prompt, left_out)
    rows_found = Rows(spec, *counts, warning=warning, **shown(spec, first, tokenizer))
    return rows_found, float(found.loss.sum()) / len(found)


def named_rows(given: str, named: Mapping[str, str]) -> tuple[DatasetSpec, str, int]:
    """Describe rows that are asked for by a file, a folder or a name on the hub.

    A test file or split is divided into validation and test rows; without one a tenth of the rows
    each, by prompt. `named`: fields of the data set that the command line sets.

    Returns the data set, the folder in which it is found ('' on the hub; a run's id excludes
    paths), and the number of training rows.

    Raises:
        DataError: there are no such rows, one cannot be read, or there are too few.
    """
    spec, folder = column_names.dataset_of(given, named=named), ""
    if spec.source != "hub":
        folder = spec.location
        split = spec.test_split if spec.train_split == "train" else spec.train_split
        spec = _pinned(dataclasses.replace(spec, location=".", test_split=split), folder)
    rows, tested = _texts(spec, folder)
    answered = [any(r == "assistant" and t.strip() for r, t in whole) for whole, _ in rows]
    if not all(answered):
        raise DataError(
            f"{given}: {answered.count(False)} of {len(rows)} rows have no answer, the first is "
            f"row {answered.index(False) + 1}. Remove these rows, or name the column of the "
            "answers: dataset.completion_field=NAME."
        )
    n_unique = len({whole for whole, _ in [*rows, *(tested or ())]})
    if n_unique < FEWEST_NAMED:
        raise DataError(
            f"{given}: {n_unique} unique rows. Expected at least {FEWEST_NAMED}: validation rows "
            "choose a learning rate and test rows measure the gain, and fewer tell neither from "
            "noise. Add rows; action=measure data=FILE and a fleet take fewer."
        )
    changes, n_train = _divided(rows, tested, spec.mask == "all", LEAST_NAMED)
    if not n_train:
        raise DataError(f"{given}: every training row is held out. Add rows to train on.")
    return dataclasses.replace(spec, n_test_curve=changes["n_test"], **changes), folder, n_train


def _pinned(spec: DatasetSpec, folder: str) -> DatasetSpec:
    """Return local rows with the present content of their files as revision."""
    files = dict.fromkeys((spec.train_split, spec.test_split))
    if odd := next((name for name in files if set("=,") & set(name)), None):
        raise DataError(f"{odd!r}: a name without '=' and ',' is expected. Rename the file.")
    spec = dataclasses.replace(spec, revision="")
    pins = [f"{f}={sources.find_file(spec, f, [folder])[1][:16]}" for f in files]
    return dataclasses.replace(spec, revision="sha256:" + ",".join(pins))


def _texts(spec: DatasetSpec, folder: str) -> tuple[list[Text], list[Text] | None]:
    """Return the training rows, and those of the test split; None if both are one split."""

    def read(row: Any, where: str) -> Text:
        found = messages.read(spec, row, where)
        # with mask=all every token is learned, so a row has no prompt
        return found.whole, found.whole if spec.mask == "all" else found.prompt

    train, held_out = splits.sources_of(spec, [folder])
    rows, tested = list(sources.each(train.rows(), read)), None
    if spec.test_split != spec.train_split:
        tested = list(sources.each(held_out.rows(), read))
        n_unique = len({whole for whole, _ in tested})
        if n_unique < 2:
            raise DataError(
                f"{spec.test_split} has {n_unique} unique rows. Expected at least 2, for "
                "validation and test. Add rows, or remove all: training rows are then held out."
            )
    return rows, tested


def _divided(
    rows: Sequence[Text], tested: Sequence[Text] | None, by_row: bool, least: int
) -> tuple[dict[str, Any], int]:
    """Split rows so that splits share no prompt; if prompts are too few, so that they share no row.

    Prompts are too few if rows share some and fewer than FEWEST are left, or if less than LEFT of
    the rows would remain for training. Returns DatasetSpec fields, and the number of training rows.
    """
    pool = rows if tested is None else tested
    for by in ("row",) if by_row else ("prompt", "row"):
        of, units = ([row[by == "prompt"] for row in part] for part in (rows, pool))
        groups = splits.divided(units, [whole for whole, _ in pool])
        sizes = [len(group) for group in groups]
        if tested is None:
            n = len(groups)  # a tenth of them each
            each = max(min(least, n // 4), min(n // SHARE, MOST))
            first = _fitting(sizes[:each])
            last = _fitting(sizes[first : first + each])
            held = {units[k] for group in groups[: first + last] for k in group}
        else:
            first = _fitting(sizes[:-1], min(sum(sizes) // 2, MOST))
            last = _fitting(sizes[first:])
            held = set(units)
        n_validation, n_test = sum(sizes[:first]), sum(sizes[first : first + last])
        n_train = sum(unit not in held for unit in of)
        enough = len(groups) >= FEWEST or len(groups) == len({whole for whole, _ in pool})
        if enough and n_train >= LEFT * len(rows):
            break
    holdout = n_validation + n_test if tested is None else 0
    sizes_of = {"n_validation": n_validation, "n_test": n_test, "holdout": holdout}
    return {"held_out_by": by, **sizes_of}, n_train


def _fitting(sizes: Sequence[int], most: int = MOST) -> int:
    """Return how many of the first units together have at most `most` rows; at least 1."""
    return max(1, sum(total <= most for total in itertools.accumulate(sizes)))


def shown(spec: DatasetSpec, first: Sequence[sources.Row], tokenizer: Any) -> dict[str, Any]:
    """Return the fields end, example, messages and stop of Rows.

    The example: the shortest of `first` without tools, with placeholders such as {user 1}.
    """
    if spec.format in messages.LISTS:
        speaker, content = messages.LISTS[spec.format]
        plain = [r for w, r in first if "with tools" not in messages.read(spec, r, w).kinds]
        question_and_answer = [{speaker: "user"}, {speaker: "assistant"}]
        turns = min((r[spec.format] for r in plain), key=len, default=question_and_answer)
        roles = [messages.ROLES[spec.format][turn[speaker]] for turn in turns]
        names = [f"{{{role} {roles[: k + 1].count(role)}}}" for k, role in enumerate(roles)]
        turns = [{k: turn[k] for k in (speaker, messages.WEIGHT) if k in turn} for turn in turns]
        row: Any = {spec.format: [{**turn, content: name} for turn, name in zip(turns, names)]}
    else:
        names = ["{prompt}", "{completion}"]
        row = {spec.prompt_field: names[0], spec.completion_field: names[1]}
    example = tokenizing.rendered(spec, row, "example", tokenizer)
    answer = next((piece for piece, in_loss in reversed(example) if in_loss), "")
    last = max(names, key=lambda name: answer.rfind(name))
    end = answer.rpartition(last)[2] if last in answer else ""
    turns, _ = tokenizing.request_of(spec, row, "example")
    stop: dict[str, list[Any]] = {}
    if end and not (tokenizer.eos_token and end.strip().endswith(tokenizer.eos_token)):
        # a special token is named by its number, because servers leave its text out of the answer
        number = tokenizer.get_added_vocab().get(end.strip())
        stop = {"stop": [end]} if number is None else {"stop_token_ids": [number]}
    return {"end": end, "example": example, "messages": turns, "stop": stop}
