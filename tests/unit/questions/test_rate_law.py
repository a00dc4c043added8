"""`rate_law`: the law, the rule, and what the rule can decide."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from analysis.inference.decide import LOOK_LEVELS, judge
from analysis.inference.estimate import N_DRAWS
from analysis.questions import laws
from analysis.questions.laws import RATE_LAW, Cell

FULL = {64: 6.5e-4, 128: 5e-4, 256: 4e-4}
"""Full fine-tuning's optima after 512 updates, as the sweep's grids assume."""
ALPHAS = (0.5, 2, 8, 32, 128, 512, 2048)
CONDITIONS = [
    *((f"tiny{h}-3m", h, a, 512, full) for h, full in FULL.items() for a in ALPHAS),
    *(("smollm2-135m-instruct", 576, a, 30, 9.9e-5) for a in (8, 128)),
    ("smollm2-135m-instruct", 576, 32, 120, 7e-5),
]
CLAIM = {"estimand": "worst_criterion", "expected": -0.09, "margin": [-10, 0]}


def law(hidden, alpha, steps, full, name=RATE_LAW):
    cell = Cell("", hidden, alpha, steps, full, 1, np.zeros((2, 1)))
    return math.exp(cell.predict(name, full))


def test_the_law_and_its_limits():
    """R (1 + q R) = L; R falls as 1 / alpha or 1 / sqrt(alpha); SmolLM2 as predicted."""
    assert (laws.G, laws.K, laws.BETA) == (1.33, 5.7, 0.45)  # frozen
    ratio = law(128, 8, 512, 4.5e-4)
    moved = laws.K * 128 * 4.5e-4 * 4**laws.BETA
    assert ratio * (1 + moved * ratio) == pytest.approx(laws.G * math.sqrt(3) * 128 / 8)
    for alpha, power in ((1e-8, -0.5), (1e8, -1)):
        low, high = (law(128, a, 512, 4.5e-4) for a in (alpha, 2 * alpha))
        assert math.log2(high / low) == pytest.approx(power, abs=1e-3)
    for alpha, expected in ((8, 28.5), (128, 5.41)):
        assert law(576, alpha, 30, 9.9e-5) == pytest.approx(expected, rel=2e-3)
    assert law(64, 32, 128, 7e-4, "sqrt(hidden)") == pytest.approx(2.56, abs=0.01)


def planted_cells(rng, truth=RATE_LAW, noise=0.078, base_sd=0.04, cell_sd=0.05, off=0.0):
    """The 24 conditions with measured optima, whose ln has the standard deviation `noise`.

    base_sd and cell_sd: how far the truth lies from the prediction; off: added to every ln(ratio).
    """
    of_base = {c[0]: rng.normal(0, base_sd) for c in CONDITIONS}
    full = {(c[0], c[3]): c[4] * math.exp(rng.normal(0, 0.2)) for c in CONDITIONS}
    seen = {at: math.log(lr) + rng.normal(0, noise) for at, lr in full.items()}
    found = []
    for name, hidden, alpha, steps, _ in CONDITIONS:
        at = (name, steps)
        ratio = math.log(law(hidden, alpha, steps, full[at], truth)) + of_base[name] + off
        lora = math.log(full[at]) + ratio + rng.normal(0, cell_sd) + rng.normal(0, noise)
        logs = np.array([[seen[at]], [lora]]) + rng.normal(0, noise, (2, 400))
        ends = (math.exp(seen[at]), math.exp(lora - seen[at]))
        found.append(Cell(name, hidden, alpha, steps, *ends, logs))
    return found


def verdict(cells):
    condition = laws.Cells("all", pd.DataFrame(), [], cells, cells, [])
    return judge("law", CLAIM, "all", condition.worst, condition.gates(), 0, False, LOOK_LEVELS[2])


@pytest.mark.parametrize(
    ("truth", "outcome", "share"),
    [
        ({}, "SUPPORTED", 0.7),
        *(({"truth": rival}, "REFUTED", 0.9) for rival in laws.RIVALS),
        ({"cell_sd": 0.2}, "SUPPORTED", -0.1),
        ({"off": math.log(1.25)}, "SUPPORTED", -0.1),
    ],
)
def test_what_the_rule_decides(truth, outcome, share):
    """At least this share of simulated sweeps; at most, if it is negative."""
    rng = np.random.default_rng(0)
    found = Counter(verdict(planted_cells(rng, **truth)).outcome for _ in range(20))
    assert found[outcome] / 20 >= share if share > 0 else found[outcome] / 20 <= -share


def test_the_error_is_the_rms_without_the_variance_of_the_measurement():
    cells = []
    for name, off in (("a", 0.3), ("a", -0.1), ("b", 0.2)):
        full = np.full(N_DRAWS, math.log(5e-4))
        lora = full + math.log(law(128, 8, 512, 5e-4)) + off
        lora += np.tile([-0.1, 0.1], N_DRAWS // 2)  # variance 0.01
        cells.append(Cell(name, 128, 8, 512, 5e-4, 1, np.stack([full, lora])))
    squares = [c.squared_error(RATE_LAW) for c in cells]
    assert squares == pytest.approx([0.08, 0, 0.03])
    # four equally likely resamples of two bases: a a, a b, b a, b b
    wanted = np.sqrt([0.04, 0.11 / 3, 0.11 / 3, 0.03])
    assert sorted(laws.resampled(cells, squares)) == pytest.approx(sorted(wanted))
