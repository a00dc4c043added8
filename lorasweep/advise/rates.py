"""Predict one method's best learning rate from the other's, within the scope of the law.

The law is in analysis/measures/laws.py. What was measured there: supervised rows, a constant
learning rate, models of up to 135M parameters.
"""

import math
from dataclasses import replace
from typing import Any

from analysis.measures import laws
from analysis.measures.laws import AT_REST, REST_RANK
from lorasweep.errors import SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import Method
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec

MEASURED = {
    **{"hidden size": (64, 576), "updates": (12, 1024), "alpha": (0.125, 2048), "batch": (4, 256)},
    **{"beta1": (0.9, 0.9), "beta2": (0.95, 0.95), "weight decay": (0.0, 0.0)},
}
"""Least and most that were measured; 576 is SmolLM2-135M."""


def outside(model: ModelSpec, method: Method, **more: str | int) -> str:
    """Return why the law does not cover an arm; empty: it does.

    `more`: objective, schedule and warmup_steps, if they are not supervised, constant and 0.
    """
    experts = {"expert_rank": "own"} if model.n_experts else {}
    return laws.outside({**method.plain(), "method": method.name, **experts, **more})


def outside_of(spec: RunSpec) -> str:
    """Return why the law does not cover a run; empty: it does."""
    run = {"objective": spec.objective, "schedule": spec.schedule}
    return outside(spec.model, spec.method, **run, warmup_steps=spec.warmup_steps)


def law(of: RunSpec, known: RunSpec, lr: float) -> float | None:
    """Return the best learning rate of a run's arm, from LoRA's best `lr` in another arm.

    None outside the law's scope. Both runs have one model, data set, batch and number of updates.
    """
    scopes = (outside_of(s) for s in (of, known))
    if not isinstance(known.method, LoRA) or any(scopes):
        return None
    width, steps = of.model.hidden_size, of.steps
    found = full = float(laws.full_lr(width, laws.alpha_of(known.method.plain()), steps, lr))
    if isinstance(of.method, LoRA):
        found *= float(laws.ratio(width, laws.alpha_of(of.method.plain()), steps, full))
    for method, at in ((known.method, lr), (of.method, found)):
        still = laws.movement(width, at, steps) < AT_REST
        if isinstance(method, LoRA) and still and method.rank != REST_RANK:
            return None
    return found


def predict(
    spec: RunSpec, full_lr: float | None, lora_lr: float | None, at_alpha: float | None
) -> dict[str, Any]:
    """Predict best learning rates from full fine-tuning's, or from LoRA's at alpha `at_alpha`.

    Returns `full_lr` and `lora_lr`; which of them is `given` ("full", "lora" or ""); `factor` and
    `full_factor`: LoRA's and full fine-tuning's lie within it (two rms errors); z, and
    `moving_alpha`, the alpha up to which z is 1 or more; and what was `never_measured`.

    Raises SpecError outside the law's scope, with the reason.
    """
    method, width, steps = spec.method, spec.model.hidden_size, spec.steps
    why = outside_of(spec)
    if not isinstance(method, LoRA):
        why = why or "which rank of LoRA?"
    else:
        alpha = laws.alpha_of(method.plain())
        at = laws.alpha_of(replace(method, alpha=at_alpha or method.alpha).plain())
        full = full_lr or float(laws.full_lr(width, at, steps, lora_lr))
        lora = full * float(laws.ratio(width, alpha, steps, full))
        known, z, q = (laws.movement(width, lr, steps) for lr in (lora_lr or lora, lora, full))
        moving_alpha = laws.limit(width, alpha / method.alpha) * q / math.sqrt(2)
        if not why and min(known, z) < AT_REST and method.rank != REST_RANK:
            why = f"z is {min(known, z):.2g}, so A hardly moves (it moves more up to alpha "
            why += f"{moving_alpha:.2g}) and the ratio depends on the rank: there only rank "
            why += f"{REST_RANK} was measured"
    if why or not isinstance(method, LoRA):
        raise SpecError(f"action=rate: {why}. Search it: lorasweep lr_ratio MODEL ROWS")
    alphas = (("alpha", value) for value in sorted({at, alpha}))
    adam = (("beta1", spec.beta1), ("beta2", spec.beta2), ("weight decay", spec.weight_decay))
    batch = ("batch", spec.batch_size)
    values = (("hidden size", width), ("updates", steps), *alphas, batch, *adam)
    return {
        **{"full_lr": full, "lora_lr": lora, "alpha": method.alpha, "steps": steps, "z": z},
        "moving_alpha": moving_alpha,
        "given": "full" if full_lr else "lora" if at == alpha else "",
        "factor": math.exp(2 * laws.ERROR),
        "full_factor": math.exp(2 * laws.ERROR_OF_FULL),
        "never_measured": [
            "{} {:g} (from {:g} to {:g})".format(name, value, *MEASURED[name])
            for name, value in values
            if not MEASURED[name][0] <= value <= MEASURED[name][1]
        ],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Say a prediction in words."""
    z = found["z"]

    def said(which: str) -> str:
        lr, f = found[f"{which}_lr"], found["full_factor" if which == "full" else "factor"]
        given = found["given"] == which
        return f"{lr:.2e} ({'given' if given else f'{lr / f:.1e} to {lr * f:.1e}'})"

    meaning = "A moves more than its random start: LoRA's falls as 1 / sqrt(alpha)"
    if z < 1:
        less = "moves less than its random start" if z >= AT_REST else "hardly moves"
        meaning = f"A {less}; it moves more up to alpha {found['moving_alpha']:.2g}"
    times = f"{found['lora_lr'] / found['full_lr']:.3g} times as high"
    return [
        f"full fine-tuning: {said('full')}",
        f"LoRA at alpha {found['alpha']:g}: {said('lora')}, {times}",
        f"z = {z:.2g}: {meaning}",
        *(f"never measured: {text}" for text in found["never_measured"]),
        f"ranges are twice the law's rms error on new runs: {laws.ERROR:g} in ln for LoRA's, "
        f"{laws.ERROR_OF_FULL:g} for full fine-tuning's",
    ]
