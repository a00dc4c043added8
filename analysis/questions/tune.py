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
from analysis.inference.rows import Row
from analysis.measures import at_best
from analysis.measures.regret import ALLOWED, Gap, gain_from, starts_of
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.curves import full_names, on_curve_rows, runs_of

FEW = 3
"""Learning rates that an arm needs: so many has one whose best one the law predicts."""
KNOWN_PERCENT = 1.0
"""A learning rate is known if the regret of choosing it is below this share of the gain."""


@dataclass(frozen=True)
class Arms(base.Condition):
    """Full fine-tuning, LoRA and other methods, each curve an arm, by its index in `optima`."""

    chosen_on: str
    """Rows that choose the learning rates: validation or test."""

    @property
    def missing(self) -> str:
        return "fullft" if self.reference is None else "lora" if self.judged is None else ""

    @property
    def shown(self) -> bool:
        return bool(self.optima)

    @cached_property
    def members(self) -> list[pd.DataFrame]:
        """The runs of each arm."""
        return [runs_of(self.runs, o.curve) for o in self.optima]

    @cached_property
    def names(self) -> list[str]:
        """The arms' names: of the column `arm`, if a search wrote the table."""
        if "arm" in self.runs:
            return [str(runs["arm"].iloc[0]) for runs in self.members]
        return full_names([o.curve for o in self.optima])

    @cached_property
    def reference(self) -> int | None:
        """Full fine-tuning, of all weights if there is such an arm; others are compared with it."""
        full = [k for k, o in enumerate(self.optima) if o.curve.key["method"] == "fullft"]
        return min(full, key=lambda k: self.optima[k].curve.is_control, default=None)

    @cached_property
    def judged(self) -> int | None:
        """LoRA's highest rank, if several the best one on the rows that choose; else another's."""

        def order(k: int) -> tuple[bool, float, float]:
            key, nll = self.optima[k].curve.key, self.optima[k].best_nll
            return key["method"] == "lora", _rank(key) or 0, -math.inf if nll is None else -nll

        adapters = (k for k, o in enumerate(self.optima) if o.curve.key["method"] != "fullft")
        return max(adapters, key=order, default=None)

    @cached_property
    def losses(self) -> list[at_best.AtBest[float]]:
        """Test losses at the optimal learning rate, in nats, by seed."""

        def read(run: pd.Series) -> dict[str, float]:
            return {"test": float(run["test_nll"])}

        found = at_best.values_at_best(self.runs, self.optima, read, parts=True)
        return [losses.map(lambda v: v["test"]) for losses in found]

    @cached_property
    def gains(self) -> list[at_best.AtBest[float]]:
        """How much training lowers the test loss, in nats, by seed."""
        start = starts_of(self.runs)
        return [gain_from(start, losses) for losses in self.losses]

    @cached_property
    def gaps(self) -> dict[int, Gap]:
        """Arm -> it compared with the reference on test rows."""
        if (of := self.reference) is None:
            return {}
        nats = {k: v.minus(self.losses[of]) for k, v in enumerate(self.losses) if k != of}
        pooled = at_best.pooled_over(nats.values())
        full, gain = self.optima[of], self.gains[of]
        return {k: Gap(0, self.optima[k], full, v, gain, None, pooled) for k, v in nats.items()}

    def loss(self, arm: int) -> float | None:
        """Return the mean test loss at the optimal learning rate, else at the best one tried."""
        if self.losses[arm].best:
            return _known(at_best.mean_of(self.losses[arm]))
        runs, lr = self.members[arm], _best_tried(self.optima[arm])
        at_lr = runs[np.isclose(runs["lr"], lr or math.nan) & (runs["status"] == "done")]
        return _known(float(at_lr["test_nll"].mean()))

    @property
    def best(self) -> int | None:
        """The fewest trained weights within KNOWN_PERCENT of the best gain, without `reference`."""
        arms = (k for k in range(len(self.optima)) if k != self.reference)
        known = {k: loss for k in arms if (loss := self.loss(k)) is not None}
        best = min(known.values(), default=math.nan)
        gain = float(np.mean(list(starts_of(self.runs).values()))) - best
        allowed = best + (KNOWN_PERCENT / 100 * gain if gain > 0 else 0.0)  # NaN: not known
        size = [float(runs["n_trainable"].iloc[0] or math.nan) for runs in self.members]
        within = (k for k in known if known[k] <= allowed)
        return min(within, key=lambda k: (size[k], known[k]), default=None)


def conditions(table: pd.DataFrame) -> list[Arms]:
    """Fit the learning rates of every model and data set."""
    validated = all(json.loads(s)["dataset"].get("n_validation", 0) > 0 for s in table["spec"])
    rows = "validation" if validated else "test"
    groups = base.by_group(base.fit(on_curve_rows(table) if validated else table, FEW))
    return [Arms(name, table, optima, rows) for name, optima in groups.items()]


def search(asked: base.Asked, c: Arms) -> dict[str, Any]:
    """Return for each arm the learning rate and its range, the loss, and the cost of a run.

    `gap_percent`: the gap in percent of the reference's gain. `start`: the test loss before
    training. `allowed`: the share of the gain up to which LoRA has no regret. `best`, `reference`,
    and `judged` if it was compared: names of arms.
    """
    arms = []
    for k, (o, runs) in enumerate(zip(c.optima, c.members)):
        gain = at_best.mean_of(c.gains[k])
        done = [json.loads(text) for text in runs.loc[runs["status"] == "done", "result"]]
        times = [r["wall_s"] for r in done if r.get("wall_s")]
        band = o.band(KNOWN_PERCENT / 100 * gain) if gain > 0 else None
        gap = c.gaps[k].percent() if k in c.gaps else None
        # the regret of choosing this learning rate, in percent of the gain, at most
        nats = o.regret_of_best(base.level_of(asked)) if gain > 0 else None
        regret = None if nats is None else 100 * nats / gain
        arm = {
            "arm": c.names[k],
            "method": o.curve.key["method"],
            "rank": _rank(o.curve.key),
            "runs": runs["run_id"].tolist(),
            "best_lr": o.best_lr.plain(),
            "best_tried": _best_tried(o),
            "good": band,
            "loss": c.loss(k),
            "gain": _known(gain),
            "regret_percent": regret,
            "known": regret is not None and regret <= KNOWN_PERCENT,
            "gap_percent": gap and gap.plain(),
            "seconds": float(np.median(times)) if times else None,
            "seeds": len(c.losses[k].best),
            "flags": list(o.flags),
        }
        arms.append(arm)
    named = {"best": c.best, "reference": c.reference, "judged": None if c.missing else c.judged}
    return {
        "arms": arms,
        "chosen_on": c.chosen_on,
        "best_rank": None if c.best is None else arms[c.best]["rank"],
        **{name: None if k is None else c.names[k] for name, k in named.items()},
        "start": _known(float(np.mean(list(starts_of(c.runs).values())))),
        "allowed": ALLOWED,
        "n_test": json.loads(c.runs["result"].iloc[0]).get("n_test"),
    }


def report(asked: base.Asked, c: Arms) -> tuple[list[Row], list[base.Section]]:
    """Return the table of the arms."""
    rows = []
    for o, arm, gap in zip(
        c.optima, search(asked, c)["arms"], map(c.gaps.get, range(len(c.optima)))
    ):
        of_band = " to ".join(map(rate, arm["good"] or ())) or "-"
        numbers = [number(arm["loss"], 5), arm["regret_percent"], gap and gap.percent()]
        rows.append([arm["arm"], base.best_lr(o), of_band, *numbers, arm["seconds"]])
    head = (
        "arm | best LR [95%] | within 1% of the gain | test NLL | regret of the LR, at most, % | "
        "gap, % of FullFT's gain [95%] | seconds a run"
    )
    notes = [f"Learning rates are chosen on {c.chosen_on} rows, losses are on test rows."]
    return [], [base.Section.of("The arms", head, rows, notes)]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rank(key: dict[str, Any]) -> int | None:
    return int(key["rank"]) if key["rank"] == key["rank"] and key["rank"] else None


def _best_tried(o: Optimum) -> float | None:
    """Return the learning rate with the lowest mean loss; None if no run is usable."""
    x, y = o.curve.x[o.curve.usable], o.curve.y[o.curve.usable]
    means = {v: float(y[x == v].mean()) for v in x}
    return float(np.exp(min(means, key=means.__getitem__))) if means else None


QUESTION = base.Question(
    [
        base.over_allowed(
            "over_allowed_top_rank",
            lambda c: c.gaps[c.judged],
            seeds=lambda c: base.fewest_seeds([c.optima[c.reference], c.optima[c.judged]]),
            at=lambda c: c.names[c.judged],
            final=True,
        )
    ],
    conditions,
    report,
    search=search,
)
