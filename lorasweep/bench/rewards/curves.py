"""Hold rewarded runs to TRL's GRPO trainer: learning curves of the same task, several seeds a side.

Full fine-tuning at the middle rate of the sweep `rl`. Base, prompts and their order, loss,
optimizer and held-out rows are the same; the random numbers of the answers are not, so the curves
agree on average only. Seconds are the processor's, of one thread.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch

from lorasweep.bench.rewards import grpo
from lorasweep.config.compose import compose_request
from lorasweep.data.examples import Data
from lorasweep.data.load import load as load_data
from lorasweep.launch.trainer import finetune
from lorasweep.models.load import Base
from lorasweep.models.load import load as load_model
from lorasweep.spec.evaluations import eval_steps
from lorasweep.spec.run import RunSpec

SEEDS = (200, 201, 202, 203, 204)
"""Not those of the sweep."""
UPDATES = 40
"""Of a run: the first ones of the sweep's."""
FIRST = 10
"""The curves are compared from this update on."""
ERRORS = 2.0
"""Standard errors of the difference of two means that count as agreement."""
Curve = dict[int, float]
"""Held-out reward by update."""


def spec_of(seed: int) -> RunSpec:
    """Return full fine-tuning at the middle rate of `rl` at scale tiny."""
    points = compose_request(["+sweep=rl", "scale=tiny"]).points
    full = sorted((p.spec for p in points if p.arm == "fullft"), key=lambda s: s.lr)
    return dataclasses.replace(full[len(full) // 2], seed=seed, steps=UPDATES)


def learning_curve(spec: RunSpec, base: Base, data: Data) -> Curve:
    """Train a run and return its held-out reward after each evaluated update."""
    results = [r for event in finetune([spec], base, data) for r in event.ended.values()]
    ((_, result),) = results
    curve = {p["step"]: p["test_reward"] for p in result["curve"] if p["step"]}
    return curve | {spec.steps: result["test_reward_curve"]}


def compared(one: Sequence[Curve], other: Sequence[Curve]) -> list[dict[str, Any]]:
    """Compare the mean curves of two sides, update by update.

    `error`: the standard error of the difference of the means, of independent runs.
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


def measure(log: Callable[[str], None]) -> dict[str, Any]:
    """Train both sides, one run after the other, and compare them."""
    torch.set_num_threads(1)
    spec, folder = spec_of(SEEDS[0]), tempfile.TemporaryDirectory()
    data = load_data(spec.dataset, [])
    base = load_model(spec.model, ["models"], spec.precision)
    weights = {k: v.clone() for k, v in base.model.state_dict().items()}
    at = eval_steps(spec.steps)
    sides: Mapping[str, Callable[[RunSpec], Curve]] = {
        "lorasweep": lambda s: learning_curve(s, base, data),
        "trl": lambda s: grpo.learning_curve(s, base.model, data, at, folder.name),
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
