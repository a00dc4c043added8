"""An overview of the claims: their verdicts by base model, grouped by outcome."""

from collections.abc import Sequence

from analysis.inference.estimate import Verdict, number, with_interval
from analysis.report.study import Part, within
from analysis.report.text import markdown

OUTCOMES = ("SUPPORTED", "REFUTED", "UNDECIDED")
SOURCES = {"study": "the study's own", "popular": "popular: summaries, defaults, other papers"}
"""Where a claim comes from (`whose` in its sweep's file), in words."""
VARIANTS = ("-skills", "-knows", "-facts")
"""Suffixes of bases with the same shape and seed but another pretraining task: they share a column.
"""
MANY_BASES = "more than one base"

Claim = list[tuple[Part, list[Verdict]]]
"""One claim: the answers that judge it, each with its verdicts; one over all tasks comes first."""


def claims_of(parts: Sequence[Part]) -> list[Claim]:
    """Collect each claim's verdicts from all answers."""
    found: dict[tuple[str, str], Claim] = {}
    for part in parts:
        for name in dict.fromkeys(v.claim for v in part.verdicts):
            mine = [v for v in part.verdicts if v.claim == name]
            found.setdefault((part.results["sweep"], name), []).append((part, mine))
    return list(found.values())


def base_of(part: Part) -> str:
    """Return the base model of an answer, as the head of a column."""
    stems = {next((b.removesuffix(v) for v in VARIANTS if b.endswith(v)), b) for b in part.bases}
    return stems.pop() if len(stems) == 1 else MANY_BASES


def bases(found: Sequence[Claim]) -> list[str]:
    """Return the base models, the largest first; answers over more than one base come last."""
    size = {base_of(part): part.size for at in found for part, _ in at}
    return sorted(size, key=lambda b: (b == MANY_BASES, -size[b], b))


def glance(found: Sequence[Claim], shown: Sequence[str], needs: bool = True) -> list[str]:
    """Render claims as a Markdown table, one row per claim and one column per base.

    Args:
        needs: add how the claim is measured, its qualifications, and what would decide it.
    """
    rows = [["claim", "counts as yes", *shown]]
    for at in found:
        part, (v, *_) = at[0]
        said = f"{part.says(v.claim)} (`{part.results['sweep']}: {v.claim}`)"
        if needs:
            notes = [part.word(v.claim, k) for k in ("measure", "beside")]
            said = "<br>".join([said, *(f"*{note}*" for note in notes if note)])
        rows.append([said, within(v), *("<br>".join(_cells(at, base, needs)) for base in shown)])
    return markdown(rows)


def _cells(at: Claim, base: str, needs: bool) -> list[str]:
    heads = [
        (part, v, by_task)
        for part, verdicts in at
        if base_of(part) == base
        for v, by_task in _heads(part, verdicts)
    ]
    out = []
    for part, v, by_task in heads:
        where = f" (`{part.results['scale']}`)" if len(heads) > 1 else ""
        before = [o for o in OUTCOMES if v.why.startswith(f"{o} alone")]
        holm = f", {before[0]} before Holm's correction" if before else ""
        out.append(f"**{v.outcome}**{holm}{where}")
        out.append(_by_task(by_task) if by_task else with_interval(v.estimate))
        if part.read(v):
            out.append(f"*{part.read(v)}*")
        if needs and v.outcome == "UNDECIDED" and v.needed:
            out.append(f"needs {v.needed}")
    return out


def _by_task(verdicts: Sequence[Verdict]) -> str:
    values = {
        o: sorted(number(v.estimate.value) for v in verdicts if v.outcome == o) for o in OUTCOMES
    }
    return "by task: " + "; ".join(f"{o} at {', '.join(v)}" for o, v in values.items() if v)


FATES = (
    ("Refuted on every base", lambda o: o == {"REFUTED"}),
    ("Supported on every base", lambda o: o == {"SUPPORTED"}),
    ("Supported in one answer, refuted in another", lambda o: {"SUPPORTED", "REFUTED"} <= o),
    ("Refuted in one answer, undecided in another", lambda o: o == {"REFUTED", "UNDECIDED"}),
    ("Supported in one answer, undecided in another", lambda o: o == {"SUPPORTED", "UNDECIDED"}),
    ("Undecided", lambda o: o == {"UNDECIDED"}),
)
"""Groups of claims by their outcomes in all answers; each claim is in exactly one."""
CONTROLS = "Checks of the instrument, and controls"


def by_fate(claims: Sequence[Claim]) -> dict[str, list[Claim]]:
    """Group claims by their outcomes in all answers; controls are a group of their own.

    Empty groups are left out. If there is a verdict over all tasks, those by task do not count.
    """
    controls = [at for at in claims if _source(at) not in SOURCES]
    others = [at for at in claims if _source(at) in SOURCES]
    fates = {name: [at for at in others if is_so(_outcomes(at))] for name, is_so in FATES}
    return {name: mine for name, mine in {**fates, CONTROLS: controls}.items() if mine}


def _outcomes(at: Claim) -> set[str]:
    return {v.outcome for part, verdicts in at for v, _ in _heads(part, verdicts)}


def _heads(part: Part, verdicts: Sequence[Verdict]) -> list[tuple[Verdict, Sequence[Verdict]]]:
    """Return the verdict over all tasks with those by task; without one, each verdict alone."""
    overall = part.overall(verdicts[0].claim)
    return [(overall, verdicts[1:])] if overall else [(v, ()) for v in verdicts]


def _source(at: Claim) -> str:
    part, (v, *_) = at[0]
    return part.word(v.claim, "whose") or "ours"


def tally(claims: Sequence[Claim]) -> list[str]:
    """Count claims by source and outcome, each claim once."""
    fates = {name: mine for name, mine in by_fate(claims).items() if name != CONTROLS}
    rows = [["claims", *(name.lower() for name in fates)]]
    for source, label in SOURCES.items():
        counts = [sum(_source(at) == source for at in mine) for mine in fates.values()]
        rows.append([label, *map(str, counts)])
    return markdown(rows)
