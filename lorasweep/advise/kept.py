"""What kept answers say, read as files: verdicts, the map of regret over load, best rates, batches.

Answers hold for the models they were measured on; each rule says how far it goes beyond.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FIRST_PASS = "first_pass"
"""Key of the loads of kept answers, and of the count of bits that they are made of."""


class Interval(NamedTuple):
    """A value with its 95% interval; None: no bound is known."""

    value: float
    low: float | None
    high: float | None

    def text(self, digits: int = 3) -> str:
        """Return it as people read it."""
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}g} (no interval)"
        return f"{self.value:.{digits}g} [{self.low:.{digits}g}, {self.high:.{digits}g}]"


@dataclass(frozen=True)
class Verdict:
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


@dataclass(frozen=True)
class MapPoint:
    """One rank in one cell of the map."""

    model: str
    rank: int
    load: float
    """By FIRST_PASS, as customers' bits are counted: what a first pass over the rows costs."""
    regret: Interval
    """Percent of full fine-tuning's gain."""


@dataclass(frozen=True)
class Optimum:
    """The best rate of one curve."""

    model: str
    method: str
    rank: int | None
    dataset: str
    scale: str
    rate: Interval


@dataclass(frozen=True)
class Kept:
    """All that is read from the folder of kept results."""

    verdicts: tuple[Verdict, ...] = ()
    points: tuple[MapPoint, ...] = ()
    optima: tuple[Optimum, ...] = ()
    batch_effects: tuple[tuple[str, float], ...] = ()
    """Scale, and change of ln(LoRA's speed over full fine-tuning's) per doubling of the batch."""
    hidden: dict[str, int] = field(default_factory=dict)
    """Width of the models that answers are about."""

    def about(self, sweep: str, *claims: str) -> list[Verdict]:
        """List the verdicts of some claims of a sweep."""
        return [v for v in self.verdicts if v.sweep == sweep and v.claim in claims]

    def covered(self, hidden: int) -> list[MapPoint]:
        """List the points of the map whose model has this width or between whose it lies."""
        widths = sorted({self.hidden[p.model] for p in self.points if p.model in self.hidden})
        if not widths or not widths[0] <= hidden <= widths[-1]:
            return []
        nearest = min(widths, key=lambda w: abs(math.log(w / hidden)))
        return [p for p in self.points if self.hidden.get(p.model) == nearest]


def read(folder: Path, hidden: dict[str, int]) -> Kept:
    """Read the kept results; empty where there are none, as in an installed package.

    Args:
        folder: holds a folder an answer, each with results.json.
        hidden: width of each known model, by name.
    """
    answers = []
    for path in sorted(folder.glob("*/results.json")):
        try:
            answers.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue  # an answer that is being written, or is broken, says nothing
    return Kept(
        verdicts=tuple(v for a in answers for v in _verdicts(a)),
        points=tuple(p for a in answers if a.get("sweep") == "regime" for p in _points(a)),
        optima=tuple(o for a in answers if a.get("sweep") == "lr_ratio" for o in _optima(a)),
        batch_effects=tuple(
            e for a in answers if a.get("sweep") == "batch_size" for e in _effects(a)
        ),
        hidden=hidden,
    )


def _interval(found: dict[str, Any] | None) -> Interval | None:
    if not found or found.get("value") is None:
        return None
    return Interval(found["value"], found.get("low"), found.get("high"))


def _verdicts(answer: dict[str, Any]) -> Iterable[Verdict]:
    """Yield an answer's verdicts but those that are withdrawn."""
    for v in answer["verdicts"]:
        if any(gate["code"] == "WITHDRAWN" for gate in v.get("gates", ())):
            continue
        found = _interval(v["estimate"])
        where = (answer["sweep"], answer["scale"], v["claim"], v["group"])
        yield Verdict(*where, v["outcome"], found, bool(v.get("exploratory")))


def _points(answer: dict[str, Any]) -> Iterable[MapPoint]:
    for cell in answer["cells"]:
        model = cell["cell"].partition(",")[0]
        for r in cell["ranks"]:
            regret = _interval(r["regret_percent"])
            load = (r.get("loads") or {}).get(FIRST_PASS)
            if load and regret is not None and regret.low is not None:
                yield MapPoint(model, int(r["rank"]), load, regret)


def _optima(answer: dict[str, Any]) -> Iterable[Optimum]:
    for c in answer["curves"]:
        if c["best_lr"] is not None:
            rank = None if c["rank"] is None else int(c["rank"])
            rate = Interval(c["best_lr"], c["low"], c["high"])
            yield Optimum(c["model"], c["method"], rank, c["dataset"], answer["scale"], rate)


def _effects(answer: dict[str, Any]) -> Iterable[tuple[str, float]]:
    """Yield the effect at the highest rank."""
    by_rank = answer.get("batch_effect") or {}
    found = [(int(r), e["value"]) for r, e in by_rank.items() if e["value"] is not None]
    if found:
        yield answer["scale"], max(found)[1]
