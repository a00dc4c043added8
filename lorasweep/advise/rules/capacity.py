"""Choose method and rank: by measured regret if it covers the customer's case, else by capacity."""

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from lorasweep.advise.evidence import Case, Interval, Regret
from lorasweep.advise.read import RowError
from lorasweep.advise.rules.workload import Workload
from lorasweep.errors import SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.spec.model import ModelSpec

BITS_PER_PARAMETER = 2.0
"""Bits that a trained parameter stores, by the study, from Allen-Zhu and Li: 2 if facts are seen
about 1,000 times, 1 if they are seen 100 times."""
ROOM = 0.5
"""Largest load that surely fits. tinker-cookbook asks for at least one parameter per token that
bears loss. In the study such a token has 1 bit."""
FULL = 1.0
"""Load above which the data exceed the capacity of a rank by the study's count."""
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Ranks of the study, and ranks that serving engines accept."""
WIDEST = 8
"""Published comparisons with full fine-tuning use ranks of up to an eighth of the hidden size."""
LAYERS = "all"
BY_REGRET, BY_CAPACITY = "measured regret", "capacity"
"""The rule that chose the method: `by` in answers."""


@dataclass(frozen=True)
class Choice:
    """The advised method and rank."""

    method: str
    """lora, full, or open (undecided)."""
    rank: int
    """The recommended rank of LoRA; if the method is open, the rank to try."""
    load: float | None
    """Bits of the data divided by the capacity of the rank."""
    by: str
    why: str


@cache
def ranks_of(model: ModelSpec) -> tuple[int, ...]:
    """List the standard ranks that a model can have, up to an eighth of its width.

    The rank of a model with experts is a multiple of the active experts. If no standard rank is,
    the ranks are the standard ones times the active experts.

    Raises:
        RowError: there is no such rank.
    """
    for ranks in (RANKS, [model.n_active_experts * rank for rank in RANKS]):
        found = []
        for rank in ranks:
            with suppress(SpecError):
                LoRA(rank=rank, layers=LAYERS).check(model)
                found.append(rank)
        if found:
            widest = max(1, model.hidden_size // WIDEST)
            return tuple(found[:1] + [rank for rank in found[1:] if rank <= widest])
    raise RowError(f"column model: no rank of LoRA fits {model.name}. Check its shape.")


@cache
def trained(model: ModelSpec, rank: int, layers: str = LAYERS) -> int:
    """Count LoRA's trained parameters. Adapters of experts have rank `rank` / (active experts)."""
    return LoRA(rank=rank, layers=layers).n_trainable(model)


def capacity(model: ModelSpec, rank: int) -> float:
    """Return the capacity of a rank in bits."""
    return BITS_PER_PARAMETER * trained(model, rank)


def load_at(bits: float | None, model: ModelSpec, rank: int) -> float | None:
    """Return bits divided by the capacity of a rank; None if the bits are not known."""
    return None if bits is None else bits / capacity(model, rank)


def choose(case: Case, work: Workload) -> Choice:
    """Choose the method, and LoRA's rank."""
    choice = _by_regret(case, work) or _by_capacity(case, work)
    c, model, rank, published = case.customer, case.model, choice.rank, case.known.published
    case.note("method", choice.method, choice.by, {"rule": choice.by}, why=choice.why)
    low, high = (load_at(bits, model, rank) for bits in (work.bits_low, work.bits_high))
    inputs = {"bits": work.bits, "lowest": low, "highest": high, "trained": trained(model, rank)}
    case.note("load", choice.load, "", inputs, bits_per_parameter=BITS_PER_PARAMETER)
    larger = next((r for r in ranks_of(model) if r > rank), None)
    more = "no larger standard rank was tried at this width"
    if larger is not None:
        extra_mib = 2 * (trained(model, larger) - trained(model, rank)) / 2**20
        more = f"rank {larger} would add {extra_mib:,.0f} MiB to each adapter in bf16"
    gaps = ", ".join(
        f"{e['model']} " + " ".join(f"r{r} +{g}" for r, g in e["gaps"].items())
        for e in published.entries("rank_gaps")
    )
    floors = dict.fromkeys(e["source"] for e in published.entries("least_rank", task=c.task))
    cited = "; ".join(published.values["sources"][source] for source in floors)
    words = {"why": choice.why, "more": more, "gaps": gaps or "none known"}
    words["floors"] = cited or "the smallest standard rank"
    case.note("rank", rank, "", {"ranks": [*ranks_of(model)], "width": model.hidden_size}, **words)
    experts = ""
    if model.n_experts:
        each = f"rank / {model.n_active_experts} active ones"
        experts = f", each of the {model.n_experts} experts with {each}"
    case.note("layers", LAYERS, experts=experts)
    if rank < 8:
        case.warn("low_rank", rank=rank)
    return choice


def _by_capacity(case: Case, work: Workload) -> Choice:
    model, task = case.model, case.customer.task
    ranks, floors = ranks_of(model), case.known.published.entries("least_rank", task=task)
    least = max((e["rank"] for e in floors), default=1)
    usable = [r for r in ranks if r >= least] or [ranks[-1]]
    if work.bits is None or work.bits_low is None or work.bits_high is None:
        holds = ROOM * BITS_PER_PARAMETER * trained(model, usable[0])
        unit = "episodes" if task == "rl" else "tokens that bear loss, at 1 bit each"
        why = f"the amount of data is not stated. Rank {usable[0]} suffices for {holds:.2g} {unit}"
        return Choice("open", usable[0], None, BY_CAPACITY, why)
    loads = {r: work.bits_high / capacity(model, r) for r in usable}
    rank = next((r for r, load in loads.items() if load <= ROOM), usable[-1])
    low, high = work.bits_low / capacity(model, rank), loads[rank]
    if high <= ROOM:
        method = "lora"
        why = (
            f"rank {rank} is the smallest of {usable[0]} or more with a load of at most {ROOM} at "
            "the high end of the bits"
        )
    elif low > FULL:
        method = "full"
        why = (
            f"even rank {rank}, the highest that was compared with full fine-tuning at this width, "
            f"has a load of {low:.2g} or more, above {FULL:g}"
        )
    else:
        method = "open"
        why = (
            f"rank {rank} has a load of {low:.2g} to {high:.2g}, neither surely below {ROOM} nor "
            f"surely above {FULL:g}. Run the sweep"
        )
    return Choice(method, rank, load_at(work.bits, model, rank), BY_CAPACITY, why)


def regret_at(points: Iterable[Regret], load: float) -> Interval | None:
    """Interpolate a rank's regret, in percent of the gain, in the logarithm of the load.

    None outside the loads measured.
    """
    for left, right in pairwise(sorted(points, key=lambda p: p.load)):
        if left.load <= load <= right.load:
            t = math.log(load / left.load) / math.log(right.load / left.load)
            pairs = zip(left.regret, right.regret, strict=True)
            return Interval(*((1 - t) * (a or 0.0) + t * (b or 0.0) for a, b in pairs))
    return None


def _by_regret(case: Case, work: Workload) -> Choice | None:
    """Choose by measured regret; None if no measurement covers the case."""
    c, model = case.customer, case.model
    if c.task != "sft" or not work.bits:
        return None
    points = case.known.kept.covering(model.hidden_size)
    found: dict[int, Interval] = {}
    for rank in sorted({p.rank for p in points}):
        load = work.bits / capacity(model, rank)
        regret = regret_at([p for p in points if p.rank == rank], load)
        if regret is not None:
            found[rank] = regret
    if not found:
        return None
    text = ", ".join(f"rank {r} {i.text()}" for r, i in found.items())
    good = [r for r, i in found.items() if i.high is not None and i.high <= c.max_regret]
    if good:
        method, rank = "lora", good[0]
        why = f"the smallest rank with a regret of at most {c.max_regret:g}% of the gain: {text}"
    else:
        rank = max(found)
        behind = (found[rank].low or 0.0) > c.max_regret
        method, above = ("full", "above") if behind else ("open", "perhaps above")
        why = (
            f"the highest rank measured has a regret {above} {c.max_regret:g}% of the gain: {text}"
        )
    return Choice(method, rank, load_at(work.bits, model, rank), BY_REGRET, why)
