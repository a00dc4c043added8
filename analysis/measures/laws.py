"""Laws of LoRA's best learning rate over full fine-tuning's, written as R.

The law (quadrature). Under Adam every entry of a matrix moves by about the learning rate. LoRA's
output changes by alpha x rate(B) x |A|, full fine-tuning's by hidden x rate. A's random start and
A's own movement are orthogonal, so their squares add. Equal changes give

    R = L / sqrt(1 + z^2)     L = G sqrt(3) hidden / alpha     z = K hidden lr_lora sqrt(T / 128)

with T updates and LoRA's output scaled by alpha / rank; the rank drops out. L is the ratio while A
hardly moves (z far below 1); where A moves (z above 1), R falls as 1 / sqrt(alpha). With z written
by full fine-tuning's rate, z = q R and q = K hidden lr_full sqrt(T / 128), so that

    R^2 = (sqrt(1 + 4 q^2 L^2) - 1) / (2 q^2)

G and K were fitted to 49 ratios of earlier sweeps (rms error of ln(R) 0.087), as were the constants
of the rivals. On new ones (sweep quadrature) its rms error is ERROR. Scope: all or nearly all
matrices, supervised rows, rank 4 and more; below z = 0.3, rank 8 alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

G, K, REFERENCE_STEPS = 0.86, 4.2, 128
"""The law's constants; the exponent of the updates is 1/2."""
ERROR, ERROR_OF_FULL = 0.14, 0.19
"""rms errors, measurement included, in the conditions of the sweep quadrature: of ln(R), and of
the logarithm of full fine-tuning's learning rate, computed from LoRA's at alpha 32."""
LINEAR = (1.0, 3.4, 0.55)
"""g, k and the exponent of the updates, if A's start and movement added as numbers."""
POWERS = {
    "power law": (2.020298114, 0.592970842, -0.664720827, -0.280228628),
    "sqrt(hidden / alpha)": (0.412375970, 0.5, -0.5, 0.0),
    "constant": (1.131549413, 0.0, 0.0, 0.0),
}
"""Rival -> ln of its factor, and its exponents of hidden size, alpha and updates."""
LEAST_RANK, AT_REST, REST_RANK = 4, 0.3, 8
"""The law is for ranks of LEAST_RANK and more; below z = AT_REST, only REST_RANK was measured."""
LAW, LINEAR_LAW = "the law (quadrature)", "linear law"
NAMES = (LAW, LINEAR_LAW, *POWERS)


def limit(hidden: float, alpha: float, g: float = G) -> float:
    """Return L: the ratio if A keeps its start."""
    return g * math.sqrt(3) * hidden / alpha


def movement(hidden: float, lora_lr: Any, steps: float, k: float = K) -> Any:
    """Return z: A's movement over A's start, at these learning rates of LoRA."""
    return k * hidden * lora_lr * math.sqrt(steps / REFERENCE_STEPS)


def ratio(
    hidden: float,
    alpha: float,
    steps: float,
    full_lr: Any,
    law: str = LAW,
    b_ratio: float = 1,
    constants: tuple[float, float] = (G, K),
) -> Any:
    """Return R by a law of NAMES, at full fine-tuning's best learning rates [any shape].

    `b_ratio`: B's rate over A's, which LAW knows (LoRA+). R then counts B's rate, and z has A's.
    `constants`: LAW's g and k.
    """
    if law in POWERS:
        return math.exp(float(np.dot(POWERS[law], [1, *np.log([hidden, alpha, steps])])))
    if law == LINEAR_LAW:
        g, k, beta = LINEAR
        start = g * math.sqrt(3) * hidden / alpha
        moved = k * hidden * full_lr * (steps / REFERENCE_STEPS) ** beta
        return 2 * start / (1 + np.sqrt(1 + 4 * moved * start))
    g, k = constants
    start, moved = limit(hidden, alpha, g), movement(hidden, full_lr / b_ratio, steps, k)
    # The root of the formula above, without its difference of nearly equal numbers.
    return start * np.sqrt(2 / (1 + np.sqrt(1 + (2 * moved * start) ** 2)))


def full_lr(hidden: float, alpha: float, steps: float, lora_lr: Any) -> Any:
    """Return full fine-tuning's best learning rate by the law, from LoRA's."""
    return lora_lr * np.sqrt(1 + movement(hidden, lora_lr, steps) ** 2) / limit(hidden, alpha)


def carried(hidden: float, old_alpha: float, alpha: float, steps: float, lora_lr: Any) -> Any:
    """Return LoRA's best learning rate by the law at another alpha, from the one at `old_alpha`."""
    full = full_lr(hidden, old_alpha, steps, lora_lr)
    return full * ratio(hidden, alpha, steps, full)


def outside(key: Mapping[str, Any]) -> str:
    """Return why the law does not cover an arm; empty: it does.

    `key`: settings by the names of the columns of a table of runs; missing ones are the study's.
    """
    said = {k: v for k, v in key.items() if v is not None and v == v}
    method, layers = said["method"], str(said.get("layers", "attention+mlp"))
    missing = {"attention", "mlp"} - {*layers.split("+")}
    constant = (said.get("schedule", "constant"), said.get("warmup_steps", 0)) == ("constant", 0)
    usual = {"init_scale": 1.0, "lr_b_ratio": 1.0, "start": "a"}
    reasons = (
        (said.get("objective", "sft") != "sft", "it is for supervised rows, not for rewards"),
        ("expert_rank" in said, "mixtures of experts were not measured"),
        (not constant, "it is for a constant learning rate"),
        (missing, f"layers={layers}: it is for attention and MLP together"),
        (method not in ("lora", "fullft"), f"method {method} was not measured"),
        (
            method == "lora" and said["rank"] < LEAST_RANK,
            f"rank={said.get('rank', 0):g}: it is for ranks of {LEAST_RANK} and more",
        ),
        (
            any(said.get(k, v) != v for k, v in usual.items()),
            "another initialisation, or other learning rates of A and B, than the study's",
        ),
    )
    return next((why for applies, why in reasons if applies), "")


def alpha_of(key: Mapping[str, Any]) -> float:
    """Return the alpha of an arm of LoRA that gives the same output under alpha / rank."""
    rank, by = float(key["rank"]), str(key.get("scaling_by") or "rank")
    return float(key["alpha"]) * {"rank": 1.0, "sqrt_rank": math.sqrt(rank), "none": rank}[by]
