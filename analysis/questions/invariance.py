"""Question: do runs with equal alpha x init_A x LR_B and equal init_A / LR_A train alike.

init_A is A's initial scale; LR_A and LR_B are the LRs of A and B. The claim: these two numbers
determine the run, however its four settings differ. The question also asks which scaling rule makes
the optimal learning rate independent of the rank.

Twins are runs with the settings (alpha, init_A, LR_A, LR_B) and (alpha / pq, p init_A, p LR_A, q
LR_B). They train to the same function under Adam without eps, decay and clipping; to the last bits
if p and q are powers of two. The second run's gradients are 1/p as large for A and 1/q for B, and
eps must scale with them: one eps can do so only if p = q.
"""

import itertools
import math
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exactly, with_interval
from analysis.inference.rows import Row
from analysis.measures.at_best import AtBest, losses_at_best, over_seeds
from analysis.measures.ratio import lr_drift
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.curves import by_run
from analysis.runs.table import CURVE_KEYS

ADAM = ("eps", "weight_decay", "clip_norm")
"""Settings in which pairs may differ: see `broken_by`."""
RULES = {"rank": "alpha / rank", "sqrt_rank": "alpha / sqrt(rank)", "none": "alpha"}


class Twins:
    """All pairs of float64 runs that are twins, or that one setting keeps from being twins."""

    def __init__(self, proofs: pd.DataFrame) -> None:
        self.held: list[float] = []
        """Largest difference of the held-out NLL of each pair of twins over all steps, in nats."""
        self.broken: dict[str, float] = {}
        """Setting that breaks the symmetry -> the largest such difference over its pairs."""
        self.rows: list[list[str]] = []
        learned = by_run(proofs)
        proofs = proofs[proofs.index.isin(list(learned))]  # others' tables may lack curves
        # what twins share, to 9 digits
        product = proofs["alpha"] * proofs["init_scale"] * proofs["lr"] * proofs["lr_b_ratio"]
        shared = [product, proofs["init_scale"] / proofs["lr"]]
        keys = [values.map("{:.9g}".format) for values in shared]
        free = {"alpha", "init_scale", "lr_b_ratio", *ADAM}
        keys += [proofs[k] for k in ("seed", *CURVE_KEYS) if k in proofs and k not in free]
        pairs = [
            pair
            for _, part in (proofs.groupby(keys, dropna=False) if len(proofs) else ())
            for pair in itertools.combinations((r for _, r in part.iterrows()), 2)
        ]
        for a, b in pairs:
            if (acts := broken_by(a, b)) is None:
                continue
            one, other = (learned[r.name].set_index("step")["test_nll"] for r in (a, b))
            off = (one - other).dropna().abs().loc[1:]  # step 0 is the base
            if off.empty:  # one of them diverged at once
                continue
            equal, most = acts == "nothing", float(off.max())
            if equal:
                self.held.append(most)
            else:
                self.broken[acts] = max(self.broken.get(acts, 0.0), most)
            if a["seed"] == proofs["seed"].min():
                names = ("alpha", "init_scale", "lr", "lr_b_ratio", "eps")
                settings = [", ".join(f"{k} {r[k]:g}" for k in names) for r in (a, b)]
                expected = "equal" if equal else "different"
                self.rows.append([*settings, acts, expected, f"{most:.2g}"])


def broken_by(a: pd.Series, b: pd.Series) -> str | None:
    """Return the one setting that keeps a pair from being twins; "nothing" if they are twins.

    None if the pair shows neither, such as runs that differ in weight decay.
    """
    clip = [None if pd.isna(r["clip_norm"]) else r["clip_norm"] for r in (a, b)]
    if a["weight_decay"] != b["weight_decay"] or clip[0] != clip[1]:
        return None
    same_eps = a["eps"] == b["eps"]
    if a["weight_decay"] or clip[0] is not None:
        return ("decay" if a["weight_decay"] else "clipping") if same_eps else None
    p = b["init_scale"] / a["init_scale"]
    q = p * b["lr_b_ratio"] / a["lr_b_ratio"]
    tiny = max(a["eps"], b["eps"]) < 1e-20
    if tiny or (math.isclose(p, q) and math.isclose(a["eps"], b["eps"] * p)):
        return "nothing"
    return "eps" if same_eps else None


class Settings(base.Condition):
    """The twins and the LR curves of one model and data set."""

    @cached_property
    def twins(self) -> Twins:
        return Twins(self.runs[self.runs["precision"] == "fp64"])

    @cached_property
    def rules(self) -> dict[str, list[Optimum]]:
        """The curves whose runs start with A random, by scaling rule."""
        of_a = [o for o in self.optima if o.curve.key["start"] == "a"]
        by = {r: [o for o in of_a if o.curve.key["scaling_by"] == r] for r in RULES}
        return {r: list(base.check_one(found, "rank")) for r, found in by.items()}

    @cached_property
    def drifts(self) -> dict[str, Estimate]:
        """The slope of ln(optimal LR) per doubling of the rank, by scaling rule."""
        return {r: lr_drift(o) if o else base.UNKNOWN for r, o in self.rules.items()}

    @cached_property
    def starts(self) -> tuple[Optimum, Optimum] | None:
        """Curves of one rank that start with A, and with B, random; None if one is missing."""
        of_b = base.check_one([o for o in self.optima if o.curve.key["start"] == "b"], "rank")
        b = next(iter(of_b), None)
        a = [o for o in self.rules["rank"] if b is not None and base.rank_of(o) == base.rank_of(b)]
        return (a[0], b) if a and b is not None else None

    @cached_property
    def start_difference(self) -> AtBest[float]:
        """The loss with B random minus that with A random, in nats, by seed."""
        with_a, with_b = losses_at_best(self.starts)
        return with_b.minus(with_a)


def conditions(table: pd.DataFrame) -> list[Settings]:
    """Return the one condition of a model and data set."""
    swept = table[table["precision"] != "fp64"]
    optima = base.fit(swept) if len(swept) else []
    return [Settings(f"{table['model'].iloc[0]} on {table['dataset'].iloc[0]}", table, optima)]


def _drift(name: str, rule: str) -> base.Estimand:
    """Declare the drift of the optimal LR over the rank, under a scaling rule."""
    return base.Estimand(
        name,
        lambda c: c.drifts[rule] if c.rules[rule] else None,
        lambda c: base.gates_on(c.rules[rule]) + base.gates_on_ranks(c.rules[rule]),
        absent=f"scaling {rule}",
    )


ESTIMANDS = [
    base.Estimand(
        "twin_difference",
        lambda c: exactly(float(np.max(held)), len(held)) if (held := c.twins.held) else None,
        absent="twins",
    ),
    base.Estimand(
        "broken_difference",
        lambda c: exactly(min(by.values()), len(by)) if (by := c.twins.broken) else None,
        absent="broken twins",
    ),
    _drift("drift_alpha_over_rank", "rank"),
    _drift("drift_alpha_over_root", "sqrt_rank"),
    _drift("drift_alpha", "none"),
    base.Estimand(
        "start_b_gap",
        lambda c: over_seeds(c.start_difference) if c.starts else None,
        lambda c: base.gates_on(c.starts) + base.gates_on_pairs(c.start_difference),
        absent="start=b",
    ),
]


def report(asked: base.Asked, c: Settings) -> tuple[list[Row], list[base.Section]]:
    """Return the drifts of the optimal LR by scaling rule, and the sections on twins and rules."""
    text = (
        "Largest difference of the held-out NLL at any step. If p = q, a single eps scaled by 1/p "
        "keeps the symmetry."
    )
    head = "one | other | symmetry broken by | should be | largest difference (nats)"
    twins = base.Section.of("Twins", head, c.twins.rows, [text])
    slopes = [
        f"Slope of ln(best LR) per doubling of the rank under {RULES[r]}: {with_interval(e)}."
        for r, e in c.drifts.items()
    ]
    rules = base.Section.of("Scaling rules", "", [], slopes)
    return [], [twins, rules]


QUESTION = base.Question(ESTIMANDS, conditions, report, split_by=base.TASK)
