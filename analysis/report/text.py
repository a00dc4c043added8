"""Text of reports: tables for a terminal or in Markdown, templates, and hashes of inputs."""

import hashlib
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.runs.table import TableError

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows) -> list[str]:
    """Format rows in aligned columns."""
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(r, widths)).rstrip() for r in rows]


def markdown(rows: Rows) -> list[str]:
    """Format rows as a Markdown table; the first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in r) + " |" for r in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def rendered(template: str, package: str = "analysis.report", **values: Any) -> str:
    """Fill a template of a package; values are escaped in .html templates only."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader(package),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["table"] = lambda rows: "\n".join(markdown(rows))
    return environment.get_template(template).render(values)


def missing(what: str, *packages: str) -> str:
    """Say which of the packages that `what` needs are not installed; empty if all are."""
    absent = " ".join(p for p in packages if importlib.util.find_spec(p) is None)
    if not absent:
        return ""
    return (
        f"{what} needs {absent}, not installed here: pip install {absent} (for a machine without "
        "a network: make wheelhouse)"
    )


def check_installed(what: str, *packages: str) -> None:
    """Raise TableError if a package is missing that `what` needs."""
    if absent := missing(what, *packages):
        raise TableError(absent)


def with_block(text: str, name: str, lines: Sequence[str]) -> str:
    """Replace the lines of a page between `<!-- NAME: ... -->` and `<!-- end of NAME -->`.

    Raises:
        ValueError: the page lacks one of these markers.
    """
    begin = re.search(rf"<!-- {name}: [^\n]*-->", text)
    if begin is None:
        raise ValueError(f"no marker `<!-- {name}: ... -->`")
    end = text.index(f"<!-- end of {name} -->")
    return "\n".join([text[: begin.end()], *lines, text[end:]])


def plain(value: Any) -> Any:
    """Convert a table's value for JSON; NaN, infinity and missing become None."""
    if value is None or value is pd.NA or value != value:
        return None
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | bool) else str(value)


def text_hash(text: str) -> str:
    """Hash the inputs of a figure."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
