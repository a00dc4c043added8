"""Analyse runs published by others, and render analysis/results/public_evidence.md.

    python -m benchmarks public_evidence TULU3_SWEEP.csv RL_RUNS.csv

The first table: LoRA-only learning rate x rank sweeps of many models on Tulu3 (tinker-cookbook,
Apache-2.0). The second: GRPO runs of LoRA and full fine-tuning (kenkuuu/lora-without-regret).
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from analysis.inference.estimate import Estimate, meta_regression, number, rate
from analysis.measures.ratio import MIN_RANK
from analysis.optimum.fit import rate_means
from analysis.runs.curves import LrCurve, lr_curves
from analysis.runs.table import Reading, load, read_any
from analysis.tables import commands
from benchmarks import harness

DRIFT_MARGIN = 0.099
"""Largest allowed slope of ln(best LR) per doubling of the rank: a factor 2 over 7 doublings."""
RL_NAMES = {"model_id": "model", "lora_rank": "rank", "n_grpo_steps": "steps"}
RL_BROKEN = 0.2
"""A run with at most this accuracy counts as diverged. Runs that learned nothing have 0.21."""
RL_MODEL = "Qwen/Qwen3-1.7B"
"""The only model of the RL table with both arms."""


PUBLISHED = {"base": 5e-5, "M": 10.0, "llama": 0.781, "qwen": 0.0775}
"""Published constants, with p by family (tinker-cookbook, docs/sl-hyperparams, 2025)."""
REFERENCE = 2000.0
"""Hidden size of the law's constant."""


def family(model: str) -> str:
    """Return a model's family: the leading letters of its name, e.g. Qwen/Qwen3-8B -> qwen."""
    found = re.match(r"[A-Za-z]+", str(model).rsplit("/", 1)[-1])
    return found.group(0).lower() if found else str(model).lower()


def published(curve: LrCurve, hidden: float) -> float | None:
    """Return the LR by the published formula; None for a family without a published exponent."""
    p = PUBLISHED.get(family(curve.key["model"]))
    if p is None or not hidden > 0:
        return None
    m = PUBLISHED["M"] if curve.key["method"] == "lora" else 1.0
    return PUBLISHED["base"] * m * (REFERENCE / hidden) ** p


def regret(curve: LrCurve, lr: float) -> float | None:
    """Return (loss at an LR - lowest loss over the LRs tried) / the lowest loss, in percent.

    The loss is interpolated linearly in ln(lr). None outside the usable LRs.
    """
    lrs, means = rate_means(curve)
    if len(lrs) < 2 or not lrs[0] <= math.log(lr) <= lrs[-1] or not means.min():
        return None
    best = float(means.min())
    return 100 * (float(np.interp(math.log(lr), lrs, means)) - best) / abs(best)


def by_loss(curves: Sequence[LrCurve], hidden: dict[str, float]) -> list[dict[str, Any]]:
    """Fit each family and method by minimising the summed loss; intervals resample the models.

    A curve's term is (loss at the law's LR - best loss tried) / best loss tried, interpolated.
    Outside the LRs tried, the last segment of the curve is extrapolated, but never downward:
    otherwise the fit could prefer LRs without data. With one hidden size, p is not fitted.

    `hidden`: model -> hidden size. The law: LR = lr_at_2000 x (2000 / hidden size)^p;
    `regret_percent` is the mean of the terms at its LRs.
    """
    laws: list[dict[str, Any]] = []
    groups: dict[tuple[str, str], list[LrCurve]] = {}
    for c in curves:
        if len(np.unique(c.x[c.usable])) >= 2 and hidden.get(c.key["model"], math.nan) > 0:
            groups.setdefault((family(c.key["model"]), c.key["method"]), []).append(c)
    for (name, method), members in sorted(groups.items(), key=lambda group: group[0]):
        of = [c.key["model"] for c in members]
        widths, models, n = np.array([hidden[m] for m in of]), sorted(set(of)), len(members)
        one_size, enough = len(set(widths)) < 2, len(models) >= 4
        ps = np.zeros(1) if one_size else np.linspace(-1.5, 2.0, 141)
        tried = np.concatenate([c.x[c.usable] for c in members])
        ks = np.linspace(tried.min() - 1, tried.max() + 1, 161)
        at = [(ks + ps[:, None] * math.log(REFERENCE / h)).ravel() for h in widths]
        loss = np.array([_extrapolated(c, x) for c, x in zip(members, at)])
        even = [1 / len(models)] * len(models)
        count = np.random.default_rng(7).multinomial(len(models), even, 400)
        drawn = np.argmin(count[:, [models.index(m) for m in of]] @ loss, axis=1)
        best, fits = int(np.argmin(loss.sum(0))), []
        all_ks, all_ps = np.tile(ks, len(ps)), np.repeat(ps, len(ks))
        for v in (np.exp(all_ks), all_ps):
            low, high = np.quantile(v[drawn], [0.025, 0.975], method="hazen").tolist()
            value = float(v[best])
            known = Estimate(value, min(low, value), max(high, value), n)
            fits.append(known if enough else Estimate(value, n=n))
        logs = all_ks[best] + all_ps[best] * np.log(REFERENCE / widths)
        costs = [regret(c, math.exp(x)) for c, x in zip(members, logs)]
        percent = [v for v in costs if v is not None]
        flags = ["one hidden size"] * one_size
        flags += [] if enough else [f"{len(models)} model(s): no interval"]
        mean = float(np.mean(percent)) if percent else None
        laws.append(
            {"family": name, "method": method, "lr_at_2000": fits[0]}
            | {"p": Estimate(None, n=n) if one_size else fits[1], "models": len(models)}
            | {"regret_percent": mean, "flags": flags}
        )
    return laws


def _extrapolated(curve: LrCurve, ln_lr: np.ndarray) -> np.ndarray:
    lrs, means = rate_means(curve)
    inside = np.interp(ln_lr, lrs, means)
    left = max((means[0] - means[1]) / (lrs[1] - lrs[0]), 0.0) * np.maximum(lrs[0] - ln_lr, 0)
    right = max((means[-1] - means[-2]) / (lrs[-1] - lrs[-2]), 0.0) * np.maximum(ln_lr - lrs[-1], 0)
    return (inside + left + right - means.min()) / (abs(means.min()) or 1.0)


def render(tulu: Path, rl: Path) -> str:
    """Render the page."""
    sweep = read_any(tulu)
    return harness.render(
        "public_evidence",
        **_bounds(sweep),
        **_drift(sweep),
        **_law(sweep),
        rl=_rl(rl),
        rl_model=RL_MODEL,
        broken=RL_BROKEN,
        margin=DRIFT_MARGIN,
        min_rank=MIN_RANK,
        files=[tulu.name, rl.name],
    )


def _bounds(sweep: Reading) -> dict[str, Any]:
    """Return counts of curves, runs, bounds and missing optima in the first table."""
    table, alone = sweep.table, commands.fit(sweep)

    def counts(rows: list[dict[str, Any]]) -> list[str]:
        known = [r for r in rows if r["low"] is not None and r["best_lr"] is not None]
        width = float(np.median([r["high"] / r["low"] for r in known])) if known else math.nan
        rest = [r for r in rows if r["best_lr"] is None]
        bound = sum(r["low"] is not None or r["high"] is not None for r in rest)
        return [str(len(known)), number(width), str(bound), str(len(rest) - bound)]

    unknown: dict[int, list[bool]] = {}
    for r in sorted(alone, key=lambda r: r["rank"]):
        unknown.setdefault(r["rank"], []).append(r["best_lr"] is None)
    diverged = table[table["status"] == "diverged"]
    repeats = table[table.duplicated(["model", "rank", "lr"], keep=False)]
    top = float(table["lr"].max())
    tried = [rate_means(c) for c in lr_curves(table)]
    return {
        **{"n_curves": len(alone), "n_models": table["model"].nunique(), "n_runs": len(table)},
        "n_diverged": len(diverged),
        "n_diverged_at_top": int((diverged["lr"] == top).sum()),
        "top": top,
        "n_largest": sum(len(x) > 0 and np.argmin(y) == len(x) - 1 for x, y in tried),
        "n_bounded": sum("bounded_by_divergence" in r["flags"] for r in alone),
        "fits": [
            ["fit", "best LR with an interval", "median high / low", "a bound only", "nothing"],
            ["each curve alone", *counts(alone)],
        ],
        "arms": sorted(table["method"].unique()),
        "unknown": "; ".join(f"r{k} {sum(v)} of {len(v)}" for k, v in unknown.items()),
        "n_repeats": len(repeats),
        "lowest": float((repeats["lr"] == table["lr"].min()).mean()),
    }


def _drift(sweep: Reading) -> dict[str, Any]:
    rows = commands.drifts(sweep)
    known = [r for r in rows if r["slope"] is not None]
    upper = dataclasses.replace(sweep, table=sweep.table[sweep.table["rank"] >= MIN_RANK])
    high = [r for r in commands.drifts(upper) if r["slope"] is not None]
    pooled = []
    for which, rows_of in (("all ranks", known), (f"ranks of {MIN_RANK} and more", high)):
        if len(rows_of) > 1:
            errors = [(r["high"] - r["low"]) / 3.92 for r in rows_of]
            slopes, design = np.array([r["slope"] for r in rows_of]), np.ones((len(rows_of), 1))
            fit = meta_regression(slopes, np.array(errors) ** 2, design)
            e, verdict = fit.term(0), "across the edge of"
            assert e.low is not None and e.high is not None
            if max(-e.low, e.high) <= DRIFT_MARGIN:
                verdict = "inside"
            elif e.low > DRIFT_MARGIN or e.high < -DRIFT_MARGIN:
                verdict = "outside"
            found = {"k": fit.n, "mean": e.value, "low": e.low, "high": e.high, "tau": fit.tau}
            pooled.append({**found, "which": which, "verdict": verdict})
    return {
        **{"moves": _moves(rows, 1), "moves_high": _moves(rows, MIN_RANK)},
        "slopes": commands.table(known, "group", "slope") if known else [],
        "pooled": pooled,
    }


def _moves(rows: Sequence[dict[str, Any]], least: int) -> str:
    """Count how the models' best learning rate tried moves from rank `least` to the highest."""
    tried = ([v for k, v in zip(r["ranks"], r["best_tried"]) if v and k >= least] for r in rows)
    signs = [int(np.sign(v[-1] - v[0])) for v in tried if len(v) > 1]
    up, down, same = (signs.count(sign) for sign in (1, -1, 0))
    p = float(stats.binomtest(up, up + down).pvalue) if up + down else 1.0
    return f"rises in {up} models, falls in {down} and stays in {same} (sign test: p {p:.2g})"


def _law(sweep: Reading) -> dict[str, Any]:
    runs = sweep.table
    widths = runs.dropna(subset=["hidden_size"]).groupby("model")["hidden_size"]
    hidden = widths.first().astype(float).to_dict()
    curves, costs = lr_curves(runs), list[dict[str, Any]]()
    for c in curves:
        if (lr := published(c, hidden.get(c.key["model"], math.nan))) is not None:
            costs.append(
                {"model": c.key["model"], "curve": c.name, "lr": lr, "percent": regret(c, lr)}
            )
    costs = [c for c in costs if c["percent"] is not None]
    values = [c["percent"] for c in costs]
    names = ("family", "lr_at_2000", "p", "models", "regret_percent", "flags")
    laws = [
        {k: v.plain() if isinstance(v, Estimate) else v for k, v in law.items()}
        for law in by_loss(curves, hidden)
    ]
    return {
        "regrets": values,
        "law": {
            **{"mean": number(float(np.mean(values))), "median": number(float(np.median(values)))},
            **{"most": number(max(values)), "above": sum(v > 0.5 for v in values)},
            "largest": "; ".join(
                f"{c['model']} {c['curve']} {number(c['percent'])}% at {rate(c['lr'])}"
                for c in sorted(costs, key=lambda c: -c["percent"])[:3]
            ),
            "rows": commands.table(laws, *names),
            "without": len(set(runs["model"]) - set(hidden)),
        },
    }


def _rl(path: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for column in ("best_eval_accuracy", "final_eval_accuracy"):
        read = read_any(path, RL_NAMES, column)
        table = read.table[read.table["model"] == RL_MODEL]
        broken = (table["status"] == "done") & (table["test_nll"] >= -RL_BROKEN)
        table = table.assign(status=table["status"].mask(broken, "diverged"))
        read = dataclasses.replace(read, table=table)
        ratios = {r["rank"]: r for r in commands.ratio(read)["ratios"]}
        for r in commands.fit(read):
            over = ratios.get(r["rank"], {"ratio": None, "low": None, "high": None})
            first = {k: r[k] for k in ("metric", "method", "rank", "best_lr", "low", "high")}
            ratio = {k: over[k] for k in ("ratio", "low", "high")}
            rows.append(
                {**first, "accuracy there": r["best_nll"], "over full": ratio}
                | {"flags": r["flags"]}
            )
    ends = [r["over full"]["high"] for r in rows if r["over full"]["high"] is not None]
    runs = load(path)
    best, final = (
        runs[c].replace("", "nan").astype(float)
        for c in ("best_eval_accuracy", "final_eval_accuracy")
    )
    outside = max(ends, default=0.0) < 10
    return {
        "rows": commands.table(rows),
        "highest": number(max(ends)) if ends else "",
        "excluded": f"10 {'lies outside' if outside else 'is not excluded by'} all of them.",
        "late": int(((best >= 0.8 * best.max()) & (final < 0.1)).sum()),
        "n_runs": len(runs),
    }


def main(arguments: Sequence[str]) -> None:
    """Write the page from the two tables."""
    parser = argparse.ArgumentParser("python -m benchmarks public_evidence", description=__doc__)
    parser.add_argument("tulu3", type=Path)
    parser.add_argument("rl", type=Path)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "public_evidence.md")
    options = parser.parse_args(arguments)
    options.out.write_text(render(options.tulu3, options.rl))
