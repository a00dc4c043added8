"""Packs by the command line: verified against runs alone, memory as planned, measured."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import memory
from lorasweep.store.run_store import checksum
from tests.integration.conftest import SMOKE
from tests.integration.test_smollm2 import WEIGHTS
from tests.world import ROOT, cli

pytestmark = pytest.mark.slow
DATA = os.environ.get("LORASWEEP_TEST_DATA", str(ROOT / "data"))


@pytest.mark.xdist_group("smoke")
def test_verify_finds_runs_equal_and_a_falsified_one(smoke_copy, tmp_path, command):
    verify = (*SMOKE, "action=verify", "sample=2", "format=json")
    found = json.loads(command(*verify).stdout)
    runs = found["runs"]
    assert len(runs) == 2 and found["differing"] == [] and runs[0]["pack_size"] == 3
    # to rounding: whether the bits are equal depends on the processor
    assert all(abs(r["difference"]) < 1e-4 and r["curve_difference"] < 1e-4 for r in runs)
    path = tmp_path / "runs" / runs[0]["run"] / "result.json"
    body = json.loads(path.read_text())["result"]
    body["test_nll"] += 0.5
    path.write_text(json.dumps({"sha256": checksum(body), "result": body}))
    done = command(*verify)
    assert done.returncode == 1 and json.loads(done.stdout)["differing"] == [runs[0]["run"]]


def full(*case):
    return pytest.param(*case, marks=pytest.mark.full)


def real(*case, also):
    there = WEIGHTS.is_file() and Path(DATA, "gsm8k", "train.jsonl").is_file()
    fast = any(flag in Path("/proc/cpuinfo").read_text() for flag in ("amx_bf16", "avx512_bf16"))
    missing = "no weights (make weights), or no gsm8k in data/ or LORASWEEP_TEST_DATA"
    slow = "this processor has no bf16 products: a step takes minutes"
    conditions = [
        pytest.mark.skipif(not ok, reason=r) for ok, r in ((fast, slow), (there, missing))
    ]
    return pytest.param(*case, marks=[also, pytest.mark.real, *conditions])


@pytest.mark.parametrize(
    "scale, method, batch, count",
    [
        full("tiny", "lora", 16, 1),
        full("tiny", "lora", 16, 8),
        full("tiny", "lora", 4, 16),
        full("tiny", "fullft", 16, 1),
        real("small", "lora", 8, 1, also=pytest.mark.nightly),
        real("small", "lora", 2, 2, also=pytest.mark.full),
        real("small", "fullft", 4, 1, also=pytest.mark.nightly),
    ],
)
def test_the_memory_model_is_within_a_fifth_of_the_measured_peak(scale, method, batch, count):
    found = json.loads(memory.in_process(scale, method, batch, count, [f"{ROOT}/models"], [DATA]))
    assert found["planned_bytes"] == pytest.approx(found["peak_bytes"], rel=0.2)


@pytest.mark.full
def test_packs_are_measured_when_asked_and_kept(tmp_path):
    """In a separate process; asked again, nothing is measured; a plan then shows the figures."""
    one = ("model=tiny64", "dataset=dialect_smoke", "method=lora", "batch_size=4")
    first = cli(*one, "action=measure_packs", cwd=tmp_path)
    again = cli(*one, "action=measure_packs", cwd=tmp_path)
    assert "measuring 1 kind(s)" in first.stderr and "were measured" in again.stderr
    (kept_file,) = (tmp_path / "runs" / ".calibration").glob("*.json")
    assert {"1", "2"} <= set(json.loads(kept_file.read_text())["step_s"])
    assert "measured per step and run: " in cli(*one, "action=plan", cwd=tmp_path).stdout
