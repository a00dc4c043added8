"""Commands and workers that are killed, stopped, or on a full disk lose and repeat no update; nor do runs
that several processes train, as one process trains them."""

import json
import os
import signal
import subprocess
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lorasweep.data import splits as data
from lorasweep.errors import SpecError
from lorasweep.launch import local
from lorasweep.launch.torch_trainer import TorchTrainer, finetune
from lorasweep.launch.worker import check_world_size
from lorasweep.models import load as models
from lorasweep.models.sharding import Mesh
from lorasweep.plan.detect import Hardware
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.store import owners
from lorasweep.store.checkpoint import described
from lorasweep.store.run_store import RunStore
from tests import world
from tests.conftest import SMOKE
from tests.training import EPS, REWARDED, ROUNDING, Trained, moved
from tests.world import cli, compose_request, wait_for

pytestmark = pytest.mark.slow

ALONE = ("scale=smoke", "exec.checkpoint_s=0.3", "exec.workers=1", "exec.threads=1")
LONG = (*ALONE, "steps=120", "batch_size=8")
REWARDED = (
    *(*ALONE, "steps=40", "dataset=words", *REWARDED["words"], "objective=policy_gradient"),
    *("method=lora", "method.rank=8", "lr=6e-4"),
)


def start(*args, cwd):
    group = {"start_new_session": True, "stderr": subprocess.PIPE}
    return world.start("-m", "lorasweep", *args, cwd=cwd, **group)


def places(tmp_path):
    made = tmp_path / "whole", tmp_path / "killed"
    for folder in made:
        folder.mkdir()
    return made


def killed_at(condition, *args, cwd):
    process = start(*args, cwd=cwd)
    wait_for(condition)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


MEASURES = ("train_nll", "test_nll", "surrogate", "reward", "entropy", "test_reward")


def kept(cwd):
    """Run id -> {step: MEASURES, None for those of other objectives} of a store."""
    store = RunStore(Path(cwd) / "runs")
    return {
        i: {r["step"]: tuple(map(r.get, MEASURES)) for r in store.records(i)}
        for i in store.existing()
    }


def furthest(cwd):
    return [max(steps, default=0) for steps in kept(cwd).values()]


PACK = (*LONG, "+sweep=lr_ratio", "~sweep.arms.fullft", "exec.pack_size=3")


@pytest.mark.parametrize(
    ("arm", "runs", "kills"),
    [
        ((*LONG, "method=fullft", "lr=1e-3", "steps=60"), 1, (15,)),
        pytest.param(PACK, 3, (15, 60), marks=pytest.mark.full),
        pytest.param(REWARDED, 1, (8, 24), marks=pytest.mark.full),
    ],
    ids=["fullft", "pack of lora", "rewarded"],
)
def test_killed_with_kill_9_it_resumes_with_the_same_bits(tmp_path, arm, runs, kills):
    whole, killed = places(tmp_path)
    cli(*arm, cwd=whole)
    for at in kills:
        killed_at(lambda at=at: max(furthest(killed), default=0) >= at, *arm, cwd=killed)
        assert list((killed / "runs").glob("*/checkpoint/*.json"))
        assert not list((killed / "runs").glob("*/result.json"))
    cli(*arm, cwd=killed)
    assert kept(whole) == kept(killed) and len(kept(whole)) == runs  # every step once
    one, other = (RunStore(folder / "runs") for folder in (whole, killed))
    for rid in one.existing():
        for key in ("test_nll", "test_reward", "curve"):
            assert one.result(rid).get(key) == other.result(rid).get(key)
        assert other.last_attempt(rid) == len(kills) + 1
        assert other.env(rid)["resumed_from_step"] > 0


@pytest.mark.full
def test_ctrl_c_stops_cleanly_and_the_next_command_resumes_though_its_worker_is_killed(tmp_path):
    arguments = (*LONG, "method=lora", "method.rank=4", "lr=3e-3")
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: max(furthest(tmp_path), default=0) >= 10)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in errors and "Traceback" not in errors
    (rid,) = kept(tmp_path)
    store = RunStore(tmp_path / "runs")
    assert store.state(rid) == "interrupted" and store.end(rid, 1)["state"] == "stopped"

    stopped_at = min(furthest(tmp_path))
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: min(furthest(tmp_path)) >= stopped_at + 5)
    assert store.env(rid)["resumed_from_step"] == stopped_at
    worker = store.owner(rid, 2)["pid"]
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert store.state(rid) == "done" and store.last_attempt(rid) == 3


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_only_the_command_dies_its_workers_stop_cleanly(tmp_path, number):
    """Nobody reads their events: interrupted, not failed, with a checkpoint of the last update."""
    arguments = (*LONG, "method=lora", "method.rank=4", "lr=3e-3", "steps=400")
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: max(furthest(tmp_path), default=0) >= 10)
    (rid,) = kept(tmp_path)
    process.send_signal(number)
    process.communicate(timeout=60)
    store = RunStore(tmp_path / "runs")
    wait_for(lambda: store.state(rid) != "running")
    assert store.state(rid) == "interrupted" and store.end(rid, 1)["state"] == "stopped"
    assert max(described(tmp_path / "runs" / rid / "checkpoint")) == max(furthest(tmp_path))


@pytest.mark.full
def test_an_owner_found_dead_on_another_machine_is_replaced(tmp_path, monkeypatch):
    """The command has watched the owner, and tells its workers, which have not."""
    one = ("scale=smoke", "method=lora", "method.rank=4", "lr=3e-3")
    request = compose_request([*one, f"exec.runs_dir={tmp_path}/runs"])
    store, (point,) = RunStore(tmp_path / "runs"), request.points
    store.prepare()
    store.claim(point.spec)
    path = store.folder(point.id) / "attempts/1/owner.json"
    owner = json.loads(path.read_text())
    path.write_text(json.dumps({**owner, "boot": "other", "host": "elsewhere"}))
    monkeypatch.setattr(owners, "SILENCE_S", 1.0)
    local.run_points(request.points, store, request.exec, lambda event: None)
    assert store.state(point.id) == "done" and store.last_attempt(point.id) == 2


def test_two_commands_at_once_share_the_runs(tmp_path):
    one_by_one = (*SMOKE, "exec.pack_size=1", "exec.workers=1", "steps=30")
    two = [start(*one_by_one, cwd=tmp_path) for _ in range(2)]
    answers = [p.communicate(timeout=300) for p in two]
    assert [p.returncode for p in two] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    runs = list((tmp_path / "runs").glob("*/attempts"))
    assert len(runs) == 6 and all(len(list(r.iterdir())) == 1 for r in runs)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_stops_cleanly_and_loses_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        full = ("method=fullft", "lr=1e-3", "steps=40", "exec.checkpoint_s=0.1")
        arguments = (*LONG, *full, f"exec.runs_dir={disk}/runs")
        first = cli(*arguments, cwd=tmp_path, check=False)  # a checkpoint of 2.6 MB does not fit
        assert first.returncode == 2
        assert "No space left" in first.stderr and "Traceback" not in first.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        cli(*arguments, cwd=tmp_path)
        (result,) = disk.glob("runs/*/result.json")
        assert json.loads(result.read_text())["result"]["state"] == "done"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


SMALL = (
    "model=tiny64-skills",
    "dataset=skills",  # rows of different lengths, so processes have different numbers of tokens
    *("dataset.n_test=10", "dataset.n_test_curve=3", "batch_size=8", "precision=fp64"),
    *(f"eps={EPS}", "exec.micro_batch_size=2", "exec.workers=1", "exec.threads=1"),
)
EXPERTS = ("model=tiny64-experts", "dataset=dialect_smoke", "batch_size=4")
KINDS = {
    "adapters": ("method=lora", "method.rank=4", "lr=3e-3"),
    "full": ("method=fullft", "lr=1e-3", "clip_norm=0.5"),
    "adapters of experts": (*EXPERTS, "method=lora", "method.rank=4"),
    "experts": (*EXPERTS, "method=fullft", "lr=1e-3"),
    "rewards": (  # 21 prompts of 8 completions: a process repeats one, which does not count
        *("model=tiny64-skilled", "dataset=words", "objective=policy_gradient", "batch_size=168"),
        *("group_size=8", "max_new_tokens=6", "method=fullft", "lr=1e-3"),
        "exec.micro_batch_size=24",
    ),
}


def trained(folder, size, kinds):
    """Train one update of each kind in one launch: kind -> its result, and its records."""
    one = (*SMALL, "steps=1", f"exec.runs_dir={folder}/runs", f"exec.world_size={size}")
    requests = [compose_request([*one, *KINDS[kind]]) for kind in kinds]
    store = RunStore(folder / "runs")
    store.prepare()
    points = [p for r in requests for p in r.points]
    local.run_points(points, store, requests[0].exec, lambda event: None)
    leaders = {store.owner(p.id, 1)["pid"] for p in points}
    assert len(leaders) == 1, "one set of processes trains them all"
    return {k: {**store.result(p.id), **store.records(p.id)[-1]} for k, p in zip(kinds, points)}


def same(a, b, relative=ROUNDING[1]):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return all(same(a[k], b[k], relative) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y, relative) for x, y in zip(a, b))
    return a == b or a == pytest.approx(b, rel=relative, abs=1e-14)


COMMON = ("grad_norm", "norm_delta", "tokens", "curve", "spectra")
OF_LOSSES = (*COMMON, "train_nll", "test_nll", "nll_start", "code_nats")
OF_REWARDS = (
    *(*COMMON, "reward", "reward_se", "test_reward", "reward_start", "surrogate"),
    *("answer_tokens", "flat_groups", "cut_off"),
)


@pytest.mark.parametrize(
    "kinds",
    [("adapters", "full"), pytest.param(tuple(KINDS)[2:], marks=pytest.mark.full)],
    ids=["dense", "experts and rewards"],
)
def test_two_processes_make_the_update_of_one_in_float64(tmp_path, kinds):
    one, two = (trained(tmp_path / str(n), n, kinds) for n in (1, 2))
    for kind in kinds:
        for name in OF_REWARDS if kind == "rewards" else OF_LOSSES:
            assert same(one[kind][name], two[kind][name]), (kind, name)
        assert one[kind]["grad_norm"] > 0.03
        assert kind == "rewards" or two[kind]["train_nll"] != two[kind]["test_nll"]
        assert two[kind]["backend"] == "transformers on cpu, 2 processes"
        assert one[kind]["backend"] == "transformers on cpu"


SHARED = (*SMALL, *KINDS["full"], "exec.checkpoint_s=0.2", "action=run")


def spread(steps):
    """The smallest power of ten within which the run agrees with itself on moved weights."""
    (point,) = compose_request([*SMALL, *KINDS["full"], f"steps={steps}"]).points
    base = models.load(point.spec.model, [], "fp64")
    rows, found = data.load(point.spec.dataset, []), []
    for weights in (base, moved(base)):
        of = Trained(finetune([point.spec], weights, rows))
        losses = [record["train_nll"] for record in of.records[point.id]]
        found.append([losses, of.results[point.id]["spectra"]])
    return next(10.0**-k for k in range(15, 0, -1) if same(*found, 10.0**-k))


NIGHTLY = (pytest.mark.nightly, pytest.mark.timeout(1800))


@pytest.mark.full
@pytest.mark.parametrize(
    ("sizes", "steps"), [((2, 1), 60), pytest.param((4, 2, 1), 150, marks=NIGHTLY)]
)
def test_killed_it_resumes_with_fewer_processes(tmp_path, sizes, steps):
    """With each number of processes in turn; all but the last are killed with kill -9, and of the
    first ones one that follows is killed alone before."""
    arguments, at, store = (*SHARED, f"steps={steps}"), 0, RunStore(tmp_path / "runs")

    def saved_after(at):
        wait_for(lambda: max(furthest(tmp_path), default=0) > at)
        (rid,) = store.existing()
        slots = store.folder(rid) / "checkpoint"
        return rid, wait_for(lambda: [k for k in described(slots) if k > at])[-1]

    for size in sizes[:-1]:
        command = start(*arguments, f"exec.world_size={size}", cwd=tmp_path)
        rid, now = saved_after(at)
        if at == 0:
            attempts = store.last_attempt(rid)
            leader = store.owner(rid, attempts)["pid"]
            started = psutil.Process(command.pid).children()
            next(p for p in started if p.pid != leader).kill()
            wait_for(lambda n=attempts + 1: store.last_attempt(rid) == n)
        _, at = saved_after(now)
        os.killpg(command.pid, signal.SIGKILL)
        command.wait()
        assert store.result(rid) is None
        assert list((store.folder(rid) / "checkpoint").glob("*.parts"))
    cli(*arguments, f"exec.world_size={sizes[-1]}", cwd=tmp_path)
    env = store.env(rid)
    assert env["resumed_from_step"] >= at > 0 and env["processes"] == sizes[-1]
    result, records = store.result(rid), kept(tmp_path)[rid]
    cli(*arguments, f"exec.runs_dir={tmp_path}/whole", cwd=tmp_path)
    store = RunStore(tmp_path / "whole")
    (rid,) = store.existing()
    whole = {r["step"]: (r["train_nll"], r.get("test_nll")) for r in store.records(rid)}
    records = {step: values[:2] for step, values in records.items()}
    assert sorted(records) == list(range(1, steps + 1))
    first = range(1, 11)
    assert same([records[k] for k in first], [whole[k] for k in first], ROUNDING[10])
    bound = 100 * spread(steps)
    assert bound < 1e-4 and same(records, whole, bound)
    assert same(result["spectra"], store.result(rid)["spectra"], bound)
    assert result["resumed_in_other_company"] and not store.result(rid)["resumed_in_other_company"]


def little_memory(pack, exec_, resume):
    """Train as usual until more than one row is in a forward pass, after five that succeed: the last
    process runs out of memory, the others wait for it, and there is a checkpoint to resume from."""
    mesh = Mesh(dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),)))
    was, done = torch.autograd.backward, []

    def backward(*args, **kwargs):
        done.append(None)
        full = exec_.rows_of(pack[0].batch_size) > 1
        if full and mesh.rank == mesh.size - 1 and len(done) > 5:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has"
            )
        return was(*args, **kwargs)

    with mock.patch("torch.autograd.backward", backward):
        yield from TorchTrainer(None, mesh)(pack, exec_, resume)


@pytest.mark.full
def test_memory_that_runs_out_in_one_process_halves_the_rows_of_all(tmp_path):
    """The others wait in a collective, so all are started again; the run equals that of one process."""
    found, two = [], ("exec.world_size=2", "exec.checkpoint_s=0")
    for name, trainer, more in (("one", None, ()), ("two", f"{__name__}:little_memory", two)):
        folder, events = tmp_path / name, []
        request = compose_request(
            [*SMALL, f"exec.runs_dir={folder}", "steps=4", *KINDS["adapters"], *more]
        )
        store, rid = RunStore(folder), request.points[0].id
        store.prepare()
        local.run_points(request.points, store, request.exec, events.append, trainer)
        found.append({r["step"]: r["train_nll"] for r in store.records(rid)})
    (note,) = [e["note"] for e in events if "note" in e]
    assert note.startswith("out of memory in learning (asked for 2.50 GiB): 1 run(s) of tiny64")
    assert note.endswith("from the last checkpoint with 1 of each run.")
    assert store.state(rid) == "done" and store.last_attempt(rid) == 2
    assert store.end(rid, 1) == {"state": "stopped", "cause": note}
    env = store.env(rid)
    assert env["resumed_from_step"] >= 1 and env["micro_batch_size"] == 1
    assert same(*found, ROUNDING[10]) and list(found[0]) == [1, 2, 3, 4]


def test_processes_that_cannot_share_a_run_are_refused():
    (point,) = compose_request([*SMALL, "method=fullft"]).points
    for size, given, why in ((3, (), "batch_size=8"), (5, ("batch_size=5",), "rank 4 nor a side")):
        (other,) = compose_request([*SMALL, *KINDS["adapters"], *given]).points
        nodes = Cluster(kind="slurm", gpus=size)
        with pytest.raises(SpecError, match=f"exec.world_size={size} .*{why}"):
            check_world_size([other.spec], Exec(world_size=size), nodes, Hardware("box"))
    machine = Hardware("box", gpus=2, gpu_name="H100", gpu_memory_gib=80.0)

    def check(cluster=None, **settings):
        check_world_size([point.spec], Exec(**settings), cluster or Cluster(), machine)

    check(world_size=2)
    check(world_size=4, cluster=Cluster(kind="slurm", gpus=4))  # its nodes are looked at later
    with pytest.raises(SpecError, match=r"exec\.world_size=4: .* machine has 2 \(H100\)"):
        check(world_size=4)
    with pytest.raises(SpecError, match=r"exec\.world_size times exec\.workers"):
        check(world_size=2, workers=2)


def test_a_check_of_this_machine_that_was_cut_off_goes_on_and_its_hardware_file_is_used(tmp_path):
    check = ("action=check_gpu", "exec.threads=1")
    with start(*check, cwd=tmp_path) as first:
        for line in first.stderr:
            if line.startswith("speed"):  # in its third part
                first.send_signal(signal.SIGKILL)
    (folder,) = (tmp_path / "reports" / "check_gpu").iterdir()
    before = {p.name: p.stat().st_mtime_ns for p in (folder / "cases").iterdir()}
    assert len(before) >= 8 and "checks passed" in (folder / "page.md").read_text()
    predicted = (folder / "predicted.json").read_bytes()
    cases = json.loads(cli(*check, "format=json", cwd=tmp_path).stdout)["cases"]
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "cases").iterdir()}
    assert after.items() >= before.items()  # nothing is measured twice
    assert (folder / "predicted.json").read_bytes() == predicted
    assert len(cases) == len(after) and not [c for c in cases.values() if "failed" in c]
    text = (folder / "page.md").read_text()
    assert "6 of 6 checks passed" in text and "## Not measured" not in text
    assert ("This machine has no GPU" in text) != torch.cuda.is_available()
    titles = ("The card", "Correctness", "Speed", "Packs")
    assert all(f"## {title}\n" in text for title in titles)
    (file,) = (folder / "conf" / "hardware").iterdir()
    plan = ("+sweep=lr_ratio", "scale=small", "action=plan", f"hardware={file.stem}")
    planned = cli("--config-dir", folder / "conf", *plan, "format=json", cwd=tmp_path)
    assert json.loads(planned.stdout)["hardware"]["name"] == file.stem
    (pack,) = (folder / "cases").glob("*fp64_against_its_runs*")  # a failed check has its name
    pack.write_text(json.dumps({**json.loads(pack.read_text()), "difference": 0.5}))
    failed = cli(*check, cwd=tmp_path, check=False)
    assert failed.returncode == 1 and "failed: a pack in fp64" in failed.stdout
