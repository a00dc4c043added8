"""Columns and forms by which rows of the user's own are recognised: no file describes them."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lorasweep.data.messages import JOINED, LISTS, read
from lorasweep.data.sources import contents, file_sha256, rows_in
from lorasweep.errors import DataError
from lorasweep.spec.dataset import FILES, FIRST_RENDER, DatasetSpec

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction+input", "output"),
    ("instruction+input", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("input", "target"),
)
"""Names of prompt and completion columns, in order of preference. a+b: both, the second if any."""
HUB_NAME = re.compile(
    r"(?P<location>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w.-]+))?"
)
PLAIN, CHAT = "{prompt}\n", "{prompt}"
"""The template of a prompt as plain text, and as a user's message."""
LENGTH: dict[str, Any] = {"max_length": 1024, "too_long": "cut_or_skip"}
HELD_OUT = ("test", "validation")
"""Names of held-out splits on the hub, in order of preference."""
EXPECTED = (
    f"a file that ends on {', '.join('.' + form for form in FILES[:-1])} or .{FILES[-1]}, a folder "
    "with train and test in one of these forms, or a data set of the hub as "
    "owner/name:configuration@revision"
)
DIGITS = 16
"""Hexadecimal digits of the SHA-256 of a file in a revision."""


class Counted(NamedTuple):
    """The size of a file of rows."""

    rows: int
    answer_bytes: int
    """UTF-8 bytes of the text in the loss."""
    sha256: str


def is_on_hub(given: str) -> bool:
    """Return whether a name is a data set of the hub: it has the form, and is no local file."""
    local = given.startswith(("/", ".", "~")) or Path(given).suffix[1:] in FILES
    return not local and bool(HUB_NAME.fullmatch(given)) and not os.path.exists(given)


def path_of(given: str) -> Path:
    """Return a file of rows, or that of a folder's training rows; DataError if there is none."""
    try:
        path = Path(given).expanduser().absolute()
        found = [path / f"train.{form}" for form in FILES] if path.is_dir() else [path]
        there = [file for file in found if file.is_file()]
    except (OSError, RuntimeError) as error:  # a name too long for a path, or an unknown ~user
        raise DataError(f"{given[:80]!r} is no path: {error}. Expected {EXPECTED}.") from None
    if len(there) != 1 or there[0].suffix[1:] not in FILES:
        what = "is in no known form" if there else "is no file"
        if len(there) > 1:
            what = f"is one of {len(there)} such files: name one"
        raise DataError(f"{(there or found)[0]} {what}. Expected {EXPECTED}.")
    return there[0]


def dataset_of(given: str, name: str = "", named: Mapping[str, str] = {}) -> DatasetSpec:
    """Describe a file of rows, or a data set of the hub that is downloaded, with pinned content.

    The test split is the file `test` beside it; without it, the same file. An empty `name` is
    replaced by one from the file name and the content. `named`: mask, render, and a format or
    columns that are not recognised.

    Raises:
        DataError: there is no such file or data set, or its rows have none of the usual forms.
    """
    if is_on_hub(given):
        match = HUB_NAME.fullmatch(given)
        assert match is not None
        place: dict[str, Any] = match.groupdict("")
        plain = "-".join(filter(None, (place["location"], place["config"]))).replace("/", "-")
        spec = DatasetSpec(name=name or plain, source="hub", **place, **LENGTH)
        try:
            columns, rows, commit = contents(spec)
        except DataError as error:
            where = f"no file or folder {Path(given).absolute()}, and as a data set of the hub"
            raise DataError(f"{where} (owner/name:configuration@revision): {error}") from error
        train = "train" if "train" in rows else next(iter(rows))
        test = next((split for split in HELD_OUT if split in rows and split != train), train)
        form = _form(f"{given}[{train}]", dict.fromkeys(columns), named)
        form |= {"revision": commit or spec.revision, "train_split": train, "test_split": test}
        return replace(spec, **form)
    path = path_of(given)
    digest = file_sha256(path)[:DIGITS]
    found = next(rows_in(path), None)
    if found is None:
        raise DataError(f"{path} has no rows. Add rows, or give another file.")
    folder, source = path.parent.name if path.stem == "train" else path.stem, path.suffix[1:]
    return DatasetSpec(
        name=name or f"{folder}-{digest[:8]}",
        source=source,  # type: ignore[arg-type]
        location=str(path.parent),
        revision=f"sha256:{path.stem}={digest}",
        train_split=path.stem,
        test_split="test" if path.with_name(f"test{path.suffix}").is_file() else path.stem,
        **LENGTH,
        **_form(*found, named),
    )


def count(given: str) -> Counted:
    """Count a file's rows and their bytes in the loss; DataError for a row of another form."""
    spec, path = dataset_of(given), path_of(given)
    given_rows = [read(spec, row, where) for where, row in rows_in(path)]
    said = (pair for row in given_rows for pair in zip(row.messages, row.learned))
    answers = sum(len(text.encode()) for (_, text), learned in said if learned)
    return Counted(len(given_rows), answers, file_sha256(path))


def as_served(form: str, render: str) -> dict[str, Any]:
    """Return the fields of a data set with which its prompts have the tokens of a server's."""
    first = render == FIRST_RENDER
    # a chat template gives the whole text in any case
    whole = form in LISTS and render != "chat_template"
    template = PLAIN if first else CHAT
    return {"render": render, "template": template, "whole_prompt": whole, "bos": first}


def _form(where: str, row: Any, named: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a data set that describe its rows; `named` ones need no recognition."""
    columns = set(row) if isinstance(row, dict) else set()
    prompt, completion = named.get("prompt_field"), named.get("completion_field")
    pairs = dict.fromkeys((prompt or p, completion or c) for p, c in PAIRS)
    lists = [named.get("format", name) for name in LISTS if not (prompt or completion)]
    mask, found = "completion", dict[str, Any]()
    for pair in reversed(pairs):
        if {*pair[0].split(JOINED), pair[1]} <= columns or set(pair) <= columns:
            found = {"prompt_field": pair[0], "completion_field": pair[1]}
    if form := next((name for name in lists if name in columns & set(LISTS)), ""):
        mask, found = "completion" if form == "messages" else "last_assistant", {"format": form}
    if found:
        found["mask"] = named.get("mask", mask)
        return found | as_served(form, named.get("render", FIRST_RENDER))
    shown = ", ".join(map(str, sorted(columns))) or "of no object"
    raise DataError(
        f"{where}: the row has the columns {shown}. Expected messages, conversations, or two "
        f"columns: {', '.join(map(' and '.join, pairs))}. Rename them, or name them "
        "(without customers=FILE): dataset.prompt_field=COLUMN dataset.completion_field=COLUMN."
    )
