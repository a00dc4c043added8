"""The fingerprint of data: equal for every seed, and for nothing but equal data."""

import numpy as np
import pytest

from lorasweep.data import load as data
from lorasweep.data.examples import of_generator, rounded
from lorasweep.data.synthetic import dialect, skills
from tests.unit.data.shipped import shipped


def few(name, **changes):
    return shipped(name, **{"n_test": 64, "n_test_curve": 16, **changes})


@pytest.mark.parametrize("name", ["dialect", "dialect_few", "bandit", "facts", "skills"])
def test_generated_data_are_known_by_their_distribution_and_held_out_rows(name):
    def of(**changes):
        loaded = data.load(few(name, **changes), [])
        loaded.train(7, 0, 300)  # what a seed draws does not matter
        return loaded.sha256

    params = few(name).generator_params
    other = {k: {"facts": 256.0, "difficulty": 3.0}.get(k, v / 2) for k, v in params.items()}
    same = of()
    assert same == of()
    assert len({same, of(generator_params=other), of(n_test=32)}) == 3


def test_a_generator_that_draws_in_another_way_has_another_fingerprint(monkeypatch):
    before = data.load(few("skills"), []).sha256
    monkeypatch.setattr(skills, "instance", lambda rng, difficulty: ("copy a>", "a"))
    assert data.load(few("skills"), []).sha256 != before


def test_another_processors_last_digits_make_no_other_fingerprint():
    loaded = data.load(few("dialect"), [])
    table = dialect.transition(few("dialect").generator_params)
    noise = 1 + 1e-15 * np.random.default_rng(0).uniform(-1, 1, table.shape)
    assert of_generator(loaded, rounded(table * noise)) == loaded.sha256
    assert of_generator(loaded, rounded(table * 1.01)) != loaded.sha256
