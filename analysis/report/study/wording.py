"""How the findings are worded: verdicts as a first sentence, then a short one for each answer."""

import math
from collections.abc import Callable, Sequence

from analysis.inference.estimate import EXPLORATORY, Estimate, Verdict, fixed
from analysis.report.study.answers import Part
from analysis.report.study.setting import Setting

Found = list[tuple[Part, Verdict]]


def found(parts: Sequence[Part], sweep: str, claim: str) -> Found:
    """Return a claim's verdicts whose value has an interval; by task where there are tasks.

    Withdrawn ones are left out. Answers that are exploratory as a whole come last.
    """
    known = [
        (part, v)
        for part in parts
        if part.results["sweep"] == sweep
        for v in part.single
        if v.claim == claim and v.estimate.value is not None and v.estimate.has_interval()
        if not v.is_withdrawn
    ]
    return sorted(known, key=lambda one: one[0].exploratory)


def lead(
    verdicts: Found, yes: str, no: str, partly: str, undecided: str, condition: str = ""
) -> str:
    """Choose the start of a sentence by the outcomes, and emphasise it.

    "No" needs a refutation and no support; support beside anything else holds in places.
    `condition`: under which all of it was measured.
    """
    n, held = len(verdicts), count(verdicts, "SUPPORTED")
    none = no if count(verdicts, "REFUTED") else undecided
    return f"**{yes if held == n else partly if held else none}{condition}**"


def of_claim(
    verdicts: Found,
    yes: str,
    no: str,
    partly: str,
    undecided: str,
    said: str,
    show: Callable[[Estimate], str],
    ranks: Callable[[Part, Verdict], str] | None = None,
) -> str:
    """Return a claim's outcome and a sentence for each answer; `said` begins the first of them."""
    if not verdicts:
        return ""
    in_regime = all(part.setting(v.group) == Setting.IN_REGIME for part, v in verdicts)
    condition = ", where only rules are new" if in_regime else ""
    start = lead(verdicts, yes, no, partly, undecided, condition)
    return f"{start}. {each(verdicts, said, show, ranks)}"


def each(
    verdicts: Found,
    said: str,
    show: Callable[[Estimate], str],
    ranks: Callable[[Part, Verdict], str] | None = None,
) -> str:
    """Return a sentence for each answer, as they differ in base, rank or length."""
    out: list[str] = []
    for part, v in verdicts:
        start = f"On {where(part, v, ranks)} it was" if out else said
        place = "" if out else f" on {where(part, v, ranks)}"
        mark = f" ({EXPLORATORY})" if v.exploratory else ""
        out.append(f"{start} {show(v.estimate)}{place}{mark}.")
    return " ".join(out)


def where(part: Part, v: Verdict, ranks: Callable[[Part, Verdict], str] | None = None) -> str:
    """Name the base, the data, the rank and the number of updates of a verdict."""
    curves = part.curves(v)
    if not curves:
        return v.group
    data = (
        "only rules new"
        if part.setting(v.group) == Setting.IN_REGIME
        else str(curves[0]["dataset"]).partition("(")[0]
    )
    read = part.read(v).partition(";")[0]
    if "update" not in read:
        rank = ranks(part, v) if ranks else highest_rank(part, v)
        read = f"{rank}, {int(curves[0]['steps'])} updates"
    return f"{curves[0]['model']} ({data}; {read})"


def highest_rank(part: Part, v: Verdict) -> str:
    """Name the highest rank of a verdict's group."""
    return f"rank {max(_ranks(part, v)):g}"


def lowest_rank(part: Part, v: Verdict) -> str:
    """Name the lowest rank of a verdict's group."""
    return f"rank {min(_ranks(part, v)):g}"


def _ranks(part: Part, v: Verdict) -> list[float]:
    return [c["rank"] for c in part.curves(v) if c["rank"] is not None]


def with_unit(show: Callable[[float], str], unit: str = "") -> Callable[[Estimate], str]:
    """Return what shows an estimate as value, unit and interval."""

    def text(e: Estimate) -> str:
        return f"{show(e.value or 0.0)}{unit} [{show(e.low or 0.0)}, {show(e.high or 0.0)}]"

    return text


def count(verdicts: Found, outcome: str) -> int:
    """Count the verdicts with an outcome."""
    return sum(v.outcome == outcome for _, v in verdicts)


def change(slope: float) -> str:
    """Show the change of a ratio in percent, from a slope of its logarithm."""
    return fixed(100 * math.expm1(slope), 1, "+")


def signed(value: float) -> str:
    """Show a value with its sign and one decimal."""
    return fixed(value, 1, "+")


def percent(value: float) -> str:
    """Show a value that is in percent."""
    return fixed(value, 1)


def listed(words: Sequence[str]) -> str:
    """Join words by commas and a last "and"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
