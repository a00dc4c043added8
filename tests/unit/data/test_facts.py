"""The facts data set: 16 bits each, shown equally often; and epochs of few rows."""

import math
from functools import partial

import numpy as np
import pytest

from lorasweep.data import load as data
from lorasweep.errors import DataError
from tests.unit.data.shipped import shipped

facts = partial(shipped, "facts")


def test_facts_are_shown_equally_often_and_hold_16_bits():
    spec = facts(generator_params={"facts": 24}, n_retain=2)
    loaded = data.load(spec, [])
    rows = loaded.train(0, 0, 12)  # 96 facts: four epochs of 24
    seen = [tuple(row.tokens[k : k + 8]) for row in rows for k in range(0, 64, 8)]
    counts = {f: seen.count(f) for f in seen}
    assert len(counts) == 24 and set(counts.values()) == {4}
    assert len({f[1:4] for f in counts}) == 24  # keys are unique
    assert all(sum(r.loss) == 32 and r.loss[4] and not r.loss[3] for r in rows)
    assert {tuple(e.tokens[k : k + 8]) for e in loaded.test for k in range(0, 64, 8)} == set(counts)
    unseen = {tuple(e.tokens[k + 1 : k + 4]) for e in loaded.retain for k in range(0, 64, 8)}
    assert not unseen & {f[1:4] for f in counts}
    again = loaded.train(0, 6, 6)
    assert all((a.tokens == b.tokens).all() for a, b in zip(rows[6:], again))
    assert max(max(f[4:]) for f in counts) < 16


def test_fresh_rows_never_come_again_and_the_others_are_as_without_them():
    known = data.load(facts(generator_params={"facts": 24}), []).train(0, 0, 200)
    mixed = data.load(facts(generator_params={"facts": 24, "fresh": 0.25}), [])
    rows = mixed.train(0, 0, 200)
    same = [(a.tokens == b.tokens).all() for a, b in zip(known, rows)]
    assert 0.15 < 1 - np.mean(same) < 0.35
    fresh = [
        tuple(r.tokens[k + 1 : k + 8]) for r, s in zip(rows, same) if not s for k in range(0, 64, 8)
    ]
    assert len(set(fresh)) == len(fresh)
    assert all((a.tokens == b.tokens).all() for a, b in zip(rows[70:90], mixed.train(0, 70, 20)))


def test_what_is_seen_of_the_facts_is_known_in_bits():
    loaded = data.load(facts(generator_params={"facts": 24}), [])
    for seen in (10, 24, 100):
        assert loaded.bits(4 * seen) == {"generator": 16 * min(seen, 24)}
    assert data.load(facts(generator_params={"facts": 24, "fresh": 0.25}), []).bits is None


def test_an_untrained_values_entropy_is_16_bits():
    spec = facts(generator_params={"facts": 8192}, n_test=1024)
    values = np.concatenate([e.tokens[e.loss] for e in data.load(spec, []).test])
    share = np.bincount(values, minlength=16) / len(values)
    assert -(share * np.log(share)).sum() == pytest.approx(math.log(16), abs=2e-3)


@pytest.mark.parametrize(
    "bad",
    [
        {"generator_params": {"facts": 12}},
        {"generator_params": {"fact": 8}},
        {"generator_params": {"facts": 30000}},
        {"generator_params": {"fresh": 2}},
        {"max_length": 60},
    ],
)
def test_bad_facts_are_refused(bad):
    with pytest.raises(DataError, match="dataset 'facts'"):
        data.check_available(facts(**bad), [])


def test_few_rows_come_again_in_a_new_order():
    loaded = data.load(shipped("dialect", n_train=8, n_test=16), [])
    first, second, other = (
        [e.tokens.tobytes() for e in loaded.train(*at, 8)] for at in ((0, 0), (0, 8), (5, 0))
    )
    assert set(first) == set(second) == set(other) and first != second
