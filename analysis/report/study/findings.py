"""Sentences that rest on rows: the findings (findings.yaml), and the ledger (ledger.yaml).

A finding has numbers from the kept rows, and lists the outcomes that its words state, those of its
main claim first. If the rows have others, the text is stale. The ledger has every sentence of the
study and of its popular summaries, with all verdicts on it.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from analysis.inference.decide import EXPLORATORY, WITHDRAWN, Verdict
from analysis.inference.estimate import AT_LEAST, Estimate, fixed, number
from analysis.measures.rows import Row, Setting, pick
from analysis.report.study.answers import WORDS, Answer, listed
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


class Finding(NamedTuple):
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


# ---------------------------------------------------------------- the ledger

SENTENCES = TEXTS.with_name("ledger.yaml")
OUTCOMES = ("SUPPORTED", "REFUTED", BETTER := "REFUTED, being better", "UNDECIDED", WITHDRAWN)
NOT_TESTED = "not tested"
OTHERS = "Other questions"


def ledger(answers: Sequence[Answer]) -> list[list[str]]:
    """Return the ledger's rows, one sentence a row after the head.

    Claims that are not in ledger.yaml but have an answer come last.
    """
    judged = [(f"{r.sweep}: {v.claim}", r, v) for a in answers for r, v in a.single]
    blocks = yaml.safe_load(SENTENCES.read_text())
    claims = {name for block in blocks for s in block["sentences"] for name in claims_of(s)}
    says = {name: r.says for name, r, _ in judged if name not in claims}
    others = [{"says": f"{t[0].upper()}{t[1:]}", "claim": name} for name, t in says.items()]
    blocks += [{"from": OTHERS, "sentences": others}] if others else []
    episodes = [r for a in answers for r in pick(a.rows, "parameters_an_episode")]
    rows = [["sentence", *WORDS.values()]]
    for block in blocks:
        rows.append([f"**{block['from']}**", *("" for _ in Setting)])
        for s in block["sentences"]:
            mine = [(r, v) for name, r, v in judged if name in claims_of(s)]
            cells = [_counted([j for j in mine if j[0].setting == k], s, episodes) for k in Setting]
            text = f"{s['says']} ({s['note']})" if "note" in s else s["says"]
            rows.append([text, *(cells if mine else [NOT_TESTED, *cells[1:]])])
    return rows


def claims_of(sentence: dict[str, Any]) -> Sequence[str]:
    """Return the claims that judge a sentence, as `sweep: claim`; empty: no sweep tests it."""
    named = sentence.get("claim", ())
    return (named,) if isinstance(named, str) else named


def _counted(
    judged: Sequence[tuple[Row, Verdict]], sentence: dict[str, Any], episodes: Sequence[Row]
) -> str:
    """Count the outcomes in one setting with their scales, confirmatory ones first.

    Also show the parameters per sampled completion of the lowest rank, if the sentence has
    `episodes`; with `at_most`, only the upper end of the claim's margin counts.
    """

    def outcome(v: Verdict) -> str:
        if v.is_withdrawn:
            return WITHDRAWN
        if not sentence.get("at_most"):
            return BETTER if v.is_better else v.outcome
        e, most = v.estimate, v.margin[1]
        if v.gates or e.low is None or e.high is None or AT_LEAST in e.flags:
            return "UNDECIDED"
        return "SUPPORTED" if e.high <= most else "REFUTED" if e.low > most else "UNDECIDED"

    by_mark: dict[bool, list[tuple[Row, str]]] = {}
    for r, v in judged:
        explores = bool(v.exploratory) and not v.is_withdrawn
        by_mark.setdefault(explores, []).append((r, outcome(v)))
    lines = []
    for explores, mine in sorted(by_mark.items()):
        counts = Counter(outcome for _, outcome in mine)
        n = f" {{}} of {len(mine)}" if len(mine) > 1 else ""
        words = ", ".join(f"**{o}**{n.format(counts[o])}" for o in OUTCOMES if counts[o])
        scales = [f"`{r.scale.partition('_')[0]}`" for r, _ in mine]
        mark = f" ({EXPLORATORY})" if explores else ""
        lines.append(f"{words} at {', '.join(dict.fromkeys(scales))}{mark}")
    known = []
    for r in (r for r, _ in judged if sentence.get("episodes")):
        of_task = pick(episodes, sweep=r.sweep, scale=r.scale, task=r.task)
        lowest = min((e.rank for e in of_task), default=None)
        known += [float(e.estimate.value or 0) for e in of_task if e.rank == lowest]
    if known:
        shown = dict.fromkeys(f"{float(f'{x:.2g}'):,g}" for x in (min(known), max(known)))
        lines.append(f"at {' to '.join(shown)} parameters an episode")
    return "<br>".join(lines)
