"""The numerical tests with the kernels of other processors, each set in a new process."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.world import ROOT

FULL = pytest.mark.full
KERNELS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"},
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default"},
}
"""torch's name of a set of kernels: what chooses it."""
ROOMS = ("tests/unit/train", "tests/unit/methods")
LONG = "(ten_updates or stops_where_it_would or it_is_done)"
"""Tests of many updates: the rest of them takes about twenty seconds a set."""
PARTS = [pytest.param(f"not {LONG}", 15, id="short"), pytest.param(LONG, 3, id="long", marks=FULL)]
"""Which tests, and how many there are at least."""


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="this processor has no AVX2, so it has one set of kernels",
)
@pytest.mark.parametrize("part, fewest", PARTS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_numerical_tests_pass_with_other_kernels(kernels, part, fewest):
    """On moved weights alone: the tests themselves, run with this processor's kernels, have both."""
    chosen = ("-m", "numerics", "-k", f"not unmoved and {part}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider", *ROOMS],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            **KERNELS[kernels],
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"kernels: {kernels}\n" in done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= fewest
