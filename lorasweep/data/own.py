"""Somebody's own file of rows as a data set: JSON Lines in one of the usual forms.

Tells the form from the first row. Refuses to know tokenizers.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from lorasweep.data import fields, sources
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
"""Names of two columns, what is asked and what is answered, the first that are there."""
DIGITS = 16
"""Hexadecimal digits of a file's SHA-256 that name it, as in a revision."""


class Counted(NamedTuple):
    """What a file holds."""

    rows: int
    answer_bytes: int
    """UTF-8 bytes of what bears loss: completions, or last answers of a conversation."""
    sha256: str


def path_of(given: str) -> Path:
    """Return the file of rows: a .jsonl file, or train.jsonl in a folder.

    Raises:
        DataError: it is not there.
    """
    path = Path(given).expanduser().absolute()
    path = path / "train.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"no file {path}. Expected a .jsonl file, or a folder with train.jsonl.")
    if path.suffix != ".jsonl":
        raise DataError(f"{path} does not end on .jsonl. Expected JSON Lines in such a file.")
    return path


def dataset_of(given: str, name: str = "") -> DatasetSpec:
    """Describe a file of rows as a data set, of long rows what fits.

    Held-out rows are those of test.jsonl beside it, or the file's own if there is none. The content
    is pinned; `name`: of the data set, where it is not to be that of the file and its content.

    Raises:
        DataError: the file is not there, or its first row has none of the usual forms.
    """
    path = path_of(given)
    digest = _sha256(path)[:DIGITS]
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
    """Count the rows of a file and what bears loss in them.

    Raises:
        DataError: the file is not there, or a row is not of the form of the first.
    """
    spec = dataset_of(given)
    path = path_of(given)
    rows = answers = 0
    for where, row in sources.jsonl_rows(path):
        said = [text for role, text in fields.messages_of(spec, row, where) if role == "assistant"]
        rows += 1
        answers += len(said[-1].encode()) if said else 0
    return Counted(rows, answers, _sha256(path))


def first_answer(spec: DatasetSpec, given: str) -> str:
    """Return the last answer of a file's first row; empty if it has none."""
    where, row = next(sources.jsonl_rows(path_of(given)))
    said = [text for role, text in fields.messages_of(spec, row, where) if role == "assistant"]
    return said[-1] if said else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _form(where: str, row: Any) -> dict[str, Any]:
    """Return the fields of a data set that say how its rows are read."""
    columns = set(row) if isinstance(row, dict) else set()
    for name in fields.LISTS:
        if name in columns:
            return {"format": name, "mask": "last_assistant"}
    for prompt, completion in PAIRS:
        if {prompt, completion} <= columns:
            return {"prompt_field": prompt, "completion_field": completion}
    pairs = ", ".join(f"{prompt} and {completion}" for prompt, completion in PAIRS)
    raise DataError(
        f"{where}: the row has the columns {', '.join(map(str, sorted(columns))) or 'of no object'}"
        f". Expected messages, conversations, or two columns: {pairs}. Rename them, or describe "
        "the file as a data set (docs/own.md)."
    )
