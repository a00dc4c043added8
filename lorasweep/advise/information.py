"""What action=measure found in files of rows, by file and model, read as files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FOLDER = "information"
"""Of what was measured, below the reports and the kept results."""


class Measured(NamedTuple):
    """A file's information under a model."""

    tokens_per_example: float
    bits: float
    """Of all rows, learned along."""
    low: float
    high: float
    where: str
    """The file that says so, and how much of the rows was measured."""


Information = Mapping[tuple[str, str], Measured]
"""(Digits that name the file of rows, model) -> what was found."""


def read(folders: Sequence[Path]) -> dict[tuple[str, str], Measured]:
    """Read what was measured; of one file and model, what the first folder has.

    Measurements of data without end or of too few rows say nothing of all rows, and are left out.
    """
    found: dict[tuple[str, str], Measured] = {}
    for folder in folders:
        for path in sorted((folder / FOLDER).glob("*.json")):
            try:
                value = json.loads(path.read_text())
                whole = value["prequential"]["bits"]["all"]
                rows, tokens = value["rows"], value["loss_tokens"]
                if whole["value"] is None or not value["rows_sha256"]:
                    continue
                measured = Measured(
                    tokens["all"] / rows["all"],
                    whole["value"],
                    whole["low"],
                    whole["high"],
                    f"action=measure, {rows['measured']:,} of {rows['all']:,} rows ({path})",
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue  # being written, or broken: it says nothing
            found.setdefault((value["rows_sha256"], value["model"]), measured)
    return found
