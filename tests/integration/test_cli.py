"""The command line end to end at scale=smoke: a sweep answers, an adapter, a wheel."""

import json
import os
import subprocess
import sys

import pytest

from analysis.__main__ import main as analysis
from tests.integration.conftest import SMOKE
from tests.world import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smoke")]


def test_a_sweep_answers_and_asked_again_trains_nothing(smoke_copy, tmp_path, command, capsys):
    first = smoke_copy
    assert "UNDECIDED" in first.stdout and "6 runs" in first.stderr
    report = tmp_path / "reports/lr_ratio-smoke"
    assert "report:" in first.stdout and (report / "report.md").is_file()

    def written():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/result.json")}

    before, second = written(), command(*SMOKE)
    assert second.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    assert "to do" not in second.stderr and written() == before
    status = json.loads(command(*SMOKE, "action=status", "format=json").stdout)
    assert status["runs"]["done"] == 6 and status["left_s"] == 0
    assert analysis(["lr_ratio", "--reports-dir", f"{tmp_path}/reports"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == first.stdout.splitlines()[0]
    for figure in ("lr_nll.png", "learning.png"):
        assert (report / figure).stat().st_size > 10_000
    other = f"exec.runs_dir={tmp_path}/other"
    assert command(*SMOKE, "action=export", f"table={tmp_path}/t.parquet").returncode == 0
    imported = command("action=import", f"table={tmp_path}/t.parquet", other)
    assert "6 runs imported" in imported.stdout
    assert "to do" not in command(*SMOKE, other).stderr


def test_a_single_run_can_be_saved_as_a_peft_adapter(tmp_path, command):
    run = ("scale=smoke", "method=lora", "method.rank=4", "lr=5e-3", "format=json")
    result = json.loads(command(*run).stdout)
    command("action=adapter", f"run={result['run_id']}", f"out={tmp_path}/adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4 and (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.full
def test_an_installed_wheel_answers_in_an_empty_folder(tmp_path):
    """Built, installed without its dependencies, and used by README's command at scale=smoke from a
    folder that holds nothing but a package of the user's with the name of ours."""
    site, wheels, home = tmp_path / "site", tmp_path / "wheel", tmp_path / "home"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    assert {p.name for p in site.iterdir() if p.suffix != ".dist-info"} - {"bin"} == {
        "analysis",
        "lorasweep",
    }
    (home / "analysis").mkdir(parents=True)
    (home / "analysis/__init__.py").write_text("raise ImportError('the wrong analysis')")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lorasweep", *SMOKE],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "UNDECIDED" in done.stdout, done.stderr
    (page,) = home.rglob("report.html")
    assert "<html" in page.read_text()
