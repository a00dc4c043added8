"""`short_runs` on planted runs: optima of short and long runs, and how far weights move."""

import pytest

from tests.planted import FULL, LORA, World, arms, ask, base, check

pytestmark = pytest.mark.slow  # fits dozens of curves


@pytest.mark.parametrize(("factor", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_short_runs_and_norms(factor, outcome, tmp_path):
    def best(spec, step):
        return FULL if spec.method.name == "fullft" else LORA * (factor if step <= 24 else 1.0)

    def more(spec):
        full, lora = {"delta": 2.0}, {"a": 0.5, "b": 1.0, "delta": 3.0}
        norms = full if spec.method.name == "fullft" else lora
        return {"spectra": {"model.layers.0.q_proj": norms, "lm_head": norms}}

    specs = arms(base(dataset="dialect_smoke"), (4, 8), steps=384)
    folder = tmp_path if outcome == "SUPPORTED" else None
    _, found = ask("short_runs", World(best=best, more=more), specs, folder)
    check(found, short_over_long=(outcome, pytest.approx(factor, rel=0.15)))
    check(found, b_grows=pytest.approx(2.0), same_movement=pytest.approx(1.5))
