"""Ratios of optimal LRs, and laws over width: planted ones and published LRs."""

import math

import numpy as np
import pytest

from analysis.measures.ratio import (
    Ratio,
    by_loss,
    published,
    ratio_law,
    ratio_of,
    regret,
)
from analysis.optimum.fit import fit_all
from analysis.optimum.valley import linex
from tests.tables import lr_curve


def test_a_ratio_of_two_brackets_is_bracketed():
    """Four LRs and one seed: no noise is known, but the minimum lies between its neighbours."""
    x = math.log(2) * np.arange(4)
    y = 2 + 0.1 * (np.arange(4) - 1.3) ** 2
    full, lora = fit_all(
        [
            lr_curve(x + math.log(best), y, np.zeros(4, int), start=5.0, method=method, rank=rank)
            for method, rank, best in (("fullft", math.nan, 1e-4), ("lora", 4.0, 1e-3))
        ]
    )
    e = ratio_of([lora], full)
    assert abs(math.log(e.value / 10)) < 0.05 and e.low <= 2.5001 and e.high >= 39.999


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
        (0.0, 0.0, "constant 10 (the study)"),
        (0.0, -0.7, "constant 10 (the study)"),
        (0.5, 0.0, "sqrt(hidden) (muA, arXiv 2602.06204)"),
        (1.0, -1.0, "sqrt(3) hidden/alpha (equal first step under Adam)"),
    ],
)
def test_the_ratios_law_tells_rivals_apart(p, q, name):
    rng = np.random.default_rng(4)

    def log(h, a):
        return 1.0 + p * math.log(h / 1000) + q * math.log(a / 32)

    law = ratio_law(ratios(rng, 3, 0.03, (8, 32, 128), 0.05, log))
    assert law.bases == law.bases_q == 9
    assert law.p.low < p < law.p.high and law.q.low < q < law.q.high
    assert law.rivals[name] > 0.05
    same = {name, "hidden/(2 alpha) (withdrawn by the study's authors)"} if p == 1.0 else {name}
    assert all(v < 0.05 for k, v in law.rivals.items() if k not in same)


@pytest.mark.parametrize("alphas", [(8, 32, 128), (32,) * 5])
def test_several_alphas_or_data_sets_of_one_base_are_one_witness_of_its_width(alphas):
    rng, held = np.random.default_rng(9), 0
    for _ in range(300):
        law = ratio_law(ratios(rng, 2, 0.3, alphas, 0.02, lambda h, a: -math.log(a)))
        held += law.p.low <= 0 <= law.p.high
    assert law.bases == 6 and 0.9 < held / 300 < 0.98
    one = ratio_law([Ratio("a", 64, 32, 1.0, 0.05), Ratio("b", 64, 32, 1.1, 0.05)])
    assert one.p.value is one.q.value is None and len(one.flags) == 2
    assert all(v is None for v in one.rivals.values())


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
            curves.append(lr_curve(x, y, np.zeros(7, int), model=model, rank=float(rank)))
    return curves, hidden


@pytest.mark.parametrize("p", [0.0, 0.8])
def test_a_planted_law_is_found(p):
    curves, hidden = planted_curves(p)
    (loss,) = by_loss(curves, hidden)
    assert loss.family == "llama" and loss.models == 5
    assert loss.p.value == pytest.approx(p, abs=0.15) and loss.p.low <= p <= loss.p.high
    assert loss.lr_at_2000.value == pytest.approx(5e-4, rel=0.15) and loss.regret_percent < 0.5
    assert regret(curves[0], 1.0) is None  # outside the LRs tried
    (law,) = by_loss(curves[:2], hidden)
    assert law.p.value is None and "one hidden size" in law.flags


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
    c = lr_curve(*[np.zeros(0)] * 3, **{"model": "meta-llama/Llama-3.1-8B", **changes})
    assert published(c, hidden) == (lr and pytest.approx(lr, rel=2e-3))
