"""Questions about runs that are cut at several lengths: the compute to a loss, and short runs.

`compute`: does LoRA need 2/3 of full fine-tuning's compute, per update and to the same loss.
Operations are counted by the study's formula, at the model's real shapes. The goal is full
fine-tuning's loss after SHARE of the updates. Each method uses the learning rate that is optimal
for runs of the length at which it reaches the goal.

`short_runs`: is LoRA's optimal learning rate a larger multiple of full fine-tuning's in short runs,
and does B outgrow A: is its spectral norm larger at the end, at the optimal learning rate.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.inference.decide import Gate, GateCode
from analysis.inference.estimate import N_DRAWS, Estimate, exactly, exp_of, from_draws
from analysis.inference.rows import Row, measured
from analysis.measures.at_best import AtBest, over_seeds, pooled_over, values_at_best
from analysis.measures.ratio import MIN_RANK, ratio_of
from analysis.measures.speed import curves_at_best, log_rho, rho
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.curves import Points, at_step, runs_of, steps_seen, while_unsolved

# ---------------------------------------------------------------- compute

SHARE = 1 / 6
FASTEST = 0.1
"""Quantile of an arm's update times that is compared; other work only slows a run down."""
QUIET = 1.5
"""Largest ratio of the 90% to the 10% quantile of an arm's update times on an idle machine."""
MIN_RUNS = 5
"""Fewest runs from which the update time of an arm is estimated."""


def flops_ratio(spec: dict[str, Any], n_trainable: int) -> float:
    """Return a LoRA update's number of operations over that of a full fine-tuning update.

    (4 P + 6 T) / 6 P, with P weights in matrix products and T trained weights (source: the study).
    """
    m = spec["model"]
    h, q, kv = m["hidden_size"], m["n_heads"] * m["head_size"], m["n_kv_heads"] * m["head_size"]
    p = m["n_layers"] * (2 * h * q + 2 * h * kv + 3 * h * m["mlp_size"]) + h * m["vocab_size"]
    return (4 * p + 6 * n_trainable) / (6 * p)


class Reached(NamedTuple):
    """How an arm reaches the goal: the optimum and learning curves of runs of `length` updates."""

    optimum: Optimum | None
    length: int
    points: AtBest[Points]


@dataclass(frozen=True)
class Arms(base.TwoArms):
    """Full fine-tuning and the ranks of one model and data set."""

    @cached_property
    def last(self) -> int:
        return int(self.runs["steps"].max())

    def read(self, optima: Sequence[Optimum], length: int, until: int) -> list[AtBest[Points]]:
        """Return learning curves to update `until`, at the optima of runs of `length` updates."""
        return curves_at_best(at_step(self.runs, until).assign(steps=length), optima)

    @cached_property
    def goal(self) -> Reached:
        """Full fine-tuning's runs of the goal's length; of length 0 if none were evaluated."""
        short = max((s for s in steps_seen(self.runs) if s <= self.last * SHARE), default=0)
        optima = base.fit(at_step(self.runs, short)) if short else []
        for k, o in enumerate(optima):
            if o is base.full_of(optima):
                return Reached(o, short, self.read(optima, short, short)[k])
        return Reached(None, short, AtBest({}))

    @cached_property
    def reached(self) -> dict[int, Reached]:
        """The shortest runs of every rank that reach the goal's loss; its whole runs if none do.

        A rank's length is the first evaluated step at which runs, at the optimum for that length,
        have reached the loss. Learning curves end at twice that length, since single seeds may
        reach it later. All optima of one length are fitted together, so that they share one noise
        level.
        """

        def lowest(o: Optimum) -> float:
            """Return the loss at the optimum; without it, the lowest mean loss at a usable LR."""
            c = o.curve
            means = (float(np.mean(c.y[c.usable & (c.x == x)])) for x in set(c.x[c.usable]))
            return min(means, default=np.inf) if o.best_nll is None else o.best_nll

        at_goal = [points[-1][1] for points in self.goal.points.best.values()]
        loss = float(np.mean(at_goal)) if at_goal else -np.inf
        found: dict[int, Reached] = {}
        seen = steps_seen(self.runs)
        for length in seen:
            optima = base.fit(at_step(self.runs, length))
            there = {
                r: k for k, o in enumerate(optima) if (r := base.rank_of(o)) and lowest(o) <= loss
            }
            if there.keys() - found.keys():
                twice = next((s for s in seen if s >= 2 * length), seen[-1])
                each = self.read(optima, length, twice)
                found = {r: Reached(optima[k], length, each[k]) for r, k in there.items()} | found
        for o, runs in zip(self.optima, curves_at_best(self.runs, self.optima)):
            if base.rank_of(o):
                found.setdefault(base.rank_of(o), Reached(o, self.last, runs))
        return found

    def seconds(self, rank: int) -> list[float]:
        """Return the median seconds per update of the runs of a rank (0: full), where recorded."""
        if "step_s" not in self.runs:
            return []
        is_full = self.runs["method"] == "fullft"
        mine = ~is_full & (self.runs["rank"] == rank) if rank else is_full
        return sorted(self.runs["step_s"][mine].dropna())

    @cached_property
    def costs(self) -> dict[int, dict[str, Estimate]]:
        """Costs relative to full fine-tuning's, by rank and estimand."""
        goal, reached, found = self.goal.points, self.reached, {}
        pooled = pooled_over(log_rho(goal, r.points) for r in reached.values())
        of_full = self.seconds(0)
        for rank, o in self.lora.items():
            row = runs_of(self.runs, o.curve).iloc[0]
            operations = exactly(flops_ratio(json.loads(row["spec"]), int(row["n_trainable"])))
            both, seconds = (self.seconds(rank), of_full), base.UNKNOWN
            if min(map(len, both)) >= MIN_RUNS:  # bootstrapped over runs
                rng, n = np.random.default_rng(20251125), sum(map(len, both))
                draws = (rng.choice(v, (N_DRAWS, len(v))) for v in both)
                x, y = (np.log(np.quantile(v, FASTEST, axis=1)) for v in draws)
                seconds = exp_of(from_draws(x - y, n))
            steps = rho(goal, reached[rank].points, pooled)  # LoRA's steps over full fine-tuning's
            found[rank] = {
                "flops_per_step": operations,
                "seconds_per_step": seconds,
                "steps": steps,
                "flops_to_loss": _times(steps, operations),
                "seconds_to_loss": _times(steps, seconds),
            }
        return found

    @property
    def ends(self) -> list[Optimum]:
        """Full fine-tuning's optimum at the goal, and the highest rank's optimum in `reached`."""
        return [o for o in (self.goal.optimum, self.reached[self.top].optimum) if o is not None]

    @property
    def seeds(self) -> int:
        return base.fewest_seeds(self.ends)

    def gates_to_loss(self) -> list[Gate]:
        aim, goal = self.goal.optimum, self.goal.points.best
        gates = (
            base.gates_on_speed(self.ends)
            if aim
            else base.missing("full fine-tuning's shorter runs")
        )
        highest = self.reached[self.top].points.best
        if any(highest[s][-1][1] > goal[s][-1][1] for s in highest.keys() & goal.keys()):
            gates = [*gates, Gate(GateCode.NOT_REACHED)]
        return gates

    def gates_on_time(self) -> list[Gate]:
        """Return a gate if an arm's update times vary too much to reflect only the method."""
        arms = filter(None, (self.seconds(0), self.seconds(self.top)))
        most = max((float(np.quantile(v, 0.9) / np.quantile(v, 0.1)) for v in arms), default=1.0)
        return [] if most <= QUIET else [Gate(GateCode.BUSY, f"{most:.2g}")]


def _times(a: Estimate, b: Estimate) -> Estimate:
    """Return the product of two independent estimates; a bound stays a bound."""
    if a.value is None or b.value is None:
        low, high = (None if v is None or b.value is None else v * b.value for v in (a.low, a.high))
        return Estimate(None, low, high, n=a.n, flags=a.flags)
    if a.draws is None or b.draws is None:
        return Estimate(a.value * b.value, n=a.n)
    logs = np.log(a.draws) + np.log(np.random.default_rng(7).permutation(b.draws))
    spread = a.spread and a.spread.sharing(float(np.std(np.log(b.draws))))
    return exp_of(from_draws(logs, a.n, spread=spread))


def compute_conditions(table: pd.DataFrame) -> list[Arms]:
    """Return the one condition of a model and data set."""
    runs, note = while_unsolved(table)
    optima = base.fit(runs)
    return [Arms(optima[0].curve.group, runs, optima, note)]


def compute_report(asked: base.Asked, c: Arms) -> tuple[list[Row], list[base.Section]]:
    """Return all costs by rank, the lengths at which ranks reach the loss, and a table of both."""
    rows = []
    for rank, cost in c.costs.items():
        lr, length = base.best_lr(c.reached[rank].optimum), c.reached[rank].length
        per_update = [cost["flops_per_step"].value, cost["seconds_per_step"]]
        to_loss = [cost[k] for k in ("steps", "flops_to_loss", "seconds_to_loss")]
        rows.append([rank, *per_update, lr, length, *to_loss])
    head = (
        "rank | operations per update | seconds per update [95%] | optimal LR to FullFT's loss "
        "[95%] | of runs of | updates to it [95%] | operations to it [95%] | seconds to it [95%]"
    )
    text = [
        f"The claims are judged at rank {c.top}. The loss to be reached is full fine-tuning's "
        f"after {c.goal.length} updates; if a rank does not reach it, the lowest loss that both "
        "reach. Each method uses the learning rate that is optimal for runs of the length at which "
        "it reaches that loss. Peak memory is measured in the benchmark and compared with the "
        "plan's estimate.",
        c.note,
    ]
    return [], [base.Section.of("Compute", head, rows, text)]


def _cost(name: str, gates: Callable[[Arms], Sequence[Gate]], place: str = "") -> base.Estimand:
    """Declare a cost of the highest rank relative to full fine-tuning's."""
    return base.Estimand(
        name,
        lambda c: c.costs[c.top][name],
        gates,
        log=True,
        used=lambda c: [c.lora[c.top], c.full],
        at=lambda c: place and f"rank {c.top}" + place.format(c),
    )


TO_LOSS = ", the loss of full fine-tuning after {0.goal.length} of {0.last} updates"
COMPUTE = base.Question(
    [
        _cost("flops_per_step", lambda c: []),
        _cost("seconds_per_step", Arms.gates_on_time),
        _cost("flops_to_loss", Arms.gates_to_loss, TO_LOSS),
        _cost("seconds_to_loss", lambda c: c.gates_to_loss() + c.gates_on_time(), TO_LOSS),
    ],
    compute_conditions,
    compute_report,
    split_by=base.TASK,
)


# ---------------------------------------------------------------- short runs

SHORT = 24
"""The short horizon is the first one of at least the longest horizon divided by this."""
SHORTEST = 4
"""Horizons of fewer updates are ignored."""
Norms = dict[tuple[str, str], float]
"""(matrix, part) -> spectral norm. Parts: LoRA's a and b, and delta (the change of the weights)."""


class Horizon(NamedTuple):
    """The optima of runs cut at one step; LoRA's at ranks from MIN_RANK up."""

    step: int
    full: Optimum | None
    lora: list[Optimum]
    ratio: Estimate
    """LoRA's optimal learning rate over full fine-tuning's."""

    @property
    def optima(self) -> list[Optimum]:
        return [*([self.full] if self.full else []), *self.lora]


@dataclass(frozen=True)
class Lengths(base.TwoArms):
    """The runs of one model and data set, cut at several horizons."""

    whole: pd.DataFrame
    """The uncut runs, whose norms are measured."""
    horizons: list[Horizon]
    short: Horizon
    """The first horizon of at least `long.step` / SHORT updates."""
    long: Horizon
    """The longest horizon."""

    @property
    def missing(self) -> str:
        return "fullft" if self.long.full is None else "" if self.long.lora else "lora"

    @property
    def shown(self) -> bool:
        return True

    @property
    def rests(self) -> list[Optimum]:
        return [*self.short.optima, *self.long.optima]

    def short_over_long(self) -> Estimate:
        """Return the ratio at the short horizon over the ratio at the long horizon."""
        short, long = self.short.ratio, self.long.ratio
        if short.draws is None or long.draws is None:
            return base.UNKNOWN
        return from_draws(short.draws / long.draws, short.n + long.n)

    @cached_property
    def ends(self) -> list[Optimum]:
        """The optima of whole runs."""
        return base.fit(self.whole) if self.note else self.optima

    @cached_property
    def of_top(self) -> dict[str, Estimate]:
        """Medians over matrices of ratios of spectral norms, of the highest rank that has norms.

        growth: norm of B over norm of A; movement: norm of the change of the weights over its norm
        in full fine-tuning. Both at the optima of whole runs.
        """

        def logs(row: pd.Series) -> Norms:
            """Return logarithms, which interpolate well between LRs."""
            norms = json.loads(row["result"]).get("spectra") or {}
            return {(m, k): math.log(v) for m, by in norms.items() for k, v in by.items() if v > 0}

        def ratio(a: Norms, of: str, b: Norms, over: str) -> float:
            """Return the median ln(part `of` of a / part `over` of b) over matrices of both."""
            both = [(v, b[n, over]) for (n, part), v in a.items() if part == of and (n, over) in b]
            return float(np.median([x - y for x, y in both]))

        found = values_at_best(self.whole, self.ends, logs)
        lora = [v for o, v in zip(self.ends, found) if base.rank_of(o)]
        full = next((v for o, v in zip(self.ends, found) if not base.rank_of(o)), AtBest({}))
        grown = [v.map(lambda m: ratio(m, "b", m, "a")) for v in lora]
        moved = [v.paired(full, lambda m, f: ratio(m, "delta", f, "delta")) for v in lora]
        known = [k for k, v in enumerate(lora) if v.best]
        return {
            name: exp_of(over_seeds(of[known[-1]], pooled_over(of))) if known else base.UNKNOWN
            for name, of in (("growth", grown), ("movement", moved))
        }

    @property
    def end(self) -> str:
        return f"highest rank, after {self.whole['steps'].max():g} updates"


def short_conditions(table: pd.DataFrame) -> list[Lengths]:
    """Fit the optima at every step at which all runs were evaluated, and at the end."""
    base.one_value(table, "steps")
    part, note = while_unsolved(table)
    last, horizons, optima = int(part["steps"].max()), [], []
    for step in [s for s in steps_seen(part) if s >= SHORTEST] + [last]:
        optima = base.fit(at_step(part, step))
        full, lora = base.full_of(optima), base.lora_of(optima, MIN_RANK)
        ratio = ratio_of(lora, full) if full and lora else base.UNKNOWN
        horizons.append(Horizon(step, full, lora, ratio))
    short = next(h for h in horizons if h.step >= last / SHORT)
    ends = (short, horizons[-1])
    return [Lengths(optima[0].curve.group, part, optima, note, table, horizons, *ends)]


def short_report(asked: base.Asked, c: Lengths) -> tuple[list[Row], list[base.Section]]:
    """Return the ratio by horizon."""
    rows: list[list[Any]] = []
    for h in c.horizons:
        of_full = base.best_lr(h.full) if h.full else "-"
        rows.append([h.step, of_full, *map(base.best_lr, h.lora), h.ratio])
    of_lora = [f"best LR, {o.curve.name}" for o in c.long.lora]
    head = " | ".join(["updates", "best FullFT LR", *of_lora, "ratio [95%]"])
    text = [
        f"Short: {c.short.step} updates; long: {c.long.step}. The ratio is over the ranks of "
        f"{MIN_RANK} and more. Shorter runs are the first updates of the longer ones.",
        c.note,
    ]
    by_horizon = base.Section.of("The ratio by horizon", head, rows, text)
    out = [measured(c.where(h.optima), "lr_ratio", h.ratio, at="") for h in c.horizons]
    return out, [by_horizon]


SHORT_RUNS = base.Question(
    [
        base.Estimand(
            "short_over_long",
            Lengths.short_over_long,
            lambda c: base.gates_on(c.rests),
            log=True,
            at=lambda c: f"{c.short.step} updates against {c.long.step}",
        ),
        base.Estimand(
            "sigma_b_over_a",
            lambda c: c.of_top["growth"],
            lambda c: base.gates_on(base.lora_of(c.ends, MIN_RANK)),
            log=True,
            at=lambda c: c.end,
        ),
        base.Estimand(
            "movement_ratio",
            lambda c: c.of_top["movement"],
            lambda c: base.gates_on(
                [o for o in c.ends if base.rank_of(o) not in range(1, MIN_RANK)]
            ),
            log=True,
            at=lambda c: c.end,
        ),
    ],
    short_conditions,
    short_report,
    split_by=base.TASK,
)
