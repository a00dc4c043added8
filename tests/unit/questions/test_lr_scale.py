"""`lr_scale` on planted runs: how the ratio of optimal LRs goes with width and alpha."""

import pytest

from tests.planted import World, arms, ask, base, check

pytestmark = pytest.mark.slow  # fits dozens of curves
BASES = ("tiny64-3m", "tiny64", "tiny64-s1", "tiny128-3m", "tiny128-4m", "tiny256-3m")


@pytest.mark.parametrize(("power", "outcome"), [(0.0, "SUPPORTED"), (1.0, "REFUTED")])
def test_the_law_of_the_ratio(power, outcome, tmp_path):
    def best(spec, step):
        if spec.method.name == "fullft":
            return 1.6e-3
        return 6.4e-3 * (32 / spec.method.alpha) * (spec.model.hidden_size / 64) ** power

    specs = {}
    for model in BASES:
        for alpha in (8.0, 32.0, 128.0):
            lora = {"lora": 6.4e-3 * 32 / alpha, "alpha": alpha, "seeds": range(3)}
            found = arms(base(model, "dialect_smoke"), (4,), 1.6e-3, steps=16, **lora)
            specs |= {s.id: s for s in found}
    world = World(best=best, more=lambda s: {"retain_start": 2.0, "retain_nll": 2.1})
    folder = tmp_path if power else None
    out, found = ask("lr_scale", world, specs.values(), folder)
    check(found, hidden=(outcome, pytest.approx(power, abs=0.15)), alpha="SUPPORTED")
    assert "smollm2-135m-instruct on gsm8k (small)" in out["outside"]  # a marker, from what is kept
