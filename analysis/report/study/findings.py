"""The findings of the study: sentences of findings.yaml with numbers from the kept rows.

A finding lists the outcomes that its words state, those of its main claim first. If the rows have
others, the text is stale.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from analysis.inference.decide import EXPLORATORY
from analysis.inference.estimate import Estimate, fixed, number
from analysis.measures.rows import Row, pick
from analysis.report.study.answers import listed
from analysis.runs.table import TableError

TEXTS = Path(__file__).with_suffix(".yaml")
ON_PAGE = 5
"""Number of findings on the page; the others have a line below."""
Show = tuple[Callable[[float], float], Callable[[float], str], str]
SHOWN: dict[str, Show] = {
    "plain": (float, number, ""),
    "short": (float, lambda v: number(v, 2), ""),
    "times": (float, lambda v: fixed(v, 1), ""),
    "speed": (float, lambda v: fixed(v, 2), ""),
    "percent": (float, lambda v: fixed(v, 1), "%"),
    "whole percent": (float, lambda v: number(v, 2), "%"),
    "points": (float, lambda v: fixed(v, 1, "+"), " points"),
    "fold": (math.exp, number, "-fold"),
    "rise": (lambda log: 100 * math.expm1(log), lambda v: number(v, 2), "%"),
    "fall": (lambda log: -100 * math.expm1(log), lambda v: fixed(v, 1), "%"),
}
"""Way to show a number -> what is shown of the value, its format, its unit."""


@dataclass(frozen=True)
class Finding:
    """A conclusion and the numbers that it rests on."""

    sweep: str
    """The question whose page has the details."""
    text: str
    more: str
    """Sentences with further settings and numbers, for the question's page alone."""
    also: tuple[str, ...]
    """Other questions that the numbers come from."""
    used: tuple[Row, ...]
    """The rows whose numbers or outcomes the text states."""


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Fill the numbers into findings.yaml; the first ON_PAGE are those of the page.

    Raises:
        TableError: rows have other outcomes than a text states, or lack one of its numbers.
    """
    known = {k: list(g) for k, g in itertools.groupby(rows, lambda r: f"{r.sweep}-{r.scale}")}
    return [_filled(entry, known) for entry in yaml.safe_load(TEXTS.read_text())]


def _filled(entry: dict[str, Any], known: dict[str, list[Row]]) -> Finding:
    used: list[Row] = []
    explores = True
    for place, outcomes in entry.get("rests", {}).items():
        answer, _, claim = place.partition(": ")
        judged = pick(known.get(answer, ()), claim=claim)
        explores = explores if used else all(r.verdict.exploratory for r in judged if r.verdict)
        used += judged
        today = [r.verdict.shown for r in judged if r.verdict]
        if today != outcomes:
            raise TableError(
                f"{TEXTS.name}: the finding {entry['lead']!r} states {place} {outcomes}, but its "
                f"verdicts are {today}. Write the finding again."
            )
    numbers = {}
    for name, asked in entry["numbers"].items():
        numbers[name], mine = _number(known, **asked)
        used += mine
    mark = f" ({EXPLORATORY})" if explores else ""
    post = f", {entry['post']}" if "post" in entry else ""
    texts = [str(entry.get(k, "")).strip() for k in ("lead", "said", "more")]
    lead, said, more = (text.format(**numbers) for text in texts)
    text = f"**{lead}**{mark}{post}: {said}"
    return Finding(entry["sweep"], text, more, tuple(entry.get("also", ())), tuple(used))


def _number(
    known: dict[str, list[Row]], of: str, show: str = "plain", join: str = "", **values: Any
) -> tuple[str, list[Row]]:
    """Return a number of findings.yaml as text, and the rows that it is from.

    Args:
        of: the answer, and a claim or the name of a measured quantity: "rank-tiny: parity".
        show: a key of SHOWN.
        join: how to join the numbers of several rows: "all" lists them, "values" without their
            intervals; "most" is the highest; "ends" the lowest and the highest, "span" these two
            without their intervals.
        values: values of the rows' attributes; a list allows each of its values.
    """
    answer, _, name = of.partition(": ")
    rows = known.get(answer, ())
    found = pick(rows, claim=name) or pick(rows, name, verdict=None)
    for key, value in values.items():
        allowed = value if isinstance(value, list) else [value]
        found = [r for r in found if getattr(r, key) in allowed]
    found = [r for r in found if r.estimate.value is not None]
    if not found or (len(found) > 1 and not join):
        raise TableError(f"{TEXTS.name}: {len(found)} rows are {of} with {values}")
    ranked = sorted(found, key=lambda r: float(r.estimate.value or 0.0))
    ends, chosen = join in ("ends", "span"), ranked[-1:] if join == "most" else found
    chosen = [ranked[0], ranked[-1]] if ends else chosen
    texts = [_shown(r.estimate, show, join not in ("span", "values")) for r in chosen]
    return " to ".join(dict.fromkeys(texts)) if ends else listed(texts), found


def _shown(e: Estimate, show: str, interval: bool) -> str:
    to, write, unit = SHOWN[show]
    value = f"{write(to(float(e.value or 0.0)))}{unit}"
    if not (interval and e.has_interval()):
        return value
    low, high = sorted(map(to, e.interval))
    return f"{value} [{write(low)}, {write(high)}]"
