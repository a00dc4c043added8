"""Question: do alpha, A's initial scale and the two rates act only through two numbers.

And which scaling rule makes the best rate independent of the rank.

Twins: (alpha, init_A, LR_A, LR_B) and (alpha / pq, p init_A, p LR_A, q LR_B) train to the same
function under Adam without eps, decay and clipping. If p and q are powers of two, every number of
one twin is that of the other times a power of two, so their losses agree to the last bit or nearly
so. Gradients scale by 1/p for A and 1/q for B; with eps > 0, eps must scale with them, and a single
eps can do so only if p = q.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exactly, number, rate, signed, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.inference.meta import drift
from analysis.measures.at_best import losses_at_best, over_seeds
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    correct,
    fewest_seeds,
    gates_on,
    judge_claims,
)
from analysis.runs.learning_curves import by_run
from analysis.runs.lr_curves import lr_curves

ESTIMANDS = (
    "twin_difference",
    "broken_difference",
    "drift_alpha_over_rank",
    "drift_alpha_over_root",
    "drift_alpha",
    "start_b_gap",
)
LOG_ESTIMANDS = ()
LAST_BITS = 1e-15
"""Differences (nats) below this are of the last bits of a loss in float64."""
RULES = {"rank": "alpha / rank", "sqrt_rank": "alpha / sqrt(rank)", "none": "alpha"}


def twin_key(row: pd.Series) -> tuple[float, ...]:
    """Return what twins share: alpha init_A LR_B, init_A / LR_A, rank, seed and steps.

    Rounded to 9 digits, since the inputs are rounded.
    """
    lr_b = row["lr"] * row["lr_b_ratio"]
    return tuple(
        float(f"{v:.9g}")
        for v in (
            row["alpha"] * row["init_scale"] * lr_b,
            row["init_scale"] / row["lr"],
            row["rank"],
            row["seed"],
            row["steps"],
        )
    )


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge twins, what breaks them, drift by scaling rule, and starting with B random."""
    proofs = table[table["precision"] == "fp64"]
    swept = table[table["precision"] != "fp64"]
    held, broken, pair_rows, panel = _twins(proofs)
    optima = fit_all(lr_curves(swept)) if len(swept) else []
    of_a = [o for o in optima if o.curve.key["start"] == "a"]
    rules = {r: [o for o in of_a if o.curve.key["scaling_by"] == r] for r in RULES}
    drifts = {rule: _drift(found) for rule, found in rules.items()}
    gap, start_row = _start_b(optima)
    group = f"{table['model'].iloc[0]} on {table['dataset'].iloc[0]}"
    gates = {
        rule: gates_on(found, "" if found else f"scaling {rule}") for rule, found in rules.items()
    }
    measured = {
        "twin_difference": (held, _missing(held, "twins")),
        "broken_difference": (broken, _missing(broken, "broken twins")),
        "drift_alpha_over_rank": (drifts["rank"], gates["rank"]),
        "drift_alpha_over_root": (drifts["sqrt_rank"], gates["sqrt_rank"]),
        "drift_alpha": (drifts["none"], gates["none"]),
        "start_b_gap": (gap, _missing(gap, "start=b")),
    }
    seeds = fewest_seeds(optima)
    verdicts = correct(judge_claims(question, measured, LOG_ESTIMANDS, group, seeds), question)
    text = (
        "Largest difference of the held-out NLL at any step. If p = q, a single eps scaled by 1/p "
        "keeps the symmetry."
    )
    caption = "difference of twins' held-out loss over the run"
    sections = [
        Section("Twins", pair_rows, [text], "twins.png", [panel], caption),
        _rules(rules, drifts),
        Section("B random instead of A", start_row),
    ]
    measures = {"drifts": {r: e.plain() for r, e in drifts.items()}}
    return Analysis(optima, verdicts, sections, measures, {group: optima})


def _missing(e: Estimate, what: str) -> list[Gate]:
    return [] if e.value is not None else [Gate(GateCode.MISSING, what)]


def _rules(rules: dict[str, list[Optimum]], drifts: dict[str, Estimate]) -> Section:
    rows = [["scaling", "rank", "best LR [95%]", "best NLL"]]
    for rule, o in ((rule, o) for rule, found in rules.items() for o in found):
        rank, at = str(int(o.curve.key["rank"])), with_interval(o.best_lr, rate)
        rows.append([RULES[rule], rank, at, number(o.best_nll, 5)])
    text = [
        f"Slope of ln(best LR) per doubling of the rank under {RULES[r]}: {with_interval(e)}."
        for r, e in drifts.items()
    ]
    ranks = sorted({int(o.curve.key["rank"]) for found in rules.values() for o in found})
    panel = Panel(
        "best rate by rank",
        "rank",
        "best LoRA LR",
        [_line(RULES[r], found) for r, found in rules.items()],
        log_x=True,
        log_y=True,
        ticks=[(float(k), str(k)) for k in ranks],
    )
    return Section(
        "Scaling rules", rows, text, "rules.png", [panel], "best rate by rank and scaling rule"
    )


def _settings(row: pd.Series) -> str:
    return (
        f"alpha {row['alpha']:g}, init {row['init_scale']:g}, LR_A {row['lr']:g}, "
        f"LR_B {row['lr'] * row['lr_b_ratio']:g}, eps {row['eps']:g}"
    )


def _twins(proofs: pd.DataFrame) -> tuple[Estimate, Estimate, list[list[str]], Panel]:
    """Compare all pairs of twins.

    Returns the largest difference of true twins, the smallest over the ways of breaking them (eps
    that does not scale, decay, clipping), a table, and a panel.
    """
    rows = [["one", "other", "what acts", "should be", "largest difference (nats)"]]
    held: list[float] = []
    broken: dict[str, float] = {}
    series = []
    learned = by_run(proofs)
    for _, part in (
        proofs.groupby([str(twin_key(r)) for _, r in proofs.iterrows()]) if len(proofs) else ()
    ):
        for (_, a), (_, b) in itertools.combinations(part.iterrows(), 2):
            acts = _acting(a, b)
            if acts is None:
                continue
            x, y = (learned[r.name]["test_nll"].to_numpy() for r in (a, b))
            off = np.abs(x - y)
            one = acts == "nothing"
            if one:
                held.append(float(off.max()))
            else:
                broken[acts] = max(broken.get(acts, 0.0), float(off.max()))
            steps = learned[a.name]["step"].tolist()
            if a["seed"] == proofs["seed"].min():
                rows.append(
                    [
                        _settings(a),
                        _settings(b),
                        acts,
                        "equal" if one else "different",
                        f"{off.max():.2g}",
                    ]
                )
                series.append(
                    Series(
                        "" if one else acts,
                        steps[1:],
                        off[1:].tolist(),
                        style="o-",
                        colour="grey" if one else None,
                    )
                )
    panel = Panel(
        "twins in float64",
        "update",
        "|difference of held-out NLL| (nats)",
        [Series("equal by the claim", [], [], colour="grey"), *series],
        log_x=True,
        log_y=True,
        linear_below=LAST_BITS,
    )
    twin = exactly(max(held), len(held)) if held else Estimate(None)
    least = exactly(min(broken.values()), len(broken)) if broken else Estimate(None)
    return twin, least, rows, panel


def _acting(a: pd.Series, b: pd.Series) -> str | None:
    """Return what breaks the symmetry of two runs: 'nothing', 'eps', 'decay' or 'clipping'.

    None if the two are not a pair.
    """
    clip = [None if pd.isna(r["clip_norm"]) else r["clip_norm"] for r in (a, b)]
    if a["weight_decay"] != b["weight_decay"] or clip[0] != clip[1]:
        return None
    if a["weight_decay"]:
        return "decay" if a["eps"] == b["eps"] else None
    if clip[0] is not None:
        return "clipping" if a["eps"] == b["eps"] else None
    p = b["init_scale"] / a["init_scale"]
    q = p * b["lr_b_ratio"] / a["lr_b_ratio"]
    tiny = max(a["eps"], b["eps"]) < 1e-20
    if tiny or (math.isclose(p, q) and math.isclose(a["eps"], b["eps"] * p)):
        return "nothing"
    return "eps" if a["eps"] == b["eps"] else None


def _drift(found: list[Optimum]) -> Estimate:
    known = [o for o in found if o.best_lr.draws is not None]
    if len(known) < len(found) or len(known) < 2:
        return Estimate(None)
    n = sum(o.best_lr.n for o in known)
    return drift(
        [o.curve.key["rank"] for o in known], [np.log(o.best_lr.draws) for o in known], n
    ).slope


def _line(name: str, found: list[Optimum]) -> Series:
    return Series.of(name, [o.curve.key["rank"] for o in found], [o.best_lr for o in found])


def _start_b(optima: list[Optimum]) -> tuple[Estimate, list[list[str]]]:
    """Return the loss with B random minus that with A random, and a table.

    Each at its best rate, paired by seed.
    """
    b = next((o for o in optima if o.curve.key["start"] == "b"), None)
    a = next(
        (
            o
            for o in optima
            if b is not None
            and o.curve.key["start"] == "a"
            and o.curve.key["scaling_by"] == "rank"
            and o.curve.key["rank"] == b.curve.key["rank"]
        ),
        None,
    )
    if a is None or b is None:
        return Estimate(None), []
    with_a, with_b = losses_at_best([a, b])
    gap = over_seeds(with_b.paired(with_a, lambda b, a: b - a))
    rows = [
        ["random", "best LR [95%]", "best NLL", "gap [95%]"],
        ["A", with_interval(a.best_lr, rate), number(a.best_nll, 5), "-"],
        ["B", with_interval(b.best_lr, rate), number(b.best_nll, 5), with_interval(gap, signed)],
    ]
    return gap, rows
