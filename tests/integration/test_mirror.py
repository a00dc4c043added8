"""mirror=wandb: what W&B gets while runs train, whatever is killed or hangs, and what it never gets."""

import dataclasses
import fcntl
import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from lorasweep.errors import SpecError, StoreError
from lorasweep.methods.peft import PEFT
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.store.run_store import RunStore
from lorasweep.tracking import wandb
from tests.conftest import SMOKE
from tests.world import ROOT, cli, planted_end, start, tiny_spec, wait_for

SERVER = """
import os, time
from types import SimpleNamespace
api, Settings = SimpleNamespace(api_key="key"), dict
def init(id, **_):
    how = os.environ["FAKE"]
    if how == "raises":
        raise ConnectionError("no network")
    time.sleep(1e6 if how == "hangs" else 0)
    path = os.path.join(os.environ["WANDB_DIR"], id)
    open(path, "a").close()
    def log(values, step):
        with open(path, "a") as file:
            file.write(f"{step}\\\\n")
    sent = open(path).read().split()
    return SimpleNamespace(log=log, summary={}, finish=lambda: None,
                           starting_step=int(sent[-1]) + 1 if sent else 0)
""".replace("\\\\n", "\\n")
"""A W&B that keeps the steps of each run in a file, and says where a run resumes."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Give a function that sets what W&B does, and returns the steps it got of each run."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(SERVER)
    (tmp_path / "got").mkdir()
    path = os.pathsep.join([f"{tmp_path}/fake", str(ROOT)])
    given = {"PYTHONPATH": path, "WANDB_MODE": "online", "WANDB_DIR": f"{tmp_path}/got"}

    def of(how):
        for name, value in {**given, "FAKE": how}.items():
            monkeypatch.setenv(name, value)
        got = {p.name: p for p in (tmp_path / "got").iterdir() if p.is_file()}
        return {rid: [*map(int, path.read_text().split())] for rid, path in got.items()}

    of("answers")
    return of


@pytest.fixture
def planted(tmp_path):
    store = RunStore(tmp_path / "runs")
    store.prepare()
    store.claim(tiny_spec())
    return store, tiny_spec().id


def steps(*numbers):
    return ({"step": k, "train_nll": 1.0 / k, "note": "no number"} for k in numbers)


def test_each_step_is_sent_once_while_a_run_trains_whatever_is_killed(server, planted, monkeypatch):
    """The process that copies is killed; the run resumes from a checkpoint before its last records."""
    store, rid = planted
    begun, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: begun.append(popen(*a, **k)) or begun[-1]
    )
    with wandb.mirroring(store, "g", []) as name:
        name([rid])
        store.record(rid, *steps(1, 2))
        size = store.records_size(rid)
        store.record(rid, *steps(3))
        wait_for(lambda: server("answers").get(rid) == [1, 2, 3])  # while it trains
        begun[-1].kill()
    with wandb.mirroring(store, "g", []) as name:
        name([rid])
        store.cut_records(rid, size)
        store.record(rid, *steps(3, 4))
        wait_for(lambda: server("answers").get(rid) == [1, 2, 3, 4])
        store.record(rid, *steps(5))
        store.finish(rid, "done", planted_end(tiny_spec(), 3.0, 2.0, [])[1])
    assert server("answers") == {rid: [1, 2, 3, 4, 5]} and begun[-1].poll() is not None
    with wandb.mirroring(store, "g", []) as name:
        name([rid])  # copied before
    assert server("answers") == {rid: [1, 2, 3, 4, 5]}


@pytest.mark.parametrize(("how", "why"), [("raises", "no network"), ("hangs", "no answer")])
def test_a_wandb_that_fails_or_hangs_ends_no_command(
    server, planted, monkeypatch, capsys, how, why
):
    store, rid = planted
    store.record(rid, *steps(1, 2))
    store.finish(rid, "done", planted_end(tiny_spec(), 3.0, 2.0, [])[1])
    server(how)
    monkeypatch.setattr(wandb, "GRACE_S", 10.0 if how == "raises" else 1.0)
    with wandb.mirroring(store, "g", []) as name:
        before = time.monotonic()
        for _ in range(20_000):  # nobody reads them
            name([rid] * 10)
        assert time.monotonic() - before < 100
    said = capsys.readouterr().err
    assert "not copied to W&B, run the command again: 1 runs" in said and why in said
    server("answers")
    monkeypatch.setattr(wandb, "GRACE_S", 300.0)
    with wandb.mirroring(store, "g", []) as name:
        name([rid])
    assert server("answers") == {rid: [1, 2]} and not capsys.readouterr().err


def test_a_killed_command_leaves_no_process_and_its_runs_are_copied_once(server, tmp_path):
    arguments = (*SMOKE, "steps=100", "exec.workers=1", "exec.checkpoint_s=1", "mirror=wandb")
    command = start(
        "-m", "lorasweep", *arguments, cwd=tmp_path, env={"PYTHONPATH": os.environ["PYTHONPATH"]}
    )
    wait_for(lambda: any(server("answers").values()))
    os.kill(command.pid, signal.SIGKILL)
    command.communicate()
    done = cli(*arguments, cwd=tmp_path, env={"PYTHONPATH": os.environ["PYTHONPATH"]})
    assert "not copied" not in done.stderr
    store = RunStore(tmp_path / "runs")
    assert server("answers") == {i: [r["step"] for r in store.records(i)] for i in store.existing()}
    assert len(store.existing()) == 6


def test_a_run_that_another_command_holds_is_copied_when_that_one_has_ended(
    server, planted, tmp_path
):
    """And a run that was claimed just now, without a description yet, disturbs no other."""
    store, rid = planted
    (store.folder("claimed") / "attempts").mkdir(parents=True)
    held = tmp_path / f"got/wandb/{wandb.HIDDEN}{rid}/lock"
    held.parent.mkdir(parents=True)
    with held.open("wb") as lock, wandb.mirroring(store, "g", []) as name:
        fcntl.flock(lock, fcntl.LOCK_EX)
        name(["claimed", rid])
        store.record(rid, *steps(1))
        time.sleep(4)
        assert server("answers") == {}
        fcntl.flock(lock, fcntl.LOCK_UN)
        wait_for(lambda: server("answers") == {rid: [1]})
        store.finish(rid, "done", planted_end(tiny_spec(), 3.0, 2.0, [])[1])
    assert not held.parent.exists()


def test_a_copier_without_its_command_ends_and_a_mode_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    arguments = ["-m", "lorasweep.tracking.wandb", "1", str(tmp_path), "g"]
    subprocess.run([sys.executable, *arguments], check=True, timeout=60, stdin=subprocess.DEVNULL)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(SpecError, match="WANDB_MODE=disabled: expected offline"):
        wandb.check()
    (tmp_path / "wandb").write_text("a file")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(StoreError, match="it is no folder"):
        wandb.check()


SECRET = "acme-clinic"


def test_names_paths_and_rows_stay_here(tmp_path, monkeypatch):
    """A secret in the paths, the names of model, data set, method and customer, and in texts of records."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "copies"))
    texts = {
        "name": SECRET,
        "location": f"/home/{SECRET}/rows.jsonl",
        "template": f"{SECRET}: {{prompt}}",
    }
    data = DatasetSpec(**texts, source="jsonl", prompt_field=SECRET, holdout=3)
    model = dataclasses.replace(
        tiny_spec().model, name=f"{SECRET}-base", location=f"/{SECRET}/base"
    )
    method = PEFT(name=SECRET, config="LoHaConfig", rank=4)
    spec = tiny_spec(dataset=data, model=model, method=method)
    store = RunStore(tmp_path / SECRET / "runs")
    store.prepare()
    store.claim(spec)
    store.record(spec.id, {"step": 1, "train_nll": 0.12345, "row": SECRET})
    more = {"note": SECRET, "curve": [{"row": SECRET}]}
    store.finish(spec.id, "done", {**planted_end(spec, 3.0, 2.0, [])[1], **more})
    with wandb.mirroring(store, f"fleet-{SECRET}", ["lora", "tiny64"]) as name:
        name([spec.id])
    files = [path for path in (tmp_path / "copies").rglob("*") if path.is_file()]
    content = b"".join(str(path).encode() + path.read_bytes() for path in files)
    assert b"0.12345" in content and spec.id.encode() in content  # it was copied
    content = content.replace(str(tmp_path).encode(), b"")
    for text in (SECRET, str(ROOT), getpass.getuser() + "@", "pytest"):
        assert text.encode() not in content, text
    host = re.escape(socket.gethostname().encode())  # two letters may lie in a random id
    assert not re.search(rb"(?<!\w)" + host + rb"(?!\w)", content)


def test_settings_that_a_users_code_names_stay_here():
    """Of a method and a generator of the user's package; those of shipped code are sent."""
    words = ["lora", "dialect", "tiny64"]
    shipped = json.loads(tiny_spec().canonical)
    sent = wandb.public(shipped, words)
    assert sent["method"]["name"] == "lora" and sent["dataset"]["knobs"]["rule_shift"] == 0.5
    assert sent["model"]["recipe"]["knobs"]
    own = {"name": SECRET, "rank": 4, f"{SECRET}_decay": 0.5, "layers": SECRET}
    data = {**shipped["dataset"], "location": SECRET, "knobs": {SECRET: 1}}
    sent = wandb.public({**shipped, "method": own, "dataset": data}, words)
    assert SECRET not in json.dumps(sent) and sent["method"] == {"rank": 4}
