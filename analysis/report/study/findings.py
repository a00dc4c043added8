"""What was found, in nine sentences at most, and what is withdrawn.

Every number is picked from an answer by its claim. A sentence without an answer is left out. Its
wording follows from the verdicts, so that a verdict that turns changes the sentence.
"""

from collections.abc import Sequence

from analysis.inference.estimate import number, with_interval
from analysis.report.study.answers import Part
from analysis.report.study.load_map import REGIME
from analysis.report.study.setting import WORDS, Setting
from analysis.report.study.wording import (
    Found,
    by_setting,
    change,
    count,
    end,
    found,
    in_percent,
    lead,
    listed,
    of_claim,
    percent,
    sets,
    signed,
    span,
)

FULL = " times full fine-tuning's"
REWARDED = {**WORDS, Setting.BEYOND: "on generated tasks"}
"""Where rewards were had: the regime is one of texts with their answers."""
GAIN = " of the gain"
EIGHTH = 8
"""The claims of `regime` are about ranks of this fraction of the width."""


GIVEN_UP = {"at_32": (32, "REFUTED"), "at_512": (512, "SUPPORTED"), "at_1024": (1024, "SUPPORTED")}
"""Claims of `large_batches`: the batch, and the outcome by which LoRA falls behind at it."""


def sentences(parts: Sequence[Part]) -> list[str]:
    """Return the sentences, the one about the regime first."""
    first = (_regime, _boundary, _rates, _speed, _batches, _layers)
    texts = [text for write in (*first, _rewards, _bits, _compute) if (text := write(parts))]
    return texts + _withdrawn(parts)


def _withdrawn(parts: Sequence[Part]) -> list[str]:
    """Say which answers are withdrawn and why, one sentence for each sweep."""
    why = {p.results["sweep"]: p.question["withdrawn"] for p in parts if p.withdrawn}
    return [f"**The answer of `{sweep}` is withdrawn**: {text}." for sweep, text in why.items()]


def _regime(parts: Sequence[Part]) -> str:
    low, behind = found(parts, REGIME, "low"), found(parts, REGIME, "beyond")
    if not low:
        return ""
    start = lead(
        low,
        "LoRA without regret is real where little is new",
        "LoRA without regret is not to be had even where little is new",
        "LoRA without regret is real on some data in which little is new",
        "Whether there is LoRA without regret where little is new stays open",
    )
    said = (
        f"{start}: on {sets(low)} in which only rules are new, a rank of an eighth of the width "
        f"gave up {_regret(low)} of what full fine-tuning gains"
    )
    if behind:
        said += f", and {_regret(behind)} on {sets(behind)} with lists to memorise"
    return said + end([*low, *behind])


def _boundary(parts: Sequence[Part]) -> str:
    fits = found(parts, REGIME, "fits")
    if not fits:
        return ""
    start = lead(
        fits,
        "It ends where the adapter is full",
        "Counting bits does not say where it ends",
        "Counting bits says only in places where it ends",
        "Whether counting bits says where it ends stays open",
    )
    return (
        f"{start}: the smallest rank with room for what is new, at the study's 2 bits a parameter, "
        f"gave up nothing on {count(fits, 'SUPPORTED')} of {len(fits)} data sets; "
        f"{_needed(parts, {v.group for _, v in fits})}{_law(parts)}{end(fits)}"
    )


def _law(parts: Sequence[Part]) -> str:
    """Say with which power of the bits the needed rank grew; empty without an interval."""
    laws = [v.estimate for _, v in found(parts, REGIME, "needs_bits") if v.estimate.has_interval()]
    if not laws:
        return ""
    shown = " and ".join(with_interval(e, lambda value: number(value, 2)) for e in laws)
    return (
        f"; where only rules are new, that rank grew as the bits to the power {shown}, and not 1"
        if all(high < 1 for e in laws for _, high in [e.interval])
        else f"; where only rules are new, that rank grew as the bits to the power {shown}"
    )


def _rates(parts: Sequence[Part]) -> str:
    ratio, order = found(parts, "lr_ratio", "ratio"), found(parts, "lr_ratio", "order")
    shares = found(parts, "recipes", "ten_times")
    cost = found(parts, "lr_ratio", "ten_times") + [(p, in_percent(v)) for p, v in shares]
    if not ratio or not order:
        return ""
    start = lead(
        order,
        "LoRA wants about ten times full fine-tuning's learning rate",
        "LoRA does not want ten times full fine-tuning's learning rate",
        "Ten times full fine-tuning's learning rate is right in places only",
        "Whether LoRA wants ten times full fine-tuning's learning rate stays open",
    )
    said = f"{start}: the ratio of the best rates was {by_setting(ratio)}"
    if cost:
        said += f"; taken at its word, the rule cost {by_setting(cost, percent, GAIN)}"
    return said + end([*ratio, *cost])


def _speed(parts: Sequence[Part]) -> str:
    return of_claim(
        found(parts, "rank", "parity"),
        "At its highest rank LoRA keeps full fine-tuning's pace",
        "Even at its highest rank LoRA does not keep full fine-tuning's pace",
        "At its highest rank LoRA keeps full fine-tuning's pace in places only",
        "Whether LoRA keeps full fine-tuning's pace stays open",
        "counted in updates to one loss, it took {}",
        lambda v: number(1 / v),
        FULL,
    )


def _batches(parts: Sequence[Part]) -> str:
    said = of_claim(
        found(parts, "batch_size", "penalty"),
        "Large batches hurt LoRA more than full fine-tuning",
        "Large batches did not hurt LoRA more than full fine-tuning",
        "Large batches hurt LoRA more than full fine-tuning in places only",
        "Whether large batches hurt LoRA more than full fine-tuning stays open",
        "with each doubling, its speed over full fine-tuning's changed by {}",
        change,
    )
    free = [(p, v) for p, v in found(parts, "batch_size", "below_256") if v.outcome == "SUPPORTED"]
    if said and any(p.setting(v.group) == Setting.IN_REGIME for p, v in free):
        said += (
            " Yet after equally many examples in batches of 256 its highest rank gave up nothing"
            f" {WORDS[Setting.IN_REGIME]}."
        )
    behind = {
        f"{batch:,}": v.group.split(" on ")[0]
        for claim, (batch, outcome) in GIVEN_UP.items()
        for _, v in found(parts, "large_batches", claim)
        if v.outcome == outcome
    }
    if said and behind:
        bases = listed(list(dict.fromkeys(behind.values())))
        said += f" An eighth of {bases}'s width fell behind in batches of {listed(list(behind))}."
    return said


def _layers(parts: Sequence[Part]) -> str:
    worse = found(parts, "layers", "attention_worse")
    return of_claim(
        worse,
        "Attention alone is the slower place for adapters",
        "Attention alone is not the slower place for adapters",
        f"Attention alone was clearly the slower place for adapters on "
        f"{count(worse, 'SUPPORTED')} of {len(worse)} tasks",
        "Whether attention alone is the slower place for adapters stays open",
        "at equal parameters, its speed over that of the MLP alone was {}",
    )


def _rewards(parts: Sequence[Part]) -> str:
    said = of_claim(
        found(parts, "rl", "rank_1"),
        "From rewards rank 1 learns as much as full fine-tuning",
        "From rewards rank 1 does not learn as much as full fine-tuning",
        "From rewards rank 1 learns as much as full fine-tuning in places only",
        "Whether rank 1 learns as much from rewards as full fine-tuning stays open",
        "at the end its reward differed by {}",
        signed,
        " points",
        REWARDED,
    )
    top = found(parts, "rl", "top_rank")
    if not (said and top):
        return said
    ends = by_setting(top, signed, " points", REWARDED)
    return f"{said} The highest rank's differed by {ends}{end(top)}"


def _bits(parts: Sequence[Part]) -> str:
    said = of_claim(
        found(parts, "rl_bits", "tie"),
        "Rank 1 learns what rewards tell where it has room for it",
        "Room for what rewards tell does not make rank 1 learn it",
        "Room for what rewards tell makes rank 1 learn it in places only",
        "Whether rank 1 learns what rewards tell wherever it has room for it stays open",
        "of labels that fit it at 2 bits a parameter, its reward differed from that of full "
        "fine-tuning by {}",
        signed,
        " points",
        REWARDED,
    )
    taught = found(parts, "rl_bits", "taught")
    share = by_setting(taught, signed, "%", REWARDED) if taught else ""
    taught_end = f" Taught them, its share of their bits differed by {share}." if share else ""
    return said and said + taught_end


def _compute(parts: Sequence[Part]) -> str:
    return of_claim(
        found(parts, "compute", "flops_to_loss"),
        "LoRA saves a third of the work",
        "LoRA does not save a third of the work",
        "LoRA saves a third of the work in places only",
        "Whether LoRA saves a third of the work stays open",
        "counted in operations to one loss, it took {}",
        unit=FULL,
    )


# ---------------------------------------------------------------- words and numbers


def _regret(verdicts: Found) -> str:
    """Return the regrets in percent of the gain at the rank that the verdicts are about."""
    values: list[float | None] = []
    for part, v in verdicts:
        width = part.runs["hidden_size"].max()
        for cell in part.results["cells"]:
            ranks = [r for r in cell["ranks"] if r["rank"] >= width / EIGHTH]
            if cell["cell"] == v.group and ranks:
                values.append(ranks[0]["regret_percent"]["value"])
    return span(values, lambda p: f"{p:.1f}%")


def _needed(parts: Sequence[Part], groups: set[str]) -> str:
    """Say in which range the smallest rank that gives up nothing lies, over the data sets."""
    needed = [
        cell["rank_needed"]
        for part in parts
        if part.results["sweep"] == REGIME
        for cell in part.results["cells"]
        if cell["cell"] in groups
    ]
    low = min(above for above, _ in needed)
    if any(up_to is None for _, up_to in needed):
        return f"it took a rank above {low:g}, and on some data above every rank tried"
    high = max(up_to for _, up_to in needed)
    return f"it took a rank {f'above {low:g} and ' if low else ''}of at most {high:g}"
