"""Render rewards.json of the benchmark as a page with a figure.

Measures nothing: every number comes from the file that `python -m benchmarks rewards` wrote.
"""

import json
from typing import Any

from analysis.inference.estimate import number
from analysis.questions.base import Panel, Series
from analysis.report import plots
from analysis.report.text import markdown, text_hash
from benchmarks.harness import FIGURES

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
    c, rows = content["curves"], content["curves"]["updates"]
    head = ["update", "lorasweep", "TRL", "difference", "its standard error", "in errors"]
    table = [
        [
            str(r["update"]),
            *(number(r[k]) for k in ("lorasweep", "trl")),
            f"{r['difference']:+.4f}",
            number(r["error"], 2),
            f"{r['difference'] / r['error']:+.1f}",
        ]
        for r in rows
    ]
    compared = [r for r in rows if r["compared"]]
    outside = [str(r["update"]) for r in compared if not r["agree"]]
    found = (
        f"Outside at {', '.join(outside)}." if outside else "All of them are: the two sides agree."
    )
    packages = ", ".join(f"{k} {v}" for k, v in content["packages"].items())
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in c["seconds_a_run"].items())
    return "\n".join(
        [
            "# Rewarded runs against TRL's GRPO trainer",
            "",
            f"`{c['dataset']}` on {c['model']}, full fine-tuning at {c['lr']:g}, {c['steps']} "
            f"updates of {c['batch_size']} answers, {c['group_size']} to a prompt; seeds "
            f"{c['seeds'][0]} to {c['seeds'][-1]}. TRL is set to our loss (`dr_grpo`, no scaling, "
            "no KL, no clipping); prompts and their order, optimizer and the "
            f"{c['rows']} held-out rows are the same, the answers' random numbers are not. "
            f"{packages}; {content['processor']}.",
            "",
            "![mean learning curves and their difference](rewards.png)",
            "",
            f"Means within {ERRORS} standard errors of their difference were asked for at every "
            f"evaluated update from the tenth on, {len(compared)} of them. {found}",
            "",
            *markdown([head, *table]),
            "",
            "Seconds of the processor, one thread, for the fastest run of each side, evaluations "
            f"included: {seconds}.",
            "",
            *flips(content.get("flips", [])),
        ]
    )


def flips(cases: list[dict[str, Any]]) -> list[str]:
    """Render what runs draw differently in a pack; nothing if it was not measured."""
    if not cases:
        return []
    rows = [
        ["runs", "in a pack of", "answers", "tokens", "answers that differ", "of a million tokens"]
    ]
    for c in cases:
        counts = [f"{c[k]:,}" for k in ("members", "answers", "tokens", "differing")]
        rows.append([c["case"], *counts, number(1e6 * c["differing"] / c["tokens"], 2)])
    return [
        "## Draws in a pack",
        "",
        "In fp32 a run's policy in a pack is that of the run alone up to rounding, and one draw "
        "in very many lies so close to a boundary that rounding decides it. Weights, prompts and "
        "random numbers are the same; an answer counts once, at its first token that differs.",
        "",
        *markdown(rows),
        "",
    ]


def write() -> None:
    """Write rewards.md and rewards.png next to rewards.json."""
    text = (FIGURES / "rewards.json").read_text()
    content = json.loads(text)
    (FIGURES / "rewards.md").write_text(page(content))
    plots.panels(panels(content["curves"]), FIGURES / "rewards.png", text_hash(text))
