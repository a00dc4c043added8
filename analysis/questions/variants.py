"""Ask whether a variant of LoRA beats LoRA once both are tuned, and whether shared rates mislead.

A cell is one data set and one rank, with full fine-tuning, LoRA and its variants. Losses are paired
by seed, in percent of full fine-tuning's gain, and averaged over the cells: seeds are the units.
Two methods are reversed if they are decided one way with tuned learning rates and the other way at
a learning rate that all methods share. Both intervals exclude 0 at the level REVERSED, which keeps
the chance of any false reversal below 5% (docs/log/2026-12-01.md).
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd

from analysis.inference.decide import MIN_SEEDS, Gate, GateCode, at_level
from analysis.inference.estimate import Estimate, rate
from analysis.measures import at_best, laws
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
REVERSED = 0.985
"""Level of the intervals of a reversal: six pairs of methods may be decided by chance."""
TIE = 1.0
"""Methods whose tuned difference is at most this, in percent of the gain, have no order."""


def method_of(key: Mapping[str, Any]) -> str:
    """Return which method a curve is of, by METHODS; empty: another one."""
    if key["method"] == "lora":
        return "plus" if float(key.get("lr_b_ratio") or 1) > 1 else "lora"
    return str(key["method"]) if key["method"] in METHODS else ""


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
    def shared(self) -> dict[float, tuple[float, dict[str, AtBest[float]]]]:
        """Share of SHARES -> the tried LR nearest to it, and the losses of all methods there.

        Every method has MIN_SEEDS seeds there. A diverged run has the loss before training. A share
        without such an LR within NEAR is left out.
        """
        tried: dict[float, dict[str, dict[int, float]]] = {}
        for name, o in self.arms.items():
            c = o.curve
            for x, y, seed, ok in zip(c.x, c.y, c.seed, c.usable):
                kept = float(y if ok or y < c.nll_start else c.nll_start)
                tried.setdefault(round(float(x), 6), {}).setdefault(name, {})[int(seed)] = kept
        known = {
            x: {name: AtBest(v) for name, v in of.items()}
            for x, of in tried.items()
            if len(of) == len(self.arms)
            and len(set.intersection(*(set(v) for v in of.values()))) >= MIN_SEEDS
        }
        found = {}
        for share in SHARES:
            wanted = math.log(share * (self.arms["lora"].best_lr.value or math.nan))
            near = [x for x in known if abs(x - wanted) <= at_best.NEAR]
            if near:
                x = min(near, key=lambda x: abs(x - wanted))
                found[share] = (math.exp(x), known[x])
        return found

    def difference(self, a: str, b: str, share: float = 0.0) -> AtBest[float]:
        """Return a's loss minus b's by seed, in % of the gain: tuned, or at a shared LR."""
        if share and share not in self.shared:
            return AtBest({})
        losses = self.shared[share][1] if share else self.losses
        nats, gain = losses[a].minus(losses[b]), AtBest(self.gain.best) if share else self.gain
        return nats.paired(gain, lambda lost, gain: 100 * lost / gain)


class Order(NamedTuple):
    """The differences of two methods, in percent of the gain: tuned, and at each shared rate."""

    tuned: Estimate
    shared: list[Estimate]

    @property
    def is_reversed(self) -> bool:
        """Whether a shared learning rate decides the other way than tuned ones."""
        return any(sign(e) * sign(self.tuned) < 0 for e in self.shared)

    @property
    def may_be(self) -> bool:
        """Whether a reversal is not decided, but possible: no tie, and not in one order."""
        t = at_level(self.tuned, REVERSED)
        tie = t.has_interval() and max(map(abs, t.interval)) <= TIE
        same = all(sign(e) * sign(t) > 0 for e in self.shared)
        return not (self.is_reversed or tie or same)


def sign(e: Estimate) -> int:
    """Return 1 or -1 if the interval of level REVERSED excludes 0, else 0."""
    e = at_level(e, REVERSED)
    return int(e.interval[0] > 0) - int(e.interval[1] < 0) if e.has_interval() else 0


Differences = Mapping[tuple[str, str], AtBest[float]]
"""a's loss minus b's, by (a, b)."""


def orders(tuned: Differences, shared: Sequence[Differences]) -> dict[tuple[str, str], Order]:
    """Return the order of each pair of methods; the variance over seeds is pooled over pairs."""

    def over_pairs(of: Differences) -> dict[tuple[str, str], Estimate]:
        pooled = at_best.pooled_over(of.values())
        return {pair: at_best.over_seeds(v, pooled) for pair, v in of.items()}

    first, *rest = map(over_pairs, (tuned, *shared))
    return {pair: Order(e, [of[pair] for of in rest]) for pair, e in first.items()}


@dataclass(frozen=True)
class Variants(base.Condition):
    """All cells."""

    cells: list[Cell]

    @property
    def missing(self) -> str:
        lost = (f"{METHODS[m]}, {c.name}" for c in self.cells for m in METHODS if m not in c.arms)
        return next(lost, "" if self.cells else "full fine-tuning with LoRA")

    def over_cells(self, a: str, b: str, share: float = 0.0) -> AtBest[float]:
        """Return the mean of `Cell.difference` over the cells, by seed."""
        total = (c.difference(a, b, share) for c in self.cells)
        return functools.reduce(lambda x, y: x.paired(y, lambda u, v: u + v), total).map(
            lambda v: v / len(self.cells)
        )

    @functools.cached_property
    def orders(self) -> dict[tuple[str, str], Order]:
        """The order of each pair of methods."""
        each = [{p: self.over_cells(*p, share) for p in PAIRS} for share in (0.0, *SHARES)]
        return orders(each[0], each[1:])

    def reversals(self) -> Estimate:
        """Count the reversed pairs; the interval ends with those whose reversal is possible."""
        n, more = (
            sum(getattr(o, k) for o in self.orders.values()) for k in ("is_reversed", "may_be")
        )
        return Estimate(float(n), float(n), float(n + more), self.seeds)

    def gates(self, *methods: str) -> list[Gate]:
        """List the gates on the curves of these methods and of full fine-tuning."""
        few = [Gate(GateCode.FEW_CONDITIONS, f"{len(self.cells)} of {CELLS}")]
        found = few if len(self.cells) < CELLS else []
        for c in self.cells:
            mine = {"full fine-tuning": c.full, **{METHODS[m]: c.arms[m] for m in methods}}
            for name, o in mine.items():
                place = f"{name}, {c.name}: "
                found += [replace(g, place=place) for g in base.gates_on([o])]
        return found or base.gates_on_pairs(self.over_cells(methods[-1], methods[0]))

    def gates_on_reversals(self) -> list[Gate]:
        """List the gates on all curves, cells without shared rates, and pairs not decided."""
        found, (low, high) = self.gates(*METHODS), self.reversals().interval
        lost = [c.name for c in self.cells if len(c.shared) < len(SHARES)]
        found += [Gate(GateCode.NOT_SHARED, name) for name in lost]
        return found or [Gate(GateCode.OPEN_ORDERS, int(high))] * (low == 0 < high)


def conditions(table: pd.DataFrame) -> list[Variants]:
    """Fit all curves, and sort them into cells."""
    optima, cells = base.fit(table), []
    losses = dict(zip(map(id, optima), at_best.losses_at_best(optima)))
    for mine in base.by_group(optima).values():
        named = [(m, o) for o in mine if (m := method_of(o.curve.key))]
        for rank in dict.fromkeys(int(o.curve.key["rank"]) for _, o in named):
            arms = {m: o for m, o in named if o.curve.key["rank"] == rank}
            if (full := base.full_of(mine)) and "lora" in arms:
                gain = gain_from(starts_of(runs_of(table, full.curve)), losses[id(full)])
                own = {m: losses[id(o)] for m, o in arms.items()}
                name = f"{in_words(full.curve.key['dataset'])}, rank {rank}"
                cells.append(Cell(name, full, arms, own, gain))
    return [Variants("all data sets and ranks", table, optima, cells)]


def report(asked: base.Asked, c: Variants) -> tuple[dict[str, Any], list[base.Section]]:
    """Return every method of every cell beside the law, and the order of every pair."""
    by_law = {id(x.lora): x for x in quadrature.cells_of(c.runs, c.optima)}
    rows: list[list[Any]] = []
    for cell in c.cells:
        rows.append([cell.name, "full fine-tuning", base.best_lr(cell.full), *[None] * 6])
        for m, o in cell.arms.items():
            x = by_law.get(id(o))
            law = x and float(laws.ratio(*x.at, x.full_lr, b_ratio=x.b_ratio))
            lost = [at_best.over_seeds(cell.difference(m, "lora", s)) for s in (0.0, *SHARES)]
            ours = [None] * 3 if m == "lora" else lost
            shared = ", ".join(rate(lr) for lr, _ in cell.shared.values())
            rows.append(
                [cell.name, METHODS[m], base.best_lr(o), x and x.measured, law, *ours, shared]
            )
    at = " | ".join(f"at {s}" for s in SHARES.values())
    head = (
        "data and rank | method | best LR [95%] | best LR (of B) over FullFT's [95%] | the law | "
        f"loss minus LoRA's, tuned, % of the gain [95%] | {at} | shared LRs"
    )
    sections = [base.Section.of("Each method", head, rows)]
    pairs: list[dict[str, Any]] = []
    for (a, b), order in c.orders.items():
        said = "reversed" if order.is_reversed else "open" if order.may_be else "not reversed"
        e = [at_level(e, REVERSED) for e in (order.tuned, *order.shared)]
        pairs.append({"pair": [a, b], "order": said, "tuned": e[0], "shared": e[1:]})
    level = f"[{100 * REVERSED:g}%]"
    head = f"loss of the first minus the second, % of the gain {level} | tuned | {at} | order"
    rows = [
        [f"{METHODS[a]} - {METHODS[b]}", p["tuned"], *p["shared"], p["order"]]
        for (a, b), p in zip(c.orders, pairs)
    ]
    text = f"Means over {len(c.cells)} cells, paired by seed."
    sections.append(base.Section.of("Orders of methods", head, rows, [text]))
    return {"pairs": pairs}, sections


def _behind(name: str) -> base.Estimand:
    """Declare how far a variant is behind LoRA, each at its best learning rate."""
    return base.Estimand(
        f"{name}_behind",
        lambda c: c.orders[name, "lora"].tuned,
        lambda c: c.gates("lora", name),
    )


QUESTION = base.Question(
    [
        *(_behind(m) for m in METHODS if m != "lora"),
        base.Estimand("reversals", Variants.reversals, Variants.gates_on_reversals),
    ],
    conditions,
    report,
)
