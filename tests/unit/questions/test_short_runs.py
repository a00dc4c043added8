"""`short_runs` on planted runs: best rates of short and long runs, and how far weights move."""

import pytest

from tests.planted import FULL, GRIDS, LORA, World

pytestmark = pytest.mark.slow  # fits hundreds of curves


@pytest.mark.parametrize(("factor", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_short_runs_and_norms(ask, factor, outcome):
    def best(spec, step):
        return FULL if spec.method.name == "fullft" else LORA * (factor if step <= 24 else 1.0)

    def more(spec):
        norms = (
            {"delta": 2.0} if spec.method.name == "fullft" else {"a": 0.5, "b": 1.0, "delta": 3.0}
        )
        return {"spectra": {"model.layers.0.q_proj": norms, "lm_head": norms}}

    _out, found = ask(
        "short_runs",
        World(best=best, more=more),
        *GRIDS,
        "sweep.arms.lora.rank=[4,8]",
        "sweep.axes.steps=384",
        "sweep.replicate.n_lrs=5",
        "sweep.arms.fullft_more.seed=[0,1,2,3]",
        report=outcome == "SUPPORTED",
    )
    assert found["short_over_long"]["outcome"] == outcome
    assert found["short_over_long"]["estimate"]["value"] == pytest.approx(factor, rel=0.15)
    assert found["b_grows"]["estimate"]["value"] == pytest.approx(2.0)
    assert found["same_movement"]["estimate"]["value"] == pytest.approx(1.5)
