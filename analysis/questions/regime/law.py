"""What the rank that is needed grows with, from the cells of `regime`."""

import math
from collections.abc import Iterable, Mapping, Sequence

from analysis.inference.estimate import Estimate, number, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import AtBest, over_seeds
from analysis.measures.laws.rank_law import Point, RankLaw, rank_law, sum_of
from analysis.optimum.optimum import Optimum
from analysis.questions.base import Measured, Panel, Rows, Section, Series, distinct
from analysis.questions.regime.cells import Cell

ESTIMANDS = ("rank_by_bits", "rank_by_change", "rank_by_updates")
BITS, CHANGE = "bits of what is new", "rank of the change"
RIVALS = {
    "2 bits a parameter (the study)": {BITS: 1.0},
    "the rank of the change": {CHANGE: 1.0},
    "the width alone, whatever the data": {},
}
"""Laws of r* on one base: the exponents that each claims; 0 where it claims none."""
MEASURES = {
    "bits_generator": "bits of all that is new",
    "bits_learnable": "bits of what is seen often enough to be learned",
}


def measured_laws(cells: Sequence[Cell]) -> dict[str, tuple[Measured, list[Optimum]]]:
    """Return the estimands about r* and the optima that they rest on, by base model and cells."""
    found: dict[str, tuple[Measured, list[Optimum]]] = {}
    for model, mine in _by_model(cells).items():
        rules = [c for c in mine if _change_rank(c)]
        if len(rules) < 2:
            continue
        law, nothing, none = _law_of_rules(rules), Estimate(None), Gate(GateCode.NO_LAW)
        by_law: Measured = {
            "rank_by_bits": (law.exponents[BITS], []) if law else (nothing, [none]),
            "rank_by_change": (law.exponents[CHANGE], []) if law else (nothing, [none]),
        }
        found[f"{model}, only rules new"] = by_law, _optima_of(rules)
        growing = _by_updates(mine)
        by_updates = (growing, []) if growing else (nothing, [none])
        found[f"{model}, all cells"] = {"rank_by_updates": by_updates}, _optima_of(mine)
    return found


def _optima_of(cells: Sequence[Cell]) -> list[Optimum]:
    gaps = [g for c in cells for g in c.last.values()]
    return distinct(o for g in gaps for o in (g.lora, g.full))


def law_section(cells: Sequence[Cell]) -> Section:
    """Show r* in every cell, the laws fitted to it, and which published ones are out."""
    rows: Rows = [["law of the rank that is needed", "base", "cells", "exponents [95%]", "verdict"]]
    for model, mine in _by_model(cells).items():
        rules = [c for c in mine if _change_rank(c)]
        if law := _law_of_rules(rules):
            shown = "; ".join(f"{n}: {with_interval(e)}" for n, e in law.exponents.items())
            rows.append(["measured, only rules new", model, str(law.cells), shown, _error(law)])
            rows += [
                [name, model, "", _claimed(claim), _outcome(law.rivals[name])]
                for name, claim in RIVALS.items()
            ]
        for key, words in MEASURES.items():
            if law := rank_law(_points(mine, key), [BITS], {}):
                shown = f"{words}: {with_interval(law.exponents[BITS])}"
                rows.append(["measured, all cells", model, str(law.cells), shown, _error(law)])
    text = [
        "The rank that is needed, r*, is where LoRA gives up just what is allowed, interpolated "
        "between the ranks tried, for each seed (each a draw of what is new). Exponents are fitted "
        "to its logarithm in each seed; their intervals are over seeds, at these very cells. Cells "
        "whose r* lies outside the ranks tried in some seed are left out.",
        *(f"{c.name}: r* {_needed_text(c)}." for c in cells),
    ]
    panels = [_panel(cells)]
    return Section("The rank that is needed", rows, text, "rank_needed.png", panels, CAPTION)


CAPTION = "the rank at which LoRA gives up nothing, over what is new"


def _error(law: RankLaw) -> str:
    if law.left_out is None:
        return "too few cells to foretell one"
    return f"foretells a cell left out to a factor {2**law.left_out:.2g}"


def _claimed(claim: Mapping[str, float]) -> str:
    return "; ".join(f"{n}: {claim.get(n, 0.0):g}" for n in (BITS, CHANGE))


def _outcome(p: float | None) -> str:
    if p is None:
        return "too few seeds to test"
    return f"{'out' if p < 0.05 else 'not out'} (p {number(p, 2)})"


def _by_model(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for c in cells:
        if c.novelty is not None and not c.novelty.nothing and c.last:
            found.setdefault(c.model, []).append(c)
    return found


def _change_rank(cell: Cell) -> int:
    """Return the rank of the change of rules; 0 where it is not all that is new, or not known."""
    new = cell.novelty
    return new.rank if new is not None and new.low and new.symbols else 0


def _points(cells: Sequence[Cell], measure: str) -> list[Point]:
    return [
        Point(
            c.name,
            {BITS: math.log2(c.bits[measure]), CHANGE: math.log2(max(1, _change_rank(c)))},
            c.needed,
        )
        for c in cells
        if c.bits.get(measure)
    ]


def _law_of_rules(rules: Sequence[Cell]) -> RankLaw | None:
    return rank_law(_points(rules, "bits_generator"), [BITS, CHANGE], RIVALS)


def _by_updates(cells: Sequence[Cell]) -> Estimate | None:
    """Return the exponent of the updates, averaged over the cells that show one; None without."""
    shown = [c.needed_over_updates for c in cells if c.needed_over_updates is not None]
    total = sum_of(shown)
    return None if total is None else over_seeds(total.map(lambda v: v / len(shown)))


def _mean(needed: AtBest[float]) -> Estimate:
    """Return r* over seeds, or the side on which it lies outside the ranks tried."""
    values = list(needed.best.values())
    if not values or not all(map(math.isfinite, values)):
        return Estimate(None)
    e = over_seeds(needed)
    low, high = ((None if v is None else 2**v) for v in (e.low, e.high))
    return Estimate(None if e.value is None else 2**e.value, low, high, e.n, e.flags)


def _needed_text(cell: Cell) -> str:
    needed = cell.needed
    values = list(needed.best.values())
    ranks = sorted(cell.last)
    if not values:
        return "is not known"
    if all(v == -math.inf for v in values):
        return f"below {ranks[0]} in all {len(values)} seeds"
    outside = sum(not math.isfinite(v) for v in values)
    if outside:
        return f"outside ranks {ranks[0]} to {ranks[-1]} in {outside} of {len(values)} seeds"
    return with_interval(_mean(needed))


def _panel(cells: Sequence[Cell]) -> Panel:
    kinds: dict[str, list[Cell]] = {}
    for c in cells:
        if c.novelty is None or c.novelty.nothing or not c.bits.get("bits_generator"):
            continue
        k = _change_rank(c)
        kinds.setdefault(f"rules changed by rank {k}" if k else "exceptions new", []).append(c)
    series = []
    for k, (kind, mine) in enumerate(sorted(kinds.items()), 1):
        mine = sorted(mine, key=lambda c: c.bits["bits_generator"])
        bits = [c.bits["bits_generator"] for c in mine]
        needed = [_mean(c.needed) for c in mine]
        series.append(Series.of(kind, bits, needed, colour=k))
    title = "each point is one data set; intervals over its draws"
    return Panel(
        title, "bits of what is new", "rank that is needed", series, log_x=True, log_y=True
    )
