"""Ask whether a variant of LoRA beats LoRA once both are tuned, and whether shared rates mislead.

A cell is one data set and one rank, with full fine-tuning, LoRA and its variants. Losses are paired
by seed, in percent of full fine-tuning's gain, and averaged over the cells: seeds are the units.
Two methods are reversed if they are decided one way with tuned learning rates and the other way at
a learning rate that all methods share. Both intervals exclude 0 at the level REVERSED, which keeps
the chance of any false reversal, over both planned looks, below 5% (docs/log/2026-12-01.md).
"""

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.inference.decide import MIN_SEEDS, Gate, GateCode, at_level
from analysis.inference.estimate import Estimate, rate
from analysis.inference.rows import Row, measured
from analysis.measures import at_best
from analysis.measures.at_best import AtBest
from analysis.measures.regret import gain_from, starts_of
from analysis.optimum.fit import Optimum
from analysis.questions import base, quadrature
from analysis.runs.curves import in_words, runs_of

METHODS = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA", "plus": "LoRA+"}
PAIRS = [(b, a) for a, b in itertools.combinations(METHODS, 2)]
SHARES = {0.25: "a quarter of LoRA's best LR", 1.0: "LoRA's best LR"}
"""The shared learning rates, over LoRA's best one."""
CELLS = 4
"""Data sets times ranks over which the claims are made."""
REVERSED = 0.99
"""Level of the intervals of a reversal: six pairs of methods may be decided by chance."""
TIE = 1.0
"""Methods whose tuned difference is at most this, in percent of the gain, have no order."""


def method_of(key: Mapping[str, Any]) -> str:
    """Return which method a curve is of, by METHODS; empty: another one."""
    if key["method"] == "lora":
        return "plus" if float(key.get("lr_b_ratio") or 1) > 1 else "lora"
    return str(key["method"]) if key["method"] in ("dora", "pissa") else ""


@dataclass(frozen=True)
class Cell:
    """One data set at one rank."""

    name: str
    full: Optimum
    arms: dict[str, Optimum]
    """Curves by METHODS."""
    losses: dict[str, AtBest[float]]
    """Their losses at the best learning rates, in nats."""
    gain: AtBest[float]
    """How much full fine-tuning lowers the loss, in nats."""

    @functools.cached_property
    def tried(self) -> dict[float, pd.DataFrame]:
        """ln(lr) -> losses by seed and method, where all methods share MIN_SEEDS seeds or more.

        A diverged run has the loss before training.
        """
        of = {}
        for name, o in self.arms.items():
            c = o.curve
            kept = np.where(c.usable | (c.y < c.nll_start), c.y, c.nll_start)
            of[name] = pd.Series(kept, [c.x.round(6), c.seed])
        by_lr = pd.DataFrame(of).dropna().groupby(level=0)
        return {float(x): v.droplevel(0) for x, v in by_lr if len(v) >= MIN_SEEDS}

    def shared(self, share: float) -> float:
        """Return ln of the tried LR nearest to `share` x LoRA's best, within NEAR; else NaN."""
        wanted = math.log(share * (self.arms["lora"].best_lr.value or math.nan))
        x = min(self.tried, key=lambda x: abs(x - wanted), default=math.nan)
        return x if abs(x - wanted) <= at_best.NEAR else math.nan

    def difference(self, a: str, b: str, share: float = 0.0) -> AtBest[float]:
        """Return a's loss minus b's by seed, in % of the gain: tuned, or at a shared LR."""
        nats, gain = self.losses[a].minus(self.losses[b]), self.gain
        if share:
            there = self.tried.get(self.shared(share), pd.DataFrame({a: [], b: []}))
            nats, gain = AtBest((there[a] - there[b]).to_dict()), AtBest(gain.best)
        return nats.paired(gain, lambda lost, gain: 100 * lost / gain)


def sign(e: Estimate) -> int:
    """Return 1 or -1 if the interval excludes 0, else 0."""
    return int((e.low or 0) > 0) - int((e.high or 0) < 0)


class Order(NamedTuple):
    """The differences of two methods with intervals of level REVERSED: tuned, and at shared LRs."""

    tuned: Estimate
    shared: list[Estimate]

    @property
    def said(self) -> str:
        """`reversed`; `not reversed`, if they tie when tuned or have one order; else `open`."""
        t, each = self.tuned, [sign(e) * sign(self.tuned) for e in self.shared]
        tie = t.has_interval() and max(map(abs, t.interval)) <= TIE
        return "reversed" if -1 in each else "not reversed" if tie or min(each) > 0 else "open"


def orders(*of: Mapping[tuple[str, str], AtBest[float]]) -> dict[tuple[str, str], Order]:
    """Return the orders from the differences by pair, tuned and at each shared LR."""
    each = []
    for by_pair in of:
        pooled = at_best.pooled_over(by_pair.values())  # over the pairs
        found = {p: at_best.over_seeds(v, pooled) for p, v in by_pair.items()}
        each.append({p: at_level(e, REVERSED) for p, e in found.items()})
    return {p: Order(e, [shared[p] for shared in each[1:]]) for p, e in each[0].items()}


@dataclass(frozen=True)
class Variants(base.Condition):
    """All cells."""

    cells: list[Cell]
    data = "all data sets and ranks"

    @property
    def missing(self) -> str:
        lost = (f"{METHODS[m]}, {c.name}" for c in self.cells for m in METHODS if m not in c.arms)
        return next(lost, "" if self.cells else "full fine-tuning with LoRA")

    def over_cells(self, a: str, b: str, share: float = 0.0) -> AtBest[float]:
        """Return the mean of `Cell.difference` over the cells, by seed."""
        each = (c.difference(a, b, share) for c in self.cells)
        total = functools.reduce(lambda x, y: x.paired(y, lambda u, v: u + v), each)
        return total.map(lambda v: v / len(self.cells))

    @functools.cached_property
    def orders(self) -> dict[tuple[str, str], Order]:
        """The order of each pair of methods."""
        return orders(*({p: self.over_cells(*p, s) for p in PAIRS} for s in (0.0, *SHARES)))

    def reversals(self) -> Estimate:
        """Count the reversed pairs; the interval ends with those whose reversal is possible."""
        said = [o.said for o in self.orders.values()]
        n = float(said.count("reversed"))
        return Estimate(n, n, n + said.count("open"), self.seeds)

    def gates(self, *methods: str) -> list[Gate]:
        """List the gates on the curves of these methods and of full fine-tuning."""
        of = [(c.full.curve.group, c.arms["lora"].curve.key["rank"]) for c in self.cells]
        data, ranks = (min(len({*v}), 2) for v in zip(*of))
        n = min(len(self.cells), data * ranks)
        few = Gate(GateCode.FEW_CONDITIONS, f"{n} of {CELLS} (two data sets at two ranks)")
        found = [few] if n < CELLS else []
        for c in self.cells:
            mine = {"full fine-tuning": c.full} | {METHODS[m]: c.arms[m] for m in methods}
            for name, o in mine.items():
                found += [replace(g, place=f"{name}, {c.name}: ") for g in base.gates_on([o])]
        return found or base.gates_on_pairs(self.over_cells(methods[-1], methods[0]))

    def gates_on_reversals(self) -> list[Gate]:
        """List the gates on all curves, cells without shared rates, and pairs not decided."""
        found, (low, high) = self.gates(*METHODS), self.reversals().interval
        lost = (c.name for c in self.cells if any(math.isnan(c.shared(s)) for s in SHARES))
        found += [Gate(GateCode.NOT_SHARED, name) for name in lost]
        return found or [Gate(GateCode.OPEN_ORDERS, int(high))] * (low == 0 < high)


def conditions(table: pd.DataFrame) -> list[Variants]:
    """Fit all curves, and sort them into cells; TableError: they cannot be judged together."""
    base.one_value(table, "model", "steps", "batch_size")
    optima, cells = base.fit(table), dict[str, Cell]()
    losses = dict(zip(map(id, optima), at_best.losses_at_best(optima)))
    for o in optima:
        full, method = base.full_of(base.by_group(optima)[o.curve.group]), method_of(o.curve.key)
        if not (full and method):
            continue
        name = f"{in_words(o.curve.key['dataset'])}, rank {o.curve.key['rank']:g}"
        gain = gain_from(starts_of(runs_of(table, full.curve)), losses[id(full)])
        cell = cells.setdefault(f"{o.curve.group}, {name}", Cell(name, full, {}, {}, gain))
        if method in cell.arms:
            base.refuse(cell.arms[method].curve, o.curve)
        cell.arms[method], cell.losses[method] = o, losses[id(o)]
    return [Variants(Variants.data, table, optima, list(cells.values()))]


def report(asked: base.Asked, c: Variants) -> tuple[list[Row], list[base.Section]]:
    """Return every method of every cell beside the law, and the order of every pair."""
    by_law = {id(x.lora): x for x in quadrature.cells_of(c.runs, c.optima)}
    rows: list[list[Any]] = []
    for cell in c.cells:
        for m, o in cell.arms.items():
            x = by_law.get(id(o))
            lost = [at_best.over_seeds(cell.difference(m, "lora", s)) for s in (0.0, *SHARES)]
            lrs = ", ".join(rate(math.exp(cell.shared(s))) for s in SHARES)
            law = (x.measured, x.predicted) if x else (None, None)
            ours = [base.best_lr(o), *law, *(lost if m != "lora" else [None] * 3)]
            rows.append([cell.name, METHODS[m], *ours, lrs])
    at = " | ".join(f"at {s}" for s in SHARES.values())
    head = "data and rank | method | best LR [95%] | best LR (of B) over FullFT's [95%] | the law"
    head += f" | loss minus LoRA's, tuned, % of the gain [95%] | {at} | shared LRs"
    each = base.Section.of("Each method", head, rows)
    named = {f"{METHODS[a]} - {METHODS[b]}": o for (a, b), o in c.orders.items()}
    rows = [[name, o.tuned, *o.shared, o.said] for name, o in named.items()]
    head = f"mean difference, % of the gain [{100 * REVERSED:g}%] | tuned | {at} | order"
    of_pairs = base.Section.of("Orders of methods, over all data and ranks", head, rows)
    out = [
        measured(c.where(), f"difference, {at}", e, arm=f"{METHODS[a]} - {METHODS[b]}")
        for (a, b), o in c.orders.items()
        for at, e in zip(("tuned", *(f"at {s}" for s in SHARES.values())), (o.tuned, *o.shared))
    ]
    return out, [each, of_pairs]


def _behind(m: str) -> base.Estimand:
    of_lora = (lambda c: c.orders[m, "lora"].tuned, lambda c: c.gates("lora", m))
    return base.Estimand(f"{m}_behind", *of_lora)


REVERSALS = base.Estimand("reversals", Variants.reversals, Variants.gates_on_reversals)
QUESTION = base.Question([*map(_behind, [*METHODS][1:]), REVERSALS], conditions, report)
