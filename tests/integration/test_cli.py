"""The command line end to end at scale=smoke: real training, real kills, real signals, a full disk,
a wheel."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorasweep.store.run_store import RunStore
from tests.world import ROOT, cli

pytestmark = pytest.mark.slow
SWEEP = ("+sweep=lr_ratio", "scale=smoke")
LONG = (
    "scale=smoke",
    "steps=120",
    "batch_size=8",
    "exec.checkpoint_s=0.3",
    "exec.workers=1",
    "exec.threads=1",
)


def start(*args, cwd):
    """Start the command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lorasweep", *args],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LORASWEEP_RUNS": f"{cwd}/runs",
            "LORASWEEP_REPORTS": f"{cwd}/reports",
        },
    )


def wait_for(condition, timeout=90):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("waited in vain")


def kept(cwd):
    """Run id -> {step: (train_nll, test_nll)} of a store."""
    store = RunStore(Path(cwd) / "runs")
    return {
        i: {r["step"]: (r["train_nll"], r.get("test_nll")) for r in store.records(i)}
        for i in store.existing()
    }


def test_a_sweep_answers_and_asked_again_trains_nothing(tmp_path):
    first = cli(*SWEEP, cwd=tmp_path)
    assert "UNDECIDED" in first.stdout and "6 runs" in first.stderr
    assert "report:" in first.stdout and (tmp_path / "reports/lr_ratio-smoke/report.md").is_file()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/result.json")}
    second = cli(*SWEEP, cwd=tmp_path)
    assert second.stdout == first.stdout and "to do" not in second.stderr
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/result.json")} == before
    status = json.loads(cli(*SWEEP, "action=status", "format=json", cwd=tmp_path).stdout)
    assert status["runs"]["done"] == 6 and status["left_s"] == 0
    again = subprocess.run(
        [sys.executable, "-m", "analysis", "lr_ratio"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    for figure in ("lr_nll.png", "learning.png"):
        assert (tmp_path / "reports/lr_ratio-smoke" / figure).stat().st_size > 10_000
    cli(*SWEEP, "action=export", f"table={tmp_path}/t.parquet", cwd=tmp_path)
    told = cli(
        "action=import",
        f"table={tmp_path}/t.parquet",
        f"exec.runs_dir={tmp_path}/other",
        cwd=tmp_path,
    )
    assert "6 runs imported" in told.stdout
    imported = cli(*SWEEP, f"exec.runs_dir={tmp_path}/other", cwd=tmp_path)
    assert "to do" not in imported.stderr


@pytest.mark.parametrize(
    "arm",
    [
        ("method=fullft", "lr=1e-3"),
        ("+sweep=lr_ratio", "~sweep.arms.fullft", "exec.pack_size=3"),
    ],
    ids=["fullft", "pack of lora"],
)
def test_killed_with_kill_9_it_goes_on_with_the_same_bits(tmp_path, arm):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    cli(*LONG, *arm, cwd=whole)
    for at in (15, 60):  # twice, at different steps
        process = start(*LONG, *arm, cwd=killed)
        wait_for(lambda at=at: any(max(steps, default=0) >= at for steps in kept(killed).values()))
        assert list((killed / "runs").glob("*/checkpoint/*.json"))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not list((killed / "runs").glob("*/result.json"))
    cli(*LONG, *arm, cwd=killed)
    a, b = kept(whole), kept(killed)
    assert a.keys() == b.keys() and len(a) == (1 if "fullft" in arm[0] else 3)
    for rid in a:
        assert a[rid] == b[rid]  # bit for bit, every step once
        results = [RunStore(w / "runs").result(rid) for w in (whole, killed)]
        assert (
            results[0]["test_nll"] == results[1]["test_nll"]
            and results[0]["curve"] == results[1]["curve"]
        )
        attempts = sorted((killed / "runs" / rid / "attempts").iterdir())
        assert len(attempts) == 3
        assert json.loads((attempts[-1] / "env.json").read_text())["resumed_from_step"] > 0


def test_ctrl_c_stops_cleanly_and_the_next_command_goes_on(tmp_path):
    arguments = (*LONG, "method=lora", "method.rank=4", "lr=3e-3", "exec.checkpoint_s=60")
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: any(max(steps, default=0) >= 10 for steps in kept(tmp_path).values()))
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in told and "Traceback" not in told
    (rid,) = kept(tmp_path)
    store = RunStore(tmp_path / "runs")
    assert store.state(rid) == "stale" and store.end(rid, 1)["state"] == "stopped"
    cli(*arguments, cwd=tmp_path)
    env = json.loads((tmp_path / "runs" / rid / "attempts/2/env.json").read_text())
    assert store.state(rid) == "done" and env["resumed_from_step"] >= 10


def test_a_killed_worker_is_replaced(tmp_path):
    process = start(*LONG, "method=lora", "method.rank=4", "lr=3e-3", cwd=tmp_path)
    wait_for(lambda: any(max(steps, default=0) >= 10 for steps in kept(tmp_path).values()))
    (rid,) = kept(tmp_path)
    owner = json.loads((tmp_path / "runs" / rid / "attempts/1/owner.json").read_text())
    assert owner["pid"] != process.pid
    os.kill(owner["pid"], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 0 and RunStore(tmp_path / "runs").state(rid) == "done"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_only_the_command_dies_its_workers_stop_cleanly(tmp_path, number):
    """Also where nobody reads their events any more: the runs are stale, not failed, and their
    checkpoint is kept."""
    arguments = (
        *LONG,
        "method=lora",
        "method.rank=4",
        "lr=3e-3",
        "exec.checkpoint_s=60",
        "steps=400",
    )
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: any(max(steps, default=0) >= 10 for steps in kept(tmp_path).values()))
    (rid,) = kept(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    store = RunStore(tmp_path / "runs")
    wait_for(lambda: store.state(rid) != "running")
    assert store.state(rid) == "stale" and store.end(rid, 1)["state"] == "stopped"
    assert list((tmp_path / "runs" / rid / "checkpoint").glob("*.json"))


def test_an_owner_found_dead_on_another_machine_is_replaced(tmp_path, monkeypatch):
    """Workers have watched nobody: the command that did tells them."""
    from lorasweep.launch import local
    from lorasweep.store import claims as ownership
    from tests.world import compose_request

    request = compose_request(
        ["scale=smoke", "method=lora", "method.rank=4", "lr=3e-3", f"exec.runs_dir={tmp_path}/runs"]
    )
    store, (point,) = RunStore(tmp_path / "runs"), request.points
    store.prepare()
    store.claim(point.spec)
    path = store.folder(point.id) / "attempts/1/owner.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "boot": "other", "host": "elsewhere"})
    )
    monkeypatch.setattr(ownership, "SILENCE_S", 1.0)
    local.run_points(request.points, store, request.exec, lambda event: None)
    assert store.state(point.id) == "done" and store.last_attempt(point.id) == 2


def test_two_commands_at_once_share_the_runs(tmp_path):
    two = [start(*SWEEP, "exec.pack_size=1", "steps=40", cwd=tmp_path) for _ in range(2)]
    answers = [p.communicate(timeout=300) for p in two]
    assert [p.returncode for p in two] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    runs = list((tmp_path / "runs").glob("*/attempts"))
    assert len(runs) == 6 and all(len(list(r.iterdir())) == 1 for r in runs)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_stops_cleanly_and_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        arguments = (*LONG, "method=fullft", "lr=1e-3", f"exec.runs_dir={disk}/runs")
        first = cli(*arguments, cwd=tmp_path, check=False)  # a checkpoint of 2.6 MB does not fit
        assert (
            first.returncode == 2 and "is full" in first.stderr and "Traceback" not in first.stderr
        )
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        cli(*arguments, cwd=tmp_path)
        (result,) = disk.glob("runs/*/result.json")
        assert json.loads(result.read_text())["result"]["state"] == "done"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_unwritable_run_folder_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("")
    done = cli(*SWEEP, f"exec.runs_dir={tmp_path}/file/runs", cwd=tmp_path, check=False)
    assert (
        done.returncode == 2
        and "cannot be written" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+sweep=lr_ration"], "lr_ratio"),
        (["scale=huge"], "tiny"),
        (["model=lama"], "tiny64"),
        (["lrr=1"], "lrr"),
        (["lr=abc"], "abc"),
        (["+sweep=lr_ratio", "lr=1"], "sweep.arms.fullft.lr"),
        (["-m", "lr=1"], "multirun"),
        (["+sweep=lr_ratio", "scale=small", "exec.models_dir=[/nowhere]"], "make weights"),
        (["method=fullft", "method.rank=3"], "rank"),
        (["steps"], "steps"),
    ],
)
def test_wrong_requests_end_with_status_2_and_no_traceback(tmp_path, arguments, words):
    done = cli(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/spec.json"))


def test_help_shows_groups_and_how_to_change_a_grid(tmp_path):
    text = cli("--help", cwd=tmp_path).stdout
    for words in (
        "sweep: batch_size, capacity",
        "lr_ratio",
        "scale: paper, small",
        "method: fullft, lora",
        "${geom:1e-4,1e-2,4}",
        "exec.runs_dir",
    ):
        assert words in text
    assert list(tmp_path.iterdir()) == []  # nothing is dropped into the current folder


def test_a_users_sweep_and_model_come_in_by_config_dir(tmp_path):
    for folder in ("sweep", "model"):
        (tmp_path / "mine" / folder).mkdir(parents=True)
    text = (ROOT / "sweeps/lr_ratio.yaml").read_text().replace("${scale.models}", "[narrow]")
    (tmp_path / "mine/sweep/my_ratio.yaml").write_text(text)
    model = (
        (ROOT / "conf/model/tiny64.yaml")
        .read_text()
        .replace("tiny64", "narrow")
        .replace("steps: 670", "steps: 3")
    )
    (tmp_path / "mine/model/narrow.yaml").write_text(model)
    plan = cli(
        "--config-dir",
        tmp_path / "mine",
        "+sweep=my_ratio",
        "scale=smoke",
        "action=plan",
        "format=json",
        cwd=tmp_path,
    )
    assert json.loads(plan.stdout)["arms"][0]["model"] == "narrow"
    (tmp_path / "mine/sweep/lr_ratio.yaml").write_text(text)
    done = cli(
        "--config-dir",
        tmp_path / "mine",
        "+sweep=lr_ratio",
        "action=plan",
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2 and "would be ignored: rename it" in done.stderr
    (tmp_path / "mine/sweep/lr_ratio.yaml").rename(tmp_path / "mine/sweep/broken.yaml")
    (tmp_path / "mine/sweep/broken.yaml").write_text("question: [")
    done = cli(
        "--config-dir", tmp_path / "mine", "+sweep=broken", "action=plan", cwd=tmp_path, check=False
    )
    assert done.returncode == 2 and "YAML" in done.stderr and "Traceback" not in done.stderr


def test_a_single_run_can_be_saved_as_a_peft_adapter(tmp_path):
    told = json.loads(
        cli(
            "scale=smoke", "method=lora", "method.rank=4", "lr=5e-3", "format=json", cwd=tmp_path
        ).stdout
    )
    cli("action=adapter", f"run={told['run_id']}", f"out={tmp_path}/adapter", cwd=tmp_path)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4 and (tmp_path / "adapter/adapter_model.safetensors").is_file()


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
    assert list((site / "lorasweep/bases").glob("tiny128-*.safetensors"))
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


def test_an_unreadable_row_is_named_before_anything_starts(tmp_path):
    (tmp_path / "mine/dataset").mkdir(parents=True)
    text = (ROOT / "conf/dataset/gsm8k.yaml").read_text().replace("name: gsm8k", "name: mine")
    lines = [line for line in text.splitlines() if not line.startswith("revision")]
    (tmp_path / "mine/dataset/mine.yaml").write_text("\n".join(lines))
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"gsm8k/{split}.jsonl").write_text(
            '{"question": "a", "answer": "b"}\n{"question": \n'
        )
    done = cli(
        "--config-dir",
        tmp_path / "mine",
        "dataset=mine",
        "model=smollm2-135m",
        "method.rank=4",
        f"exec.data_dir=[{tmp_path}]",
        cwd=tmp_path,
        check=False,
    )
    assert (
        done.returncode == 2
        and "train.jsonl:2: not a JSON row" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list((tmp_path / "runs").glob("*/spec.json"))
