"""Judge comparisons of arms that a sweep's file declares, each arm at its best learning rate.

Keys of the file: `variants` names curves of LoRA, `estimands` says what is compared. For example

    variants: {whole: {expert_rank: whole}}
    estimands:
      over_allowed_whole: {measure: over_allowed, of: whole, over: full}
      attention_over_mlp: {measure: speed, of: {layers: attention, like: size}, over: {layers: mlp}}
      attention_everywhere: {every_task: attention_over_mlp, worst: max}

`measure` is a key of QUANTITIES. An arm is `full`, `control` (full fine-tuning of LoRA's matrices),
a variant, or settings of a curve of LoRA. Settings with a meaning of their own: `rank: top`;
`min_rank`: all ranks from this one up; `like: rank` or `size`: as the other arm has; `layers:
fewest` or `most`; `objective: sft`: the supervised runs beside rewarded ones. `lora` is the only
curve of LoRA. Other keys (`where`, `difference` and `says`: see cells.py):

    times: 10              for `cost_at`: the factor on the other arm's learning rate; as {law:
                           [g, k]}: by the law of learning rates with these constants
    load: [0, 1]           only where the bits to learn, over the capacity of rank 1, lie in between
    optional: true         no verdict, and no gate, where an arm is missing
    any_task: true         for `points`: also on tasks whose rewards start or end elsewhere
    pool: [...]            estimands whose noise is pooled; otherwise that of all ranks
    log: false             margin on a linear scale
    rates: true            the question is about learning rates: their ratios, by variant
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.inference.decide import MIN_SEEDS, Gate, GateCode
from analysis.inference.estimate import (
    Estimate,
    exp_of,
    from_sample,
    number,
    rate,
    signed,
    within_groups,
)
from analysis.inference.rows import Row, measured
from analysis.measures import at_best, laws, places, rewards
from analysis.measures.ratio import lr_drift, pool_ratios, ratio_of
from analysis.measures.regret import BITS_PER_PARAMETER, Gap, gain_from, starts_of
from analysis.measures.speed import curves_at_best, log_rho, read_to, rho, stalled
from analysis.optimum.fit import Optimum
from analysis.questions import base, cells
from analysis.questions.cells import EXTREMES, Said
from analysis.runs.curves import Points, full_names, learning_curves, runs_of
from analysis.runs.table import COLLAPSED_SHARE, CURVE_KEYS, TableError

SIZES_AGREE = 0.1
"""Two arms are of equal size if their trained parameters differ by at most this share."""
START, MOST = (0.05, 0.4), 0.9
"""A task can distinguish methods if the reward before training lies in START, and the highest
reward at the end is at most MOST."""
ACTIONS, LABEL_BITS = 16, 4
"""Labels of a bandit to choose from, and their bits (lorasweep/data/synthetic/facts.py)."""
KNOWN = 0.99
"""A curve that knows more than this share of the labels' bits cannot gain from other LRs."""
ARMS = ("full", "control", "lora")
"""Names of arms, beside those of variants."""
Arm = str | Said


class Pair(NamedTuple):
    """Two arms that are compared; the first may be several curves."""

    of: list[Optimum]
    over: Optimum

    @property
    def one(self) -> Optimum:
        """The first arm's only curve, or the first of them."""
        return self.of[0]

    @property
    def all(self) -> list[Optimum]:
        """Every curve, the second arm's first."""
        return base.distinct([self.over, *self.of])


@dataclass(frozen=True)
class Task(base.Condition):
    """All curves of one model, data set, batch size and number of updates."""

    variants: dict[str, Optimum]
    estimands: Mapping[str, Said]
    points: Callable[[], dict[int, at_best.AtBest[Points]]]
    """Read the learning curves of all curves of the table at their optima, by id."""
    losses: Callable[[], dict[int, at_best.AtBest[float]]]
    """Read the last losses, in nats, likewise."""

    @functools.cached_property
    def main(self) -> list[Optimum]:
        """All curves, without those of supervised runs beside rewarded ones."""
        return [o for o in self.optima if is_rewarded(o) or not is_rewarded(self.optima[0])]

    @functools.cached_property
    def whole(self) -> Optimum | None:
        """Full fine-tuning of all weights."""
        return next(iter(self.find("full")), None)

    def peers(self, o: Optimum) -> list[Optimum]:
        """Return the curves of LoRA over which the noise of a curve's differences is pooled."""
        lora = base.lora_of(self.main)
        same = [v for v in lora if v.curve.key.get("layers") == o.curve.key.get("layers")]
        return same if base.rank_of(o) else lora

    def find(self, arm: Arm, other: Optimum | None = None) -> list[Optimum]:
        """Return the curves of an arm, or an empty list; `other`: the curve it is compared with.

        Raises:
            TableError: several curves fit the arm at one rank.
        """
        if arm == "lora":
            return list(base.check_one(base.lora_of(self.main)))
        if isinstance(arm, str) and arm not in ARMS:
            return [self.variants[arm]] if arm in self.variants else []
        if isinstance(arm, str):
            control = arm == "control"
            found = [o for o in self.main if (o.curve.is_control if control else o.curve.is_full)]
            return list(base.check_one(found))
        wanted = {"method": "lora", **arm}
        like, least = wanted.pop("like", ""), wanted.pop("min_rank", 0)
        among = [o for o in self.optima if not is_rewarded(o)] if "objective" in arm else self.main
        wanted.pop("objective", None)
        if wanted.get("rank") == "top":
            del wanted["rank"]
        few = wanted.pop("layers") if arm.get("layers") in EXTREMES else ""
        among = [o for o in among if base.rank_of(o) >= least and not o.curve.is_control]
        found = [o for o in among if wanted.items() <= o.curve.key.items()]
        if few and found:
            size = EXTREMES[few](map(_n_layers, found))
            found = [o for o in found if _n_layers(o) == size]
        if like and other is None:
            return []
        base.check_one(found, *["rank"] * (wanted["method"] == "lora"))
        if like == "size":
            apart = {id(o): abs(math.log(self.size(o) / self.size(other))) for o in found}
            found = [o for o in found if apart[id(o)] <= math.log(1 + SIZES_AGREE)]
            return sorted(found, key=lambda o: apart[id(o)])[:1]
        if like:
            return [o for o in found if o.curve.key[like] == other.curve.key[like]]
        return found if least and "rank" not in arm else sorted(found, key=base.rank_of)[-1:]

    def absent(self, name: str) -> str:
        """Name the first missing arm of an estimand."""
        said = self.estimands[name]
        over = self.find(said["over"])
        if over and self.find(said["of"], over[0]):
            return "fullft"
        return shown(said["of" if over else "over"])

    @functools.cached_property
    def pairs(self) -> dict[str, Pair]:
        """Estimand -> its arms, if none is missing."""
        found = {}
        for name, said in self.estimands.items():
            over = self.find(said["over"]) if "of" in said else []
            of = self.find(said["of"], over[0]) if over else []
            needs_full = QUANTITIES[said["measure"]].needs_full if of else False
            same = of and of[0] is over[0] and said["of"] != said["over"]
            if of and not same and (self.whole or not needs_full):
                found[name] = Pair(of, over[0])
        return found

    @property
    def rests(self) -> list[Optimum]:
        return base.distinct(o for p in self.pairs.values() for o in self.used(p))

    def used(self, p: Pair, both: bool = True) -> list[Optimum]:
        """Return full fine-tuning and the arms of a comparison, or the first of them."""
        return base.distinct(o for o in (self.whole, *(p.all if both else p.of)) if o)

    def size(self, o: Optimum) -> int:
        """Return the number of trained parameters; 0 if the table does not have it."""
        return int(runs_of(self.runs, o.curve).get("n_trainable", pd.Series(0)).iloc[0])

    @functools.cached_property
    def label_bits(self) -> float | None:
        """Bits of a bandit's labels; None for other data."""
        if "spec" not in self.runs:
            return None
        data = json.loads(runs_of(self.runs, self.optima[0].curve)["spec"].iloc[0])["dataset"]
        is_bandit = data.get("location") == "bandit"
        return LABEL_BITS * float(data["knobs"]["contexts"]) if is_bandit else None

    @functools.cached_property
    def load(self) -> float | None:
        """Bits of the labels over the capacity of rank 1; None if unknown."""
        if self.label_bits is None or not (one := self.find({"rank": 1, "layers": "fewest"})):
            return None
        return self.label_bits / (BITS_PER_PARAMETER * self.size(one[0]))

    def applies(self, name: str, said: Said) -> bool:
        """Return whether claims about an estimand are asked of this task."""
        low, high = said.get("load", (0, math.inf))
        fits = low == 0 if self.load is None else low <= self.load < high
        return fits and (name in self.pairs or not said.get("optional"))

    def log_rho(self, p: Pair) -> at_best.AtBest[float]:
        """Return ln(rho of the first arm / rho of the second), by seed."""
        points, full = self.points(), self.points()[id(self.whole)]
        logs = log_rho(points[id(p.one)], full)
        return logs if p.over is self.whole else logs.minus(log_rho(points[id(p.over)], full))

    def gap_of(self, o: Optimum, other: Optimum) -> Gap:
        """Return a curve's loss minus another's; see `gap`."""
        return self.gap(Pair([o], other))

    def gap(self, p: Pair) -> Gap:
        """Return the first arm's loss minus the second's; the gain is full fine-tuning's."""
        losses, full, pooled = self.losses(), self.whole, None
        nats = losses[id(p.one)].minus(losses[id(p.over)])
        gain = gain_from(starts_of(runs_of(self.runs, full.curve)), losses[id(full)])
        if p.over is full:
            peers = self.peers(p.one)
            pooled = at_best.pooled_over(losses[id(o)].minus(losses[id(full)]) for o in peers)
        return Gap(base.rank_of(p.one), p.one, full, nats, gain, None, pooled)

    @functools.cached_property
    def at_stable(self) -> dict[int, at_best.AtBest[Points]]:
        """id of an optimum -> learning curves (losses) at its best stable learning rate."""
        return rewards.learning_at_stable(self.runs, {id(o): o for o in self.main})


def _n_layers(o: Optimum) -> int:
    return str(o.curve.key.get("layers")).count("+")


def is_rewarded(o: Optimum) -> bool:
    """Return whether a curve's runs were trained on rewards."""
    return o.curve.key.get("objective") == "policy_gradient"


def shown(arm: Arm) -> str:
    """Name an arm in messages."""
    if isinstance(arm, str):
        names = {"full": "fullft", "control": "fullft of LoRA's matrices"}
        return names.get(arm, arm.replace("_", " "))
    rank = f" r{arm['rank']}" if isinstance(arm.get("rank"), int) else ""
    rest = ", ".join(f"{k} {v}" for k, v in arm.items() if k not in ("rank", "method"))
    return f"{arm.get('method', 'lora')}{rank}" + (f" ({rest})" if rest else "")


# ---------------------------------------------------------------- quantities


class Quantity(NamedTuple):
    """What is measured on two arms; the functions get the task, the arms and the declaration."""

    of: Callable[[Task, Pair, Said], Estimate]
    gates: Callable[[Task, Pair, Said], Sequence[Gate]]
    log: bool = False
    needs_full: bool = False
    """Whether full fine-tuning must be there, even if it is not one of the arms."""
    margin_gates: Callable[[Task, Pair, Said, float], Sequence[Gate]] = lambda t, p, said, high: ()
    """Gates that depend on the upper end of the claim's margin."""
    by_seed: Callable[[Task, Pair], at_best.AtBest[float]] | None = None
    """The values by seed whose mean is the estimate."""
    final: bool = False
    """Whether losses at the end of runs are enough; other trainers' programs give no more."""


def speed(t: Task, p: Pair, said: Said) -> Estimate:
    """Return the first arm's rho over the second's."""
    points, full = t.points(), t.points()[id(t.whole)]
    if p.over is t.whole:
        pooled = at_best.pooled_over(log_rho(points[id(o)], full) for o in t.peers(p.one))
        return rho(points[id(p.one)], full, pooled)
    logs, pools = t.log_rho(p), [t.pairs[e] for e in said.get("pool", ()) if e in t.pairs]
    if not at_best.is_finite(logs):
        return Estimate(None, n=len(logs.best))
    return exp_of(at_best.over_seeds(logs, at_best.pooled_over(map(t.log_rho, pools))))


def _speed_gates(t: Task, p: Pair, said: Said) -> list[Gate]:
    is_whole, used = p.over is t.whole, t.used(p)
    own = used if is_whole else [t.whole]
    gates = base.gates_on_speed(used)
    gates += stalled(own, [t.points()[id(o)].best for o in own])
    bounds = not gates and not is_whole and not at_best.is_finite(t.log_rho(p))
    return [*gates, Gate(GateCode.ONLY_BOUNDS)] if bounds else gates


def _times(t: Task, p: Pair, said: Said, lr: float) -> float:
    """Return the factor on the second arm's learning rate: a number, or by the law at this rate."""
    if not isinstance(said["times"], Mapping):
        return float(said["times"])
    key, hidden = p.one.curve.key, float(runs_of(t.runs, p.one.curve)["hidden_size"].iloc[0])
    at = hidden, laws.alpha_of(key), float(key["steps"])
    return float(laws.ratio(*at, lr, constants=tuple(said["times"]["law"])))


def _cost_gates(t: Task, p: Pair, said: Said) -> list[Gate]:
    why = laws.outside(p.one.curve.key) if isinstance(said["times"], Mapping) else ""
    return [*base.gates_on(p.all), *([Gate(GateCode.TASK, f"the law: {why}")] if why else [])]


def _cost(t: Task, p: Pair, said: Said) -> at_best.Cost:
    """Return the first arm's regret at `times` the second's best LR, in percent of the gain."""
    lrs = [_times(t, p, said, lr) * lr for lr in at_best.best_and_draws(p.over)]
    gain, peers = t.gap(p).gain, {id(o): o for o in t.peers(p.one)}

    def percent(k: int, losses: at_best.AtBest[float]) -> at_best.AtBest[float]:
        (own,) = at_best.losses_at_best([peers[k]])
        return losses.minus(own).paired(gain, lambda lost, gain: 100 * lost / gain)

    return at_best.costs_at({k: (o, lrs) for k, o in peers.items()}, percent)[id(p.one)]


def points(t: Task, p: Pair, said: Said) -> Estimate:
    """Return the first arm's reward minus the second's, in points.

    The noise is pooled over all arms against the control, or else against full fine-tuning.
    """
    reward = {id(o): rewards.reward_of(o) for o in t.main}
    fixed = next((o for o in p.all if o.curve.is_control), p.over)
    arms = [*([t.whole] if t.whole else []), *t.peers(p.one)]
    differ = (reward[id(o)].minus(reward[id(fixed)]) for o in arms if o is not fixed)
    pooled = None if base.rank_of(fixed) else at_best.pooled_over(differ)
    return at_best.over_seeds(reward[id(p.one)].minus(reward[id(p.over)]), pooled)


def _points_gates(t: Task, p: Pair, said: Said) -> list[Gate]:
    """List the gates on rewards; the reward must start in START and end at most at MOST."""
    gates = _stable_gates(t, p, said)
    if said.get("any_task"):
        return gates
    start = -p.over.curve.nll_start
    if math.isfinite(start) and not START[0] <= start <= START[1]:
        low, high = START
        gates.append(Gate(GateCode.TASK, f"starts at {start:.2g}, {low:g} to {high:g} needed"))
    best = max((-o.best_nll for o in p.all if o.best_nll is not None), default=math.nan)
    if best > MOST:
        gates.append(Gate(GateCode.TASK, f"nearly solved: {best:.2f}, at most {MOST:g}"))
    return gates or base.gates_on_pairs(rewards.reward_of(p.one).minus(rewards.reward_of(p.over)))


def _stable_gates(t: Task, p: Pair, said: Said) -> list[Gate]:
    return rewards.gates_on_stable([o.curve for o in p.all])


def share_known(o: Optimum) -> at_best.AtBest[float]:
    """Return the share (at most 1) of the labels' bits known at the best stable LR, by seed."""
    found = rewards.stable(o.curve)
    losses = found.loss if found else at_best.AtBest[float]({})
    return losses.map(lambda nll: min(1, 1 - nll / math.log(ACTIONS)))


def _known_gates(t: Task, p: Pair, said: Said) -> list[Gate]:
    """List the gates. A curve that knows more than KNOWN may have its best LR at an edge."""
    seeds = [g for g in _stable_gates(t, p, said) if g.code == GateCode.FEW_SEEDS]
    learning = [
        o.curve for o in p.all if not (at_best.over_seeds(share_known(o)).value or 0) > KNOWN
    ]
    return [*seeds, *(g for g in rewards.gates_on_stable(learning) if g not in seeds)]


def bits_per_episode(t: Task, p: Pair, said: Said) -> Estimate:
    """Return the bits learned per sampled completion, as a mean over the whole run."""

    def learned(run: pd.Series) -> dict[str, float]:
        bits = json.loads(run["result"]).get("bits_per_answer")
        return {"bits": math.log(bits)} if bits else {}

    runs = rewards.values_at_stable(t.runs, p.one.curve, learned)
    return exp_of(at_best.over_seeds(runs.map(lambda v: v["bits"])))


QUANTITIES = {
    "speed": Quantity(speed, _speed_gates, True, True),
    "over_allowed": Quantity(
        lambda t, p, said: t.gap(p).over_allowed(),
        lambda t, p, said: [
            *base.gates_on_gap(t.gap(p)),
            *([] if p.over is t.whole else base.gates_on([p.over])),
        ],
        needs_full=True,
        final=True,
    ),
    "percent": Quantity(
        lambda t, p, said: t.gap(p).percent(),
        lambda t, p, said: [*base.gates_on(t.used(p)), *base.gates_on_pairs(t.gap(p).nats)],
        needs_full=True,
        by_seed=lambda t, p: t.gap(p).in_percent,
    ),
    "best_lr": Quantity(
        lambda t, p, said: ratio_of(p.of, p.over),
        lambda t, p, said: base.gates_on(p.all),
        log=True,
        final=True,
    ),
    "lr_drift": Quantity(
        lambda t, p, said: lr_drift(p.of),
        lambda t, p, said: base.gates_on(p.of) + base.gates_on_ranks(p.of),
        final=True,
    ),
    "cost_at": Quantity(
        lambda t, p, said: _cost(t, p, said).estimate,
        _cost_gates,
        needs_full=True,
        margin_gates=lambda t, p, said, high: _cost(t, p, said).gates(high),
        final=True,
    ),
    "points": Quantity(points, _points_gates),
    "good_range": Quantity(
        lambda t, p, said: rewards.range_ratio(p.one, p.over)[0],
        lambda t, p, said: [*base.gates_on(p.all), *rewards.range_ratio(p.one, p.over)[1]],
        True,
    ),
    "progress": Quantity(
        lambda t, p, said: rho(t.at_stable[id(p.one)], t.at_stable[id(p.over)]), _stable_gates, True
    ),
    "labels_known": Quantity(
        lambda t, p, said: at_best.over_seeds(
            share_known(p.one).paired(share_known(p.over), lambda a, b: 100 * (a - b))
        ),
        _known_gates,
    ),
    "bits_per_episode": Quantity(bits_per_episode, _stable_gates, True),
}


OF_RANKS = ("best_lr", "lr_drift")
"""Quantities whose first arm may be several ranks; of another, only one rank would be measured."""

OF_ONE = ("cost_at", "lr_drift", "bits_per_episode")
"""Quantities of one arm, which may stand on both sides; another would be 0, or 1."""


# ---------------------------------------------------------------- all tasks


@dataclass(frozen=True)
class AllTasks(base.Condition):
    """All tasks together."""

    tasks: list[Task]

    @property
    def keys(self) -> list[dict[str, Any]]:
        return [key for t in self.tasks for key in t.keys]

    @property
    def parts(self) -> Sequence[Task]:
        return self.tasks

    @property
    def shown(self) -> bool:
        return False

    @property
    def rests(self) -> list[Optimum]:
        return base.distinct(o for t in self.tasks for o in t.rests)

    def gates(self, *estimands: base.Estimand) -> list[Gate]:
        """List the gates of estimands on each task, with the task's name."""
        found = [
            g.at(f"{t.name}: ")
            for t in self.tasks
            for e in estimands
            for g in (e.gates(t) if e.name in t.pairs else base.missing(t.absent(e.name)))
        ]
        return list(dict.fromkeys(found))


def _everywhere(name: str, said: Said, found: Mapping[str, Any]) -> base.Estimand:
    """Declare an estimand on the task on which it is highest or lowest."""
    each, worst = found[said["every_task"]], {"max": max, "min": min}[said["worst"]]

    def measure(c: AllTasks) -> Estimate:
        known = [e for t in c.tasks if (e := each.measure(t)) and e.value is not None]
        return worst(known, key=lambda e: e.value, default=base.UNKNOWN)

    return base.Estimand(
        name,
        measure,
        lambda c: c.gates(each),
        log=each.log,
        applies=lambda c: isinstance(c, AllTasks),
        seeds=lambda c: min((each.seeds(t) for t in c.tasks if each.name in t.pairs), default=0),
        each=each,
    )


def gradient_share(t: Task, o: Optimum) -> float | None:
    """Return the share of full fine-tuning's squared gradient at step 0 in a curve's layers.

    A mean over runs; None if it was not recorded.
    """
    curves = learning_curves(runs_of(t.runs, t.whole.curve)) if t.whole else pd.DataFrame()
    first = curves.drop_duplicates("run")["grad_share"].dropna() if len(curves) else []
    layers = str(o.curve.key["layers"]).split("+")
    total = sum(float(np.mean([f.get(k, math.nan) for f in first])) for k in layers if len(first))
    return total or None


def _trace(name: str, said: Said, found: Mapping[str, Any]) -> base.Estimand:
    """Declare the rank correlation of ln(rho) with ln(gradient share), within tasks."""
    of_all: Sequence[str] = said["trace"]

    def measure(c: AllTasks) -> Estimate:
        groups = []
        for t in (t for t in c.tasks if t.pairs.keys() >= set(of_all)):
            arms = base.distinct(o for n in of_all for o in (*t.pairs[n].of, t.pairs[n].over))
            logs = [(gradient_share(t, o), t.log_rho(Pair([o], t.whole))) for o in arms]
            known = [(share, v) for share, v in logs if share and at_best.is_finite(v)]
            groups.append([(math.log(share), at_best.mean_of(v)) for share, v in known])
        return within_groups(groups, "layer sets over all tasks")

    def gates(c: AllTasks) -> list[Gate]:
        trace, why = measure(c), "layer sets over all tasks are too few to correlate"
        few = [Gate(GateCode.TASK, f"{trace.n} {why}")] if trace.value is None else []
        return [*few, *c.gates(*(found[n] for n in of_all))]

    return base.Estimand(name, measure, gates, applies=lambda c: isinstance(c, AllTasks))


OVER_TASKS = {"every_task": _everywhere, "trace": _trace}
"""Keys of quantities of all tasks together."""


KEYS = ("measure", "of", "over", "times", "log", "pool", "rates", "load", "optional", "any_task")
"""Keys of an estimand on a task."""

FLAGS = ("log", "rates", "optional", "any_task", "by_seed")
"""Keys that are true or false."""


def problems(said: Mapping[str, Said], variants: Mapping[str, Said]) -> Iterator[str]:
    """Yield what is wrong with a sweep's estimands and variants."""
    for name in (name for name, s in said.items() if not isinstance(s, Mapping)):
        yield f"estimands.{name}: {said[name]!r}. Write measure, of and over."
        return
    settings = {*CURVE_KEYS, "like", "min_rank"}
    arms: dict[str, Arm] = {f"variants.{k}": v for k, v in variants.items()}
    own = cells.AT_CELL if any("where" in s for s in said.values()) else KEYS
    wheres = dict[str, None]()
    for name, s in said.items():
        place = f"estimands.{name}"
        if not cells.is_sentence(s.get("says", "{n}")):
            form = "{n} where the number belongs, and no other braces than {of} and {over}"
            yield f"{place}.says: {s['says']!r}. Write {form}."
        for flag in (k for k in FLAGS if not isinstance(s.get(k, False), bool)):
            yield f"{place}.{flag}: {s[flag]!r}. Write true or false."
        if "difference" in s:
            able = [k for k, q in QUANTITIES.items() if q.by_seed]
            yield from cells.problems_of_difference(name, said, able)
            continue
        known = ("worst", *OVER_TASKS) if s.keys() & OVER_TASKS.keys() and own is KEYS else own
        if "every_task" in s and s.get("worst") not in ("max", "min"):
            yield f"{place}.worst: {s.get('worst')!r}. Write max or min."
        of = [s[k] for k in s.keys() & {*OVER_TASKS, "pool"}]
        parts = [v for names in of for v in (names if isinstance(names, list) else [names])]
        yield from (_unknown(place, "key", k, known) for k in s if k not in known)
        if own is not KEYS:
            yield from cells.problems_of_where(place, s)
            wheres[", ".join(s.get("where") or ())] = None
        able = [n for n, other in said.items() if "of" in other]
        yield from (_unknown(place, "estimand", v, able) for v in parts if v not in able)
        if known is own and not {"measure", "of", "over"} <= s.keys():
            yield f"{place}: {dict(s)}. Write measure, of and over."
        elif known is own:
            arms |= {f"{place}.{k}": s[k] for k in ("of", "over")}
            if s["measure"] not in [*QUANTITIES]:
                yield _unknown(place, "measure", s["measure"], QUANTITIES)
            elif not _is_factor(times := s.get("times", None if s["measure"] == "cost_at" else 1)):
                yield f"{place}.times: {times!r}. Write a number, or law: [g, k], all above 0."
            elif s["of"] == s["over"] and s["measure"] not in OF_ONE:
                yield f"{place}: of and over are both {s['of']!r}. Name two arms."
            for k in ("of", "over"):  # rank: top names one of them
                ranks = {"rank", "min_rank"} & {*s[k]} if isinstance(s[k], Mapping) else {}
                if ranks == {"min_rank"} and (k == "over" or s["measure"] not in OF_RANKS):
                    several = f"Only `of` with {' or '.join(OF_RANKS)} may be several ranks."
                    yield f"{place}.{k}: {s[k]!r}. {several} Name one."
    for place, arm in arms.items():
        if not isinstance(arm, Mapping) and arm not in (names := (*ARMS, *variants)):
            yield _unknown(place, "arm", arm, names)
        for k in (k for k in (arm if isinstance(arm, Mapping) else ()) if k not in settings):
            yield _unknown(place, "setting", k, sorted(settings))
    if len(wheres) > 1:
        yield f"estimands: `where` names {'; '.join(wheres)}. Name the same settings in each."


def _is_factor(times: Any) -> bool:
    of_law = isinstance(times, Mapping) and list(times) == ["law"]
    numbers = times["law"] if of_law else [times, times]
    if np.shape(numbers) != (2,) or not all(isinstance(n, int | float) for n in numbers):
        return False
    return all(0 < n < math.inf for n in numbers)


def _unknown(place: str, what: str, given: Any, known: Iterable[str]) -> str:
    return f"{place}: unknown {what} {given!r}. Use one of: {', '.join(known)}."


# ---------------------------------------------------------------- conditions and question


def on_task(name: str, said: Said) -> base.Estimand:
    """Declare an estimand that compares two arms of a task."""
    q = QUANTITIES[said["measure"]]
    of_seed = q.by_seed
    e = base.Estimand(
        name,
        lambda t: q.of(t, t.pairs[name], said) if name in t.pairs else None,
        lambda t: q.gates(t, t.pairs[name], said),
        lambda t: t.absent(name),
        log=said.get("log", q.log),
        applies=lambda c: isinstance(c, Task) and c.applies(name, said),
        seeds=lambda t: base.fewest_seeds(t.used(t.pairs[name], said["measure"] != "points")),
        margin_gates=lambda t, high: q.margin_gates(t, t.pairs[name], said, high),
        used=lambda t: t.pairs[name].all if q.of is not bits_per_episode else [t.pairs[name].one],
        at=lambda t: _at(t, t.pairs[name], said),
        by_seed=of_seed and (lambda t: of_seed(t, t.pairs[name])),
        final=q.final,
    )
    return cells.at_cell(e, said["where"]) if "where" in said else e


def _at(t: Task, p: Pair, said: Said) -> str:
    """Return rank and updates in words: of layer sets of several ranks, and of a speed."""
    if said["measure"] == "speed" and p.over is t.whole and "rank" in said["of"]:
        last = read_to([t.points()[id(o)] for o in p.all])
        return f"rank {base.rank_of(p.one)}, to update {last}"
    arms = {o.curve.key["layers"]: base.rank_of(o) for o in (*p.of, p.over) if base.rank_of(o)}
    if len(arms) < 2 or len({*arms.values()}) < 2:
        return ""
    named = " and ".join(f"{layers} at rank {rank}" for layers, rank in arms.items())
    return f"{named}, {p.one.curve.key['steps']:.0f} updates"


def _task(o: Optimum) -> tuple[str, ...]:
    return tuple(o.curve.key[k] for k in base.TASK)


def _named(optima: list[Optimum], variants: Mapping[str, Said]) -> dict[str, Optimum]:
    """Return variant -> its curve of LoRA; a curve belongs to the first variant that it fits."""
    found, left = dict[str, Optimum](), base.lora_of(optima)
    for name, keys in variants.items():
        fit = [o for o in left if keys.items() <= o.curve.key.items()]
        if len(fit) > 1:
            base.refuse(fit[0].curve, fit[1].curve)
        for o in fit:
            found[name], left = o, [other for other in left if other is not o]
    return found


def conditions(
    table: pd.DataFrame,
    said: Mapping[str, Said],
    variants: Mapping[str, Said],
    estimands: Sequence[base.Estimand],
) -> list[Any]:
    """Return the tasks, then all tasks together; with `where`, the cells of each base and data set.

    Raises:
        TableError: two curves have the settings of one variant, or those of one cell differ in what
            `where` does not name.
    """
    optima, of_rates = base.fit(table), any(s.get("rates") for s in said.values())
    groups = base.by_group(optima)
    at = {g: _task(mine[0]) for g, mine in groups.items()}
    rewarded = [g for g, mine in groups.items() if is_rewarded(mine[0])]
    for name in list(groups):
        # Supervised runs on the data of rewarded runs are their control.
        for other in (g for g in rewarded if name not in rewarded and at[g] == at[name]):
            groups[other] = [*groups[other], *groups.pop(name, [])]

    @functools.cache
    def points() -> dict[int, at_best.AtBest[Points]]:
        return dict(zip(map(id, optima), curves_at_best(table, optima)))

    @functools.cache
    def losses() -> dict[int, at_best.AtBest[float]]:
        return dict(zip(map(id, optima), at_best.losses_at_best(optima)))

    def task(name: str, mine: list[Optimum], arms: list[Optimum] | None = None) -> Task:
        of = mine if arms is None else arms
        return Task(name, table, of, _named(mine, variants), said, points, losses)

    if settings := next((s["where"].keys() for s in said.values() if "where" in s), None):
        if rewarded:
            raise TableError(f"{rewarded[0]}: `where` is for losses, and these runs have rewards.")
        of_cells = tuple(k for k in cells.WHERE if k in settings)
        found = []
        for of, runs in table.groupby(list(base.TASK), sort=False):
            name, mine = " on ".join(of), [o for o in optima if of == _task(o)]
            base.one_value(runs, *(k for k in ("batch_size", "steps") if k not in settings))
            make = functools.partial(task, name)
            found.append(cells.Cells(name, runs, mine, of_cells, make, estimands))
        return found
    tasks = []
    for g, mine in groups.items():
        # Where learning rates are asked for, LoRA's curves of one rank are separate conditions.
        lora = base.lora_of(mine)
        rest = [o for o in mine if not base.rank_of(o)]
        each = (base.by_variant(lora, g) if of_rates else {}) or {g: lora}
        tasks += [task(n, mine, [*rest, *arms]) for n, arms in each.items()]
    tasks.sort(key=lambda t: t.label_bits or 0)
    if not any(k in s for s in said.values() for k in OVER_TASKS):
        return tasks
    names = " and ".join(t.name for t in tasks)
    whole = names if len(tasks) < 3 else f"all {len(tasks)} tasks"
    return [*tasks, AllTasks(whole, table, [], tasks)]


# ---------------------------------------------------------------- report

RULES = {"FullFT's best LR": 1.0, "10 x FullFT's best LR": 10.0}
"""Rules of thumb: factors on full fine-tuning's optimal learning rate."""
HOW = (
    "Rewards are at the best stable LR, by a parabola through it and the stable LRs around it. An "
    f"LR is stable if at most {100 * rewards.MAX_COLLAPSED:.0f}% of its runs collapse: they were "
    f"stopped in training, or ended below {100 * COLLAPSED_SHARE:.0f}% of their own best reward. "
    "Means are over the other runs. The choice of the LR is part of the interval: it is repeated "
    "on resampled seeds. Good LRs: those whose fitted reward is within 2 points of the best one. "
    "Range over FullFT's: the width of a curve's range of good LRs, in doublings, divided by the "
    f"width of full fine-tuning's. It needs {MIN_SEEDS} seeds that ran at all LRs of both curves. "
    "In the figure, bars are intervals over seeds; an episode is a sampled completion."
)


def names_of(t: Task) -> dict[int, str]:
    """Name a task's curves, by id: as the sweep's file does, else by their settings."""
    found = dict(zip(map(id, t.main), full_names([o.curve for o in t.main])))
    found |= {id(o): name.replace("_", " ") for name, o in t.variants.items()}
    return found | ({id(t.whole): "full fine-tuning"} if t.whole else {})


def against_full(t: Task) -> list[tuple[Optimum, str, Estimate, dict[str, float | None]]]:
    """Return every arm but full fine-tuning: curve, name, ratio of optimal LRs, regrets of RULES.

    A regret is in nats; None if its LR is outside those tried. Empty without full fine-tuning.
    """
    best, names = t.whole and t.whole.best_lr.value, names_of(t)
    return [
        (
            o,
            names[id(o)],
            ratio_of([o], t.whole),
            {rule: o.regret(k * best) if best else None for rule, k in RULES.items()},
        )
        for o in t.main
        if t.whole and o is not t.whole
    ]


def report(asked: base.Asked, *tasks: Task) -> tuple[list[Row], list[base.Section]]:
    """Return every arm's ratio of learning rates and what rules cost it, and tables of the tasks.

    For a ratio of speeds also the second arm's updates over the first's to one loss; for rewarded
    arms the trained parameters for each episode.
    """
    at = places.places_of(base.distinct(o for t in tasks for o in t.optima), tasks[0].runs)
    found, independent, out = list[Row](), [], []
    of_rates = any(s.get("rates") for s in tasks[0].estimands.values())
    head = (
        "arm | trained parameters | best LR [95%] | over FullFT's [95%] | rho [95%] | best NLL | "
        "gap (nats) [95%] | regret, % of the gain [95%] | regret of FullFT's LR | of 10x FullFT's "
        "| share of the squared gradient"
    )
    for k, t in enumerate(tasks, 1):
        arms = against_full(t)
        for o, _, ratio, lost in arms if of_rates else ():
            found.append(measured(at[id(o)], "lr_ratio", ratio))
            gain = t.whole.curve.nll_start - (t.whole.best_nll or math.nan)
            for rule, nats in lost.items():
                percent = None if nats is None or math.isnan(gain) else 100 * nats / gain
                found.append(measured(at[id(o)], f"nats lost at {rule}", nats))
                found.append(measured(at[id(o)], f"% of the gain lost at {rule}", percent))
        for name, p in t.pairs.items():
            said = t.estimands[name]
            if of_rates and said["measure"] == "best_lr" and "min_rank" in said["of"]:
                ratio = ratio_of(p.of, p.over)
                found.append(measured(t.place, "lr_ratio", ratio, alpha=p.one.curve.key["alpha"]))
            if said.get("rates") and ";" not in t.name:  # variants share a FullFT curve
                independent.append(ratio_of(p.of, p.over))
            if said["measure"] == "speed" and p.over is not t.whole:
                direct = rho(t.points()[id(p.one)], t.points()[id(p.over)])
                where = t.where(p.all, _at(t, p, said))
                found.append(measured(where, f"{name}, counted directly", direct))
        for o in t.main:
            if base.rank_of(o) and is_rewarded(o) and (size := t.size(o)):
                episodes = o.curve.key["batch_size"] * o.curve.key["steps"]
                found.append(measured(at[id(o)], "parameters_an_episode", size / episodes))
        if is_rewarded(t.optima[0]):
            out.append(_rewarded(t, "rewards.png" if k == 1 else f"rewards_{k}.png"))
            continue
        rows, row = [], list[Any]()
        if o := t.whole:
            row = ["full fine-tuning", f"{t.size(o):,}", base.best_lr(o), None, None]
            rows.append([*row, number(o.best_nll, 5), *[None] * 4, gradient_share(t, o)])
        for o, name, ratio, lost in arms:
            gap = t.gap(pair := Pair([o], t.whole))
            row = [name, f"{t.size(o):,}", base.best_lr(o), ratio, speed(t, pair, {})]
            row += [number(o.best_nll, 5), base.with_interval(gap.mean(), signed), gap.percent()]
            rows.append([*row, *map(signed, lost.values()), gradient_share(t, o)])
        out.append(base.Section.of(t.name, head, rows))
    if (pooled := pool_ratios(independent)) is not None:
        ratio, spread = pooled
        sentence = (
            f"Ratio pooled over {ratio.n} groups (random effects): {base.with_interval(ratio)}. "
            f"Between groups it varies by a factor {number(spread)}."
        )
        out.append(base.Section("Ratio over all groups", text=[sentence]))
    return found, out


# ---------------------------------------------------------------- rewards


def _rewarded(t: Task, figure: str) -> base.Section:
    """Return a table of the arms' rewards, and their figure over episodes.

    The legend counts collapsed runs.
    """
    rows, control, names = [], next(iter(t.find("control")), None), names_of(t)
    key, start = t.main[0].curve.key, -t.main[0].curve.nll_start
    progress = []
    for k, o in enumerate(t.main):
        name, (lost, n) = names[id(o)], rewards.collapsed_at_best(o.curve)
        full = Pair([o], t.whole) if t.whole and o is not t.whole else None
        other = Pair([o], control) if control and o is not control else None
        row = [name, base.best_lr(o), at_best.over_seeds(rewards.reward_of(o)), f"{lost} of {n}"]
        row += [points(t, p, {}) if p else None for p in (full, other)]
        row += [ratio_of([o], t.whole) if full else None]
        row += [" to ".join(map(rate, o.band(rewards.GOOD) or ())) or "-"]
        ranged = full and base.rank_of(o)
        rows.append([*row, rewards.range_ratio(o, t.whole)[0] if ranged else None])
        look: dict[str, Any] = {"size": 4, "colour": k, "style": f"{'osD^v'[k % 5]}-"}
        of_seeds = [dict(points) for points in t.at_stable[id(o)].best.values()]
        steps = sorted(set.intersection(*map(set, of_seeds))) if of_seeds else []
        means = [from_sample([-points[s] for points in of_seeds]) for s in steps]
        without = f"{name} (without {lost} of {n} runs: collapsed)" if lost else name
        episodes = [s * int(key["batch_size"]) for s in steps]
        progress.append(base.Series.of(without, episodes, means, **look))
    head = (
        "curve | best LR [95%] | reward, points [95%] | collapsed there | behind FullFT, points "
        "[95%] | behind FullFT of LoRA's matrices | ratio of best LRs [95%] | good LRs | range "
        "over FullFT's [95%]"
    )
    text = [f"Bits of the labels over the capacity of rank 1: {t.load:.2g}." if t.load else "", HOW]
    place = f"{key['model']} on {key['dataset']}, each at its best stable LR"
    lines = {"before training": start} if math.isfinite(start) else {}
    panels = [base.Panel(place, "episodes", "held-out reward", progress, log_x=True, lines=lines)]
    caption = "reward over episodes by arm"
    return base.Section.of(f"Rewards, {t.name}", head, rows, text, figure, panels, caption)


def question_of(said: Mapping[str, Said], variants: Mapping[str, Said]) -> base.Question:
    """Return the question that a sweep's `estimands` and `variants` declare."""
    found = {name: on_task(name, s) for name, s in said.items() if "of" in s}
    for name, s in said.items():
        for key in s.keys() & OVER_TASKS.keys():
            found[name] = OVER_TASKS[key](name, s, found)
        if "difference" in s:
            found[name] = cells.difference(name, said, found)
    estimands, has_cells = list(found.values()), any("where" in s for s in said.values())
    return base.Question(
        estimands,
        lambda table: conditions(table, said, variants, estimands),
        cells.report if has_cells else report,
        ratios=lambda t: [] if has_cells else [(name, r) for _, name, r, _ in against_full(t)],
        by_base=True,
        of_rates=any(s.get("rates") for s in said.values()),
    )
