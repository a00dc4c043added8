"""The dialect's shift: how far it is away, its rank, its bits and its draws are what was asked."""

import dataclasses
import math

import numpy as np
import pytest

from lorasweep.data import load as data
from lorasweep.data.synthetic import dialect
from lorasweep.errors import DataError
from tests.unit.data.shipped import shipped

CELLS = [(8, 2), (8, 8), (32, 2), (32, 8)]


def params(m, k, **more):
    return {"rule_shift": m / 32, "new_exceptions": 0.0, "shift_rank": k, **more}


LANGUAGE = dialect.transition(params(0, 0))


@pytest.mark.parametrize(("m", "k"), CELLS)
def test_every_shift_is_as_far_away_as_asked(m, k):
    for draw in (None, 100):
        table = dialect.transition(params(m, k, shift_nats=0.2), draw=draw)
        assert dialect.distance(table, LANGUAGE) == pytest.approx(0.2, rel=1e-5)
        assert np.allclose(table.sum(-1), 1) and table.min() >= 0
    assert np.array_equal(dialect.transition(params(0, k)), LANGUAGE)


@pytest.mark.parametrize(("m", "k"), CELLS)
def test_the_change_has_the_rank_and_touches_the_symbols_that_were_asked(m, k):
    changed = dialect.parts_of(params(m, k), draw=7)
    before = dialect.parts_of(params(0, 0), draw=7)
    for new, old in zip(changed.feats_VF, before.feats_VF):
        change = new - old
        assert np.linalg.matrix_rank(change, tol=1e-9) == k
        assert (np.abs(change).max(1) > 0).sum() == m


@pytest.mark.parametrize(
    ("old", "total"),
    [
        ({"rule_shift": 0.5, "new_exceptions": 0.3}, 13.638929920548115),
        ({"rule_shift": 0.25, "new_exceptions": 0.0, "language": 1.0}, 8.168247878034254),
    ],
)
def test_an_old_dialect_is_the_same_table(old, total):
    """Weighted sums of the tables, made by the code that trained the exploratory study's runs."""
    table = dialect.transition(old)
    weights = np.cos(np.arange(table.size)).reshape(table.shape)
    assert float((table * weights).sum()) == pytest.approx(total, abs=1e-6)


def test_draws_differ_in_what_is_new_and_share_the_language():
    first, second = (dialect.transition(params(8, 2), draw=d) for d in (100, 101))
    unshifted = [(t == LANGUAGE).all(-1) for t in (first, second)]
    assert not np.array_equal(first, second)
    assert all(0.4 < u.mean() < 0.7 for u in unshifted)  # (24/32)^2 of the contexts stay


def test_bits_are_those_of_the_free_numbers_and_of_the_exceptions():
    n = 2**20
    assert dialect.bits(params(8, 2), n)["generator"] == 2 * 2 * (8 + 8 - 2) / 2 * 20
    assert dialect.bits(params(8, 8), n)["generator"] == 2 * 8 * 8 / 2 * 20
    some = dialect.bits({"rule_shift": 0.0, "new_exceptions": 0.1}, n)
    parts = dialect.parts_of({"rule_shift": 0, "new_exceptions": 0.1})
    exceptions, replaced = int(parts.is_exception_VVV.sum()), int(parts.replaced_VVV.sum())
    which = math.log2(math.comb(exceptions, replaced))
    assert some["generator"] == pytest.approx(5 * replaced + which, rel=1e-9)
    assert 0 < some["learnable"] < some["generator"]
    assert dialect.bits(params(0, 2), n) == {"generator": 0.0, "learnable": 0.0}


def test_the_exact_loss_has_less_noise_and_the_same_mean():
    """The held-out entropy over 64 rows against that over 2,048 rows, both of one draw."""
    sampled = data.load(shipped("dialect_smoke", n_test=2048), [])
    exact = data.load(shipped("dialect_smoke", n_test=64, exact_loss=True), [])
    truth = [e.truth for e in exact.test]
    assert all(t.probabilities.shape == (e.loss.sum(), 32) for t, e in zip(truth, exact.test))
    assert exact.entropy_floor_nats == pytest.approx(sampled.entropy_floor_nats, abs=0.03)
    changed = np.concatenate([t.changed for t in truth])
    assert 0.7 < changed.mean() < 0.95  # half of the symbols are new: 1 - 1/4, and the exceptions


def test_with_draws_by_seed_all_seeds_share_one_fingerprint():
    asked = {"draw_by_seed": True, "exact_loss": True}
    whole = shipped("dialect_smoke", generator_params=params(8, 2), **asked)
    one, two = (data.load(whole, [], draw=d) for d in (100, 101))
    assert one.sha256 == two.sha256 == data.load(whole, []).sha256
    assert not np.array_equal(one.test[0].truth.probabilities, two.test[0].truth.probabilities)
    other = dataclasses.replace(whole, generator_params=params(8, 4))
    assert data.load(other, [], draw=100).sha256 != one.sha256


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"shift_rank": 9}, "shift_rank=9.*from 0 to features=8"),
        ({"shift_rank": 1.5}, "whole number"),
        ({"shift_rank": 2, "shift_nats": 0}, "shift_nats=0.*above 0"),
        ({"shift": 0.5}, "generator_params.shift is unknown"),
    ],
)
def test_wrong_parameters_are_refused(wrong, problem):
    with pytest.raises(DataError, match=problem):
        dialect.check(shipped("dialect_smoke", generator_params=wrong))


def test_exact_losses_and_draws_are_for_the_generator_that_has_them():
    for name in ("exact_loss", "draw_by_seed"):
        problems = list(shipped("facts", **{name: True}).problems())
        assert any(name in p and "dialect" in p for p in problems)
