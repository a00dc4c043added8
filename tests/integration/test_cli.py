"""The command line end to end at scale=smoke: a sweep answers, an adapter, a wheel."""

import json
import os
import subprocess
import sys

import pytest

from analysis.__main__ import main as analysis
from tests.world import ROOT, cli

pytestmark = pytest.mark.slow
SWEEP = ("+sweep=lr_ratio", "scale=smoke")


def test_a_sweep_answers_and_asked_again_trains_nothing(tmp_path, command, capsys):
    first = cli(*SWEEP, cwd=tmp_path)
    assert "UNDECIDED" in first.stdout and "6 runs" in first.stderr
    assert "report:" in first.stdout and (tmp_path / "reports/lr_ratio-smoke/report.md").is_file()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/result.json")}
    second = command(*SWEEP)
    assert second.stdout == first.stdout and "to do" not in second.stderr
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/result.json")} == before
    status = json.loads(command(*SWEEP, "action=status", "format=json").stdout)
    assert status["runs"]["done"] == 6 and status["left_s"] == 0
    assert analysis(["lr_ratio", "--reports-dir", f"{tmp_path}/reports"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == first.stdout.splitlines()[0]
    for figure in ("lr_nll.png", "learning.png"):
        assert (tmp_path / "reports/lr_ratio-smoke" / figure).stat().st_size > 10_000
    other = f"exec.runs_dir={tmp_path}/other"
    assert command(*SWEEP, "action=export", f"table={tmp_path}/t.parquet").returncode == 0
    imported = command("action=import", f"table={tmp_path}/t.parquet", other)
    assert "6 runs imported" in imported.stdout
    assert "to do" not in command(*SWEEP, other).stderr


def test_a_single_run_can_be_saved_as_a_peft_adapter(tmp_path, command):
    run = ("scale=smoke", "method=lora", "method.rank=4", "lr=5e-3", "format=json")
    result = json.loads(command(*run).stdout)
    command("action=adapter", f"run={result['run_id']}", f"out={tmp_path}/adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4 and (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.full
def test_an_installed_wheel_carries_its_configuration(tmp_path):
    """Built, installed without its dependencies into a folder of its own, used from a foreign
    current folder."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "-w",
            str(tmp_path / "wheel"),
            str(ROOT),
        ],
        check=True,
        timeout=300,
    )
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    site = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(site),
            str(wheel),
        ],
        check=True,
    )
    assert (site / "lorasweep/conf/sweep/lr_ratio.yaml").is_file()
    assert list((site / "lorasweep/models/bases").glob("tiny128-*.safetensors"))
    foreign = tmp_path / "foreign"
    (foreign / "analysis").mkdir(
        parents=True
    )  # a folder of the user's with the name of our package
    (foreign / "analysis/__init__.py").write_text("raise ImportError('the wrong analysis')")
    env = {
        **os.environ,
        "PYTHONPATH": str(site),
        "LORASWEEP_RUNS": f"{tmp_path}/runs",
        "LORASWEEP_REPORTS": f"{tmp_path}/reports",
    }
    code = "import sys; sys.path.remove(''); from lorasweep.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *SWEEP], cwd=foreign, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "UNDECIDED" in done.stdout, done.stderr
