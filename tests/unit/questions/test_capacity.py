"""`capacity` on planted runs: bits stored per parameter."""

import math

import numpy as np
import pytest

from analysis.questions import capacity
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests.planted import World, around, ask, base, check, runs

pytestmark = pytest.mark.slow  # composes configurations
ONE = LoRA(rank=1, layers="attention")
PARAMETERS = 4 * (127 + 79 + 79 + 127)  # r (m + n) - r^2 of the four attention matrices


@pytest.mark.parametrize(("bits", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_capacity(bits, outcome, tmp_path):
    class Facts(World):
        def loss(self, spec, step):
            facts = spec.plain()["dataset"]["knobs"]["facts"]
            full = spec.method.name == "fullft"
            stored = 16 * facts if full else min(16 * facts, bits * PARAMETERS)
            noise = np.random.default_rng(int(spec.id, 16)).normal(0, 1e-3)
            off = 0.05 * math.log(spec.lr / (3e-3 if full else 1e-2)) ** 2
            return math.log(16) - stored / facts / 4 * math.log(2) + off + noise

    spec = base("tiny64-facts", "facts", facts=512.0)
    specs = [
        s
        for steps in (200, 400)
        for method, best in ((FullFT(), 3e-3), (ONE, 1e-2))
        for s in runs(spec, method, around(best, 3), steps=steps)
    ]
    world = Facts(more=lambda s: {"retain_nll": 3.0, "retain_start": math.log(16)})
    _, found = ask("capacity", world, specs, tmp_path if bits == 2 else None)
    check(found, two_bits=(outcome, pytest.approx(bits, rel=0.05)), no_leak="SUPPORTED")


def test_effective_parameters_count_each_matrix_once():
    spec = runs(base(), ONE, [1e-3], [0])[0]
    assert capacity.effective(spec.plain()) == PARAMETERS == 1648
    assert capacity.bits(0.0, 10) == pytest.approx(160) and capacity.bits(math.log(16), 10) == 0
