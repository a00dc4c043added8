"""Generated data: the dialect's shift, facts of 16 bits each, and fingerprints of what is drawn."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest

from lorasweep.data import load as data
from lorasweep.data.examples import with_fingerprint
from lorasweep.data.synthetic import dialect, generators
from lorasweep.errors import DataError
from lorasweep.spec.streams import stream
from tests.unit.data.conftest import shipped


def params(m, k, **more):
    return {"rule_shift": m / 32, "new_exceptions": 0.0, "shift_rank": k, **more}


@pytest.mark.parametrize(("m", "k"), [(8, 2), (8, 8), (32, 2), (32, 8)])
def test_every_shift_has_the_distance_the_rank_and_the_symbols_that_were_asked(m, k):
    language = dialect.transition(params(0, 0))
    for draw in (None, 100):
        table = dialect.transition(params(m, k, shift_nats=0.2), draw=draw)
        assert dialect.distance(table, language) == pytest.approx(0.2, rel=1e-5)
        assert np.allclose(table.sum(-1), 1) and table.min() >= 0
    assert np.array_equal(dialect.transition(params(0, k)), language)
    changed, before = (dialect.parts_of(p, draw=7) for p in (params(m, k), params(0, 0)))
    for new, old in zip(changed.feats_VF, before.feats_VF):
        assert np.linalg.matrix_rank(new - old, tol=1e-9) == k
        assert (np.abs(new - old).max(1) > 0).sum() == m
    if (m, k) == (8, 2):
        first, second = (dialect.transition(params(m, k), draw=d) for d in (100, 101))
        assert not np.array_equal(first, second)  # and (24/32)^2 of the contexts stay
        assert all(0.4 < (t == language).all(-1).mean() < 0.7 for t in (first, second))


def test_an_old_dialect_is_the_same_table():
    """Weighted sums of the tables, made by the code that trained the exploratory study's runs."""
    for old, total in (
        ({"rule_shift": 0.5, "new_exceptions": 0.3}, 13.638929920548115),
        ({"rule_shift": 0.25, "new_exceptions": 0.0, "language": 1.0}, 8.168247878034254),
    ):
        table = dialect.transition(old).ravel()
        assert table @ np.cos(np.arange(table.size)) == pytest.approx(total, abs=1e-6)


def test_bits_are_those_of_the_free_numbers_and_of_the_exceptions():
    n = 2**20
    for m, k, free in ((8, 2, 2 * (8 + 8 - 2)), (8, 8, 8 * 8), (0, 2, 0)):
        parts = dialect.parts_of(params(m, k))
        assert dialect.bits(parts, n) == {"generator": 2 * free / 2 * 20}
    parts = dialect.parts_of({"rule_shift": 0, "new_exceptions": 0.1})
    some = dialect.bits(parts, n)
    exceptions, replaced = int(parts.is_exception_VVV.sum()), int(parts.replaced_VVV.sum())
    which = math.log2(math.comb(exceptions, replaced))
    assert some["generator"] == pytest.approx(5 * replaced + which, rel=1e-9)


def test_the_exact_loss_has_the_same_mean():
    sampled = data.load(shipped("dialect_smoke", n_test=2048), [])
    exact = data.load(shipped("dialect_smoke", n_test=64, exact_loss=True), [])
    assert all(e.truth.probabilities.shape == (e.loss.sum(), 32) for e in exact.test)
    assert exact.entropy_floor_nats == pytest.approx(sampled.entropy_floor_nats, abs=0.03)
    changed = np.concatenate([e.truth.changed for e in exact.test])
    assert 0.7 < changed.mean() < 0.95  # half of the symbols are new: 1 - 1/4, and the exceptions


def test_with_draws_by_seed_all_seeds_share_one_fingerprint():
    asked = {"draw_by_seed": True, "exact_loss": True}
    whole = shipped("dialect_smoke", generator_params=params(8, 2), **asked)
    one, two = (data.load(whole, [], draw=d) for d in (100, 101))
    assert one.sha256 == two.sha256 == data.load(whole, []).sha256
    assert not np.array_equal(one.test[0].truth.probabilities, two.test[0].truth.probabilities)
    other = dataclasses.replace(whole, generator_params=params(8, 4))
    assert data.load(other, [], draw=100).sha256 != one.sha256


@pytest.mark.parametrize("name", ["dialect_smoke", "facts"])
def test_wrong_parameters_are_refused(name):
    given = {"shift_rank": 2}
    wrong = "shift_rank=9 shift_rank=1.5 shift=0.5 shift_nats=0 language=1.5"
    if name == "facts":
        given, wrong = {}, "facts=12 facts=30000 fact=8 fresh=2 max_length=60 set=0.5"
    for key, value in (one.split("=") for one in wrong.split()):
        changes = {"generator_params": {**given, key: float(value)}}
        if key == "max_length":
            changes = {key: int(value)}
        words = f"dataset '{name}.*{key}(={value}| is unknown).*Allowed"
        with pytest.raises(DataError, match=words):
            data.check_available(shipped(name, **changes), [])


def test_skills_have_right_answers():
    right = {"reverse": lambda s: s[::-1], "sort": lambda s: "".join(sorted(s))}
    rng = stream("test")
    for _ in range(300):
        prompt, answer = generators.instance(rng, 2)
        name, _, rest = prompt[:-1].partition(" ")
        if name in right:
            assert answer == right[name](rest)
        elif "+" in prompt:
            assert int(answer) == sum(map(int, prompt[:-1].split("+")))


facts = partial(shipped, "facts")


def symbols(rows, first=0):
    """The facts in rows, 8 symbols each, from the symbol `first` on."""
    return [tuple(r.tokens[k + first : k + 8]) for r in rows for k in range(0, 64, 8)]


def test_facts_are_shown_equally_often_and_hold_16_bits():
    loaded = data.load(facts(generator_params={"facts": 24}, n_retain=2), [])
    rows = loaded.train(0, 0, 12)  # 96 facts: four epochs of 24
    counts = {f: symbols(rows).count(f) for f in symbols(rows)}
    assert len(counts) == 24 and set(counts.values()) == {4}
    keys = {f[1:4] for f in counts}
    assert len(keys) == 24 and not keys & {f[1:4] for f in symbols(loaded.retain)}
    assert all(sum(r.loss) == 32 and r.loss[4] and not r.loss[3] for r in rows)
    assert set(symbols(loaded.test)) == set(counts) and max(max(f[4:]) for f in counts) < 16
    again = loaded.train(0, 6, 6)
    assert all((a.tokens == b.tokens).all() for a, b in zip(rows[6:], again))
    for n in (10, 24, 100):
        assert loaded.bits(4 * n) == {"generator": 16 * min(n, 24)}
    spec = facts(generator_params={"facts": 8192}, n_test=1024)  # the entropy of untrained values
    values = np.concatenate([e.tokens[e.loss] for e in data.load(spec, []).test])
    share = np.bincount(values, minlength=16) / len(values)
    assert -(share * np.log(share)).sum() == pytest.approx(math.log(16), abs=2e-3)


def test_fresh_rows_never_come_again_and_the_others_are_as_without_them():
    known = data.load(facts(generator_params={"facts": 24}), []).train(0, 0, 200)
    mixed = data.load(facts(generator_params={"facts": 24, "fresh": 0.25}), [])
    rows = mixed.train(0, 0, 200)
    new = [b for a, b in zip(known, rows) if (a.tokens != b.tokens).any()]
    assert 0.15 < len(new) / 200 < 0.35 and len(set(symbols(new, 1))) == 8 * len(new)
    assert all((a.tokens == b.tokens).all() for a, b in zip(rows[70:90], mixed.train(0, 70, 20)))
    assert mixed.bits is None


def few(name, **changes):
    return shipped(name, **{"n_test": 64, "n_test_curve": 16, **changes})


@pytest.mark.parametrize("name", ["dialect_few", "bandit", "facts", "skills"])
def test_generated_data_are_known_by_their_distribution_and_held_out_rows(name):
    params = few(name).generator_params
    other = {k: {"facts": 256.0, "difficulty": 3.0}.get(k, v / 2) for k, v in params.items()}
    changes = ({}, {}, {"generator_params": other}, {"n_test": 32})
    same, again, *others = (data.load(few(name, **c), []).sha256 for c in changes)
    assert same == again and len({same, *others}) == 3


def test_another_draw_changes_the_fingerprint_and_a_processors_last_digits_do_not(monkeypatch):
    before = data.load(few("skills"), []).sha256
    monkeypatch.setattr(generators, "instance", lambda rng, difficulty: ("copy a>", "a"))
    assert data.load(few("skills"), []).sha256 != before
    loaded = data.load(few("dialect"), [])
    table = dialect.transition(few("dialect").generator_params)
    noise = 1 + 1e-15 * np.random.default_rng(0).uniform(-1, 1, table.shape)
    assert with_fingerprint(loaded, (table * noise).astype("<f2")).sha256 == loaded.sha256
    assert with_fingerprint(loaded, (table * 1.01).astype("<f2")).sha256 != loaded.sha256
