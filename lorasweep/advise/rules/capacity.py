"""Method, layers and rank: from the map where it covers the case, else from counted capacity."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from lorasweep.advise.customer import Customer
from lorasweep.advise.kept import Interval, Kept, MapPoint
from lorasweep.advise.published import Published
from lorasweep.advise.rules.workload import Workload
from lorasweep.advise.trace import Sure, Trace
from lorasweep.errors import SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.spec.model import ModelSpec

BITS_PER_PARAMETER = 2.0
"""Capacity in the study, from Allen-Zhu and Li, after about 1,000 exposures."""
ROOM = 0.5
"""Load up to which a rank has room: tinker-cookbook's rule, no fewer parameters than tokens that
bear loss, at the study's 1 bit a token. After 100 exposures a parameter holds 1 bit and not 2."""
FULL = 1.0
"""Load from which the data exceed what a rank can hold by the study's count."""
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""The study's, and those that servers take."""
WIDEST = 8
"""Ranks up to an eighth of the width were held against full fine-tuning in public; none above."""
LAYERS = "all"


@dataclass(frozen=True)
class Choice:
    """What to train."""

    method: str
    """lora, full, or open."""
    rank: int
    """LoRA's rank: the recommended one, or the one to try."""
    load: float | None
    """Bits of what is new over the capacity of that rank."""
    by: str
    """map or capacity."""
    why: str


@cache
def ranks_of(model: ModelSpec) -> tuple[int, ...]:
    """List the standard ranks that a model takes, up to an eighth of its width."""
    found: list[int] = []
    for rank in RANKS:
        try:
            LoRA(rank=rank, layers=LAYERS).check(model)
        except SpecError:
            continue
        if rank <= max(1, model.hidden_size // WIDEST) or not found:
            found.append(rank)
    return tuple(found)


@cache
def trained(model: ModelSpec, rank: int, layers: str = LAYERS) -> int:
    """Count LoRA's trained parameters; every expert has adapters of rank / active experts."""
    return LoRA(rank=rank, layers=layers).n_trainable(model)


def load_at(bits: float | None, model: ModelSpec, rank: int) -> float | None:
    """Return bits over the capacity of a rank."""
    return None if bits is None else bits / (BITS_PER_PARAMETER * trained(model, rank))


def choose(
    c: Customer, model: ModelSpec, work: Workload, kept: Kept, published: Published, trace: Trace
) -> Choice:
    """Choose the method, and LoRA's rank."""
    choice = _by_map(c, model, work, kept) or _by_capacity(c, model, work, published)
    sure = Sure.MEASURED if choice.by == "map" else Sure.ONCE
    source = (
        "analysis/results: regime, its map"
        if choice.by == "map"
        else f"{published.where('allen_zhu')}; {published.where('primer')}"
    )
    trace.note("method", choice.method, choice.why, source, sure, rule=choice.by)
    trace.note(
        "load",
        choice.load,
        f"bits / ({BITS_PER_PARAMETER:g} x trained parameters of the rank)",
        f"{published.where('study')}; {published.where('allen_zhu')}",
        Sure.ASSUMED,
        bits=work.bits,
        lowest=load_at(work.bits_low, model, choice.rank),
        highest=load_at(work.bits_high, model, choice.rank),
        trained=trained(model, choice.rank),
    )
    _note_rank(c, model, work, choice, published, trace)
    return choice


def _by_capacity(c: Customer, model: ModelSpec, work: Workload, published: Published) -> Choice:
    ranks = ranks_of(model)
    least = max((e["rank"] for e in published.entries("least_rank", task=c.task)), default=1)
    usable = [r for r in ranks if r >= least] or [ranks[-1]]
    if work.bits is None or work.bits_low is None or work.bits_high is None:
        holds = ROOM * BITS_PER_PARAMETER * trained(model, usable[0])
        unit = "episodes" if c.task == "rl" else "tokens that bear loss, at 1 bit each"
        room = f"Rank {usable[0]} has room for {holds:.2g} {unit}"
        why = f"how much is trained on is not stated. {room}"
        return Choice("open", usable[0], None, "capacity", why)
    roomy = [r for r in usable if (load_at(work.bits_high, model, r) or 0.0) <= ROOM]
    if roomy:
        why = (
            f"rank {roomy[0]} is the smallest from {least} on whose load stays below {ROOM} at the "
            "high end of the bits"
        )
        return Choice("lora", roomy[0], load_at(work.bits, model, roomy[0]), "capacity", why)
    top = usable[-1]
    low, high = load_at(work.bits_low, model, top), load_at(work.bits_high, model, top)
    assert low is not None and high is not None
    if low > FULL:
        why = (
            f"even rank {top}, the highest tried against full fine-tuning at this width, has a "
            "load of "
            f"{low:.2g} or more: above {FULL:g}"
        )
        return Choice("full", top, load_at(work.bits, model, top), "capacity", why)
    why = (
        f"rank {top} has a load between {low:.2g} and {high:.2g}: neither surely below {ROOM} nor "
        f"surely above {FULL:g}. Run the sweep"
    )
    return Choice("open", top, load_at(work.bits, model, top), "capacity", why)


# ---------------------------------------------------------------- the map


def regret_at(points: Iterable[MapPoint], load: float) -> Interval | None:
    """Return a rank's regret at a load between those measured, in percent of the gain.

    Between two loads each end is interpolated in the logarithm. None outside the loads measured.
    """
    known = sorted(points, key=lambda p: p.load)
    for left, right in pairwise(known):
        if left.load <= load <= right.load:
            t = math.log(load / left.load) / math.log(right.load / left.load)
            pairs = zip(left.regret, right.regret, strict=True)
            value, low, high = ((1 - t) * (a or 0.0) + t * (b or 0.0) for a, b in pairs)
            return Interval(value, low, high)
    return None


def _by_map(c: Customer, model: ModelSpec, work: Workload, kept: Kept) -> Choice | None:
    """Choose by measured regret; None where the map does not cover the case."""
    points = kept.covered(model.hidden_size) if c.task == "sft" and work.bits else []
    found: dict[int, Interval] = {}
    for rank in sorted({p.rank for p in points}):
        load = load_at(work.bits, model, rank)
        regret = regret_at([p for p in points if p.rank == rank], load or 0.0)
        if regret is not None:
            found[rank] = regret
    if not found:
        return None
    text = ", ".join(f"rank {r} {i.text()}" for r, i in found.items())
    good = [r for r, i in found.items() if i.high is not None and i.high <= c.max_regret]
    if good:
        why = f"smallest rank that gives up at most {c.max_regret:g}% of the gain, of {text}"
        return Choice("lora", good[0], load_at(work.bits, model, good[0]), "map", why)
    top = max(found)
    low = found[top].low
    behind = low is not None and low > c.max_regret
    why = (
        f"the highest rank measured gives up {'more than' if behind else 'perhaps more than'} "
        f"{c.max_regret:g}% of the gain: {text}"
    )
    method = "full" if behind else "open"
    return Choice(method, top, load_at(work.bits, model, top), "map", why)


# ---------------------------------------------------------------- what is said of the rank


def _note_rank(
    c: Customer,
    model: ModelSpec,
    work: Workload,
    choice: Choice,
    published: Published,
    trace: Trace,
) -> None:
    larger = next((r for r in ranks_of(model) if r > choice.rank), None)
    more = "no larger standard rank was tried at this width"
    if larger is not None:
        extra = trained(model, larger) - trained(model, choice.rank)
        more = f"rank {larger} would add {2 * extra / 2**20:,.0f} MiB to each adapter in bf16"
    floors = published.entries("least_rank", task=c.task)
    gaps = ", ".join(
        f"{e['model']} " + " ".join(f"r{r} +{g}" for r, g in e["gaps"].items())
        for e in published.entries("rank_gaps")
    )
    trace.note(
        "rank",
        choice.rank,
        f"{choice.why}; {more}. Loss above rank 128's in public, nats: {gaps or 'none known'}",
        published.sources_of(floors) or "the smallest standard rank",
        Sure.ONCE,
        ranks=list(ranks_of(model)),
        width=model.hidden_size,
    )
    experts = (
        f", each of the {model.n_experts} experts with rank / {model.n_active_experts} active ones"
        if model.n_experts
        else ""
    )
    trace.note(
        "layers",
        LAYERS,
        f"attention, MLP and unembedding{experts}; a router stays frozen. PEFT's all-linear "
        "leaves the "
        "unembedding out",
        f"{published.where('study')}, figures 4 and 5",
        Sure.PUBLISHED,
    )
    if choice.rank < 8:
        trace.warn(
            f"rank {choice.rank} is served as rank 8, padded, or merged: servers take 8 and more"
        )
