"""The plan of every sweep and scale, on a laptop and on H100s, is the one in tests/golden/plans.json.

Runs and packs are exact; memory and time may differ in the last digits. To write the file after a
change that was wanted: python -m tests.unit.plan.test_golden_plans
"""

import hashlib
import json
import tempfile
from pathlib import Path

import pytest

from lorasweep.config.compose import composer
from lorasweep.errors import NotAtScale
from lorasweep.plan.detect import Hardware
from lorasweep.plan.planner import Planner, costs, make_plan
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.question import Replicates
from tests.world import ROOT

SCALES = sorted(p.stem for p in (ROOT / "conf" / "scale").glob("*.yaml"))
SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml") if p.stem not in ("study", "tune"))
FILE = ROOT / "tests/golden/plans.json"
LAPTOP = Hardware("laptop", processor="p", cores=2, memory_gib=24.0, fast_bf16=True)
OF_PLAN = ("workers", "threads", "flops", "hours", "checkpoint_gib", "memory_gib")


def plans_of(scale, root):
    """Return the plan of each sweep at a scale as JSON values."""
    found, store = {}, RunStore(root)
    with composer() as compose:
        from lorasweep.launch.slurm.submit import hardware_of

        h100 = hardware_of(compose(["hardware=h100", "action=plan"]))
        for sweep in SWEEPS:
            try:
                request = compose([f"+sweep={sweep}", f"scale={scale}"])
            except NotAtScale:
                continue
            plan = make_plan(request.points, store, request.exec, LAPTOP)
            packs = [[p.id for p in pack.points] + [pack.micro_batch_size] for pack in plan.packs]
            second = request.sweep.replicate if request.sweep else Replicates()
            planner = Planner(h100, request.exec)
            runs = planner.forecast(planner.without_too_large(request.points), second)
            found[f"{sweep}-{scale}"] = {
                "packs": hashlib.sha256(json.dumps(packs).encode()).hexdigest()[:16],
                "laptop": {
                    **{"runs": len(plan.todo), "packs": len(packs)},
                    **{name: getattr(plan, name) for name in OF_PLAN},
                },
                "h100": costs(sweep, runs, h100, request.cluster.work_max),
            }
    return found


def rounded(text):
    """Read JSON, numbers with 6 digits."""
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))


@pytest.mark.parametrize("scale", SCALES)
def test_every_sweep_has_the_recorded_plan(scale, tmp_path):
    found = rounded(json.dumps(plans_of(scale, tmp_path / "runs")))
    known = rounded(FILE.read_text()).items()
    known = {k: v for k, v in known if k.rpartition("-")[2] == scale}
    assert found.keys() == known.keys()
    for name, plan in known.items():
        assert found[name] == plan, name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        every = {k: v for s in SCALES for k, v in plans_of(s, Path(folder) / "runs").items()}
    every = rounded(json.dumps(every))
    lines = [f" {json.dumps(k)}: {json.dumps(every[k])}" for k in sorted(every)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
