"""The findings of the study: five on the page, others on the pages of their questions.

Every number is read from an answer, and the wording follows from the verdicts. A finding names its
bases, ranks and numbers of updates, and says what the study claims: it is called "the post".
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis.inference.estimate import EXPLORATORY, Estimate, Verdict, fixed, number
from analysis.measures.regret import ABOVE_FLOOR, ALLOWED, COUNTS, FIRST_PASS, GENERATOR
from analysis.questions.base import mapped
from analysis.questions.lr_ratio import TEN
from analysis.questions.rate_law import RATE_LAW, WITHIN
from analysis.questions.regime import EIGHTH, FIRST
from analysis.report.study.answers import Answer, called, estimate_of, listed
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

ON_PAGE = 5
"""Largest number of findings on the page."""
FULL = " times full fine-tuning's"
AVERAGE = "each doubling raises speed on average by"
UNKNOWN = Estimate(None).plain()
UNDECIDED = "It is undecided whether"
BEYOND = "which the post expects only beyond an adapter's capacity"
COUNTED = {
    GENERATOR: "by what the generator of the data changed",
    FIRST_PASS: "by the loss of a first pass over them (the post's count)",
    ABOVE_FLOOR: "by that loss without their randomness",
}
"""The keys of COUNTS -> words for a reader who knows none of them."""
Found = list[tuple[Answer, Verdict]]
Show = Callable[[Estimate], str]
Where = tuple[str, int, int]
"""Base, rank, number of updates."""


@dataclass(frozen=True)
class Finding:
    """One or two sentences: a conclusion, and the numbers that it rests on."""

    sweep: str
    """The question whose page has the details."""
    lead: str
    said: str
    exploratory: bool = False
    """Whether no verdict behind it confirms anything."""
    more: str = ""
    """Sentences with further settings and numbers, for the question's page alone."""
    post: str = ""
    """Whether the study says so, in words that follow the lead."""
    also: tuple[str, ...] = ()
    """Other questions that the numbers come from."""

    @property
    def text(self) -> str:
        mark = f" ({EXPLORATORY})" if self.exploratory else ""
        return f"**{self.lead}**{mark}{f', {self.post}' if self.post else ''}: {self.said}."


def main(answers: Sequence[Answer]) -> list[Finding]:
    """Return the findings for the page: important ones first, undecided ones last.

    The page has room for the first ON_PAGE; the rest stand among the others.
    """
    made = (_regret, _growth, _learning_rates, _law, _speed, _batches)
    known = [f for of in made if (f := of(answers)) is not None]
    return sorted(known, key=lambda f: f.lead.startswith(UNDECIDED))


def others(answers: Sequence[Answer]) -> list[Finding]:
    """Return the findings that only the pages of their questions have in full."""
    worse = found(answers, "layers", "attention_worse")
    alone, mlp = "Adapters on attention alone", "learn more slowly than on the MLP alone"
    slower = f" (slower: under {worse[0][1].margin[1]:g})" if worse else ""
    made = [
        _capacity(answers),
        _large_batches(answers),
        of_claim(
            worse,
            f"{alone} {mlp}",
            f"{alone} do not {mlp}",
            f"at equal parameters, the speed on attention over that on the MLP{slower}, each "
            "against full fine-tuning, is",
            with_unit(number),
            partly=f"{alone} {mlp} on {count(worse, 'SUPPORTED')} of {len(worse)} tasks",
        ),
        _rewards(answers),
        of_claim(
            found(answers, "compute", "flops_to_loss"),
            "LoRA saves a third of the operations",
            "LoRA does not save a third of the operations",
            "to the same loss it takes",
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
        partly: if some are SUPPORTED and others are not; default: `yes` in some settings, or in
            some settings only if others are REFUTED.
    """
    held = count(verdicts, "SUPPORTED")
    if held == len(verdicts):
        return yes
    if held:
        only = " only" if count(verdicts, "REFUTED") else ""
        return partly or f"{yes} in some settings{only}"
    if count(verdicts, "REFUTED"):
        return no
    start = yes if yes.startswith("LoRA") else yes[0].lower() + yes[1:]
    return f"{UNDECIDED} {start}"


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
    explores = all(v.exploratory for _, v in verdicts)
    start = lead(verdicts, yes, no, partly)
    numbers = listed([shown(a, v, show, rank, not explores, start == no) for a, v in verdicts])
    return Finding(verdicts[0][0].sweep, start, f"{said} {numbers}", explores)


def agreement(verdicts: Found, claim: str) -> str:
    """Say after a finding's lead whether the verdicts agree with the study, which says `claim`."""
    held = count(verdicts, "SUPPORTED")
    if held == len(verdicts):
        return "as the post says"
    against = "against" if not held and count(verdicts, "REFUTED") else "undecided for"
    return f"{against} the post, for which {claim}"


def shown(
    a: Answer,
    v: Verdict,
    show: Show,
    rank: Callable[[Sequence[float]], float] = max,
    marked: bool = True,
    refuted: bool = False,
) -> str:
    """Return a number with its base, data, rank and number of updates; mark it if exploratory.

    With `refuted`, a number that is undecided is marked, too.
    """
    where = a.where(v, rank)
    marks = [EXPLORATORY] if marked and v.exploratory else []
    marks += ["undecided"] if refuted and v.outcome == "UNDECIDED" else []
    if marks and ")" in where:
        where = "; ".join([where.removesuffix(")"), *marks]) + ")"
    return f"{show(v.estimate)} on {where}"


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


def _span(values: Sequence[float], digits: int = 2) -> str:
    return " to ".join(dict.fromkeys(number(v, digits) for v in (min(values), max(values))))


def _ends(estimates: Sequence[Estimate], show: Show) -> str:
    """Show the lowest and the highest of some estimates with their intervals."""
    low, high = (f(estimates, key=lambda e: float(e.value or 0.0)) for f in (min, max))
    return " to ".join(dict.fromkeys((show(low), show(high))))


# ---------------------------------------------------------------- the findings of the page


Row = dict[str, Any]


def _at_eighth(verdicts: Found) -> dict[Where, list[tuple[Verdict, Row]]]:
    """Return the verdict and the row of results.json of each data set, by `Where`.

    The verdicts are of `regime`; the row is that of the rank of an eighth of the width.
    """
    named: dict[Where, list[tuple[Verdict, Row]]] = {}
    for a, v in verdicts:
        conditions: list[dict[str, Any]] = a.results["cells"]
        condition: Row = next((c for c in conditions if c["cell"] == v.group), {"ranks": []})
        width = a.width(v.group)
        row = next((r for r in condition["ranks"] if r["rank"] >= width / EIGHTH), None)
        if row is not None:
            place = (a.base(v.group), row["rank"], condition["updates"])
            row = row | {"batch_size": condition.get("batch_size")}
            named.setdefault(place, []).append((v, row))
    return named


def _sets(n: int) -> str:
    return f", {n} data sets" if n > 1 else ""


def _numbers(verdicts: Found) -> str:
    """List the regrets of all data sets, by base, rank and number of updates."""
    show = with_unit(percent, "%")
    return listed(
        [
            f"{listed([show(estimate_of(r['regret_percent'])) for _, r in rows])} on {base} "
            f"(rank {rank}, {updates} updates{_sets(len(rows))})"
            for (base, rank, updates), rows in _at_eighth(verdicts).items()
        ]
    )


def _regret(answers: Sequence[Answer]) -> Finding | None:
    """Report the regret at an eighth of the width, by base, rank and number of updates."""
    low, beyond = found(answers, REGIME, "low"), found(answers, REGIME, "beyond")
    measured: dict[Where, list[tuple[str, Estimate]]] = {}
    batch: dict[Where, int | None] = {}
    for place, rows in _at_eighth(low).items():
        measured[place] = [(v.outcome, estimate_of(r["regret_percent"])) for v, r in rows]
        batch[place] = rows[0][1]["batch_size"]
    if not measured:
        return None
    for line, a in controls_of(answers):
        rank = max(line.regrets)
        for _, v in found([a], BATCHES, f"at_{CONTROL}"):
            if rank * EIGHTH == a.runs["hidden_size"].max():
                here = (line.base, rank, line.updates)
                measured.setdefault(here, []).append((v.outcome, line.regrets[rank]))
                batch[here] = line.batch_size
    start, parts, undecided = "", [], []
    show = with_unit(percent, "%")
    for place, sets in measured.items():
        base, rank, updates = place
        held, lost = (all(o == x for o, _ in sets) for x in ("SUPPORTED", "REFUTED"))
        most = _largest([e for _, e in sets])
        size = f", batch {batch[place]}" if batch[place] else ""
        regret, after = show(most), f"{updates} updates{size}"
        if not start:
            lora, full = f"LoRA of rank {rank}", f"full fine-tuning on {base}"
            start = f"{lora} {'matches' if held else 'does not match'} {full}"
            start = start if held or lost else f"it is undecided whether {lora} matches {full}"
            what = f"the largest regret of {len(sets)} data sets" if len(sets) > 1 else "the regret"
            parts.append(f"{what} is {regret} ({after})")
        elif held or lost:
            does = "matches as well" if held else "does not"
            parts.append(f"Rank {rank} on {base} {does}: {regret} ({after})")
        else:
            undecided.append(f"for rank {rank} on {base} ({after}; {regret})")
    first = next(iter(measured))
    more = f"A match is a regret of at most {100 * ALLOWED:g}% of the gain, at a rank of an eighth "
    more += f"of the hidden size. Data set by data set, the regret is {_numbers(low)}"
    lists = _at_eighth(beyond)
    if rows := lists.get(first):
        regret = f"up to {show(_largest([estimate_of(r['regret_percent']) for _, r in rows]))}"
        (outcome, *other), where = {v.outcome for v, _ in rows}, "ith lists to memorise"
        if other or outcome == "UNDECIDED":
            undecided.insert(0, f"w{where} ({regret})")
        else:
            behind = "falls behind" if outcome == "SUPPORTED" else "does not fall behind"
            parts.append(f"W{where} LoRA {behind}: {regret}")
    if undecided:
        parts.append(f"It is undecided {listed(undecided)}")
    if lists:
        more += f"; where lists to memorise are new too, it is {_numbers(beyond)}"
    text = f"Where only rules are new, {start}"
    post = agreement(
        [one for one in low if first[0] in one[0].bases],
        "LoRA ends at the same loss while it can hold what is new",
    )
    return Finding(REGIME, text, ". ".join(parts), False, f"{more}.", post)


def _largest(estimates: Sequence[Estimate]) -> Estimate:
    return max(estimates, key=lambda e: e.value or 0.0)


def first_pass_loads(answers: Sequence[Answer]) -> str:
    """Say how often the data of the first finding fill its adapter by the post's count of bits."""
    for (_, rank, _), rows in _at_eighth(found(answers, REGIME, "low")).items():
        if loads := [r["loads"][FIRST_PASS] for _, r in rows if r.get("loads")]:
            return f"{_span(loads)} times what rank {rank} can hold"
    return ""


def _growth(answers: Sequence[Answer]) -> Finding | None:
    """Report the regret after FIRST updates and at the end, at an eighth of the width.

    The sentence has the numbers of one data set: of those on which growth was shown, the one with
    the least growth.
    """
    asked = found(answers, REGIME, "growth_high")
    show, known, details = with_unit(percent, "%"), [], []
    bases = list(dict.fromkeys(base for base, _, _ in _at_eighth(asked)))
    for (base, rank, updates), rows in _at_eighth(asked).items():
        for v, r in rows:
            if (early := estimate_of(r["gap_nats_first"] or UNKNOWN)).has_interval():
                first = mapped(early, (100 / r["gain_nats"]).__mul__)
                last = estimate_of(r["regret_percent"])
                where = f"at rank {rank}{f' on {base}' if len(bases) > 1 else ''}"
                rises = f"from {show(first)} after {FIRST} updates to {show(last)} after {updates}"
                still = ", a match" if (last.high or math.inf) <= 100 * ALLOWED else ""
                grown = (last.value or 0.0) - (first.value or 0.0)
                known.append((v.outcome != "SUPPORTED", grown, f"{where} {rises}{still}"))
                details.append(f"{v.group}: {rises}")
    if not known:
        return None
    on = f"On {listed(bases)} the regret"
    text = f"{on} grows with training where only rules are new"
    no = f"{on} does not grow with training where only rules are new"
    start = lead(asked, text, no, text)
    said = min(known)[2]
    if len(asked) > 1:
        ranks = listed(sorted({a.read(v).partition(",")[0] for a, v in asked}))
        said += f". That it grows{ranks and f' at all {ranks}'} is {_tally(asked)}"
    more = (
        "In percent of the final gain and at an eighth of the hidden size (below 0 LoRA is ahead): "
    )
    more += f"{'; '.join(details)}. Learning rates are constant, without warm-up."
    beforehand = [v for a, v in found(answers, REGIME, "growth") if not a.setting(v.group)]
    if open_ones := sum(v.outcome != "SUPPORTED" for v in beforehand):
        more += (
            f" For the lowest rank it was asked beforehand, and not shown on {open_ones} of "
            f"{len(beforehand)} data sets."
        )
    explores = all(v.exploratory for _, v in asked)
    post = "" if start == no else BEYOND
    return Finding(REGIME, start, said, explores, more, post)


def _learning_rates(answers: Sequence[Answer]) -> Finding | None:
    """Report the ratio of best learning rates; on further bases, and its cost, as details."""
    ratio = found(answers, "lr_ratio", "ratio")
    if not ratio:
        return None
    yes, no = (
        f"LoRA's best learning rate is {times} times full fine-tuning's"
        for times in ("about ten", "not ten")
    )
    text = lead(ratio, yes, no)
    for outcome, what in (("SUPPORTED", yes), ("REFUTED", no)):
        if 0 < count(ratio, outcome) < len(ratio):
            where = [called(b) for a, v in ratio if v.outcome == outcome for b in a.bases]
            text = f"On {listed(list(dict.fromkeys(where)))} {what}"

    def times(e: Estimate) -> str:
        ten = ", which includes ten," if (e.low or 0.0) <= 10 <= (e.high or 0.0) else ""
        return f"{with_unit(percent)(e)}{ten}"

    numbers = listed([shown(a, v, times) for a, v in ratio])
    alphas = {number(c["alpha"]) for a, _ in ratio for c in a.results.get("ratios", ())}
    at = f" at alpha {listed(sorted(alphas))}" if alphas else ""
    said = f"the post says ten (15 in short runs); the ratio{at} is {numbers}"
    named = {base for a, _ in ratio for base in a.bases}
    rest = [c for c in rate_curves(answers) if c.base not in named and c.ratio.has_interval()]
    more = []
    if rest:
        ratios = _ends([c.ratio for c in rest], with_unit(percent))
        more.append(f"The ratio is {ratios} {_together(rest)}.")
    costs = []
    for a, _ in ratio:
        judged = found([a], "lr_ratio", "ten_times")
        show_cost = with_unit(percent, "%")
        costs += [f"{show_cost(v.estimate)} of the gain on {_bases(b)}" for b, v in judged]
        best = [c["best_nll"] for c in a.results["curves"] if c["method"] == "fullft"]
        for r in a.results.get("ratios", ()) if not judged else ():
            if (nats := r["regrets"].get(TEN)) is not None:
                gain = float(a.runs["nll_start"].mean()) - best[0]
                costs.append(f"{percent(100 * nats / gain)}% of the gain on {_bases(a)}")
    if costs:
        more.append(f"Exactly ten times costs {listed(costs)}.")
    explores = all(v.exploratory for _, v in ratio)
    return Finding("lr_ratio", text, said, explores, " ".join(more))


def _law(answers: Sequence[Answer]) -> Finding | None:
    """Report whether the law of `rate_law` predicts the ratio of best learning rates."""
    judged = found(answers, "rate_law", "law")
    if not judged:
        return None
    (a, v), *_ = judged
    what = "LoRA's best learning rate from full fine-tuning's"
    yes, no = (f"A law fixed beforehand {does} {what}" for does in ("predicts", "does not predict"))
    start = lead(judged, yes, no)
    errors = {k: mapped(estimate_of(e), math.exp) for k, e in a.results["errors"].items()}
    best, show = a.results["best_rival"], with_unit(lambda factor: number(factor, 3), "-fold")
    cells: list[dict[str, Any]] = a.results["cells"]
    at: dict[str, list[str]] = {}
    for name in dict.fromkeys(c["base"] for c in cells):
        mine = [c for c in cells if c["base"] == name]
        alphas, steps = (_span([c[key] for c in mine], 4) for key in ("alpha", "steps"))
        at.setdefault(f"(alpha {alphas}; {steps} updates)", []).append(called(name))
    where = listed([f"{listed(names)} {conditions}" for conditions, names in at.items()])
    said = (
        f"its rms error is {show(errors[RATE_LAW])} in {len(cells)} conditions, its best rival's "
        f"({best}) {show(errors[best])}: {where}"
    )
    by_alpha: dict[float, list[float]] = {}
    for c in cells:
        by_alpha.setdefault(c["alpha"], []).append(c["ratio"] / c["law"])
    alpha, off = max(by_alpha.items(), key=lambda each: sum(math.log(v) ** 2 for v in each[1]))
    allowed = math.exp(WITHIN)
    more = (
        f"It counts as right up to a factor of {allowed:.3g}, if every rival's error is larger. It "
        f"is farthest off at alpha {alpha:g}, where the measured ratios are {_span(off)} times its "
        "own."
    )
    return Finding("rate_law", start, said, bool(v.exploratory), more)


def _bases(a: Answer) -> str:
    return listed([called(base) for base in a.bases])


def _tally(verdicts: Found) -> str:
    """Count the outcomes in words: "supported on 2 data sets, undecided on 1"."""
    counts = [(o.lower(), count(verdicts, o)) for o in ("SUPPORTED", "REFUTED", "UNDECIDED")]
    (first, n), *rest = [one for one in counts if one[1]]
    sets = f"{first} on {n} data set{'s' if n > 1 else ''}"
    return ", ".join([sets, *(f"{outcome} on {m}" for outcome, m in rest)])


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
    alike = found(answers, "rank", "alike")
    slope = with_unit(lambda log: number(100 * math.expm1(log), 2), "%")
    made = of_claim(
        alike,
        "The rank makes no difference to the speed of learning",
        "The higher the rank, the faster LoRA learns",
        AVERAGE,
        slope,
    )
    if made is None:
        return None
    more, said = [], made.said
    for a in speed_answers(answers).values():
        last = judged_to(a)
        known = sorted((r, of[last]) for r, of in speeds(a.runs, [last]).items() if last in of)
        values = [fixed(float(e.value or 0.0), 2) for _, e in known]
        show = with_unit(lambda v: fixed(v, 2))
        values[-1:] = [show(v.estimate) for _, v in found([a], "rank", "parity")] or values[-1:]
        if known:
            ranks = listed([str(r) for r, _ in known])
            more.append(f"It is {listed(values)}{FULL} at ranks {ranks} ({_bases(a)}).")
            if a is alike[0][0] and len(alike) == 1:
                each = [f"{v} (rank {r})" for v, (r, _) in zip(values, known)]
                said += f". The speed is {listed(list(dict.fromkeys((each[0], each[-1]))))}"
                if len(known) > 2:  # the rise falls with the rank, which its average hides
                    average = f"{AVERAGE} {slope(alike[0][1].estimate)}"
                    ends = f"{_rise(*known[:2])} and by {_rise(*known[-2:])}"
                    said = said.replace(average, f"a doubling raises the speed by {ends}")
                    more.append(f"{average.capitalize()}.")
    post = BEYOND if count(alike, "REFUTED") == len(alike) else ""
    return replace(made, said=said, more=" ".join(more), post=post)


def _rise(low: tuple[int, Estimate], high: tuple[int, Estimate]) -> str:
    times = (high[1].value or 0.0) / (low[1].value or math.nan)
    a_doubling = float(times ** (1 / math.log2(high[0] / low[0])))
    return f"{number(100 * (a_doubling - 1), 2)}% from rank {low[0]} to {high[0]}"


def _batches(answers: Sequence[Answer]) -> Finding | None:
    """Report how much a doubling of the batch changes LoRA's speed against full fine-tuning's."""
    penalty = found(answers, "batch_size", "penalty")
    text = "After equally many updates, larger batches slow LoRA more than full fine-tuning"
    no = text.replace("slow", "do not slow")
    change = with_unit(lambda slope: signed(100 * math.expm1(slope)), "%")
    made = of_claim(penalty, text, no, "a doubling changes the ratio of speeds by", change)
    if made is None or not all((v.estimate.high or 0.0) < 0 for _, v in penalty):
        return made
    slower = with_unit(lambda slope: percent(-100 * math.expm1(-slope)), "%")

    def each(e: Estimate) -> str:
        return slower(mapped(e, float.__neg__))

    said = "each doubling lowers LoRA's speed by "
    said += listed([shown(a, v, each) for a, v in penalty])
    at_examples = [
        estimate_of(of[rank])
        for a, _ in penalty
        if (of := a.results.get("batch_effect_at_equal_examples"))
        and of[rank := max(of, key=int)]["value"] is not None
    ]
    if at_examples:
        too = all((e.high or 0.0) < 0 for e in at_examples)
        text += f"; after equally many examples {'too' if too else 'this is not shown'}"
        said += ". After equally many examples, which the post compares, it is "
        said += f"{listed([each(e) for e in at_examples])} ({EXPLORATORY})"
    relevant = f"{max(abs(100 * v.margin[1]) for _, v in penalty):g}% fixed beforehand as relevant"
    more = []
    if less := [called(b) for a, v in penalty if v.outcome == "REFUTED" for b in a.bases]:
        more.append(f"On {listed(less)} the effect is less than the {relevant}.")
    if count(penalty, "UNDECIDED"):
        more.append(f"Whether this exceeds the {relevant} is undecided.")
    return replace(made, lead=text, said=said, more=" ".join(more))


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
    loads = [f"{_span(values)} {COUNTED[kind]}" for kind, values in spans.items()]
    ranks = [c["rank_interpolated"]["value"] for c in known]
    return Finding(
        REGIME,
        f"Whether the data fit an adapter {'depends' if apart else 'hardly depends'} on how the "
        "bits of the data are counted",
        f"where the regret is {100 * ALLOWED:g}% (ranks of {_span(ranks)} on {len(known)} data "
        f"sets; {base}, {updates} updates), the data have this many times the bits of the adapter "
        f"(2 a parameter): {listed(loads)}",
        True,
        "The last count was chosen after a look.",
    )


def _large_batches(answers: Sequence[Answer]) -> Finding | None:
    """Say where large batches are no evidence, since LoRA has regret at a small one too."""
    control = found(answers, BATCHES, f"at_{CONTROL}")
    if not control or count(control, "SUPPORTED") == len(control):
        return None
    show = with_unit(percent, "%")
    named = [
        f"{line.base} (rank {(top := max(line.regrets))}, {line.updates} updates: "
        f"{show(line.regrets[top])})"
        for line, _ in controls_of(answers)
    ]
    has = "has" if count(control, "REFUTED") else "may have"
    said = f"even in batches of {CONTROL}, LoRA {has} regret on {listed(named)}"
    text = "Whether batches of 512 and more are bad for LoRA cannot be said"
    explores = all(v.exploratory for _, v in control)
    return Finding(BATCHES, text, said, explores) if named else None


def _rewards(answers: Sequence[Answer]) -> Finding | None:
    points = with_unit(signed, " points")
    asked = next((s for s in ("rl_matrices", "rl") if found(answers, s, "rank_1")), "rl")
    top = found(answers, asked, "top_rank")
    one = [*found(answers, asked, "rank_1"), *found(answers, "rl_unembedding", "tie")]
    one.sort(key=lambda each: each[1].exploratory)
    made = of_claim(
        one,
        "In reinforcement learning rank 1 learns as much as full fine-tuning",
        "In reinforcement learning rank 1 does not learn as much as full fine-tuning",
        "the final reward (up to 100 points) of rank 1 minus full fine-tuning's is",
        points,
        min,
    )
    if made is None:
        return None
    more = []
    same = found(answers, asked, "rank_1_control")
    if same and all(v.outcome == "REFUTED" and not v.is_better for _, v in same):
        numbers = [f"{points(v.estimate)} on {_bases(a)}" for a, v in same]
        cause = "so the low rank is the cause"
        matrices = found(answers, asked, "control")
        if matrices and count(matrices, "SUPPORTED") == len(matrices):
            cause += ", not the choice of matrices"
        own = f"Against full fine-tuning of LoRA's own matrices it is {listed(numbers)}, {cause}"
        made = replace(made, said=f"{made.said}. {own}")
    alone = found(answers, "rl_layers", "rank_1")
    if alone:
        differs = "Without an adapter of the unembedding the difference from full fine-tuning is"
        numbers = [shown(a, v, points) for a, v in alone]
        made = replace(made, said=f"{made.said}. {differs} {listed(numbers)}")
    if top:
        numbers = [shown(a, v, points, marked=not made.exploratory) for a, v in top]
        more.append(f"At the highest rank the difference is {listed(numbers)}.")
    few = [r for a, v in one if (r := a.parameters_an_episode(v)) is not None and r < 1]
    if few:
        said = f"{made.said}. The post's rank 1 has more than one parameter per episode; ours has"
        made = replace(made, said=f"{said} {_span(few)}")
    also = dict.fromkeys(a.sweep for a, _ in [*one, *alone] if a.sweep != made.sweep)
    return replace(made, more=" ".join(more), also=tuple(also))
