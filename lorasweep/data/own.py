"""Describe rows without a data set file: JSON Lines or a hub data set, in a usual form."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

from lorasweep.data import fields, hub, sources
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
)
"""Names of prompt and completion columns, in order of preference."""
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w.-]+))?")
"""A data set of the hub: owner/name, with an optional :configuration and @revision."""
HELD_OUT = ("test", "validation")
"""Names of held-out splits on the hub, in order of preference."""
DIGITS = 16
"""Hexadecimal digits of the SHA-256 of a file in a revision."""


class Counted(NamedTuple):
    """The size of a file of rows."""

    rows: int
    answer_bytes: int
    """UTF-8 bytes of the text in the loss (`fields.in_loss`)."""
    sha256: str


def is_on_hub(given: str) -> bool:
    """Return whether a name is a data set of the hub: it has the form, and is no local file."""
    local = given.startswith(("/", ".", "~")) or given.endswith(".jsonl")
    return not local and bool(HUB_NAME.fullmatch(given)) and not Path(given).exists()


def on_hub(given: str, name: str) -> DatasetSpec:
    """Download a data set of the hub and describe it as `dataset_of` does, pinned to its commit.

    Raises:
        DataError: the download fails, or the columns have none of the usual forms.
    """
    match = HUB_NAME.fullmatch(given)
    assert match is not None
    location, config, revision = (part or "" for part in match.groups())
    plain = f"{location}-{config}" if config else location
    spec = DatasetSpec(
        name=name or plain.replace("/", "-"),
        source="hub",
        location=location,
        config=config,
        revision=revision,
        max_length=1024,
        too_long="cut_or_skip",
    )
    try:
        columns, rows, commit = hub.contents(spec)
    except DataError as error:
        raise DataError(
            f"no file or folder {Path(given).absolute()}, and as a data set of the hub (owner/name"
            f":configuration@revision): {error}"
        ) from error
    train = "train" if "train" in rows else next(iter(rows))
    test = next((split for split in HELD_OUT if split in rows and split != train), train)
    form = _form(f"{given}[{train}]", dict.fromkeys(columns))
    changes = {"revision": commit or revision, "train_split": train, "test_split": test, **form}
    return dataclasses.replace(spec, **changes)


def path_of(given: str) -> Path:
    """Return a .jsonl file, or a folder's train.jsonl; raise DataError if there is none."""
    path = Path(given).expanduser().absolute()
    path = path / "train.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise DataError(
            f"no file {path}. Expected a .jsonl file, a folder with train.jsonl, or a data set of "
            "the hub as owner/name."
        )
    if path.suffix != ".jsonl":
        raise DataError(f"{path} does not end on .jsonl. Expected JSON Lines in such a file.")
    return path


def dataset_of(given: str, name: str = "") -> DatasetSpec:
    """Describe a file of rows, or a data set of the hub, with its content pinned.

    The test split is test.jsonl beside the file; without it, the same file. An empty `name` is
    replaced by one from the file name and the content.

    Raises:
        DataError: there is no such file, or its first row has none of the usual forms.
    """
    if is_on_hub(given):
        return on_hub(given, name)
    path = path_of(given)
    digest = sources.file_sha256(path)[:DIGITS]
    found = next(sources.jsonl_rows(path), None)
    if found is None:
        raise DataError(f"{path} has no rows.")
    test = path.with_name("test.jsonl")
    folder = path.parent.name if path.stem == "train" else path.stem
    return DatasetSpec(
        name=name or f"{folder}-{digest[:8]}",
        source="jsonl",
        location=str(path.parent),
        revision=f"sha256:{path.stem}={digest}",
        train_split=path.stem,
        test_split="test" if test.is_file() else path.stem,
        max_length=1024,
        too_long="cut_or_skip",
        **_form(*found),
    )


def count(given: str) -> Counted:
    """Count a file's rows and their bytes in the loss; DataError for a row of another form."""
    spec = dataset_of(given)
    path = path_of(given)
    rows = answers = 0
    for where, row in sources.jsonl_rows(path):
        said = zip(fields.messages_of(spec, row, where), fields.in_loss(spec, row, where))
        rows += 1
        answers += sum(len(text.encode()) for (_, text), learned in said if learned)
    return Counted(rows, answers, sources.file_sha256(path))


def first_answer(spec: DatasetSpec, given: str) -> str:
    """Return the last answer of the first row; empty if it has none."""
    if spec.source == "hub":
        rows = hub.source_of(spec, False).rows()
    else:
        rows = sources.jsonl_rows(path_of(given))
    where, row = next(rows)
    said = [text for role, text in fields.messages_of(spec, row, where) if role == "assistant"]
    return said[-1] if said else ""


def _form(where: str, row: Any) -> dict[str, Any]:
    """Return the fields of a data set that describe the form of its rows."""
    columns = set(row) if isinstance(row, dict) else set()
    for name in fields.LISTS:
        if name in columns:
            return {"format": name, "mask": "last_assistant"}
    for prompt, completion in PAIRS:
        if {prompt, completion} <= columns:
            return {"prompt_field": prompt, "completion_field": completion}
    pairs = ", ".join(map(" and ".join, PAIRS))
    raise DataError(
        f"{where}: the row has the columns {', '.join(map(str, sorted(columns))) or 'of no object'}"
        f". Expected messages, conversations, or two columns: {pairs}. Rename them, or describe "
        "the file as a data set (docs/own.md)."
    )
