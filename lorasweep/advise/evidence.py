"""The basis of advice: published figures, this project's kept results, measured data sets.

Every number of an answer is noted with its formula, inputs, source and confidence.
"""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lorasweep.advise.read import Models
from lorasweep.plan.detect import Hardware

INFORMATION = "information"
"""Folder of the results of action=measure, below the reports and the kept results."""
Row = Mapping[str, Any]
"""A kept result: text, but numbers or None for value, low and high (the 95% interval). It is a
verdict if it has a claim, and applies to its base model."""


class Sure(StrEnum):
    """Confidence in a number, from highest to lowest."""

    EXACT = "exact: counted from the shape"
    MEASURED = "measured here, on this model"
    PLANNED = "computed; nine in ten published figures lie within the stated error"
    PUBLISHED = "published by more than one"
    ONCE = "published once, or disputed"
    WEAK = "measured here on small models only"
    ASSUMED = "an assumption"


@dataclass(frozen=True)
class Reason:
    """How a number of an answer was obtained."""

    name: str
    value: Any
    formula: str
    inputs: Mapping[str, Any]
    source: str
    sure: Sure


def shown(value: Any) -> str:
    """Format a value for people: three digits, thousands separated."""
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, float) and (abs(value) >= 1e9 or abs(value) < 1000):
        return f"{value:.3g}"
    if isinstance(value, int | float):
        return f"{value:,.0f}"
    return "not known" if value is None else str(value)


@cache
def texts(name: str) -> dict[str, Any]:
    """Read a YAML file of this package: published figures, formulas or warnings."""
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text())


def published() -> dict[str, Any]:
    """Return the figures of published.yaml: lists of entries, and single entries, with sources."""
    return texts("published")


# ---------------------------------------------------------------- kept results


def interval(value: float, low: float | None, high: float | None) -> str:
    """Format a value with its interval."""
    if low is None or high is None:
        return f"{value:.3g} (no interval)"
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"


def line_of(row: Row) -> str:
    """Return a verdict as text."""
    found = " (exploratory)" if row["exploratory"] else ""
    if row["value"] is not None:
        found += f" {interval(row['value'], row['low'], row['high'])}"
    verdict = f"{row['sweep']}: {row['claim']} {row['outcome']}{found}"
    return f"{verdict} at {row['scale']} ({row['task']})"


@dataclass(frozen=True)
class Kept:
    """The kept results that rules use."""

    rows: Sequence[Row] = ()
    hidden: Mapping[str, int] = field(default_factory=dict)
    """Hidden size of each model."""

    def about(self, sweep: str, *claims: str) -> list[Row]:
        """List the verdicts on some claims of a sweep."""
        return [r for r in self.rows if r["sweep"] == sweep and r["claim"] in claims]

    def measured(self, sweep: str, quantity: str) -> list[Row]:
        """List a sweep's measurements of a quantity, without verdicts."""
        wanted = (sweep, quantity, "")
        mine = (r for r in self.rows if (r["sweep"], r["quantity"], r["claim"]) == wanted)
        return [r for r in mine if r["value"] is not None]

    def covering(self, hidden: int) -> dict[int, list[tuple[float, ...]]]:
        """Return rank -> (load, regret, ends of its interval), at the width nearest to `hidden`.

        The regret is in percent of full fine-tuning's gain. The bits of the load are counted in the
        study's way, as the loss in the first epoch. Empty outside the measured range of widths.
        """
        loads = self.measured("regime", "load, first_pass")
        load = {(r["task"], r["rank"]): r["value"] for r in loads}
        found: dict[int, dict[int, list[tuple[float, ...]]]] = {}
        for r in self.measured("regime", "regret_percent"):
            at, width = load.get((r["task"], r["rank"])), self.hidden.get(r["base"])
            if at is not None and width is not None and r["low"] is not None:
                of_width = found.setdefault(width, {}).setdefault(int(r["rank"]), [])
                of_width.append((at, r["value"], r["low"], r["high"]))
        if not found or not min(found) <= hidden <= max(found):
            return {}
        return found[min(sorted(found), key=lambda width: abs(math.log(width / hidden)))]

    def batch_effects(self) -> dict[str, float]:
        """Return the change of ln(rho) of the highest rank per doubling of the batch, by scale."""
        found = self.measured("batch_size", "batch_effect")
        by_rank = sorted((int(r["rank"]), r["scale"], r["value"]) for r in found)
        return {scale: effect for _, scale, effect in by_rank}


def read_kept(folder: Path, hidden: Mapping[str, int]) -> Kept:
    """Read `folder`/rows.csv, if it is there, without withdrawn verdicts."""
    path, rows = folder / "rows.csv", []
    for row in csv.DictReader(path.read_text().splitlines()) if path.is_file() else ():
        if "WITHDRAWN" not in row["gates"].split():
            ends = {k: float(row[k]) if row[k] else None for k in ("value", "low", "high")}
            rows.append({**row, **ends})
    return Kept(rows, hidden)


# ---------------------------------------------------------------- measured data sets


def read_information(folders: Sequence[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """Read the measurements, by (first digits of the SHA-256 of the rows' file, model).

    Each has `tokens_per_example`; the code length of all rows in bits, online during training, as
    `value`, with its 95% interval from `low` to `high`; and `where` it was read. The first folder
    with a measurement counts. Those without a value for all rows (endless data, too few rows) are
    left out.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in (p for folder in folders for p in sorted((folder / INFORMATION).glob("*.json"))):
        try:
            value = json.loads(path.read_text())
            whole, rows = value["prequential"]["bits"]["all"], value["rows"]
            if whole["value"] is None or not value["rows_sha256"]:
                continue
            where = f"action=measure, {rows['measured']:,} of {rows['all']:,} rows ({path})"
            tokens = value["loss_tokens"]["all"] / rows["all"]
            measured = {**whole, "tokens_per_example": tokens, "where": where}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written, or broken
        found.setdefault((value["rows_sha256"], value["model"]), measured)
    return found


@dataclass(frozen=True)
class Known:
    """The inputs of rules other than the customer."""

    models: Models
    machines: Mapping[str, Callable[[], Hardware]]
    """Name in conf/hardware -> function that reads the file."""
    kept: Kept = field(default_factory=Kept)
    published: Mapping[str, Any] = field(default_factory=published)
    hardware: Hardware | None = None
    """Hardware for customers who name none."""
    information: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    """The result of `read_information`."""
