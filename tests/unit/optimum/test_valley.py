"""The model of a valley against what is known of it: the family's limits, a covariance by
quadrature, planted optima."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import integrate

from analysis.measures.ratio import ratio_of
from analysis.optimum import valley
from analysis.optimum.fit import fit_all, fit_sweeps
from analysis.optimum.likelihood import gather, weights_of
from analysis.optimum.posterior import weigh
from analysis.runs.lr_curves import LrCurve, lr_curves
from benchmarks.calibration.generators import FAMILIES, Design, plant
from tests.world import ROOT


def test_linex_is_the_double_integral_of_its_curvature():
    u = np.linspace(-3, 3, 13)
    assert np.allclose(valley.linex(u, 1e-9), u * u / 2)
    above, below = valley.linex(u, 1e-3 * 1.0001), valley.linex(u, 1e-3 * 0.9999)
    assert np.allclose(above, below, rtol=1e-3, atol=1e-6)  # where the series takes over
    for a in (-0.7, 0.4, 1.3):
        for x in (-1.5, 0.8):
            value, _ = integrate.quad(lambda t, x=x, a=a: (x - t) * math.exp(a * t), 0, x)
            assert valley.linex(np.array(x), a) == pytest.approx(value, rel=1e-9)


def test_the_misfits_covariance_is_the_curvatures_integrated_twice():
    """One entry by direct quadrature of the double integral in the module's docstring."""
    m, a, x1, x2 = 0.2, 0.6, 1.3, -0.9

    def process(s, t):
        far = math.sqrt(3) * abs(s - t) / valley.ELL
        return (1 + far) * math.exp(-far) + valley.STEP**2 * np.sign(s - m) * np.sign(t - m)

    def inner(s, t):
        scale = max(math.exp(a * (s - m)), 1.0) * max(math.exp(a * (t - m)), 1.0)
        return abs(x1 - s) * abs(x2 - t) * scale * process(s, t)

    value, _ = integrate.dblquad(inner, x2, m, m, x1, epsabs=1e-6)
    found = valley.misfit(np.array([x1, x2]), np.array([m]), np.array([a]))[0, 0]
    assert found[0, 1] == pytest.approx(value, rel=0.05)  # the product is a sum over 100 points
    assert np.linalg.eigvalsh(found).min() > 0
    # It neither lifts nor tilts the minimum.
    near = valley.misfit(np.array([0.0, 1e-3, 1.0]), np.array([0.0]), np.array([0.5]))[0, 0]
    assert near[0, 0] == 0 and near[1, 1] < 1e-9 * near[2, 2]


def curve_of(x, y, seed, rank=4.0, start=math.nan):
    key = {"model": "m", "dataset": "d", "method": "lora", "rank": rank}
    return LrCurve(key, x, y, seed, seed, np.ones(len(x), bool), start, math.nan)


def unsteady_sweep(broken):
    """Four curves of six rates and three seeds; at the first one's second rate above its best, one
    seed has begun to break."""
    rng, out = np.random.default_rng(11), []
    x = np.repeat(math.log(1e-3) + math.log(2) * np.arange(-3, 3), 3)
    for k in range(4):
        y = 2.0 + 0.1 * (x - math.log(1e-3)) ** 2 + 0.004 * rng.standard_normal(18)
        if k == 0 and broken:
            y[15] += 0.4
        out.append(curve_of(x, y, np.tile(np.arange(3), 6), float(2**k), 3.5))
    return out


def test_one_rate_that_begins_to_break_down_spoils_no_other_curve():
    steady, broken = (weights_of(unsteady_sweep(b)) for b in (False, True))
    assert all((t == 1).all() for t in steady)
    assert (broken[0][15:] < 0.01).all() and (broken[0][:15] == 1).all()
    assert all((t == 1).all() for t in broken[1:])
    before, after = (fit_all(unsteady_sweep(b)) for b in (False, True))
    for k, (o, p) in enumerate(zip(before, after)):
        assert p.flags == o.flags and p.best_lr.low < 1e-3 < p.best_lr.high
        wider = math.log(p.best_lr.high / p.best_lr.low) / math.log(o.best_lr.high / o.best_lr.low)
        assert wider < (1.3 if k else 3)


def test_repeats_that_differ_no_more_than_others_are_trusted():
    rng = np.random.default_rng(12)
    sweeps = [plant(family, Design(7, 2.0, 2, 3), rng)[0] for family in FAMILIES for _ in range(20)]
    flagged = [any((t < 1).any() for t in weights_of(curves)) for curves in sweeps]
    assert np.mean(flagged) < 0.02


def test_blocks_take_out_what_a_seed_shifts():
    """Two seeds of which the second sees three rates only: shifts leave the evidence unchanged."""
    x = np.array([0.0, 1, 2, 3, 1, 2, 3])
    y, block = np.array([3.0, 2, 1.5, 2.5, 2.1, 1.4, 2.6]), np.array([0, 0, 0, 0, 1, 1, 1])
    one, other = gather(x, y, block), gather(x, y + 7.0 * block, block)
    assert np.allclose(np.diff(one.loss), np.diff(other.loss))
    assert one.squares == pytest.approx(other.squares)
    assert one.df == 7 - 2 - 3
    assert np.allclose(one.root @ np.ones(4), 0, atol=1e-9)


def test_repeats_measure_the_noise():
    rng = np.random.default_rng(0)
    x = np.tile(np.arange(6.0), 200)
    block = np.repeat(np.arange(200), 6)
    shifts = 0.05 * rng.standard_normal(200)[block]
    e = gather(x, 0.1 * (x - 2.6) ** 2 + shifts + 3e-3 * rng.standard_normal(1200), block)
    assert math.sqrt(e.squares / e.df) == pytest.approx(3e-3, rel=0.05)
    ((posterior,), pooled) = weigh([[e]])[0]
    assert pooled.noise == pytest.approx(3e-3, rel=0.05)
    assert posterior.quantile(0.5) == pytest.approx(2.6, abs=0.1)
    assert posterior.mass.sum() == pytest.approx(1)


def test_curves_fitted_together_are_the_curves_fitted_one_sweep_at_a_time():
    rng = np.random.default_rng(1)
    sweeps = [plant("linex", Design(7, 2.0, 2), rng)[0] for _ in range(3)]
    for together, alone in zip(fit_sweeps(sweeps), sweeps):
        for a, b in zip(together, fit_all(alone)):
            assert a.best_lr.value == pytest.approx(b.best_lr.value, rel=1e-9)
            assert a.best_lr.low == pytest.approx(b.best_lr.low, rel=1e-6)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "linex")) for f in FAMILIES]
)
def test_intervals_hold_planted_truths(family):
    """A small calibration of each family (the full one: make calibrate), at three noises."""
    rng = np.random.default_rng(11)
    held = ratios = n = n_ratios = 0
    for noise in (1e-4, 1e-3, 1e-2):
        planted = [plant(family, Design(7, 2.0, 2, noise=noise), rng) for _ in range(12)]
        for (_, truths), optima in zip(planted, fit_sweeps([c for c, _ in planted])):
            for o, truth in zip(optima, truths):
                e, n = o.best_lr, n + 1
                held += math.log(e.low or 1e-99) <= truth <= math.log(e.high or 1e99)
                assert e.value is not None or o.flags
            r = ratio_of(optima[1:], optima[0])
            if r.has_interval():
                n_ratios += 1
                ratios += math.log(r.low) <= np.mean(truths[1:]) - truths[0] <= math.log(r.high)
    assert held / n >= 0.88  # 144 curves: 0.93 less two standard errors
    assert ratios >= 0.85 * n_ratios


def test_sharing_curvature_narrows_curves_of_few_rates():
    from benchmarks.calibration.run import sharing

    told = sharing("linex", 4, 2.0, 1e-3, 12)
    assert told["shared"]["width"] < told["alone"]["width"]
    assert told["shared"]["coverage"] >= 0.9
    three = sharing("linex", 3, 2.0, 1e-3, 6)
    assert three["alone"]["answers"] == 0 and three["shared"]["answers"] > 0


RESULTS = ROOT / "analysis" / "results"
KEPT = [
    p
    for p in sorted(RESULTS.glob("*/table.parquet"))
    if json.loads((p.parent / "results.json").read_text())["curves"]
    and not p.parent.name.startswith("rl")
]
"""Kept tables whose answer rests on fitted optima; rewards are read at stable rates."""


def loss_by_rate(x, y, seed):
    """Mean loss by rate without the shifts of seeds, which are not at all rates."""
    rates, seeds = np.unique(x), np.unique(seed)
    design = np.hstack([x[:, None] == rates, seed[:, None] == seeds[1:]]).astype(float)
    return np.linalg.lstsq(design, y, rcond=None)[0][: len(rates)]


@pytest.mark.parametrize("path", KEPT, ids=lambda p: p.parent.name)
def test_on_kept_runs_the_optimum_lies_beside_the_best_rate_tried(path):
    """A curve that collapses at a high rate once had its optimum 0.2 nats above the best loss."""
    optima = fit_all(lr_curves(pd.read_parquet(path)))
    # Controls are at one learning rate.
    swept = [o for o in optima if len(np.unique(o.curve.x)) >= 5]
    known = [o for o in swept if o.best_lr.value is not None]
    assert all(o.flags for o in swept if o not in known)  # the others say why
    if path.parent.name.startswith("lr_ratio") or path.parent.name == "batch_size-tiny":
        assert len(known) == len(optima)  # every curve of these is swept about its optimum
    assert len(known) >= 0.6 * len(swept) > 0
    for o in known:
        x, y = o.curve.x[o.curve.usable], o.curve.y[o.curve.usable]
        rates = np.unique(x)
        best = int(np.argmin(loss_by_rate(x, y, o.curve.seed[o.curve.usable])))
        around = rates[max(best - 1, 0)], rates[min(best + 1, len(rates) - 1)]
        assert around[0] <= math.log(o.best_lr.value) <= around[1], o.curve.name
        low, high = o.band(0.01)
        assert low < o.best_lr.value < high
        # Where nothing is new, the rates hardly differ, and all of them lie within the band.
        assert math.log(high / low) < 2 or o.curve.nll_start - o.best_nll < 0.01


def test_a_collapse_that_nobody_flagged_leaves_the_optimum_alone():
    rng = np.random.default_rng(2)
    for rise in (1.0, 3.0, 30.0):
        x = np.tile(np.arange(7) * math.log(2), 3)
        y = 1 + 0.1 * valley.linex(x - 1.7, 0.5) + 1e-3 * rng.standard_normal(21)
        y[x > 5.9 * math.log(2)] += rise
        e = fit_all([curve_of(x, y, np.repeat(np.arange(3), 7))])[0].best_lr
        assert e.low < math.exp(1.7) < e.high and e.high / e.low < 1.8


def test_seeds_that_share_no_rate_count_as_noise():
    """Random search: every run has a seed of its own."""
    x = np.linspace(0, 4, 16)
    e = gather(x, 0.1 * (x - 2.2) ** 2, np.arange(16))
    assert e.best == 8 and len(e.root) == 15 and e.df >= 0


def test_a_loud_data_set_does_not_spoil_a_quiet_one():
    rng = np.random.default_rng(5)
    quiet, _ = plant("linex", Design(7, 2.0, 3, noise=3e-4), rng)
    loud, _ = plant("linex", Design(7, 2.0, 3, noise=1e-2), rng)
    loud = [dataclasses.replace(c, key={**c.key, "dataset": "loud"}) for c in loud]
    both = fit_all([*quiet, *loud])
    noises = both[0].pooled.noise, both[-1].pooled.noise
    assert noises == pytest.approx((3e-4, 1e-2), rel=0.3)
