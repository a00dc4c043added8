"""How the findings are worded: verdicts as the start of a sentence, their values by setting."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from analysis.inference.estimate import EXPLORATORY, Verdict, number
from analysis.report.study.answers import FIRST_STUDY, Part
from analysis.report.study.setting import WORDS, Setting

Found = list[tuple[Part, Verdict]]


def found(parts: Sequence[Part], sweep: str, claim: str) -> Found:
    """Return a claim's verdicts whose value has an interval; by task where there are tasks.

    Withdrawn ones are left out.
    """
    return [
        (part, v)
        for part in parts
        if part.results["sweep"] == sweep
        for v in part.single
        if v.claim == claim and v.estimate.value is not None and v.estimate.has_interval()
        if not v.is_withdrawn
    ]


def lead(verdicts: Found, yes: str, no: str, partly: str, undecided: str) -> str:
    """Choose the start of a sentence by the outcomes, and emphasise it.

    "No" needs a refutation and no support; support beside anything else holds in places.
    """
    n, held = len(verdicts), count(verdicts, "SUPPORTED")
    none = no if count(verdicts, "REFUTED") else undecided
    return f"**{yes if held == n else partly if held else none}**"


def of_claim(
    verdicts: Found,
    yes: str,
    no: str,
    partly: str,
    undecided: str,
    said: str,
    shown: Callable[[float], str] = number,
    unit: str = "",
    words: Mapping[Setting, str] = WORDS,
) -> str:
    """Return a sentence about one claim; `said` has a place for the values by setting."""
    if not verdicts:
        return ""
    start = lead(verdicts, yes, no, partly, undecided)
    return f"{start}: {said.format(by_setting(verdicts, shown, unit, words))}{end(verdicts)}"


def count(verdicts: Found, outcome: str) -> int:
    """Count the verdicts with an outcome."""
    return sum(v.outcome == outcome for _, v in verdicts)


def sets(verdicts: Found) -> str:
    """Say how many data sets verdicts are about, one each."""
    return "one data set" if len(verdicts) == 1 else f"{len(verdicts)} data sets"


def end(verdicts: Found) -> str:
    """End a sentence, with the mark of all that it says: of the first study, or exploratory."""
    if all(part.first_study for part, _ in verdicts):
        return f" ({FIRST_STUDY})."
    return f" ({EXPLORATORY})." if all(v.exploratory for _, v in verdicts) else "."


def change(slope: float) -> str:
    """Return the change of a ratio in percent, from a slope of its logarithm."""
    return f"{100 * math.expm1(slope):+.0f}%"


def in_percent(v: Verdict) -> Verdict:
    """Return a verdict whose estimate is a share with its value in percent; None stays None."""
    share = v.estimate.value
    percent = None if share is None else 100 * share
    return replace(v, estimate=replace(v.estimate, value=percent))


def signed(value: float) -> str:
    """Show a value with its sign and one decimal."""
    return f"{value:+.1f}"


def percent(value: float) -> str:
    """Show a value that is in percent."""
    return f"{value:.0f}%"


def by_setting(
    verdicts: Found,
    shown: Callable[[float], str] = number,
    unit: str = "",
    words: Mapping[Setting, str] = WORDS,
) -> str:
    """Give the range of the values in each setting."""
    values: dict[Setting, list[float | None]] = {}
    for part, v in verdicts:
        values.setdefault(part.setting(v.group), []).append(v.estimate.value)
    return listed([f"{span(values[s], shown)}{unit} {words[s]}" for s in Setting if s in values])


def listed(words: Sequence[str]) -> str:
    """Join words by commas and a last "and"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def span(values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    """Show the lowest and the highest value, or the one that they are."""
    known = [v for v in values if v is not None]
    texts = sorted({shown(min(known)), shown(max(known))}, key=lambda t: float(t.rstrip("%")))
    return " to ".join(texts)
