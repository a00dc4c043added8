"""Read the rows of a table of customers, CSV or YAML, without judging them."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lorasweep.advise.customer import COLUMNS, REQUIRED
from lorasweep.errors import SpecError, unknown


class Row(NamedTuple):
    """One row as it stands in the file."""

    where: str
    """Where people find it, such as 'row 3': in a CSV, the line of the file."""
    values: dict[str, Any]
    problem: str | None = None
    """Why it cannot be read as a row at all."""


def read(path: Path) -> list[Row]:
    """Read a table of customers.

    Raises:
        SpecError: the file is not there, is empty, is neither CSV nor YAML, or has a header with
            columns that do not exist.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except FileNotFoundError:
        raise SpecError(f"customers={path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"customers={path}: cannot be read as text: {error}") from None
    rows = _yaml(path, text) if path.suffix.lower() in (".yaml", ".yml") else _csv(path, text)
    if not rows:
        raise SpecError(f"customers={path}: no customers in it. {expected()}")
    return rows


def expected() -> str:
    """Say what a table looks like."""
    optional = [c for c in COLUMNS if c not in REQUIRED]
    return (
        f"Expected a header with the columns {', '.join(REQUIRED)} and any of "
        f"{', '.join(optional)}, and a row for each customer."
    )


def _csv(path: Path, text: str) -> list[Row]:
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)  # as spreadsheets of other languages write it
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_header(path, header)
                continue
            where = f"row {reader.line_num}"
            if any(cell.strip() for cell in cells[len(header) :]):
                problem = (
                    f"{len(cells)} cells under {len(header)} columns. Quote cells with commas."
                )
                rows.append(Row(where, dict(zip(header, cells, strict=False)), problem))
            else:
                rows.append(Row(where, dict(zip(header, cells, strict=False))))
    except csv.Error as error:
        raise SpecError(f"customers={path}: row {reader.line_num}: {error}") from None
    return rows


def _check_header(path: Path, header: Iterable[str]) -> None:
    """Refuse a header that would be misread: a misspelt column would count as not stated."""
    names = list(header)
    for name in names:
        if name not in COLUMNS:
            raise SpecError(f"customers={path}: {unknown('column', name, COLUMNS)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    missing = [name for name in REQUIRED if name not in names]
    if twice or missing:
        what = f"column {twice[0]} twice" if twice else f"no column {', '.join(missing)}"
        raise SpecError(f"customers={path}: {what}. {expected()}")


def _yaml(path: Path, text: str) -> list[Row]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"customers={path}: not valid YAML: {error}") from None
    if isinstance(found, dict) and set(found) == {"customers"}:
        found = found["customers"]
    if found is None:
        return []
    if not isinstance(found, list):
        raise SpecError(f"customers={path}: expected a list with an entry for each customer.")
    return [
        Row(f"entry {k}", entry)
        if isinstance(entry, dict)
        else Row(f"entry {k}", {}, f"expected columns and values, got {entry!r}.")
        for k, entry in enumerate(found, 1)
    ]
