"""`lr_scale` on planted runs: how the ratio of best rates goes with width and alpha."""

import pytest

from tests.planted import World

pytestmark = pytest.mark.slow  # sweeps of hundreds of planted runs


@pytest.mark.parametrize(("power", "outcome"), [(0.0, "SUPPORTED"), (1.0, "REFUTED")])
def test_the_law_of_the_ratio(ask, power, outcome):
    def best(spec, step):
        if spec.method.name == "fullft":
            return 1.6e-3
        return 1.6e-3 * 4 * (32 / spec.method.alpha) * (spec.model.hidden_size / 64) ** power

    lora = ",".join(
        f"{{model:[tiny64-3m,tiny64,tiny64-s1,tiny128-3m,tiny128-4m,tiny256-3m],alpha:{a},lr:[{','.join(f'{6.4e-3 * 32 / a * 2.0**k:.3g}' for k in range(-3, 4))}]}}"
        for a in (8, 32, 128)
    )
    more = {"retain_start": 2.0, "retain_nll": 2.1}
    out, found = ask(
        "lr_scale",
        World(best=best, more=lambda s: more),
        f"sweep.arms.lora.base=[{lora}]",
        "sweep.arms.fullft.base=[{model:[tiny64-3m,tiny64,tiny64-s1,tiny128-3m,tiny128-4m,tiny256-3m],lr:[2e-4,4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3,1.28e-2]}]",
        report=outcome == "SUPPORTED",
    )
    assert found["hidden"]["outcome"] == outcome
    assert found["hidden"]["estimate"]["value"] == pytest.approx(power, abs=0.15)
    assert found["alpha"]["outcome"] == "SUPPORTED"
    assert "smollm2-135m-instruct on gsm8k (small)" in out["outside"]  # a marker, from what is kept
