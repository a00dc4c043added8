"""Runs that several processes train: as one process trains them, killed and resumed, and refused."""

import os
import signal

import psutil
import pytest

from lorasweep.data import load as data
from lorasweep.errors import SpecError
from lorasweep.launch import local
from lorasweep.launch.trainer import finetune
from lorasweep.launch.worker import check_world_size
from lorasweep.models import load as models
from lorasweep.plan.detect import Hardware
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.store.checkpoint import described
from lorasweep.store.run_store import RunStore
from tests.integration.test_interruptions import furthest, kept, start
from tests.training import EPS, ROUNDING, Trained, moved
from tests.world import cli, compose_request, wait_for

pytestmark = pytest.mark.slow

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


MEASURES = (
    *("train_nll", "test_nll", "nll_start", "grad_norm", "norm_delta", "tokens"),
    *("curve", "spectra", "code_nats"),
)
OF_REWARDS = (
    *("reward", "reward_se", "test_reward", "reward_start", "surrogate", "answer_tokens"),
    *("grad_norm", "norm_delta", "tokens", "flat_groups", "cut_off", "curve", "spectra"),
)


@pytest.mark.parametrize(
    "kinds",
    [("adapters", "full"), pytest.param(tuple(KINDS)[2:], marks=pytest.mark.full)],
    ids=["dense", "experts and rewards"],
)
def test_two_processes_make_the_update_of_one_in_float64(tmp_path, kinds):
    one, two = (trained(tmp_path / str(n), n, kinds) for n in (1, 2))
    for kind in kinds:
        for name in OF_REWARDS if kind == "rewards" else MEASURES:
            assert same(one[kind][name], two[kind][name]), (kind, name)
        assert one[kind]["grad_norm"] > 0.03
        assert kind == "rewards" or two[kind]["train_nll"] != two[kind]["test_nll"]
        assert two[kind]["backend"] == "transformers on cpu, 2 processes"
        assert one[kind]["backend"] == "transformers on cpu"


LONG = (*SMALL, *KINDS["full"], "exec.checkpoint_s=0.2", "action=run")


def killed_and_resumed(folder, sizes, steps):
    """Train with each number of processes in turn; all but the last are killed with kill -9, and of
    the first ones one that follows is killed alone before."""
    folder.mkdir()
    arguments, at = (*LONG, f"steps={steps}"), 0
    store = RunStore(folder / "runs")

    def saved_after(at):
        wait_for(lambda: max(furthest(folder), default=0) > at)
        (rid,) = store.existing()
        slots = store.folder(rid) / "checkpoint"
        return rid, wait_for(lambda: [k for k in described(slots) if k > at])[-1]

    for size in sizes[:-1]:
        command = start(*arguments, f"exec.world_size={size}", cwd=folder)
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
    cli(*arguments, f"exec.world_size={sizes[-1]}", cwd=folder)
    env = store.env(rid)
    assert env["resumed_from_step"] >= at > 0 and env["processes"] == sizes[-1]
    return store.result(rid), kept(folder)[rid]


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
    result, records = killed_and_resumed(tmp_path / "killed", sizes, steps)
    cli(*LONG, f"steps={steps}", f"exec.runs_dir={tmp_path}/whole", cwd=tmp_path)
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


@pytest.mark.full
def test_memory_that_runs_out_in_one_process_halves_the_rows_of_all(tmp_path):
    """The others wait in a collective, so all are started again; the run equals that of one process."""
    found, two = [], ("exec.world_size=2", "exec.checkpoint_s=0")
    for name, trainer, more in (
        ("one", None, ()),
        ("two", "tests.integration.planted_memory:trainer", two),
    ):
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
