"""The packs of a small sweep, to be put into jobs."""

import pytest

from lorasweep.plan import detect
from lorasweep.plan.plan import make_plan
from lorasweep.store.run_store import RunStore


@pytest.fixture
def packs(compose, tmp_path):
    """packs(): 24 runs of `lr_ratio` at scale smoke, in packs of at most four."""

    def make():
        request = compose(
            "+sweep=lr_ratio",
            "scale=smoke",
            "sweep.axes.seed=[0,1,2,3]",
            "exec.pack_size=4",
        )
        store = RunStore(tmp_path / "runs")
        return make_plan(request.points, store, request.exec, detect.this_machine()).packs

    return make
