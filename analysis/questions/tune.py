"""Question: which method, rank and learning rate for one model and one file of rows.

With validation rows, learning rates are fitted to validation losses, and every loss that is
reported or judged is on test rows. Without them, test rows do both.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import number, rate
from analysis.measures import at_best
from analysis.measures.regret import ALLOWED, Gap, gain_from, starts_of
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.curves import on_curve_rows, runs_of

FEW = 3
"""Learning rates that an arm needs: so many has one whose best one the law predicts."""
KNOWN_PERCENT = 1.0
"""A learning rate is known if the regret of choosing it is below this share of the gain."""


@dataclass(frozen=True)
class Arms(base.Condition):
    """Full fine-tuning and ranks of LoRA; one of the two methods may be missing."""

    chosen_on: str
    """Rows that choose the learning rates: validation or test."""

    @property
    def missing(self) -> str:
        return "fullft" if 0 not in self.by_rank else "" if self.lora else "lora"

    @property
    def shown(self) -> bool:
        return bool(self.optima)

    @cached_property
    def losses(self) -> dict[int, at_best.AtBest[float]]:
        """Rank -> test losses at the optimal learning rate, in nats, by seed."""

        def read(run: pd.Series) -> dict[str, float]:
            return {"test": float(run["test_nll"])}

        ranks, optima = zip(*self.by_rank.items())
        found = at_best.values_at_best(self.runs, optima, read, parts=True)
        return {r: losses.map(lambda v: v["test"]) for r, losses in zip(ranks, found)}

    @cached_property
    def gains(self) -> dict[int, at_best.AtBest[float]]:
        """Rank -> how much training lowers the test loss, in nats, by seed."""
        start = starts_of(self.runs)
        return {r: gain_from(start, losses) for r, losses in self.losses.items()}

    @cached_property
    def gaps(self) -> dict[int, Gap]:
        """Rank -> LoRA compared with full fine-tuning on test rows."""
        nats = {r: self.losses[r].minus(self.losses[0]) for r in self.lora}
        pooled = at_best.pooled_over(nats.values())
        return {
            r: Gap(r, o, self.full, nats[r], self.gains[0], None, pooled)
            for r, o in self.lora.items()
        }

    def loss(self, rank: int) -> float | None:
        """Return the mean test loss at the optimal learning rate, else at the best one tried."""
        if self.losses[rank].best:
            return _known(at_best.mean_of(self.losses[rank]))
        runs, lr = runs_of(self.runs, self.by_rank[rank].curve), _best_tried(self.by_rank[rank])
        at_lr = runs[np.isclose(runs["lr"], lr or math.nan) & (runs["status"] == "done")]
        return _known(float(at_lr["test_nll"].mean()))

    @property
    def best_rank(self) -> int | None:
        """The smallest rank within KNOWN_PERCENT of the gain of the best one."""
        known = {r: loss for r in self.lora if (loss := self.loss(r)) is not None}
        best = min(known.values(), default=math.nan)
        gain = float(np.mean(list(starts_of(self.runs).values()))) - best
        allowed = best + (KNOWN_PERCENT / 100 * gain if gain > 0 else 0.0)  # NaN: not known
        return min((r for r, loss in known.items() if loss <= allowed), default=None)


def conditions(table: pd.DataFrame) -> list[Arms]:
    """Fit the learning rates of every model and data set."""
    validated = all(json.loads(s)["dataset"].get("n_validation", 0) > 0 for s in table["spec"])
    rows = "validation" if validated else "test"
    groups = base.by_group(base.fit(on_curve_rows(table) if validated else table, FEW))
    return [Arms(name, table, optima, rows) for name, optima in groups.items()]


def report(asked: base.Asked, c: Arms) -> tuple[dict[str, Any], list[base.Section]]:
    """Return for each arm the learning rate and its range, the loss, and the cost of a run.

    `gap_percent`: LoRA's gap in percent of full fine-tuning's gain. `start`: the test loss before
    training. `allowed`: the share of the gain up to which LoRA has no regret.
    """
    arms, rows = [], []
    for rank, o in c.by_rank.items():
        gain = at_best.mean_of(c.gains[rank])
        runs = runs_of(c.runs, o.curve)
        done = [json.loads(text) for text in runs.loc[runs["status"] == "done", "result"]]
        times = [r["wall_s"] for r in done if r.get("wall_s")]
        band = o.band(KNOWN_PERCENT / 100 * gain) if gain > 0 else None
        gap = c.gaps[rank].percent() if c.missing == "" and rank else None
        # the regret of choosing this learning rate, in percent of the gain, at most
        nats = o.regret_of_best(base.level_of(asked)) if gain > 0 else None
        regret = None if nats is None else 100 * nats / gain
        arm = {
            "method": "lora" if rank else "fullft",
            "rank": rank or None,
            "best_lr": o.best_lr,
            "best_tried": _best_tried(o),
            "good": band,
            "loss": c.loss(rank),
            "gain": _known(gain),
            "regret_percent": regret,
            "known": regret is not None and regret <= KNOWN_PERCENT,
            "gap_percent": gap,
            "seconds": float(np.median(times)) if times else None,
            "seeds": len(c.losses[rank].best),
            "flags": list(o.flags),
        }
        arms.append(arm)
        of_band = "-" if not band else " to ".join(map(rate, band))
        numbers = [number(c.loss(rank), 5), regret, gap, arm["seconds"]]
        rows.append([o.curve.name, base.best_lr(o), of_band, *numbers])
    head = (
        "arm | best LR [95%] | within 1% of the gain | test NLL | regret of the LR, at most, % | "
        "gap, % of FullFT's gain [95%] | seconds a run"
    )
    notes = [f"Learning rates are chosen on {c.chosen_on} rows, losses are on test rows."]
    measures = {
        "arms": arms,
        "chosen_on": c.chosen_on,
        "best_rank": c.best_rank,
        "start": _known(float(np.mean(list(starts_of(c.runs).values())))),
        "allowed": ALLOWED,
        "n_test": json.loads(c.runs["result"].iloc[0]).get("n_test"),
    }
    return measures, [base.Section.of("The arms", head, rows, notes)]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _best_tried(o: Optimum) -> float | None:
    """Return the learning rate with the lowest mean loss; None if no run is usable."""
    x, y = o.curve.x[o.curve.usable], o.curve.y[o.curve.usable]
    means = {v: float(y[x == v].mean()) for v in x}
    return float(np.exp(min(means, key=means.__getitem__))) if means else None


QUESTION = base.Question(
    [
        base.over_allowed(
            "over_allowed_top_rank",
            lambda c: c.gaps[c.top],
            seeds=lambda c: base.fewest_seeds([c.full, c.by_rank[c.top]]),
            read=lambda c: f"rank {c.top}",
        )
    ],
    conditions,
    report,
)
