"""The basis of advice: published figures, this project's kept results, measured data sets.

Every number of an answer is noted with its formula, inputs, source and confidence.
"""

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
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value and (abs(value) >= 1e9 or abs(value) < 1e-3):
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)


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

FIRST_PASS = "first_pass"
"""Key, in kept results, of loads with bits counted in the study's way: loss in the first epoch."""


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


class Verdict(NamedTuple):
    """One judged claim."""

    sweep: str
    scale: str
    claim: str
    group: str
    outcome: str
    found: Interval | None
    exploratory: bool = False

    @property
    def line(self) -> str:
        """The verdict as text."""
        found = " (exploratory)" if self.exploratory else ""
        found += f" {self.found.text()}" if self.found else ""
        return f"{self.sweep}: {self.claim} {self.outcome}{found} at {self.scale} ({self.group})"


class MeasuredRegret(NamedTuple):
    """The regret of a rank at a load, in percent of full fine-tuning's gain.

    The sweep `regime` measured it. The bits of the load are those of FIRST_PASS.
    """

    model: str
    rank: int
    load: float
    regret: Interval


@dataclass(frozen=True)
class Kept:
    """The kept results that rules use. A result applies to the model on which it was measured."""

    verdicts: list[Verdict] = field(default_factory=list)
    regrets: list[MeasuredRegret] = field(default_factory=list)
    best_rates: dict[tuple[str, str], list[tuple[str, Interval]]] = field(default_factory=dict)
    """(Model, method) -> scale and data set, and the best learning rate measured there."""
    batch_effects: list[tuple[str, float]] = field(default_factory=list)
    """Scale, and change of ln(rho) of the highest rank per doubling of the batch size."""
    hidden: dict[str, int] = field(default_factory=dict)
    """Hidden size of each model."""

    def about(self, sweep: str, *claims: str) -> list[Verdict]:
        """List the verdicts of some claims of a sweep."""
        return [v for v in self.verdicts if v.sweep == sweep and v.claim in claims]

    def covering(self, hidden: int) -> list[MeasuredRegret]:
        """List regrets at the measured hidden size nearest to `hidden`; empty outside the range."""
        widths = sorted({self.hidden[p.model] for p in self.regrets if p.model in self.hidden})
        if not widths or not widths[0] <= hidden <= widths[-1]:
            return []
        nearest = min(widths, key=lambda w: abs(math.log(w / hidden)))
        return [p for p in self.regrets if self.hidden.get(p.model) == nearest]


def read_kept(folder: Path, hidden: dict[str, int]) -> Kept:
    """Read `folder`/*/results.json, if any; `hidden`: hidden size of each known model."""
    kept = Kept(hidden=hidden)
    for path in sorted(folder.glob("*/results.json")):
        try:
            answer = json.loads(path.read_text())
        except (OSError, ValueError):
            continue  # being written, or broken
        sweep, scale = answer.get("sweep", ""), answer.get("scale", "")
        for v in answer["verdicts"]:
            if not any(gate["code"] == "WITHDRAWN" for gate in v.get("gates", ())):
                where = (sweep, scale, v["claim"], v["group"], v["outcome"])
                exploratory = bool(v.get("exploratory"))
                kept.verdicts.append(Verdict(*where, _interval(v["estimate"]), exploratory))
        if sweep == "regime":
            for condition in answer["cells"]:
                model = condition["cell"].partition(",")[0]
                for r in condition["ranks"]:
                    regret = _interval(r["regret_percent"])
                    load = (r.get("loads") or {}).get(FIRST_PASS)
                    if load and regret is not None and regret.low is not None:
                        kept.regrets.append(MeasuredRegret(model, int(r["rank"]), load, regret))
        elif sweep == "lr_ratio":
            for c in answer["curves"]:
                if rate := _interval({**c, "value": c["best_lr"]}):
                    rates = kept.best_rates.setdefault((c["model"], c["method"]), [])
                    rates.append((f"{scale} on {c['dataset']}", rate))
        elif sweep == "batch_size":  # use the effect at the highest rank
            effects = (answer.get("batch_effect") or {}).items()
            found = [(int(r), e["value"]) for r, e in effects if e["value"] is not None]
            kept.batch_effects.extend([(scale, max(found)[1])] if found else [])
    return kept


def _interval(found: dict[str, Any] | None) -> Interval | None:
    if not found or found.get("value") is None:
        return None
    return Interval(found["value"], found.get("low"), found.get("high"))


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
