"""`capacity` on planted runs: bits stored a parameter."""

import math

import numpy as np
import pytest

from analysis.questions import capacity
from tests.planted import World
from tests.world import compose_request

pytestmark = pytest.mark.slow  # fits hundreds of curves


@pytest.mark.parametrize(("bits", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_capacity(ask, bits, outcome):
    class Facts(World):
        def loss(self, spec, step):
            facts = spec.dataset.generator_params["facts"]
            stored = 16 * facts if spec.method.name == "fullft" else min(16 * facts, bits * 1648)
            noise = np.random.default_rng(int(spec.id, 16)).normal(0, 1e-3)
            off = 0.05 * math.log(spec.lr / (3e-3 if spec.method.name == "fullft" else 1e-2)) ** 2
            return math.log(16) - stored / facts / 4 * math.log(2) + off + noise

    _out, found = ask(
        "capacity",
        Facts(more=lambda s: {"retain_nll": 3.0, "retain_start": math.log(16)}),
        "sweep.arms.lora.load=[{generator_params:{facts:512},steps:[200,400],lr:[5e-3,1e-2,2e-2]}]",
        report=outcome == "SUPPORTED",
    )
    assert found["two_bits"]["outcome"] == outcome
    assert found["two_bits"]["estimate"]["value"] == pytest.approx(bits, rel=0.05)
    assert found["no_leak"]["outcome"] == "SUPPORTED"


def test_effective_parameters_count_each_matrix_once():
    spec = (
        compose_request(["model=tiny64", "method=lora", "method.rank=1", "method.layers=attention"])
        .points[0]
        .spec
    )
    assert capacity.effective(spec.plain()) == 4 * (127 + 79 + 79 + 127) == 1648
    assert capacity.bits(0.0, 10) == pytest.approx(160) and capacity.bits(math.log(16), 10) == 0
