"""Question: is LoRA on attention worse than on the MLP, and does attention add anything to the MLP.

Layer sets are compared by rho and by the last loss, on every task, each at its optimal learning
rate. Attention and MLP have equal parameters. Full fine-tuning of the same matrices shows whether
their location alone gives the same order.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exp_of, number, signed
from analysis.inference.gates import Gate, GateCode
from analysis.inference.meta import within_groups
from analysis.inference.seeds import PooledVariance
from analysis.measures import at_best
from analysis.measures.qualify import stalled
from analysis.measures.regret import Gap, gain_from, starts_of
from analysis.measures.speed import curves_at_best, log_rho, rho
from analysis.optimum.optimum import Optimum
from analysis.questions import base
from analysis.runs.learning_curves import Points, learning_curves
from analysis.runs.lr_curves import runs_of, title

EVERY_LAYER = "attention+mlp+unembedding"
SETS = (
    "attention",
    "mlp",
    "attention+mlp",
    "attention+unembedding",
    "mlp+unembedding",
    EVERY_LAYER,
)
PARAMETERS_AGREE = 0.1
"""Two curves count as equal in size if their trained parameters differ by at most this share."""
ABSENT = "attention and mlp at equal parameters, or of attention+mlp at mlp's rank"


@dataclass(frozen=True)
class Arm:
    """One layer set of one task, trained with LoRA or by full fine-tuning of its matrices."""

    optimum: Optimum
    layers: str
    rank: int | None
    n_trainable: int
    points: at_best.AtBest[Points]
    losses: at_best.AtBest[float]
    """Last loss by seed, in nats."""
    share: float | None
    """Share of full fine-tuning's squared gradient at the start that lies in the layer set."""

    @property
    def is_whole(self) -> bool:
        """Whether the arm is full fine-tuning of all weights."""
        return self.rank is None and self.optimum.curve.key.get("scope") == "all"

    @property
    def nll(self) -> float | None:
        """Loss at the optimum, in nats."""
        return self.optimum.best_nll


@dataclass(frozen=True)
class Pair:
    """Two layer sets that are compared: their arms, ratio of rho, and gap in loss."""

    arms: tuple[Arm, Arm]
    logs: at_best.AtBest[float]
    """ln(rho of the first / rho of the second), by seed."""
    gap: Gap
    """The first arm's loss minus the second arm's; the gain is full fine-tuning's."""


@dataclass(frozen=True)
class Task(base.Condition):
    """All arms on one model and data set."""

    arms: list[Arm]
    """Full fine-tuning of all weights first, then of some matrices, then LoRA."""

    @cached_property
    def whole(self) -> Arm | None:
        """Full fine-tuning of all weights."""
        return next((a for a in self.arms if a.is_whole), None)

    @cached_property
    def restricted(self) -> list[Arm]:
        """Full fine-tuning of some matrices."""
        return [a for a in self.arms if a.rank is None and not a.is_whole]

    @cached_property
    def adapted(self) -> list[Arm]:
        """LoRA on each layer set."""
        return [a for a in self.arms if a.rank is not None]

    def get(self, layers: str, rank: int | None = None) -> Arm | None:
        """Return LoRA's arm of a layer set and rank (None: the highest), or None."""
        found = [a for a in self.adapted if a.layers == layers and rank in (None, a.rank)]
        return max(found, key=lambda a: a.rank or 0, default=None)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Attention and MLP at equal parameters, MLP and attention+mlp at equal rank; or empty."""
        equal, both = equal_pair(self.adapted), self.get("attention+mlp")
        mlp = self.get("mlp", both.rank) if both else None
        if self.whole is None or equal is None or both is None or mlp is None:
            return []
        found, full = [], self.whole
        gain = gain_from(starts_of(runs_of(self.runs, full.optimum.curve)), full.losses)
        for a, b in (equal, (mlp, both)):
            logs = log_rho(a.points, full.points).minus(log_rho(b.points, full.points))
            nats = a.losses.minus(b.losses)
            gap = Gap(a.rank or 0, a.optimum, full.optimum, nats, gain, None)
            found.append(Pair((a, b), logs, gap))
        return found

    @cached_property
    def ratios(self) -> list[Estimate]:
        """rho of the first arm over rho of the second, by pair; no value if a seed has a bound."""
        pooled = at_best.pooled_over(p.logs for p in self.pairs)
        return [
            exp_of(at_best.over_seeds(p.logs, pooled))
            if at_best.is_finite(p.logs)
            else Estimate(None, n=len(p.logs.best))
            for p in self.pairs
        ]

    def of_pair(self, which: int) -> list[Optimum]:
        """Return the optima from which a pair's estimands are computed."""
        arms = (self.whole, *self.pairs[which].arms) if self.pairs else ()
        return [a.optimum for a in arms]

    @property
    def rests(self) -> list[Optimum]:
        return base.distinct([*self.of_pair(0), *self.of_pair(1)])

    def gates_on_rho(self, used: Sequence[Optimum], ratios: Sequence[Estimate]) -> list[Gate]:
        """List the gates of a claim about rho on these optima."""
        if not self.pairs:
            return base.missing(ABSENT)
        gates = stalled([self.whole.optimum], [self.whole.points.best]) + base.gates_on_speed(used)
        if not gates and any(e.value is None for e in ratios):
            gates.append(Gate(GateCode.ONLY_BOUNDS))
        return gates

    def gates_on_gap(self, which: int) -> list[Gate]:
        """List the gates of a claim about the gap in loss of a pair."""
        # The gap holds the optima of the first arm and of full fine-tuning, not of the second arm.
        return [*base.gates_on_gap(self.pairs[which].gap), *base.gates_on(self.of_pair(which)[-1:])]

    def named(self, gates: Sequence[Gate]) -> list[Gate]:
        """Return the gates with the task's name before their sentences."""
        return [gate.at(f"{self.name}: ") for gate in gates]

    @cached_property
    def pooled(self) -> PooledVariance | None:
        """Variance over seeds of ln(rho), pooled over all arms."""
        full = self.whole.points
        return at_best.pooled_over(
            log_rho(b.points, full) for b in (*self.adapted, *self.restricted)
        )

    def speed(self, a: Arm) -> Estimate:
        """Return rho of an arm."""
        return rho(a.points, self.whole.points, self.pooled)


@dataclass(frozen=True)
class AllTasks(base.Condition):
    """All tasks together."""

    tasks: list[Task]

    @property
    def parts(self) -> Sequence[Task]:
        return self.tasks

    @property
    def shown(self) -> bool:
        return False

    @property
    def rests(self) -> list[Optimum]:
        return base.distinct(o for t in self.tasks for o in t.rests)

    def trace(self) -> Estimate:
        """Return the rank correlation of ln(rho) with ln(gradient share), within tasks."""
        found = []
        for t in (t for t in self.tasks if t.pairs):
            equal, joint = (p.arms for p in t.pairs)
            arms = [a for a in (*equal, joint[1]) if a.share]
            speeds = [log_rho(a.points, t.whole.points) for a in arms]
            known = [(a, v) for a, v in zip(arms, speeds) if at_best.is_finite(v)]
            found.append([(math.log(a.share), at_best.mean_of(v)) for a, v in known])
        return within_groups(found, "layer sets over all tasks")

    def gates_on_trace(self) -> list[Gate]:
        """List the gates of a claim about the correlation."""
        trace, why = self.trace(), "layer sets over all tasks are too few to correlate"
        gates = [Gate(GateCode.TASK, f"{trace.n} {why}")] if trace.value is None else []
        for t in self.tasks:
            gates += t.named(t.gates_on_rho(t.rests, t.ratios))
        return gates


def equal_pair(adapted: Sequence[Arm]) -> tuple[Arm, Arm] | None:
    """Return the attention arm and the MLP arm nearest in size, if within PARAMETERS_AGREE."""
    known = [a for a in adapted if a.n_trainable]
    pairs = [(a, m) for a in known if a.layers == "attention" for m in known if m.layers == "mlp"]

    def apart(pair: tuple[Arm, Arm]) -> float:
        return abs(math.log(pair[0].n_trainable / pair[1].n_trainable))

    nearest = min(pairs, key=apart, default=None)
    return nearest if nearest and apart(nearest) <= math.log(1 + PARAMETERS_AGREE) else None


def conditions(table: pd.DataFrame) -> list[Task | AllTasks]:
    """Split a table into tasks and their arms; the last condition joins all tasks."""
    optima = base.fit(table)
    points = dict(zip(map(id, optima), curves_at_best(table, optima)))
    losses = dict(zip(map(id, optima), at_best.losses_at_best(optima)))
    tasks = []
    for group, curves in base.by_group(optima).items():
        full = [o for o in curves if not base.rank_of(o)]
        whole = [o for o in full if o.curve.key.get("scope") == "all"]
        arms, share = [], gradient_shares(runs_of(table, whole[0].curve)) if whole else {}
        for o in curves:
            layers = str(o.curve.key["layers"]).replace("all", EVERY_LAYER)
            total = sum(share.get(s, math.nan) for s in layers.split("+")) if share else None
            n = int(runs_of(table, o.curve)["n_trainable"].iloc[0])
            rank = base.rank_of(o) or None
            arms.append(Arm(o, layers, rank, n, points[id(o)], losses[id(o)], total))
        arms.sort(key=lambda a: 2 if a.rank else 1 - a.is_whole)
        tasks.append(Task(group, table, [a.optimum for a in arms], arms))
    names = " and ".join(t.name for t in tasks)
    name = names if len(tasks) < 3 else f"all {len(tasks)} tasks"
    return [*tasks, AllTasks(name, table, [], tasks)]


def gradient_shares(runs: pd.DataFrame) -> dict[str, float]:
    """Return the share of the squared gradient at step 0 by layer set, as a mean over runs."""
    first = learning_curves(runs).drop_duplicates("run")
    found = list(first["grad_share"].dropna())
    return {k: float(np.mean([f[k] for f in found])) for k in found[0]} if found else {}


def _speed(name: str, which: int) -> base.Estimand[Any]:
    """Declare the ratio of rho of a pair; not on a log scale, since its margin may start at 0."""
    return base.Estimand(
        name,
        lambda t: t.ratios[which] if t.pairs else None,
        lambda t: t.gates_on_rho(t.of_pair(which), t.ratios[which : which + 1]),
        ABSENT,
        applies=lambda c: isinstance(c, Task),
        seeds=lambda t: base.fewest_seeds(t.of_pair(which)),
    )


def _loss(name: str, which: int) -> base.Estimand[Any]:
    """Declare the gap in loss of a pair minus the allowed regret."""
    return dataclasses.replace(
        _speed(name, which),
        measure=lambda t: t.pairs[which].gap.over_allowed() if t.pairs else None,
        gates=lambda t: t.gates_on_gap(which),
    )


def _everywhere(
    name: str, which: int, hardest: Callable[..., Estimate], each: base.Estimand[Any]
) -> base.Estimand[Any]:
    """Declare the ratio of rho on the task on which a claim about all tasks does worst."""

    def worst(c: AllTasks) -> Estimate:
        ratios = [each.measure(t) for t in c.tasks]
        known = [e for e in ratios if e is not None and e.value is not None]
        return hardest(known, key=lambda e: e.value, default=base.UNKNOWN)

    return base.Estimand(
        name,
        worst,
        lambda c: [g for t in c.tasks for g in t.named(each.gates(t))],
        applies=lambda c: isinstance(c, AllTasks),
        seeds=lambda c: base.fewest_seeds([o for t in c.tasks for o in t.of_pair(which)]),
        each=each.name,
    )


ATTENTION, MLP = _speed("attention_over_mlp", 0), _speed("mlp_over_both", 1)
ESTIMANDS = [
    ATTENTION,
    MLP,
    _loss("attention_over_allowed", 0),
    _loss("mlp_over_allowed", 1),
    _everywhere("attention_everywhere", 0, max, ATTENTION),
    _everywhere("mlp_everywhere", 1, min, MLP),
    base.Estimand(
        "trace_correlation",
        AllTasks.trace,
        AllTasks.gates_on_trace,
        applies=lambda c: isinstance(c, AllTasks),
    ),
]


def measures(tasks: Sequence[Task], asked: base.Asked) -> dict[str, Any]:
    """Return the ratios of rho, the ranks compared, and the gradient's shares."""
    used = [t for t in tasks if t.pairs]
    return {
        "attention_over_mlp": {t.name: t.ratios[0] for t in used},
        "mlp_over_both": {t.name: t.ratios[1] for t in used},
        "ranks": {
            t.name: {p.arms[0].layers: {a.layers: a.rank for a in p.arms} for p in t.pairs}
            for t in used
        },
        "gradient_share": {t.name: {a.layers: a.share for a in t.adapted} for t in tasks},
    }


def sections(tasks: Sequence[Task], asked: base.Asked) -> list[base.Section]:
    """Return the comparisons over tasks, every task's arms, and their figure."""
    rows = []
    for t in (t for t in tasks if t.pairs):
        nll = {a.layers: a.nll for a in t.restricted}
        attention, mlp, same = nll.get("attention"), nll.get("mlp"), "-"
        speed = t.ratios[0].value
        if attention is not None and mlp is not None and speed is not None:
            agrees = "yes" if (attention > mlp) == (speed < 1) else "no"
            same = f"{agrees}: attention {signed(attention - mlp)} nats against mlp"
        rows.append([t.name, *t.ratios, *(p.gap.percent() for p in t.pairs), same])
    head = (
        "task | rho attention / rho mlp, equal parameters [95%] | rho mlp / rho attention+mlp, "
        "equal rank [95%] | attention's loss less mlp's, % of FullFT's gain [95%] | mlp's loss "
        "less attention+mlp's, % [95%] | the same order under full fine-tuning of the matrices"
    )
    text = "A claim about all tasks is judged by the task that is worst for it."
    out = [base.Section.of("Over the tasks", head, rows, [text])]
    head = (
        "arm | trained parameters | rho [95%] | best NLL | gap to FullFT (nats) | share of the "
        "squared gradient"
    )
    for t in tasks:
        rows = []
        for a in t.arms:
            of_full, gap = None, None
            if t.whole is not None and a is not t.whole:
                of_full = t.speed(a)
                gap = None if a.nll is None or t.whole.nll is None else a.nll - t.whole.nll
            name = f"FullFT of {a.layers}" if a.rank is None else f"LoRA r{a.rank} on {a.layers}"
            name = "full fine-tuning" if a is t.whole else name
            shown = [number(a.nll, 5), signed(gap), a.share]
            rows.append([name, f"{a.n_trainable:,}", of_full, *shown])
        out.append(base.Section.of(t.name, head, rows))
    if left_out := [row for t in tasks for row in _without_unembedding(t)]:
        head = "task | rank | loss on attention+mlp less loss on all layers, nats [95%]"
        text = "Exploratory: what leaving out the adapter of the unembedding costs at equal rank."
        out.append(base.Section.of("Without the unembedding", head, left_out, [text]))
    caption, panels = "step efficiency by layer set and task", [_panel(t) for t in tasks]
    return [*out, base.Section("Layer sets", [], [], "layers.png", panels, caption)]


def _without_unembedding(t: Task) -> list[list[Any]]:
    """Return task, rank and difference in loss of attention+mlp and EVERY_LAYER, for each rank."""
    pairs = ((a, t.get(EVERY_LAYER, a.rank)) for a in t.adapted if a.layers == "attention+mlp")
    known = [(a, b) for a, b in pairs if b is not None]
    return [[t.name, a.rank, at_best.over_seeds(a.losses.minus(b.losses))] for a, b in known]


def _panel(t: Task) -> base.Panel:
    here = [s for s in SETS if any(a.layers == s for a in (*t.adapted, *t.restricted))]
    low = min((a.rank for a in t.adapted), default=0)
    raised = [a for a in t.adapted if a.rank > low and a is t.get(a.layers)]
    kinds = {
        "LoRA, rank raised to the MLP's parameters": raised,
        "LoRA, one rank": [a for a in t.adapted if a not in raised],
        "FullFT of the same matrices": t.restricted,
    }
    series = []
    for side, (label, arms) in enumerate(kinds.items()):
        arms = sorted((a for a in arms if a.layers in here), key=lambda a: here.index(a.layers))
        # Side by side, so that intervals do not cover each other.
        x = [here.index(a.layers) + 0.16 * (side - 1) for a in arms if t.whole]
        series.append(base.Series.of(label, x, [t.speed(a) for a in arms if t.whole], style="o"))
    short = [
        s.replace("attention", "attn").replace("unembedding", "head").replace("+", "\n+")
        for s in here
    ]
    return base.Panel(
        title(t.arms[0].optimum.curve).replace(" on ", " on\n", 1),
        "layer set",
        "rho: FullFT's updates / the arm's",
        series,
        log_y=True,
        ticks=[(float(k), s) for k, s in enumerate(short)],
        lines={"full fine-tuning": 1.0},
    )


QUESTION = base.Question[Any](ESTIMANDS, conditions, measures, sections)
