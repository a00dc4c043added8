"""The optimal LR over hidden size: planted laws, and the published formula."""

import math

import numpy as np
import pytest

from analysis.measures.lr_law import by_loss, by_optima, published, regret
from analysis.optimum.fit import fit_all
from analysis.optimum.valley import linex
from analysis.runs.lr_curves import LrCurve


def planted_curves(p, at=5e-4, widths=(512, 1024, 2048, 4096, 8192), noise=1e-4):
    rng = np.random.default_rng(2)
    curves, hidden = [], {}
    for h in widths:
        model = f"org/Llama-{h}"
        hidden[model] = float(h)
        best = math.log(at * (2000 / h) ** p)
        for rank in (8, 16):
            x = best + rng.uniform(-0.3, 0.3) + (np.arange(7) - 3) * math.log(2)
            y = 2 + 0.1 * linex(x - best, 0.5) + noise * rng.standard_normal(7)
            key = {"model": model, "dataset": "d", "method": "lora", "rank": float(rank)}
            zero = np.zeros(7, int)
            curves.append(LrCurve(key, x, y, zero, zero, np.ones(7, bool), math.nan, math.nan))
    return curves, hidden


@pytest.mark.parametrize("p", [0.0, 0.8])
def test_both_ways_find_a_planted_law(p):
    curves, hidden = planted_curves(p)
    (loss,) = by_loss(curves, hidden)
    (fit,) = by_optima(fit_all(curves), hidden)
    for law, off in ((loss, 0.15), (fit, 0.05)):
        assert law.family == "llama" and law.n_models == 5
        assert law.p.value == pytest.approx(p, abs=off) and law.p.low <= p <= law.p.high
        assert law.at_2000.value == pytest.approx(5e-4, rel=0.15)
    assert loss.regret < 0.5


@pytest.mark.parametrize(
    ("changes", "hidden", "lr"),
    [
        ({}, 4096, 2.86e-4),
        ({"method": "fullft"}, 2048, 4.91e-5),
        ({"model": "Qwen/Qwen3-8B"}, 4096, 4.73e-4),
        ({"model": "google/gemma"}, 4096, None),
    ],
)
def test_the_published_formula_gives_its_published_lrs(changes, hidden, lr):
    key = {"model": "meta-llama/Llama-3.1-8B", "dataset": "d", "method": "lora", "rank": 16.0}
    none = np.zeros(0)
    c = LrCurve({**key, **changes}, *[none] * 4, none.astype(bool), math.nan, math.nan)
    assert published(c, hidden) == (lr and pytest.approx(lr, rel=2e-3))


def test_regret_outside_the_lrs_tried_is_no_number():
    (c, *_), _ = planted_curves(0.0)
    assert regret(c, 5e-4).percent == pytest.approx(0, abs=0.3)
    assert regret(c, 1.0).percent is None


def test_a_law_over_one_hidden_size_has_no_exponent():
    curves, hidden = planted_curves(0.5, widths=(1024,))
    (law,) = by_loss(curves, hidden)
    assert law.p.value is None and "one hidden size" in law.flags
    (fit,) = by_optima(fit_all(curves), hidden)
    assert fit.p.value is None
