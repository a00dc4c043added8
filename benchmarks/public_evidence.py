"""Analyse runs published by others, and render analysis/results/public_evidence.md.

    python -m benchmarks public_evidence TULU3_SWEEP.csv RL_RUNS.csv

The first table: LoRA-only learning rate x rank sweeps of many models on Tulu3 (tinker-cookbook,
Apache-2.0). The second: GRPO runs of LoRA and full fine-tuning (kenkuuu/lora-without-regret).
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from analysis.inference.estimate import Estimate, number, rate, with_interval
from analysis.inference.meta import random_effects
from analysis.measures.ratio import MIN_RANK
from analysis.report.text import markdown
from analysis.runs import reading
from analysis.runs.lr_curves import lr_curves
from analysis.tables import commands, laws
from benchmarks.harness import RESULTS

DRIFT_MARGIN = 0.099
"""Largest allowed slope of ln(best LR) per doubling of the rank: a factor 2 over 7 doublings."""
RL_NAMES = {"model_id": "model", "lora_rank": "rank", "n_grpo_steps": "steps"}
RL_BROKEN = 0.2
"""At most this accuracy: diverged. Full fine-tuning at its lowest rate learned nothing: 0.21."""
RL_MODEL = "Qwen/Qwen3-1.7B"
"""The only model of the RL table with both arms."""


def render(tulu: Path, rl: Path) -> str:
    """Render the page."""
    sweep = reading.read(tulu)
    out = [
        "# What runs published by others decide",
        "",
        "Two tables made by others, put through `python -m analysis`. They have one seed each, so "
        "no verdict is given: what is shown are optima, bounds and tests.",
        "",
    ]
    out += [*_bounds(sweep), *_drift(sweep), *_law(sweep), *_rl(rl), *_made(sweep, tulu, rl)]
    return "\n".join(out) + "\n"


def _bounds(sweep: reading.Reading) -> list[str]:
    alone, shared = commands.fit(sweep), commands.fit(sweep, share=True)
    n = len(alone)

    def count(rows: list[dict[str, Any]], *flags: str) -> int:
        return sum(bool(set(flags) & set(r["flags"])) for r in rows)

    def counts(rows: list[dict[str, Any]]) -> list[str]:
        known = [r for r in rows if r["low"] is not None and r["best_lr"] is not None]
        width = float(np.median([r["high"] / r["low"] for r in known])) if known else math.nan
        bound = sum(
            r["best_lr"] is None and (r["low"] is not None or r["high"] is not None) for r in rows
        )
        return [
            str(len(known)),
            number(width),
            str(bound),
            str(sum(r["best_lr"] is None for r in rows) - bound),
        ]

    largest = _largest_survivor_best(sweep)
    diverged = sweep.table[sweep.table["status"] == "diverged"]
    top = float(sweep.table["lr"].max())
    return [
        "## How many published best rates are only bounds",
        "",
        f"{n} curves (a model at a rank) of {sweep.table['model'].nunique()} models; "
        f"{len(sweep.table)} runs, of which {len(diverged)} diverged, "
        f"{int((diverged['lr'] == top).sum())} of them at {top:g}. In {largest} of {n} curves the "
        "best surviving rate is the largest that survived, so what is called the best rate is a "
        f"lower bound; {count(alone, 'bounded_by_divergence')} curves are bounded above only by a "
        "rate that diverged.",
        "",
        *markdown(
            [
                ["fit", "best LR with an interval", "median high / low", "a bound only", "nothing"],
                ["each curve alone", *counts(alone)],
                ["ranks of a model share their curvature (`--share`)", *counts(shared)],
            ]
        ),
        "",
        "Rates are a factor 2.5 to 3.3 apart and four to five survive: the intervals are wide "
        "because the shape between such points is open, not because of noise.",
        "",
    ]


def _largest_survivor_best(sweep: reading.Reading) -> int:
    found = 0
    for c in lr_curves(sweep.table):
        x, y = c.x[c.usable], c.y[c.usable]
        rates = np.unique(x)
        if len(rates):
            means = [y[x == v].mean() for v in rates]
            found += int(np.argmin(means)) == len(rates) - 1
    return found


def _drift(sweep: reading.Reading) -> list[str]:
    rows = commands.drifts(sweep, share=True)
    every, high = _moves(rows, 1), _moves(rows, MIN_RANK)
    known = [r for r in rows if r["slope"] is not None]
    lines = [["model", "slope of ln LR a doubling [95%]", "p (no slope)", "p (ranks equal)"]]
    lines += [
        [
            r["group"].split(" on ")[0],
            with_interval(Estimate(r["slope"], r["low"], r["high"])),
            number(r["p_slope"], 2),
            number(r["p_equal"], 2),
        ]
        for r in known
    ]
    upper = dataclasses.replace(sweep, table=sweep.table[sweep.table["rank"] >= MIN_RANK])
    pooled = [
        *_pooled_slope(known, "all ranks"),
        *_pooled_slope(
            [r for r in commands.drifts(upper, share=True) if r["slope"] is not None],
            f"ranks of {MIN_RANK} and more",
        ),
    ]
    return [
        "## Does the best rate move with the rank?",
        "",
        f"From the lowest to the highest rank of a model the best rate tried {every}. With ranks "
        f"of {MIN_RANK} and more only, as the study's claim has it, it {high}. This rests on no "
        "fit.",
        "",
        *([*markdown(lines), ""] if known else []),
        *pooled,
    ]


def _moves(rows: Sequence[dict[str, Any]], least: int) -> str:
    """Count the models in which the best rate tried rises, falls or stays the same with the rank.

    From the lowest to the highest rank.

    Args:
        least: ignore ranks below this.
    """
    up = down = same = 0
    for r in rows:
        tried = [v for rank, v in zip(r["ranks"], r["best_tried"]) if v and rank >= least]
        if len(tried) > 1:
            up, down, same = (
                up + (tried[-1] > tried[0]),
                down + (tried[-1] < tried[0]),
                same + (tried[-1] == tried[0]),
            )
    p = float(stats.binomtest(up, up + down).pvalue) if up + down else 1.0
    return f"rises in {up} models, falls in {down} and stays in {same} (sign test: p {p:.2g})"


def _pooled_slope(known: Sequence[dict[str, Any]], which: str) -> list[str]:
    if len(known) < 2:
        return []
    e = random_effects([r["slope"] for r in known], [(r["high"] - r["low"]) / 3.92 for r in known])
    if max(-e.low, e.high) <= DRIFT_MARGIN:
        verdict = "inside"
    elif e.low > DRIFT_MARGIN or e.high < -DRIFT_MARGIN:
        verdict = "outside"
    else:
        verdict = "across the edge of"
    return [
        f"Pooled over {e.k} models with two or more known optima, {which} (random effects): "
        f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}] a doubling, spread between models {e.tau:.3f}. "
        f"That is {verdict} the margin of {DRIFT_MARGIN} (a factor 2 over 7 doublings). Models "
        "whose optimum lies too high to be bracketed are missing: a selection.",
        "",
    ]


def _law(sweep: reading.Reading) -> list[str]:
    law = laws.law(sweep)
    costs = [c for c in law["published_regret"] if c["percent"] is not None]
    worst = sorted(costs, key=lambda c: -c["percent"])[:3]
    head = "family|LR at hidden 2000 [95%]|exponent [95%]|models|regret of this law, %|flags"
    lines = [head.split("|")]
    for v in law["by_loss"]:
        at, p = (Estimate(v[k]["value"], v[k]["low"], v[k]["high"]) for k in ("lr_at_2000", "p"))
        lines.append(
            [
                v["family"],
                with_interval(at, rate),
                with_interval(p),
                str(v["models"]),
                number(v["regret_percent"]),
                ", ".join(v["flags"]) or "-",
            ]
        )
    values = [c["percent"] for c in costs]
    above = sum(v > 0.5 for v in values)
    largest = "; ".join(
        f"{c['model']} {c['curve']} {number(c['percent'])}% at {rate(c['lr'])}" for c in worst
    )
    return [
        "## The published formula of the rate",
        "",
        "LR = 5e-5 x 10 x (2000/hidden)^p with p 0.781 (Llama) and 0.0775 (Qwen). Over "
        f"{len(costs)} curves of models whose hidden size is known, its regret against the best "
        f"rate tried is {number(float(np.mean(values)))}% on average, "
        f"{number(float(np.median(values)))}% in the median and {number(max(values))}% at most; "
        f"{above} curves lie above the 0.5% that its authors claim. Largest: {largest}.",
        "",
        "The same law fitted to this table as the study fitted its own, by the least summed "
        "interpolated loss:",
        "",
        *markdown(lines),
        "",
        f"{len(law['models_without_hidden_size'])} models without a published hidden size are left "
        "out.",
        "",
    ]


def _rl(path: Path) -> list[str]:
    out = ["## Reinforcement learning: LoRA's rate over full fine-tuning's", ""]
    rows = [["metric", "curve", "best LR [95%]", "accuracy there", "ratio [95%]", "flags"]]
    for name, column in (
        ("best accuracy during the run", "best_eval_accuracy"),
        ("final accuracy", "final_eval_accuracy"),
    ):
        read = reading.read(path, RL_NAMES, column, RL_BROKEN)
        read = dataclasses.replace(read, table=read.table[read.table["model"] == RL_MODEL])
        ratios = {r["rank"]: r for r in commands.ratio(read)["ratios"]}
        for r in commands.fit(read):
            e = ratios.get(r["rank"])
            shown = "-" if e is None else with_interval(Estimate(e["ratio"], e["low"], e["high"]))
            curve = "full fine-tuning" if r["rank"] is None else f"LoRA r{r['rank']}"
            rows.append(
                [
                    name,
                    curve,
                    with_interval(Estimate(r["best_lr"], r["low"], r["high"]), rate),
                    number(r["best_nll"]),
                    shown,
                    ", ".join(r["flags"]) or "-",
                ]
            )
    out += [
        f"{RL_MODEL}, GRPO, 50 steps, one seed; accuracy of {RL_BROKEN:g} and less counts as "
        "diverged.",
        "",
        *markdown(rows),
        "",
    ]
    high = [float(r[4].split("[")[1].split(",")[1].rstrip("]")) for r in rows[1:] if "[" in r[4]]
    if high:
        out += [
            f"Highest upper end of the ratios: {number(max(high))}. "
            + (
                "10 lies outside all of them."
                if max(high) < 10
                else "10 is not excluded by all of them."
            ),
            "",
        ]
    runs = reading.load(path)
    best, final = (
        runs[c].replace("", "nan").astype(float)
        for c in ("best_eval_accuracy", "final_eval_accuracy")
    )
    late = int(((best >= 0.8 * best.max()) & (final < 0.1)).sum())
    out += [
        f"{late} of {len(runs)} runs of the table reached four fifths of the highest accuracy and "
        "ended below 0.1 (late collapse): best and final accuracy rank rates differently, which is "
        "why both are shown.",
        "",
    ]
    return out


def _made(sweep: reading.Reading, tulu: Path, rl: Path) -> list[str]:
    rows = commands.fit(sweep)
    ranks = sorted({r["rank"] for r in rows})
    unknown = "; ".join(
        f"r{k} {sum(r['best_lr'] is None for r in rows if r['rank'] == k)} of "
        f"{sum(r['rank'] == k for r in rows)}"
        for k in ranks
    )
    repeats = sweep.table[sweep.table.duplicated(["model", "rank", "lr"], keep=False)]
    arms = sorted(sweep.table["method"].unique())
    lowest = float((repeats["lr"] == sweep.table["lr"].min()).mean())
    return [
        "## What these tables cannot decide",
        "",
        "- The ratio in supervised fine-tuning: the first table has the "
        f"arm{'s' * (len(arms) > 1)} {', '.join(arms)} only.",
        f"- The best rate of most curves. Without a known optimum, by rank: {unknown}.",
        f"- Anything that needs the noise at the optimum: of {len(repeats)} repeated runs "
        f"{100 * lowest:.0f}% are at the lowest rate.",
        "",
        f"Command: `python -m benchmarks public_evidence {tulu.name} {rl.name}`",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page from the two tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks public_evidence", description=__doc__
    )
    parser.add_argument("tulu3", type=Path)
    parser.add_argument("rl", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "public_evidence.md")
    args = parser.parse_args(argv)
    args.out.write_text(render(args.tulu3, args.rl))
