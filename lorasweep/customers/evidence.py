"""What advice is based on: published figures, this project's kept results, measured data sets.

Every number of an answer is noted with its formula, inputs, source and confidence. Kept results
hold for the models they were measured on; each rule says how far it extrapolates.
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

from lorasweep.customers.read import Customer, Models
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
    """Where a number comes from."""

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
    """The entries of published.yaml, each with its source."""

    values: dict[str, Any]

    def without(self, sources: Iterable[str]) -> "Published":
        """Return the entries of all other sources."""
        gone = set(sources)

        def left(entry: Any) -> Any:
            if isinstance(entry, list):
                return [e for e in entry if e["source"] not in gone]
            return None if isinstance(entry, dict) and entry.get("source") in gone else entry

        return Published({name: left(entry) for name, entry in self.values.items()})

    def entries(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        """List the entries of one kind that have the wanted values."""
        return [e for e in self.values[name] if all(e.get(k) == v for k, v in wanted.items())]


@cache
def published() -> Published:
    """Read published.yaml."""
    return Published(yaml.safe_load(Path(__file__).with_name("published.yaml").read_text()))


# ---------------------------------------------------------------- kept results

FIRST_PASS = "first_pass"
"""Key of the loads in kept results that count bits as a first pass over the rows does."""


class Interval(NamedTuple):
    """A value with its 95% interval; None: no bound is known."""

    value: float
    low: float | None
    high: float | None

    def text(self) -> str:
        """Format it for people."""
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
    """The regret of one rank at one load, from the sweep `regime`."""

    model: str
    rank: int
    load: float
    """Counted by FIRST_PASS, as customers' bits are."""
    regret: Interval
    """Percent of full fine-tuning's gain."""


@dataclass(frozen=True)
class Kept:
    """What the rules use of the kept results."""

    verdicts: list[Verdict] = field(default_factory=list)
    regrets: list[MeasuredRegret] = field(default_factory=list)
    best_rates: dict[tuple[str, str], list[tuple[str, Interval]]] = field(default_factory=dict)
    """(Model, method) -> scale and data set, and the best learning rate measured there."""
    batch_effects: list[tuple[str, float]] = field(default_factory=list)
    """Scale, and change of ln(LoRA's speed over full fine-tuning's) per doubling of the batch."""
    hidden: dict[str, int] = field(default_factory=dict)
    """Hidden size of the models that the results are about."""

    def about(self, sweep: str, *claims: str) -> list[Verdict]:
        """List the verdicts of some claims of a sweep."""
        return [v for v in self.verdicts if v.sweep == sweep and v.claim in claims]

    def covering(self, hidden: int) -> list[MeasuredRegret]:
        """List the regrets at the measured width nearest to `hidden`; none outside those widths."""
        widths = sorted({self.hidden[p.model] for p in self.regrets if p.model in self.hidden})
        if not widths or not widths[0] <= hidden <= widths[-1]:
            return []
        nearest = min(widths, key=lambda w: abs(math.log(w / hidden)))
        return [p for p in self.regrets if self.hidden.get(p.model) == nearest]


def read_kept(folder: Path, hidden: dict[str, int]) -> Kept:
    """Read */results.json of a folder; empty where there are none, as in an installed package.

    `hidden`: hidden size of each known model, by name.
    """
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
        elif sweep == "batch_size":  # the effect at the highest rank
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
"""Folder of measurements by action=measure, below the reports and the kept results."""


class Measured(NamedTuple):
    """The information in a file of rows under a model."""

    tokens_per_example: float
    bits: float
    """Of all rows, by online coding during training."""
    low: float
    high: float
    where: str
    """The file of the measurement, and how many of the rows it covers."""


def read_information(folders: Sequence[Path]) -> dict[tuple[str, str], Measured]:
    """Read the measurements, by the digits that name the file of rows and by model.

    The first folder with a measurement counts. Measurements of endless data or of too few rows
    give no value for all rows, and are left out.
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


# ---------------------------------------------------------------- what the rules are given


@dataclass(frozen=True)
class Known:
    """What the rules are based on: catalogues, kept results, published figures."""

    models: Models
    machines: Mapping[str, Callable[[], Hardware]]
    """Name in conf/hardware -> reads its file."""
    kept: Kept = field(default_factory=Kept)
    published: Published = field(default_factory=published)
    hardware: Hardware | None = None
    """For rows that name none."""
    information: Mapping[tuple[str, str], Measured] = field(default_factory=dict)
    """Measurements of customers' data, as `read_information` returns them."""


@cache
def _texts(name: str) -> dict[str, Any]:
    """Read rules/formulas.yaml or rules/warnings.yaml."""
    return yaml.safe_load((Path(__file__).parent / f"rules/{name}.yaml").read_text())


@dataclass(frozen=True)
class Case:
    """One customer, as all rules get it; they add reasons and warnings."""

    customer: Customer
    model: ModelSpec
    known: Known
    reasons: dict[str, Reason] = field(default_factory=dict)
    """In the order in which they were found."""
    warnings: list[str] = field(default_factory=list)

    def note(
        self,
        name: str,
        value: Any,
        variant: str = "",
        inputs: Mapping[str, Any] | None = None,
        **words: Any,
    ) -> None:
        """Record where a number comes from.

        Args:
            name: of the number; peak_gib_lora has the formula of peak_gib.
            value: the number.
            variant: which of the formulas in rules/formulas.yaml.
            inputs: values that the formula uses.
            words: replace the {words} of formula and source.
        """
        key = name.removesuffix("_lora").removesuffix("_full")
        entry = _texts("formulas")[f"{key}.{variant}" if variant else key]
        words = {**self.known.published.values["sources"], **words}
        formula, source = (entry[k].format(**words) for k in ("formula", "source"))
        self.reasons[name] = Reason(name, value, formula, inputs or {}, source, Sure[entry["sure"]])

    def warn(self, name: str, /, **words: Any) -> None:
        """Record a warning of rules/warnings.yaml, once."""
        text = _texts("warnings")[name].format(**words)
        if text not in self.warnings:
            self.warnings.append(text)
