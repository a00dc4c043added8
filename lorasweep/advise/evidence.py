"""The basis of advice: published figures, this project's kept results, measured data sets.

Every number of an answer is noted with its formula, inputs, source and confidence.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lorasweep.advise.read import Customer, Models
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.model import ModelSpec


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
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, float) and (abs(value) >= 1e9 or abs(value) < 1000):
        return f"{value:.3g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


# ---------------------------------------------------------------- published figures


@dataclass(frozen=True)
class Published:
    """The entries of published.yaml."""

    values: dict[str, Any]

    def without(self, sources: Iterable[str]) -> "Published":
        """Return the entries that come from none of `sources`."""
        gone = set(sources)

        def left(entry: Any) -> Any:
            if isinstance(entry, list):
                return [e for e in entry if e["source"] not in gone]
            return None if isinstance(entry, dict) and entry.get("source") in gone else entry

        return Published({name: left(entry) for name, entry in self.values.items()})

    def entries(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        """List the entries of a kind with the wanted values."""
        return [e for e in self.values[name] if all(e.get(k) == v for k, v in wanted.items())]


@cache
def published() -> Published:
    """Read published.yaml."""
    return Published(yaml.safe_load(Path(__file__).with_name("published.yaml").read_text()))


# ---------------------------------------------------------------- kept results

ROWS = "rows.csv"
"""The table of all kept verdicts and measurements, in the folder of the kept results."""
Row = Mapping[str, str]
"""A row of it: a quantity, and with a claim the verdict about it. It applies to its base model."""


class Interval(NamedTuple):
    """A value with its 95% interval; None: not known."""

    value: float
    low: float | None
    high: float | None

    def text(self) -> str:
        """Format the value and interval."""
        if self.low is None or self.high is None:
            return f"{self.value:.3g} (no interval)"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval_of(row: Row) -> Interval | None:
    """Return the measured value of a row, if there is one."""
    ends = [float(row[k]) if row[k] else None for k in ("value", "low", "high")]
    return None if ends[0] is None else Interval(ends[0], ends[1], ends[2])


def line_of(row: Row) -> str:
    """Return a verdict as text."""
    found = " (exploratory)" if row["exploratory"] else ""
    found += f" {e.text()}" if (e := interval_of(row)) else ""
    verdict = f"{row['sweep']}: {row['claim']} {row['outcome']}{found}"
    return f"{verdict} at {row['scale']} ({row['task']})"


class Regret(NamedTuple):
    """The regret of a rank in percent of full fine-tuning's gain.

    The bits of the load are counted in the study's way, as the loss in the first epoch.
    """

    rank: int
    load: float
    regret: Interval


@dataclass(frozen=True)
class Kept:
    """The kept results that rules use."""

    rows: Sequence[Row] = ()
    hidden: Mapping[str, int] = field(default_factory=dict)
    """Hidden size of each model."""

    def about(self, sweep: str, *claims: str) -> list[Row]:
        """List the verdicts on some claims of a sweep, without withdrawn ones."""
        mine = (r for r in self.rows if r["sweep"] == sweep and r["claim"] in claims)
        return [r for r in mine if "WITHDRAWN" not in r["gates"].split()]

    def measured(self, sweep: str, quantity: str) -> list[tuple[Row, Interval]]:
        """List a sweep's measurements of a quantity, without verdicts."""
        wanted = (sweep, quantity, "")
        mine = (r for r in self.rows if (r["sweep"], r["quantity"], r["claim"]) == wanted)
        return [(r, e) for r in mine if (e := interval_of(r))]

    def covering(self, hidden: int) -> list[Regret]:
        """List regrets at the measured hidden size nearest to `hidden`; empty outside the range."""
        loads = self.measured("regime", "load, first_pass")
        load = {(r["task"], r["rank"]): e.value for r, e in loads}
        points = [
            (self.hidden[r["base"]], Regret(int(r["rank"]), load[r["task"], r["rank"]], e))
            for r, e in self.measured("regime", "regret_percent")
            if (r["task"], r["rank"]) in load and r["base"] in self.hidden and e.low is not None
        ]
        widths = sorted({width for width, _ in points})
        if not widths or not widths[0] <= hidden <= widths[-1]:
            return []
        nearest = min(widths, key=lambda w: abs(math.log(w / hidden)))
        return [point for width, point in points if width == nearest]

    def batch_effects(self) -> list[tuple[str, float]]:
        """List scales, and the change of ln(rho) of the highest rank per doubling of the batch."""
        found = self.measured("batch_size", "batch_effect")
        by_rank = sorted((int(r["rank"]), r["scale"], e.value) for r, e in found)
        return list({scale: effect for _, scale, effect in by_rank}.items())


def read_kept(folder: Path, hidden: Mapping[str, int]) -> Kept:
    """Read `folder`/rows.csv, if it is there; `hidden`: hidden size of each known model."""
    path = folder / ROWS
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []
    return Kept(rows, hidden)


# ---------------------------------------------------------------- measured data sets

INFORMATION = "information"
"""Folder of the results of action=measure, below the reports and the kept results."""


class Measured(NamedTuple):
    """The information in a file of rows under a model."""

    tokens_per_example: float
    bits: float
    """Code length of all rows, online during training; `low` and `high`: its 95% interval."""
    low: float
    high: float
    where: str
    """The file of the measurement, and the number of rows measured."""


def read_information(folders: Sequence[Path]) -> dict[tuple[str, str], Measured]:
    """Read the measurements, by (first digits of the SHA-256 of the rows' file, model).

    The first folder with a measurement counts. Measurements without a value for all rows (endless
    data, too few rows) are left out.
    """
    found: dict[tuple[str, str], Measured] = {}
    for path in (p for folder in folders for p in sorted((folder / INFORMATION).glob("*.json"))):
        try:
            value = json.loads(path.read_text())
            whole = value["prequential"]["bits"]["all"]
            rows, tokens = value["rows"], value["loss_tokens"]
            if whole["value"] is None or not value["rows_sha256"]:
                continue
            where = f"action=measure, {rows['measured']:,} of {rows['all']:,} rows ({path})"
            mean = tokens["all"] / rows["all"]
            measured = Measured(mean, whole["value"], whole["low"], whole["high"], where)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written, or broken
        found.setdefault((value["rows_sha256"], value["model"]), measured)
    return found


# ---------------------------------------------------------------- the input of the rules


@dataclass(frozen=True)
class Known:
    """The inputs of rules other than the customer."""

    models: Models
    machines: Mapping[str, Callable[[], Hardware]]
    """Name in conf/hardware -> function that reads the file."""
    kept: Kept = field(default_factory=Kept)
    published: Published = field(default_factory=published)
    hardware: Hardware | None = None
    """Hardware for customers who name none."""
    information: Mapping[tuple[str, str], Measured] = field(default_factory=dict)
    """The result of `read_information`."""


@cache
def _texts(name: str) -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / f"rules/{name}.yaml").read_text())


@dataclass(frozen=True)
class Case:
    """One customer, passed to all rules. The rules add reasons and warnings."""

    customer: Customer
    model: ModelSpec
    known: Known
    reasons: dict[str, Reason] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def note(
        self,
        name: str,
        value: Any,
        variant: str = "",
        inputs: Mapping[str, Any] | None = None,
        **words: Any,
    ) -> None:
        """Record the reason of a number, from the entry `name.variant` of rules/formulas.yaml.

        peak_gib_lora and peak_gib_full use the entry peak_gib. `inputs`: values in the formula.
        `words`: texts for the {placeholders} in formula and source.
        """
        key = name.removesuffix("_lora").removesuffix("_full")
        entry = _texts("formulas")[f"{key}.{variant}" if variant else key]
        words = {**self.known.published.values["sources"], **words}
        formula, source = (entry[k].format(**words) for k in ("formula", "source"))
        self.reasons[name] = Reason(name, value, formula, inputs or {}, source, Sure[entry["sure"]])

    def warn(self, name: str, /, **words: Any) -> None:
        """Record a warning of rules/warnings.yaml, unless it was recorded before."""
        text = _texts("warnings")[name].format(**words)
        if text not in self.warnings:
            self.warnings.append(text)
