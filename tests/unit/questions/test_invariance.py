"""`invariance` on planted runs: twins, scaling rules, and starting with B random."""

import math

import pytest

from lorasweep.methods.lora import LoRA as Lora
from tests.planted import LORA, World, around, ask, base, check, runs

pytestmark = pytest.mark.slow  # fits a dozen curves
B_BEHIND = 0.03
TWIN = {"alpha": 8.0, "init_scale": 2.0, "lr_b_ratio": 1.0}
"""The twin of alpha 32, init 1 and one LR by p = q = 2: both LRs are doubled."""


class Rules(World):
    """Under alpha / rank the optimum is free of the rank, under alpha it is not; B random is behind.

    Twins in float64 agree to the last bits, unless eps does not scale with them.
    """

    def __init__(self, broken):
        super().__init__(lambda spec: 0.8, best=self.optimum)
        self.broken = broken

    def optimum(self, spec, step):
        power = {"rank": 0.0, "sqrt_rank": -0.5, "none": -1.0}[spec.method.scaling_by]
        return LORA * spec.method.rank**power

    def loss(self, spec, step):
        if spec.precision == "fp64":
            off = self.broken if spec.eps == 1e-8 and spec.method.init_scale != 1 else 1e-15
            return 3.0 - 0.1 * math.log2(1 + step) + off * spec.method.init_scale
        behind = B_BEHIND if spec.method.random_factor == "b" else 0.0
        return super().loss(spec, step) + behind


def setting_runs(twins=True):
    spec, found = base(dataset="dialect_smoke"), []
    for rule, power in (("rank", 0), ("sqrt_rank", -0.5), ("none", -1)):
        for rank in (1, 4, 16):
            method = Lora(rank=rank, scaling_by=rule)
            found += runs(spec, method, around(LORA * rank**power), steps=64)
    found += runs(spec, Lora(rank=4, random_factor="b"), around(LORA), steps=64)
    for eps in (1e-30, 1e-8) if twins else ():
        common = {"precision": "fp64", "eps": eps, "steps": 16}
        found += runs(spec, Lora(rank=4), [1e-3], [0], **common)
        found += runs(spec, Lora(rank=4, **TWIN), [2e-3], [0], **common)
    return found


@pytest.mark.parametrize(("broken", "outcome"), [(1e-3, "SUPPORTED"), (1e-9, "REFUTED")])
def test_twins_rules_and_starts_come_back(broken, outcome, tmp_path):
    _, found = ask("invariance", Rules(broken), setting_runs(), tmp_path if broken > 1e-6 else None)
    check(found, twins="SUPPORTED", breakers=outcome, rank_free="SUPPORTED")
    check(found, rank_free_root=pytest.approx(-math.log(2) / 2, abs=0.05))
    check(found, start_b=("REFUTED", pytest.approx(B_BEHIND, abs=1e-3)))


def test_without_twins_their_claims_stay_open():
    _, found = ask("invariance", Rules(1e-3), setting_runs(twins=False))
    assert found["twins"]["why"] == "no curve of twins"
    assert found["rank_free"]["outcome"] == "SUPPORTED"
