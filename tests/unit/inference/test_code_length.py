"""Code length of all rows from a first part: planted losses of known shape are recovered."""

import numpy as np
import pytest

from analysis.inference.code_length import FEWEST, extrapolate

SHAPES = {
    "nothing is learned": lambda u: np.ones_like(u),
    "a power law to a floor": lambda u: 0.5 + 0.5 * (1 + u) ** -0.5,
    "a power law without a floor": lambda u: (1 + u) ** -0.1,
    "learned at once": lambda u: 0.7 + 0.3 * np.exp(-u / 3),
    "straight over the logarithm": lambda u: 1 - 0.05 * np.log1p(u),
}


def batches(rng, shape, n, noise=0.1):
    """Nats of n batches under the base model and during training, and their tokens."""
    tokens = rng.gamma(10, 10, size=n)
    base = 1.3 * tokens * np.exp(noise * rng.standard_normal(n) - noise**2 / 2)
    code = base * shape(np.arange(n, dtype=float)) * (1 + noise / 3 * rng.standard_normal(n))
    return base, code, tokens


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("n", "times"), [(FEWEST, 2), (60, 15)])
def test_the_range_holds_what_all_rows_cost(name, n, times):
    rng, held, cases = np.random.default_rng(0), [0, 0], 100
    for _ in range(cases):
        base, code, tokens = batches(rng, SHAPES[name], n * times)
        found = extrapolate(base[:n], code[:n], tokens[:n], tokens[n:].sum())
        for k, (e, truth) in enumerate(zip(found, (base, code))):
            held[k] += e.low <= truth.sum() <= e.high
    assert held[0] >= 0.9 * cases and held[1] >= 0.95 * cases, held


def test_what_is_known_has_no_range_and_too_few_batches_say_nothing():
    base, code, tokens = batches(np.random.default_rng(1), SHAPES["learned at once"], 30)
    whole = extrapolate(base, code, tokens, 0)  # all was measured
    for e, nats in zip(whole, (base, code)):
        assert e.value == e.low == e.high == pytest.approx(nats.sum())
    tokens = np.full(40, 100.0)
    flat = extrapolate(2 * tokens, tokens, tokens, 10 * tokens.sum())
    assert [e.interval for e in flat] == [pytest.approx((v, v)) for v in (88_000, 44_000)]
    few = extrapolate(*[np.ones(FEWEST - 1)] * 3, 100)
    assert [e.value for e in few] == [None, None]
