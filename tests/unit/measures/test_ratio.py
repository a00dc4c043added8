"""Ratios of optimal LRs, their drift, and laws over width: planted ones and published LRs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.inference.estimate import from_draws
from analysis.measures import ratio
from analysis.measures.ratio import Ratio, by_loss, published, ratio_law
from analysis.optimum.fit import fit_all, linex
from tests.tables import lr_curve


def test_a_ratio_of_two_brackets_is_bracketed():
    """Four LRs and one seed: no noise is known, but the minimum lies between its neighbours."""
    x, seed = math.log(2) * np.arange(4), np.zeros(4, int)
    y = 2 + 0.1 * (np.arange(4) - 1.3) ** 2
    arms = (("fullft", math.nan, 1e-4), ("lora", 4.0, 1e-3))
    full, lora = fit_all(
        [lr_curve(x + math.log(lr), y, seed, start=5.0, method=m, rank=r) for m, r, lr in arms]
    )
    e = ratio.ratio_of([lora], full)
    assert abs(math.log(e.value / 10)) < 0.05 and e.low <= 2.5001 and e.high >= 39.999


def test_a_planted_drift_is_found_and_a_flat_one_is_not():
    def found(slope, *ranks):
        rng, optima = np.random.default_rng(0), []
        for k, rank in enumerate(ranks):
            draws = from_draws(np.exp(slope * k + 0.05 * rng.standard_normal(4000)), 9)
            curve = SimpleNamespace(key={"rank": rank})
            optima.append(SimpleNamespace(curve=curve, best_lr=draws))
        return ratio.lr_drift(optima)

    steep, flat = (found(slope, 4, 8, 16, 32) for slope in (0.3, 0.0))
    assert 0 < steep.low < 0.3 < steep.high and flat.low < 0 < flat.high
    assert found(0.0, 4).value is None


def ratios(rng, seeds, sd, alphas, error, log):
    """Ratios `log(width, alpha)` of base models, which differ by `sd` from their width's mean."""
    bases = [(f"{h}-{s}", h, rng.normal(0, sd)) for h in (64, 128, 256) for s in range(seeds)]
    return [
        Ratio(base, h, a, off + log(h, a) + rng.normal(0, error), error)
        for base, h, off in bases
        for a in alphas
    ]


@pytest.mark.parametrize(
    ("p", "q", "name"),
    [
        *((0.0, q, "constant 10 (the study)") for q in (0.0, -0.7)),
        (0.5, 0.0, "sqrt(hidden) (muA, arXiv 2602.06204)"),
        (1.0, -1.0, "sqrt(3) hidden/alpha (equal first step under Adam)"),
    ],
)
def test_the_ratios_law_tells_rivals_apart(p, q, name):
    def log(h, a):
        return 1.0 + p * math.log(h / 1000) + q * math.log(a / 32)

    law = ratio_law(ratios(np.random.default_rng(4), 3, 0.03, (8, 32, 128), 0.05, log))
    assert law.bases == law.bases_q == 9
    assert law.p.low < p < law.p.high and law.q.low < q < law.q.high
    same = {name, "hidden/(2 alpha) (withdrawn by the study's authors)"} if p == 1.0 else {name}
    assert law.rivals[name] > 0.05
    assert all(v < 0.05 for k, v in law.rivals.items() if k not in same)


@pytest.mark.parametrize("alphas", [(8, 32, 128), (32,) * 5])
def test_several_alphas_or_data_sets_of_one_base_are_one_witness_of_its_width(alphas):
    rng, held = np.random.default_rng(9), 0
    for _ in range(300):
        law = ratio_law(ratios(rng, 2, 0.3, alphas, 0.02, lambda h, a: -math.log(a)))
        held += law.p.low <= 0 <= law.p.high
    assert law.bases == 6 and 0.9 < held / 300 < 0.98
    one = ratio_law([Ratio("a", 64, 32, 1.0, 0.05), Ratio("b", 64, 32, 1.1, 0.05)])
    assert {one.p.value, one.q.value, *one.rivals.values()} == {None}


@pytest.mark.parametrize("p", [0.0, 0.8])
def test_a_planted_law_is_found(p):
    rng, curves, hidden = np.random.default_rng(2), [], {}
    for h in (512, 1024, 2048, 4096, 8192):
        hidden[model := f"org/Llama-{h}"] = float(h)
        best = math.log(5e-4 * (2000 / h) ** p)
        for rank in (8, 16):
            x = best + rng.uniform(-0.3, 0.3) + (np.arange(7) - 3) * math.log(2)
            y = 2 + 0.1 * linex(x - best, 0.5) + 1e-4 * rng.standard_normal(7)
            curves.append(lr_curve(x, y, np.zeros(7, int), model=model, rank=float(rank)))
    (law,) = by_loss(curves, hidden)
    power, at_2000 = law["p"], law["lr_at_2000"].value
    assert law["family"] == "llama" and law["models"] == 5 and law["regret_percent"] < 0.5
    assert power.value == pytest.approx(p, abs=0.15) and power.low <= p <= power.high
    assert at_2000 == pytest.approx(5e-4, rel=0.15)
    assert ratio.regret(curves[0], 1.0) is None  # outside the LRs tried
    (law,) = by_loss(curves[:2], hidden)
    assert law["p"].value is None and "one hidden size" in law["flags"]


def test_the_published_formula_gives_its_published_lrs():
    for model, method, hidden, lr in (
        ("meta-llama/Llama-3.1-8B", "lora", 4096, 2.86e-4),
        ("meta-llama/Llama-3.1-8B", "fullft", 2048, 4.91e-5),
        ("Qwen/Qwen3-8B", "lora", 4096, 4.73e-4),
        ("google/gemma", "lora", 4096, None),
    ):
        found = published(lr_curve(*[np.zeros(0)] * 3, model=model, method=method), hidden)
        assert found == (lr and pytest.approx(lr, rel=2e-3))
