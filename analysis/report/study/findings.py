"""The findings of the study: at most eight, and the answers that are withdrawn.

Every number is read from an answer, and the wording follows from the verdicts. Each sentence is
about one base, rank and number of updates.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from analysis.inference.estimate import EXPLORATORY, Estimate, Verdict, fixed, number
from analysis.measures.regret import ALLOWED, COUNTS
from analysis.questions.base import mapped
from analysis.questions.regime import EIGHTH
from analysis.report.study.answers import Answer, Setting, estimate_of
from analysis.report.study.figures import BATCHES, CONTROL, REGIME, conditions_of, controls_of

FULL = " times full fine-tuning's"
HEADLINES = ("regret", "learning_rates", "speed")
"""Subjects of the findings on the project's front page."""
Found = list[tuple[Answer, Verdict]]
Show = Callable[[Estimate], str]


def by_subject(answers: Sequence[Answer]) -> dict[str, str]:
    """Return subject -> finding, for subjects with an answer; regret in the regime comes first."""
    ratio, order = found(answers, "lr_ratio", "ratio"), found(answers, "lr_ratio", "order")
    cost = found(answers, "lr_ratio", "ten_times")
    rates, ten = "LoRA's best learning rate is", "of the order of ten times full fine-tuning's"
    learning_rates = [
        f"{lead(order, f'{rates} {ten}', f'{rates} not {ten}')}.",
        each(ratio, "The ratio was", with_unit(number)),
        each(cost, "Regret at exactly ten times was", with_unit(percent, "% of the gain")),
    ]
    worse = found(answers, "layers", "attention_worse")
    alone, mlp = "Adapters on attention alone", "learn more slowly than on the MLP alone"
    texts = {
        "regret": _regret(answers),
        "capacity": _capacity(answers),
        "learning_rates": " ".join(filter(None, learning_rates)) if ratio and order else "",
        "speed": of_claim(
            found(answers, "rank", "parity"),
            "LoRA's highest rank learns as fast as full fine-tuning",
            "Even LoRA's highest rank learns more slowly than full fine-tuning",
            "The number of updates to the same loss was",
            lambda e: with_unit(number, FULL)(mapped(e, lambda v: 1 / v)),
        ),
        "batches": _batches(answers),
        "layers": of_claim(
            worse,
            f"{alone} {mlp}",
            f"{alone} do not {mlp}",
            "At equal parameters the ratio of their speeds was",
            with_unit(number),
            partly=f"{alone} {mlp} on {count(worse, 'SUPPORTED')} of {len(worse)} tasks",
        ),
        "rewards": _rewards(answers),
        "work": of_claim(
            found(answers, "compute", "flops_to_loss"),
            "LoRA saves a third of the work",
            "LoRA does not save a third of the work",
            "The number of operations to the same loss was",
            with_unit(number, FULL),
        ),
    }
    return {subject: text for subject, text in texts.items() if text}


def sentences(answers: Sequence[Answer]) -> list[str]:
    """Return all findings, then the answers that are withdrawn."""
    withdrawn = {a.sweep: why for a in answers if (why := a.question.get("withdrawn"))}
    return [
        *by_subject(answers).values(),
        *(f"**The answer of `{name}` is withdrawn**: {why}." for name, why in withdrawn.items()),
    ]


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


def lead(verdicts: Found, yes: str, no: str, partly: str = "", condition: str = "") -> str:
    """Return the start of a finding by the outcomes, emphasised.

    Args:
        yes: if all verdicts are SUPPORTED.
        no: if some are REFUTED and none is SUPPORTED.
        partly: if some are SUPPORTED and others are not; default: `yes` in some settings only.
        condition: added to the chosen text.
    """
    held = count(verdicts, "SUPPORTED")
    if held == len(verdicts):
        text = yes
    elif held:
        text = partly or f"{yes} in some settings only"
    elif count(verdicts, "REFUTED"):
        text = no
    else:
        start = yes if yes.startswith("LoRA") else yes[0].lower() + yes[1:]
        text = f"It is undecided whether {start}"
    return f"**{text}{condition}**"


def of_claim(
    verdicts: Found,
    yes: str,
    no: str,
    said: str,
    show: Show,
    rank: Callable[[Sequence[float]], float] = max,
    partly: str = "",
) -> str:
    """Return a claim's outcome and a sentence for each answer; `said` begins the first of them."""
    if not verdicts:
        return ""
    in_regime = all(a.setting(v.group) == Setting.IN_REGIME for a, v in verdicts)
    condition = ", where only rules are new" if in_regime else ""
    return f"{lead(verdicts, yes, no, partly, condition)}. {each(verdicts, said, show, rank)}"


def each(
    verdicts: Found, said: str, show: Show, rank: Callable[[Sequence[float]], float] = max
) -> str:
    """Return a sentence for each answer: base, rank and number of updates may differ."""
    out: list[str] = []
    for a, v in verdicts:
        where = _where(a, v, rank)
        mark = f" ({EXPLORATORY})" if v.exploratory else ""
        text = f"On {where} it was {show(v.estimate)}" if out else f"{said} {show(v.estimate)}"
        out.append(f"{text}{mark}." if out else f"{text} on {where}{mark}.")
    return " ".join(out)


def _where(a: Answer, v: Verdict, rank: Callable[[Sequence[float]], float]) -> str:
    """Name the base, the data, the rank and the number of updates of a verdict."""
    curves = a.curves(v)
    if not curves:
        return v.group
    data = (
        "only rules new"
        if a.setting(v.group) == Setting.IN_REGIME
        else str(curves[0]["dataset"]).partition("(")[0]
    )
    read = a.read(v).partition(";")[0]
    if "update" not in read:
        by_arm = (a.results.get("ranks") or {}).get(v.group) if a.sweep == "layers" else None
        ranks = (
            listed([f"{k} at rank {r}" for k, r in by_arm.items()])
            if by_arm
            else f"rank {rank([c['rank'] for c in curves if c['rank'] is not None]):g}"
        )
        read = f"{ranks}, {int(curves[0]['steps'])} updates"
    return f"{curves[0]['model']} ({data}; {read})"


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


def listed(words: Sequence[str]) -> str:
    """Join words by commas and a last "and"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _span(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(number(v, 2) for v in (min(values), max(values))))


# ---------------------------------------------------------------- findings with more than one claim


def _regret(answers: Sequence[Answer]) -> str:
    """Report the regret at an eighth of the width, by base, rank and number of updates."""
    low, beyond = found(answers, REGIME, "low"), found(answers, REGIME, "beyond")
    if not low:
        return ""

    def by_place(verdicts: Found, start: str, also: str = "") -> list[str]:
        by_base: dict[str, list[str]] = {}
        for a, v in verdicts:
            conditions: list[dict[str, Any]] = a.results["cells"]
            condition = next((c for c in conditions if c["cell"] == v.group), {})
            width = a.runs["hidden_size"].max()
            row = next((r for r in condition.get("ranks", ()) if r["rank"] >= width / EIGHTH), None)
            if row is not None:
                size = f" of {condition['batch_size']} rows" if condition.get("batch_size") else ""
                base = condition["cell"].partition(",")[0]
                place = f"{base} (rank {row['rank']}, {condition['updates']} updates{size})"
                regret = with_unit(percent, "%")(estimate_of(row["regret_percent"]))
                by_base.setdefault(place, []).append(regret)
        return [
            f"{start} on {place}{also} was {listed(values)} of full fine-tuning's gain"
            f"{f' on {len(values)} data sets' if len(values) > 1 else ''}"
            for place, values in by_base.items()
        ]

    controls = [
        (line, a)
        for line, a in controls_of(answers)
        if max(line.regrets) * EIGHTH == a.runs["hidden_size"].max()
    ]
    none = f"no regret (at most {100 * ALLOWED:g}% of full fine-tuning's gain)"
    where = "where only rules are new, at a rank of an eighth of the width"
    start = lead(
        [*low, *found([a for _, a in controls], BATCHES, f"at_{CONTROL}")],
        f"LoRA has {none} {where}",
        f"LoRA has regret {where}",
        f"On some bases and data sets LoRA has {none} {where}",
    )
    of_controls = [
        f"On {line.base} (rank {max(line.regrets)}, {line.updates} updates of "
        f"{line.batch_size} rows) it was {with_unit(percent, '%')(line.regrets[max(line.regrets)])}"
        for line, _ in controls
    ]
    lists = by_place(beyond, "Regret", ", where lists to memorise are new too,")
    return ". ".join([start, *by_place(low, "Its regret"), *of_controls, *lists]) + "."


def _capacity(answers: Sequence[Answer]) -> str:
    """Report the load at the needed rank, for each way of counting bits, on one base."""
    known = [
        c
        for c in conditions_of(answers)
        if c.get("bits") and c["rank_interpolated"]["value"] is not None
    ]
    lengths = {(c["cell"].partition(",")[0], c["updates"]) for c in known}
    if len(lengths) != 1 or len(known) < 2:
        return ""
    ((base, updates),) = lengths
    spans = {
        kind: [v for c in known if (v := c["loads_needed"][kind]["value"]) is not None]
        for kind in COUNTS
    }
    if not all(spans.values()):
        return ""
    ends = sorted((min(values), max(values)) for values in spans.values())
    apart = all(low > high for (_, high), (low, _) in itertools.pairwise(ends))
    loads = [f"{_span(values)} by {COUNTS[kind]}" for kind, values in spans.items()]
    return (
        f"**Whether the data fit an adapter {'depends' if apart else 'hardly depends'} on how bits "
        f"are counted**. On {base} after {updates} updates a regret of {100 * ALLOWED:g}% takes "
        f"ranks of {_span([c['rank_interpolated']['value'] for c in known])}, on {len(known)} data "
        f"sets. At 2 bits a parameter their load is {listed(loads)}; the last count was chosen "
        "after a look."
    )


def _batches(answers: Sequence[Answer]) -> str:
    said = of_claim(
        found(answers, "batch_size", "penalty"),
        "Large batches slow LoRA more than full fine-tuning",
        "Large batches do not slow LoRA more than full fine-tuning",
        "With each doubling LoRA's speed relative to full fine-tuning changed by",
        with_unit(lambda slope: signed(100 * math.expm1(slope)), "%"),
    )
    control = found(answers, BATCHES, f"at_{CONTROL}")
    if said and control and count(control, "SUPPORTED") < len(control):
        bases = listed([_where(a, v, max).partition(" (")[0] for a, v in control])
        has = "has" if count(control, "REFUTED") else "may have"
        said += (
            f" Batches of 512 and more on {bases} are no evidence: the control, a batch of "
            f"{CONTROL}, {has} regret as well."
        )
    return said


def _rewards(answers: Sequence[Answer]) -> str:
    points = with_unit(signed, " points")
    one, top = found(answers, "rl", "rank_1"), found(answers, "rl", "top_rank")
    said = of_claim(
        one,
        "From rewards rank 1 learns as much as full fine-tuning",
        "From rewards rank 1 does not learn as much as full fine-tuning",
        "The difference of the final reward was",
        points,
        min,
    )
    if said and top:
        said += f" {each(top, 'The difference was', points)}"
    few = [r for a, v in one if (r := a.parameters_an_episode(v)) is not None and r < 1]
    if few:
        said += (
            " The study's claim is about more parameters than episodes; here rank 1 has "
            f"{_span(few)} parameters an episode."
        )
    return said
