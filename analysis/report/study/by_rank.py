"""Regret over rank, one line a condition; and the room for the data by three counts of bits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.inference.estimate import Estimate, number, with_interval
from analysis.measures.regret import COUNTS
from analysis.report.study.answers import Part, estimate_of
from analysis.report.study.setting import Setting
from analysis.report.text import markdown

REGIME, BATCHES = "regime", "large_batches"
CONTROL = 32
"""Batch of the control of `large_batches`, which is a condition like those of `regime`."""
NOTHING = "nothing new"
"""Name of the cells without a gain to take a share of."""


@dataclass(frozen=True)
class Line:
    """The regrets of all ranks in one condition: a base, a data set, a length."""

    base: str
    data: str
    batch_size: int | None
    """None in answers that did not record it."""
    updates: int
    regrets: dict[int, Estimate]
    """By rank, percent of full fine-tuning's gain."""

    @property
    def name(self) -> str:
        """Base, data and length."""
        size = f" of {self.batch_size}" if self.batch_size else ""
        return f"{self.base}, {self.data}, {self.updates} updates{size}"


def lines_of(parts: Sequence[Part]) -> list[Line]:
    """Return the lines of `regime`, and the control of `large_batches` on another base."""
    found = [
        Line(
            base=(named := cell["cell"].partition(", "))[0],
            data=named[2],
            batch_size=cell.get("batch_size"),
            updates=int(cell["updates"]),
            regrets=_by_rank(cell["ranks"]),
        )
        for part in parts
        if part.results["sweep"] == REGIME
        for cell in part.results["cells"]
        if not cell["cell"].endswith(NOTHING)
    ]
    return [line for line in [*found, *(c for c, _ in controls_of(parts))] if line.regrets]


def controls_of(parts: Sequence[Part]) -> Iterator[tuple[Line, Part]]:
    """Yield the control of every answer of `large_batches` where only rules are new."""
    for part in parts:
        mine = [r for r in part.results.get("regrets", ()) if r["batch_size"] == CONTROL]
        if part.results["sweep"] != BATCHES or not mine or len(part.bases) != 1:
            continue
        if part.setting(part.verdicts[0].group) != Setting.IN_REGIME:
            continue
        line = Line(part.bases[0], "only rules new", CONTROL, mine[0]["updates"], _by_rank(mine))
        yield line, part


def _by_rank(rows: Sequence[dict[str, Any]]) -> dict[int, Estimate]:
    known = {int(r["rank"]): estimate_of(r["regret_percent"]) for r in rows}
    return {rank: e for rank, e in known.items() if e.value is not None}


def cells_with_bits(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return the cells of `regime` with known bits in which something is new."""
    cells = [c for p in parts if p.results["sweep"] == REGIME for c in p.results["cells"]]
    return [c for c in cells if c.get("bits") and not c["cell"].endswith(NOTHING)]


def room(parts: Sequence[Part]) -> list[str]:
    """Render, for every condition, its bits and the load of the needed rank by every count."""
    head = ["data set", "updates", "needed rank [95%]"]
    head += [f"{what} by {words}" for what in ("bits", "load") for words in COUNTS.values()]
    rows = [head]
    for cell in cells_with_bits(parts):
        bits = [_bits(cell["bits"].get(count)) for count in COUNTS]
        loads = [with_interval(estimate_of(cell["loads_needed"][count])) for count in COUNTS]
        rank = with_interval(estimate_of(cell["rank_interpolated"]))
        rows.append([cell["cell"], str(cell["updates"]), rank, *bits, *loads])
    return markdown(rows) if len(rows) > 1 else []


def _bits(value: float | None) -> str:
    return number(value) if value is None else f"{value:,.0f}"


def loads(parts: Sequence[Part]) -> list[str]:
    """Render the load of every rank by every count, with its regret."""
    head = [f"load by {words}" for words in COUNTS.values()]
    rows = [["data set", "updates", "rank", *head, "regret, % of the gain [95%]"]]
    for cell in cells_with_bits(parts):
        for r in cell["ranks"]:
            shown = [number(r["loads"].get(count)) for count in COUNTS]
            regret = with_interval(estimate_of(r["regret_percent"]))
            rows.append([cell["cell"], str(cell["updates"]), str(r["rank"]), *shown, regret])
    return markdown(rows) if len(rows) > 1 else []
