"""The ratio of best rates over hidden size and alpha."""

import math

import numpy as np
import pytest

from analysis.measures.ratio import Ratio, ratio_law


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
    bases = [(f"{h}-{s}", h, rng.normal(0, 0.03)) for h in (64, 128, 256) for s in range(3)]
    ratios = [
        Ratio(
            b,
            h,
            a,
            1.0 + p * math.log(h / 1000) + q * math.log(a / 32) + u + rng.normal(0, 0.05),
            0.05,
        )
        for b, h, u in bases
        for a in (8, 32, 128)
    ]
    law = ratio_law(ratios)
    assert law.bases == law.bases_q == 9
    assert law.p.low < p < law.p.high and law.q.low < q < law.q.high
    assert law.rivals[name] > 0.05
    others = {
        k: v for k, v in law.rivals.items() if k != name and not (p == 1.0 and "2 alpha" in k)
    }
    assert all(v < 0.05 for v in others.values())


def test_several_alphas_of_one_base_are_no_several_witnesses_of_its_width():
    """Bases that differ by 0.3 beyond their width: 95% intervals of p hold the truth, however many
    alphas each has."""
    rng, held = np.random.default_rng(9), 0
    for _ in range(300):
        bases = [(f"{h}-{s}", h, rng.normal(0, 0.3)) for h in (64, 128, 256) for s in range(2)]
        p = ratio_law(
            [
                Ratio(b, h, a, u - math.log(a) + rng.normal(0, 0.02), 0.02)
                for b, h, u in bases
                for a in (8, 32, 128)
            ]
        ).p
        held += p.low <= 0 <= p.high
    assert 0.92 < held / 300 < 0.98


def test_several_data_sets_of_one_base_are_one_row():
    rng, held = np.random.default_rng(9), 0
    for _ in range(300):
        bases = [(f"{h}-{s}", h, rng.normal(0, 0.3)) for h in (64, 128, 256) for s in range(2)]
        law = ratio_law(
            [Ratio(b, h, 32, u + rng.normal(0, 0.02), 0.02) for b, h, u in bases for _ in range(5)]
        )
        held += law.p.low <= 0 <= law.p.high
    assert law.bases == 6 and held / 300 > 0.9


def test_a_factor_that_does_not_vary_has_no_exponent():
    law = ratio_law([Ratio(str(h), h, 32, y, 0.05) for h, y in ((64, 1.0), (128, 1.1), (256, 1.2))])
    assert law.q.value is None and "alpha does not vary" in law.flags and law.p.value is not None
    one = ratio_law([Ratio("a", 64, 32, 1.0, 0.05), Ratio("b", 64, 32, 1.1, 0.05)])
    assert (
        one.p.value is None
        and one.flags[0] == "hidden size does not vary"
        and all(v is None for v in one.rivals.values())
    )
