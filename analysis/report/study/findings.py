"""The findings of the study: five on the page, others on the pages of their questions.

Every number is read from an answer, and the wording follows from the verdicts. A finding names its
bases, ranks and numbers of updates, and says if it rests on one base.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.inference.estimate import EXPLORATORY, Estimate, Verdict, fixed, number
from analysis.measures.regret import ALLOWED, COUNTS
from analysis.questions.base import mapped
from analysis.questions.lr_ratio import TEN
from analysis.questions.regime import EIGHTH, FIRST
from analysis.report.study.answers import Answer, estimate_of, listed
from analysis.report.study.figures import (
    BATCHES,
    CONTROL,
    REGIME,
    RateCurve,
    conditions_of,
    controls_of,
    judged_to,
    rate_curves,
    speed_answers,
    speeds,
)

FULL = " times full fine-tuning's"
ONE_BASE = "; one base only"
ASKED_LATER = ("rank", "short_runs", "compute")
"""Questions that were asked of runs of `regime` after their final losses had been seen."""
UNKNOWN = Estimate(None).plain()
Found = list[tuple[Answer, Verdict]]
Show = Callable[[Estimate], str]


@dataclass(frozen=True)
class Finding:
    """One sentence: a conclusion, and the numbers that it rests on."""

    sweep: str
    """The question whose page has the details."""
    lead: str
    said: str
    exploratory: bool = False
    """Whether no verdict behind it confirms anything."""

    @property
    def text(self) -> str:
        return f"{self.short}: {self.said}."

    @property
    def short(self) -> str:
        return f"**{self.lead}**{f' ({EXPLORATORY})' if self.exploratory else ''}"


def main(answers: Sequence[Answer]) -> list[Finding]:
    """Return the findings of the page: at most five."""
    made = (_regret, _growth, _learning_rates, _speed, _batches)
    return [f for of in made if (f := of(answers)) is not None]


def others(answers: Sequence[Answer]) -> list[Finding]:
    """Return the findings that only the pages of their questions have in full."""
    worse = found(answers, "layers", "attention_worse")
    alone, mlp = "Adapters on attention alone", "learn more slowly than on the MLP alone"
    made = [
        _capacity(answers),
        _large_batches(answers),
        of_claim(
            worse,
            f"{alone} {mlp}",
            f"{alone} do not {mlp}",
            "at equal parameters the ratio of their speeds was",
            with_unit(number),
            partly=f"{alone} {mlp} on {count(worse, 'SUPPORTED')} of {len(worse)} tasks",
        ),
        _rewards(answers),
        of_claim(
            found(answers, "compute", "flops_to_loss"),
            "LoRA saves a third of the work",
            "LoRA does not save a third of the work",
            "the number of operations to the same loss was",
            with_unit(number, FULL),
        ),
    ]
    return [f for f in made if f is not None]


# ---------------------------------------------------------------- how a finding is worded


def found(answers: Sequence[Answer], sweep: str, claim: str) -> Found:
    """Return a claim's verdicts that have an interval and stand; exploratory answers come last."""
    known = [
        (a, v)
        for a in answers
        if a.sweep == sweep
        for v in a.single
        if v.claim == claim and v.estimate.value is not None and v.estimate.has_interval()
        if not v.is_withdrawn
    ]
    return sorted(known, key=lambda one: one[0].exploratory)


def lead(verdicts: Found, yes: str, no: str, partly: str = "") -> str:
    """Return the start of a finding by the outcomes.

    Args:
        yes: if all verdicts are SUPPORTED.
        no: if some are REFUTED and none is SUPPORTED.
        partly: if some are SUPPORTED and others are not; default: `yes` in some settings only.
    """
    held = count(verdicts, "SUPPORTED")
    if held == len(verdicts):
        return yes
    if held:
        return partly or f"{yes} in some settings only"
    if count(verdicts, "REFUTED"):
        return no
    start = yes if yes.startswith("LoRA") else yes[0].lower() + yes[1:]
    return f"It is undecided whether {start}"


def of_claim(
    verdicts: Found,
    yes: str,
    no: str,
    said: str,
    show: Show,
    rank: Callable[[Sequence[float]], float] = max,
    partly: str = "",
) -> Finding | None:
    """Return a claim's outcome with the number of each answer; `said` comes before the first."""
    if not verdicts:
        return None
    sweep = verdicts[0][0].sweep
    explores = sweep in ASKED_LATER or all(v.exploratory for _, v in verdicts)
    numbers = listed([shown(a, v, show, rank, not explores) for a, v in verdicts])
    said = f"{said} {numbers}{_one_base(verdicts)}"
    return Finding(sweep, lead(verdicts, yes, no, partly), said, explores)


def shown(
    a: Answer,
    v: Verdict,
    show: Show,
    rank: Callable[[Sequence[float]], float] = max,
    marked: bool = True,
) -> str:
    """Return a number with its base, data, rank and number of updates; mark it if exploratory."""
    mark = f" ({EXPLORATORY})" if marked and v.exploratory else ""
    return f"{show(v.estimate)} on {a.where(v, rank)}{mark}"


def count(verdicts: Found, outcome: str) -> int:
    """Count the verdicts with an outcome."""
    return sum(v.outcome == outcome for _, v in verdicts)


def with_unit(show: Callable[[float], str], unit: str = "") -> Show:
    """Return a function that shows an estimate as value, unit and interval."""

    def text(e: Estimate) -> str:
        value = f"{show(e.value or 0.0)}{unit}"
        ends = f" [{show(e.low or 0.0)}, {show(e.high or 0.0)}]"
        return value + (ends if e.has_interval() else "")

    return text


def signed(value: float) -> str:
    """Show a value with its sign and one decimal."""
    return fixed(value, 1, "+")


def percent(value: float) -> str:
    """Show a value that is in percent, with one decimal."""
    return fixed(value, 1)


def _one_base(verdicts: Found) -> str:
    return ONE_BASE if len({base for a, _ in verdicts for base in a.bases}) == 1 else ""


def _span(values: Sequence[float], digits: int = 2) -> str:
    return " to ".join(dict.fromkeys(number(v, digits) for v in (min(values), max(values))))


def _ends(estimates: Sequence[Estimate], show: Show) -> str:
    """Show the lowest and the highest of some estimates with their intervals."""
    low, high = (f(estimates, key=lambda e: float(e.value or 0.0)) for f in (min, max))
    return " to ".join(dict.fromkeys((show(low), show(high))))


# ---------------------------------------------------------------- the findings of the page


Row = dict[str, Any]


def _at_eighth(verdicts: Found) -> dict[str, list[tuple[str, Row]]]:
    """Return place (base, rank, updates) -> (outcome, row of results.json) of each data set.

    The verdicts are of `regime`; the row is that of the rank of an eighth of the width.
    """
    named: dict[str, list[tuple[str, Row]]] = {}
    for a, v in verdicts:
        conditions: list[dict[str, Any]] = a.results["cells"]
        condition: Row = next((c for c in conditions if c["cell"] == v.group), {"ranks": []})
        width = a.runs["hidden_size"].max()
        row = next((r for r in condition["ranks"] if r["rank"] >= width / EIGHTH), None)
        if row is not None:
            base = condition["cell"].partition(",")[0]
            place = f"{base} (rank {row['rank']}, {condition['updates']} updates"
            named.setdefault(place, []).append((v.outcome, row))
    return named


def _sets(rows: Sequence[Any]) -> str:
    return f"; {len(rows)} data sets)" if len(rows) > 1 else ")"


def _regret(answers: Sequence[Answer]) -> Finding | None:
    """Report the regret at an eighth of the width, by base, rank and number of updates."""
    low, beyond = found(answers, REGIME, "low"), found(answers, REGIME, "beyond")
    if not low:
        return None
    show = with_unit(percent, "%")

    def by_base(verdicts: Found) -> list[str]:
        return [
            f"{listed([show(estimate_of(r['regret_percent'])) for _, r in rows])} on {place}"
            f"{_sets(rows)}"
            for place, rows in _at_eighth(verdicts).items()
        ]

    numbers = by_base(low)
    outcomes = {p.partition(" ")[0]: [o for o, _ in rows] for p, rows in _at_eighth(low).items()}
    for line, a in controls_of(answers):
        rank = max(line.regrets)
        if rank * EIGHTH == a.runs["hidden_size"].max():
            at = f"{line.base} (rank {rank}, {line.updates} updates)"
            numbers.append(f"{show(line.regrets[rank])} on {at}")
            control = found([a], BATCHES, f"at_{CONTROL}")
            outcomes.setdefault(line.base, []).extend(v.outcome for _, v in control)
    what = "LoRA at a rank of an eighth of the hidden size has"
    most = f"at most {100 * ALLOWED:g}% of the gain"
    words = {"yes": f"{what} no regret ({most}) on", "no": "it has regret on"}
    words["open"] = "this is undecided on"
    groups: dict[str, list[str]] = {k: [] for k in words}
    for base, of_base in outcomes.items():
        held, lost = (all(o == x for o in of_base) for x in ("SUPPORTED", "REFUTED"))
        groups["yes" if held else "no" if lost else "open"].append(base)
    if not groups["yes"]:
        words |= {"no": f"{what} regret (more than {100 * ALLOWED:g}% of the gain) on"}
        words |= {"open": f"it is undecided whether {what} no regret ({most}) on"}
    parts = [f"{words[k]} {listed(names)}" for k, names in groups.items() if names]
    said = f"regret was {listed(numbers)}"
    if lists := by_base(beyond):
        said += f"; where lists to memorise are new too, it was {listed(lists)}"
    return Finding(REGIME, f"Where only rules are new, {', and '.join(parts)}", said)


def _growth(answers: Sequence[Answer]) -> Finding | None:
    """Report the regret after FIRST updates and at the end, on the data sets of `_regret`."""
    show, parts, rising = with_unit(percent, "%"), [], []
    for place, rows in _at_eighth(found(answers, REGIME, "low")).items():
        base, _, arms = place.partition(" (")
        rank, _, updates = arms.partition(", ")
        known = []
        for _, r in rows:
            if (first := estimate_of(r["gap_nats_first"] or UNKNOWN)).has_interval():
                of_gain = mapped(first, (100 / r["gain_nats"]).__mul__)
                known.append((of_gain, estimate_of(r["regret_percent"])))
        rising += [(last.value or 0.0) > (first.value or 0.0) for first, last in known]
        if known:
            firsts, lasts = (listed([show(e) for e in of]) for of in zip(*known))
            parts.append(
                f"on {base} ({rank}{_sets(known)} it was {firsts} of the final gain after {FIRST} "
                f"updates, and {lasts} after {updates.partition(' ')[0]}"
            )
    if not parts:
        return None
    grows = "grows with training" if all(rising) else "does not always grow with training"
    text = f"Where only rules are new, the regret {grows}"
    asked = [v for a, v in found(answers, REGIME, "growth") if not a.setting(v.group)]
    said = f"{listed(parts)} (below 0 LoRA is ahead)"
    if open_ones := sum(v.outcome != "SUPPORTED" for v in asked):
        said += (
            f"; for the lowest rank it was asked beforehand, and not shown on {open_ones} of "
            f"{len(asked)} data sets"
        )
    said += f"{ONE_BASE if len(parts) == 1 else ''}"
    return Finding(REGIME, text, said, True)


def _learning_rates(answers: Sequence[Answer]) -> Finding | None:
    """Report the ratio of best learning rates on every base, and the cost of exactly ten times."""
    ratio = found(answers, "lr_ratio", "ratio")
    if not ratio:
        return None
    named = {base for a, _ in ratio for base in a.bases}
    rest = [c for c in rate_curves(answers) if c.base not in named and c.ratio.has_interval()]
    show = with_unit(percent)
    numbers = [(a.setting(v.group), shown(a, v, show)) for a, v in ratio]
    if rest:
        ratios = _ends([c.ratio for c in rest], show)
        numbers.append((rest[0].setting, f"{ratios} {_together(rest)}"))
    numbers.sort(key=lambda one: one[0])
    ends = [v.estimate.interval for _, v in ratio] + [c.ratio.interval for c in rest]
    apart = max(low for low, _ in ends) > min(high for _, high in ends)
    multiple = "no fixed multiple" if apart else "a similar multiple on all bases"
    costs = []
    for a, _ in ratio:
        judged = found([a], "lr_ratio", "ten_times")
        show_cost = with_unit(percent, "%")
        costs += [f"{show_cost(v.estimate)} of the gain on {', '.join(b.bases)}" for b, v in judged]
        best = [c["best_nll"] for c in a.results["curves"] if c["method"] == "fullft"]
        for r in a.results.get("ratios", ()) if not judged else ():
            if (nats := r["regrets"].get(TEN)) is not None:
                gain = float(a.runs["nll_start"].mean()) - best[0]
                costs.append(f"{percent(100 * nats / gain)}% of the gain on {', '.join(a.bases)}")
    said = f"the ratio was {listed([text for _, text in numbers])}"
    said += f"; exactly ten times costs {listed(costs)}" if costs else ""
    text = f"LoRA's best learning rate is {multiple} of full fine-tuning's"
    return Finding("lr_ratio", text, said)


def _together(curves: Sequence[RateCurve]) -> str:
    """Name some bases by what they share."""
    widths, ranks, updates = (
        _span([getattr(c, k) for c in curves], 4) for k in ("hidden", "rank", "updates")
    )
    mark = f" ({EXPLORATORY})" if all(c.exploratory for c in curves) else ""
    arms = f"(hidden size {widths}; rank {ranks}, {updates} updates)"
    return f"on {len(curves)} more bases {arms}{mark}"


def _speed(answers: Sequence[Answer]) -> Finding | None:
    """Report how the speed changes with the rank, and the speeds of all ranks."""
    made = of_claim(
        found(answers, "rank", "alike"),
        "The rank makes no difference to the speed of learning",
        "The higher the rank, the faster LoRA learns",
        "each doubling of the rank raises the speed by",
        with_unit(lambda slope: number(100 * math.expm1(slope), 2), "%"),
    )
    if made is None:
        return None
    said = made.said.removesuffix(ONE_BASE)
    for a in speed_answers(answers).values():
        last = judged_to(a)
        known = sorted((r, of[last]) for r, of in speeds(a.runs, [last]).items() if last in of)
        values = [fixed(float(e.value or 0.0), 2) for _, e in known]
        show = with_unit(lambda v: fixed(v, 2))
        values[-1:] = [show(v.estimate) for _, v in found([a], "rank", "parity")] or values[-1:]
        if known:
            ranks = listed([str(r) for r, _ in known])
            said += f"; it was {listed(values)} times full fine-tuning's at ranks {ranks}"
    said += _one_base(found(answers, "rank", "alike"))
    return Finding(made.sweep, made.lead, said, made.exploratory)


def _batches(answers: Sequence[Answer]) -> Finding | None:
    penalty = found(answers, "batch_size", "penalty")
    if not penalty:
        return None
    show = with_unit(lambda slope: signed(100 * math.expm1(slope)), "%")
    numbers = listed([shown(a, v, show) for a, v in penalty])
    said = f"each doubling changes LoRA's speed relative to full fine-tuning by {numbers}"
    slower = all((v.estimate.high or 0.0) < 0 for _, v in penalty)
    text = "Larger batches slow LoRA more than full fine-tuning"
    if slower and count(penalty, "UNDECIDED"):
        edge = percent(max(abs(100 * v.margin[1]) for _, v in penalty))
        said += f", and whether by more than the claim's margin of {edge}% is undecided"
    elif not slower:
        no = "Larger batches do not slow LoRA more than full fine-tuning"
        text = lead(penalty, text, no)
    return Finding("batch_size", text, said + _one_base(penalty))


# ---------------------------------------------------------------- other findings


def _capacity(answers: Sequence[Answer]) -> Finding | None:
    """Report the load at the needed rank, for each way of counting bits, on one base."""
    known = [
        c
        for c in conditions_of(answers)
        if c.get("bits") and c["rank_interpolated"]["value"] is not None
    ]
    lengths = {(c["cell"].partition(",")[0], c["updates"]) for c in known}
    if len(lengths) != 1 or len(known) < 2:
        return None
    ((base, updates),) = lengths
    spans = {
        kind: [v for c in known if (v := c["loads_needed"][kind]["value"]) is not None]
        for kind in COUNTS
    }
    if not all(spans.values()):
        return None
    ends = sorted((min(values), max(values)) for values in spans.values())
    apart = all(low > high for (_, high), (low, _) in itertools.pairwise(ends))
    loads = [f"{_span(values)} by {COUNTS[kind]}" for kind, values in spans.items()]
    return Finding(
        REGIME,
        f"Whether the data fit an adapter {'depends' if apart else 'hardly depends'} on how bits "
        "are counted",
        f"on {base} after {updates} updates a regret of {100 * ALLOWED:g}% takes ranks of "
        f"{_span([c['rank_interpolated']['value'] for c in known])}, on {len(known)} data sets, "
        f"and at 2 bits a parameter their load is {listed(loads)} (the last count was chosen "
        f"after a look){ONE_BASE}",
        True,
    )


def _large_batches(answers: Sequence[Answer]) -> Finding | None:
    """Say where large batches are no evidence, since LoRA has regret at a small one too."""
    control = found(answers, BATCHES, f"at_{CONTROL}")
    if not control or count(control, "SUPPORTED") == len(control):
        return None
    named = [
        f"{line.base} (rank {max(line.regrets)}, {line.updates} updates)"
        for line, _ in controls_of(answers)
    ]
    has = "has" if count(control, "REFUTED") else "may have"
    said = f"the control, a batch of {CONTROL}, {has} regret as well on {listed(named)}"
    text = "Whether batches of 512 and more are bad for LoRA cannot be said"
    return Finding(BATCHES, text, said + _one_base(control)) if named else None


def _rewards(answers: Sequence[Answer]) -> Finding | None:
    points = with_unit(signed, " points")
    one, top = found(answers, "rl", "rank_1"), found(answers, "rl", "top_rank")
    made = of_claim(
        one,
        "From rewards rank 1 learns as much as full fine-tuning",
        "From rewards rank 1 does not learn as much as full fine-tuning",
        "the difference of the final reward was",
        points,
        min,
    )
    if made is None:
        return None
    said = made.said
    if top:
        numbers = [shown(a, v, points, marked=not made.exploratory) for a, v in top]
        said += f"; at the highest rank it was {listed(numbers)}"
    few = [r for a, v in one if (r := a.parameters_an_episode(v)) is not None and r < 1]
    if few:
        said += (
            "; the study's claim is about more parameters than episodes, and here rank 1 has "
            f"{_span(few)} parameters an episode"
        )
    return Finding(made.sweep, made.lead, said, made.exploratory)
