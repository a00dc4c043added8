"""Flat rows: one for each judged claim, and one for each quantity measured on a curve or condition.

Questions make them; results.json keeps them. Pages, figures, findings, the ledger and the adviser
read nothing else of an answer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analysis.inference.decide import Verdict, gate_of
from analysis.inference.estimate import Estimate
from analysis.inference.where import Where, where_of
from analysis.runs.table import TableError


@dataclass(frozen=True, kw_only=True)
class Row(Where):
    """A measured quantity and its place; with `verdict`, the judged claim about it."""

    quantity: str
    """Estimand of a claim; otherwise a name such as best_lr or regret_percent."""
    estimate: Estimate
    sweep: str = ""
    scale: str = ""
    verdict: Verdict | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    """The claim as in question.json: its text, source, measure and note."""

    @property
    def claim(self) -> str:
        """Name of the claim; empty without a verdict."""
        return self.verdict.claim if self.verdict else ""

    @property
    def says(self) -> str:
        """The claim's sentence."""
        return self.asked.get("text") or self.claim.replace("_", " ")

    def measurement(self) -> dict[str, Any]:
        """Return quantity, estimate and place as values for JSON."""
        plain = {"quantity": self.quantity, "estimate": self.estimate.plain()}
        return {**plain, **self.plain()}

    def cells(self) -> dict[str, Any]:
        """Return the row's cells, by column, with six digits; None: not known."""
        e, v = self.estimate, self.verdict
        known = {k: getattr(self, k) for k in COLUMNS if hasattr(self, k)} | e.plain()
        known |= {"setting": self.setting.name, "flags": " ".join(e.flags)}
        if v is not None:
            known |= {k: value for k, value in vars(v).items() if k not in ("claim", "estimate")}
            known |= {"outcome": v.not_asked or v.outcome, "source": self.asked.get("source")}
            known |= {"margin_low": v.margin[0], "margin_high": v.margin[1]}
            known |= {"gates": " ".join(g.code.name for g in v.gates)}
        digits = {k: f"{v:.6g}" for k, v in known.items() if isinstance(v, float)}
        return {k: digits.get(k, known.get(k)) for k in COLUMNS}


COLUMNS = (
    *("sweep", "scale", "base", "data", "setting", "task", "arm", "rank", "batch_size", "updates"),
    *("alpha", "at", "quantity", "value", "low", "high", "level", "flags", "claim", "source"),
    *("primary", "expected", "margin_low", "margin_high", "outcome", "gates", "exploratory"),
    *("why", "needed"),
)
"""Columns of a table of rows. `gates`, `flags`: names with spaces between them."""


def measured(where: Where, quantity: str, estimate: Estimate | float | None, **other: Any) -> Row:
    """Return the row of a quantity; a number has no interval. `other`: fields of the place."""
    e = estimate if isinstance(estimate, Estimate) else Estimate(estimate)
    return Row(**{**where.place, **other}, quantity=quantity, estimate=e)


def csv_of(rows: Iterable[Row]) -> str:
    """Return rows as a table in CSV; a cell that is not known is empty."""
    table = pd.DataFrame([r.cells() for r in rows], columns=COLUMNS, dtype=object)
    return table.to_csv(index=False, lineterminator="\n")


def pick(rows: Iterable[Row], quantity: str = "", **values: Any) -> list[Row]:
    """Return the rows of a quantity (empty: any) with the given values of attributes."""
    wanted = {**({"quantity": quantity} if quantity else {}), **values}
    return [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]


def estimate_of(plain: Mapping[str, Any]) -> Estimate:
    """Read an estimate from results.json."""
    return Estimate(**{**plain, "flags": tuple(plain["flags"])})


def verdict_of(plain: Mapping[str, Any]) -> Verdict:
    """Read a verdict from results.json."""
    read = {"estimate": estimate_of(plain["estimate"]), "margin": tuple(plain["margin"])}
    read |= {"gates": tuple(map(gate_of, plain["gates"])), "where": where_of(plain["where"])}
    return Verdict(**{**plain, **read})


def rows_of(results: Mapping[str, Any], question: Mapping[str, Any]) -> list[Row]:
    """Return the rows of an answer: of its curves, its other measurements, and its verdicts.

    `results`: results.json; TableError if an earlier version wrote it. `question`: question.json,
    with today's keys.
    """
    of = {"sweep": results["sweep"], "scale": results["scale"]}
    rows = list[Row]()
    if "rows" not in results:
        raise TableError(f"{results['sweep']} has results of an earlier version: judge it again.")

    def add(where: Where, quantity: str, e: Estimate, **more: Any) -> None:
        rows.append(Row(**where.place, **of, quantity=quantity, estimate=e, **more))

    for c in results["curves"]:
        place = where_of(c["where"])
        best = Estimate(c["best_lr"], c["low"], c["high"], c["n"], tuple(c["flags"]))
        add(place, "best_lr", best)
        add(place, "best_loss", Estimate(c["best_nll"]))
        if c["band"]:
            add(place, "lr_band", Estimate(None, *c["band"]))
    for r in results["rows"]:
        add(where_of(r), r["quantity"], estimate_of(r["estimate"]))
    for v in map(verdict_of, results["verdicts"]):
        asked = question["claims"].get(v.claim, {})
        add(v.where, asked.get("estimand", v.claim), v.estimate, verdict=v, asked=asked)
    return rows
