"""How fast each rank learns along a run: rho after more and more updates."""

from collections.abc import Sequence

import pandas as pd

from analysis.inference.estimate import Estimate
from analysis.measures.speed import curves_at_best, rho
from analysis.optimum.fit import fit_all
from analysis.questions.base import Panel, Series, full_of, lora_of
from analysis.report.study.answers import Part
from analysis.report.study.setting import WORDS, Setting
from analysis.runs.learning_curves import by_run
from analysis.runs.lr_curves import lr_curves
from analysis.runs.prefixes import at_step, on_curve_rows

EARLIEST = 8
"""Updates at the first point. Before, adapters that start at zero have hardly left it."""
Speeds = dict[int, dict[int, Estimate]]
"""By rank and updates."""


def chosen(parts: Sequence[Part]) -> dict[Setting, Part]:
    """Return the answer of `rank` for each setting: of fresh seeds, then of the largest base."""
    mine = [p for p in parts if p.results["sweep"] == "rank" and _judged_to(p) >= 2 * EARLIEST]
    found: dict[Setting, Part] = {}
    for part in sorted(mine, key=lambda p: (p.first_study, -p.size)):
        found.setdefault(part.setting(part.verdicts[0].group), part)
    return dict(sorted(found.items()))


def _judged_to(part: Part) -> int:
    """Return the updates after which an answer was judged; its runs may be longer."""
    return max((int(c["steps"]) for c in part.results["curves"]), default=0)


def panels(parts: Sequence[Part]) -> list[Panel]:
    """Return a panel for each setting."""
    return [_panel(setting, part) for setting, part in chosen(parts).items()]


def _panel(setting: Setting, part: Part) -> Panel:
    found = speeds(part.runs, _judged_to(part))
    series = [
        Series.of(f"rank {rank}", list(mine), list(mine.values()), colour=k)
        for k, (rank, mine) in enumerate(sorted(found.items()), 1)
    ]
    return Panel(
        part.marked(f"{', '.join(part.bases)}, {WORDS[setting]}"),
        "updates",
        "speed (rho)",
        series,
        log_x=True,
        log_y=True,
        lines={"full fine-tuning": 1.0},
    )


def speeds(runs: pd.DataFrame, to: int) -> Speeds:
    """Measure rho after 8, 16, 32, ... updates, each method at its best rate for that many.

    Args:
        to: the last number of updates.
    """
    plain = (runs["method"] == "fullft") | (runs["init_seed"].fillna(0) == 0)
    table = on_curve_rows(runs[plain].reset_index(drop=True))
    evaluated = {int(s) for curve in by_run(table).values() for s in curve["step"]}
    doubled = [EARLIEST * 2**k for k in range(to.bit_length())]
    found: Speeds = {}
    for step in sorted({s for s in (*doubled, to) if s <= to} & evaluated):
        part = at_step(table, step)
        optima = fit_all(lr_curves(part))
        points = dict(zip(map(id, optima), curves_at_best(part, optima)))
        full = full_of(optima)
        for o in lora_of(optima) if full is not None else ():
            e = rho(points[id(o)], points[id(full)])
            if e.value is not None:
                found.setdefault(int(o.curve.key["rank"]), {})[step] = e
    return found
