"""Compare RL with TRL's GRPO trainer.

    python -m benchmarks rewards [--out FILE]

Both sides run full fine-tuning at the middle learning rate of the sweep `rl`, with several seeds.
Only the random numbers of rollouts differ, so the learning curves should agree on average. Seconds
are of processor time.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch

from analysis.inference.estimate import number
from analysis.questions.base import Panel, Series
from analysis.report import plots
from benchmarks import harness, trl_baseline
from benchmarks.harness import BENCH, Figures, Log, Page, packages_of, render
from lorasweep.config.compose import compose_request
from lorasweep.data.splits import load as load_data
from lorasweep.launch.torch_trainer import finetune
from lorasweep.models.load import load as load_model
from lorasweep.spec.metric import eval_steps
from lorasweep.spec.run import RunSpec

SEEDS = (200, 201, 202, 203, 204)
"""The sweep uses other seeds."""
UPDATES = 40
"""Number of updates of a run; the runs of the sweep are longer."""
FIRST = 10
"""The curves are compared from this update on."""
ERRORS = 2
"""Two means agree if they differ by at most this many standard errors, the bars of the figure."""
Curve = dict[int, float]
"""Update -> held-out reward."""


def compared(one: Sequence[Curve], other: Sequence[Curve]) -> list[dict[str, Any]]:
    """Compare the mean curves of two sides, update by update.

    `error`: the standard error of the difference of the means, as the runs are independent.
    """
    rows = []
    for update in sorted(one[0].keys() & other[0].keys()):
        sides = [[curve[update] for curve in side] for side in (one, other)]
        means = [fmean(values) for values in sides]
        errors = [stdev(values) / math.sqrt(len(values)) for values in sides]
        error = math.hypot(*errors)
        rows.append(
            {
                "update": update,
                "lorasweep": means[0],
                "lorasweep_error": errors[0],
                "trl": means[1],
                "trl_error": errors[1],
                "difference": means[0] - means[1],
                "error": error,
                "compared": update >= FIRST,
                "agree": abs(means[0] - means[1]) <= ERRORS * error,
            }
        )
    return rows


def measure_curves(log: Log) -> Figures:
    """Train both sides, one run after the other, and compare them."""
    torch.set_num_threads(1)
    points = compose_request(["+sweep=rl", "scale=tiny"]).points
    full = sorted((p.spec for p in points if p.arm == "fullft"), key=lambda s: s.lr)
    spec = dataclasses.replace(full[len(full) // 2], seed=SEEDS[0], steps=UPDATES)
    folder = tempfile.TemporaryDirectory()
    data = load_data(spec.dataset, [])
    base = load_model(spec.model, ["models"], spec.precision)
    weights = {k: v.clone() for k, v in base.model.state_dict().items()}
    at = eval_steps(spec.steps)

    def learned(spec: RunSpec) -> Curve:
        ended = [r for event in finetune([spec], base, data) for r in event.ended.values()]
        ((_, result),) = ended
        curve = {p["step"]: p["test_reward"] for p in result["curve"] if p["step"]}
        return curve | {spec.steps: result["test_reward_curve"]}

    sides: Mapping[str, Callable[[RunSpec], Curve]] = {
        "lorasweep": learned,
        "trl": lambda s: trl_baseline.learning_curve(s, base.model, data, at, folder.name),
    }
    curves: dict[str, list[Curve]] = {name: [] for name in sides}
    seconds: dict[str, float] = {}
    for seed in SEEDS:
        for name, train in sides.items():
            started = time.process_time()
            base.model.load_state_dict(weights)
            curves[name].append(train(dataclasses.replace(spec, seed=seed)))
            taken = time.process_time() - started
            seconds[name] = min(taken, seconds.get(name, taken))
            log(f"{name}, seed {seed}, {taken:.0f} s: {curves[name][-1]}")
    folder.cleanup()
    rows = compared(curves["lorasweep"], curves["trl"])
    known = ("batch_size", "group_size", "max_new_tokens", "steps", "lr")
    return {
        "model": spec.model.name,
        "dataset": spec.dataset.name,
        "method": spec.method.name,
        **{k: getattr(spec, k) for k in known},
        "seeds": list(SEEDS),
        "rows": spec.dataset.n_test_curve,
        "seconds_a_run": seconds,
        "agree": all(r["agree"] for r in rows if r["compared"]),
        "updates": rows,
        "curves": {name: [list(c.items()) for c in side] for name, side in curves.items()},
    }


# ---------------------------------------------------------------- the page


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
    head = ["update", "lorasweep", "TRL", "difference", "standard error", "ratio"]
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
    found = f"Not met at {', '.join(outside)}." if outside else "It is met: the two agree."
    seconds = ", ".join(f"{k} {v:.0f} s" for k, v in c["seconds_a_run"].items())
    return render(
        "rewards",
        curves=c,
        packages=packages_of(content),
        processor=content["machine"]["processor"],
        n_compared=len(compared),
        errors=ERRORS,
        found=found,
        updates=[head, *rows],
        seconds=seconds,
    )


def draw(content: dict[str, Any], inputs: str) -> None:
    """Draw the learning curves of both sides."""
    plots.panels(panels(content["curves"]), BENCH / "rewards.png", inputs)


PAGE = Page(BENCH / "rewards.json", "rewards.md", page, draw)


def main(arguments: Sequence[str]) -> None:
    """Measure the named parts, or both, and write the page."""
    parts = {"curves": measure_curves}
    harness.measure(PAGE, parts, arguments, "torch", "transformers", "trl")
