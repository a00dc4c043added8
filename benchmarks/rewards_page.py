"""Render rewards.json of the benchmark as a page with a figure.

Measures nothing: every number comes from the file that `python -m benchmarks rewards` wrote.
"""

import json
from typing import Any

from analysis.inference.estimate import number
from analysis.questions.base import Panel, Series
from analysis.report import plots
from analysis.report.text import text_hash
from benchmarks.harness import FIGURES, render, table

ERRORS = 2
"""Standard errors that bars show, and within which two means agree."""


def panels(curves: dict[str, Any]) -> list[Panel]:
    """Return the mean learning curves of both sides, and their difference."""
    rows = curves["updates"]
    x = [r["update"] for r in rows]

    def series(label: str, value: str, error: str, **look: Any) -> Series:
        y, reach = [r[value] for r in rows], [ERRORS * r[error] for r in rows]
        low, high = ([v + side * e for v, e in zip(y, reach)] for side in (-1, 1))
        return Series(label, x, y, low, high, **look)

    both = [
        series("lorasweep", "lorasweep", "lorasweep_error", colour=1),
        series("TRL's GRPO", "trl", "trl_error", colour=2),
    ]
    apart = [series("lorasweep minus TRL", "difference", "error", colour=0)]
    seeds = f"mean of {len(curves['seeds'])} seeds, bars: {ERRORS} standard errors"
    return [
        Panel(seeds, "updates", "held-out reward", both, log_x=True),
        Panel("difference of the means", "updates", "reward", apart, log_x=True, lines={"0": 0.0}),
    ]


def page(content: dict[str, Any]) -> str:
    """Render the page."""
    c, updates = content["curves"], content["curves"]["updates"]
    head = ["update", "lorasweep", "TRL", "difference", "its standard error", "in errors"]
    rows = [
        [
            str(r["update"]),
            *(number(r[k]) for k in ("lorasweep", "trl")),
            f"{r['difference']:+.4f}",
            number(r["error"], 2),
            f"{r['difference'] / r['error']:+.1f}",
        ]
        for r in updates
    ]
    compared = [r for r in updates if r["compared"]]
    outside = [str(r["update"]) for r in compared if not r["agree"]]
    found = f"Outside at {', '.join(outside)}." if outside else "All do: the two sides agree."
    packages = ", ".join(f"{k} {v}" for k, v in content["packages"].items())
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in c["seconds_a_run"].items())
    return render(
        "rewards",
        curves=c,
        packages=packages,
        processor=content["processor"],
        n_compared=len(compared),
        errors=ERRORS,
        found=found,
        updates=table([head, *rows]),
        seconds=seconds,
        flips=flips(content.get("flips", [])),
    )


def flips(cases: list[dict[str, Any]]) -> str:
    """Render how many rollouts differ in a pack; empty if it was not measured."""
    if not cases:
        return ""
    head = "runs|in a pack of|rollouts|tokens|rollouts that differ|of a million tokens"
    rows = [head.split("|")]
    for c in cases:
        counts = [f"{c[k]:,}" for k in ("members", "answers", "tokens", "differing")]
        rows.append([c["case"], *counts, number(1e6 * c["differing"] / c["tokens"], 2)])
    return table(rows)


def write() -> None:
    """Write rewards.md and rewards.png next to rewards.json."""
    text = (FIGURES / "rewards.json").read_text()
    content = json.loads(text)
    (FIGURES / "rewards.md").write_text(page(content))
    plots.panels(panels(content["curves"]), FIGURES / "rewards.png", text_hash(text))
