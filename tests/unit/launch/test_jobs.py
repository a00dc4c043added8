"""Which runs go into which job, what a job asks Slurm for, and what is refused before one is sent."""

import dataclasses
import subprocess
import sys

import pytest

from lorasweep.errors import ClusterError, SpecError
from lorasweep.launch.slurm import (
    client,
    partitions,
    planning,
    resources,
)
from lorasweep.launch.slurm.partitions import Partition
from lorasweep.plan.estimate import make_plan
from lorasweep.plan.gpu.placement import Placement, place
from lorasweep.spec.execution import Cluster
from lorasweep.store.run_store import RunStore
from tests.world import ROOT

GPUS = Partition("gpu", True, 64, 512_000, 8, 2880.0, frozenset({"n1"}))


def test_jobs_hold_every_pack_once_and_as_much_work_as_asked(packs):
    some = packs()
    flops_s = sum(p.flops for p in some) / 3600  # an hour of work in all
    for cluster, least, most in (
        (Cluster(kind="slurm", work_min=5), 10, 16),
        (Cluster(kind="slurm", work_min=60, work_max=60), 1, 2),
    ):
        tasks = resources.group(some, cluster, flops_s)
        assert sorted(id(p) for t in tasks for p in t) == sorted(map(id, some))
        assert least <= len(tasks) <= most
        work = [sum(p.flops for p in t) / flops_s / 60 for t in tasks]
        assert all(w <= max(cluster.work_min, cluster.work_max) + 1e-9 for w in work)


def test_runs_per_job_is_kept(packs):
    tasks = resources.group(packs(), Cluster(kind="slurm", runs_per_job=8), 1e9)
    assert max(sum(len(p.points) for p in t) for t in tasks) <= 8
    assert sum(len(p.points) for t in tasks for p in t) == 24


def test_a_job_with_several_workers_gets_a_pack_for_each(packs):
    tasks = resources.group(
        packs(), Cluster(kind="slurm", gpus=4, work_min=0.01, work_max=0.01), 1e6
    )
    assert all(len(t) >= 4 for t in tasks[:-1]) and sum(map(len, tasks)) > 4


def test_a_job_asks_for_what_its_packs_need(packs):
    some = packs()
    tasks = resources.group(some, Cluster(kind="slurm", work_min=10), 1e7)
    ask = resources.resources_for(tasks, Cluster(kind="slurm", cpus=3, workers=2), 1e7, GPUS)
    assert ask.cpus == 6 and ask.workers == 2 and 1 < ask.mem_gib < 4 and 15 < ask.time_min <= 2880
    set_ = resources.resources_for(tasks, Cluster(kind="slurm", mem_gib=7, time_min=33), 1e7, GPUS)
    assert (set_.mem_gib, set_.time_min) == (7, 33)
    assert (
        resources.resources_for(tasks, Cluster(kind="slurm"), 1.0, GPUS).time_min == 2880
    )  # the partition's limit; the job requeues itself


@pytest.mark.parametrize(
    "given, said",
    [
        ({"gpus": 9}, "cluster.gpus=9"),
        ({"cpus": 65}, "needs 65 CPU cores"),
        ({"mem_gib": 600}, "needs 600 GiB"),
        ({"time_min": 9999}, "allows at most 2880"),
    ],
)
def test_what_no_node_can_hold_is_refused(given, said):
    cluster = Cluster(kind="slurm", **given)
    with pytest.raises(ClusterError, match=said):
        resources.check_fits(resources.resources_for([], cluster, 1.0, GPUS), cluster, GPUS)


def test_a_job_has_as_few_nodes_as_hold_its_processes():
    def asked(world_size, partition=GPUS, **settings):
        cluster = Cluster(kind="slurm", **settings)
        needed = resources.resources_for([], cluster, 1.0, partition, world_size)
        return needed.nodes, needed.gpus, needed.tasks, needed.cpus, needed.workers

    assert asked(1, gpus=8) == (1, 8, 1, 16, 8)
    assert asked(4, gpus=8) == (1, 8, 1, 16, 2)
    assert asked(4, gpus=1, cpus=3) == (1, 4, 1, 12, 1)
    assert asked(16, gpus=1) == (2, 8, 8, 16, 1)
    assert asked(16, gpus=1, gpus_per_node=4) == (4, 4, 4, 8, 1)
    six = dataclasses.replace(GPUS, gpus=6)
    assert asked(8, six, gpus=1) == (2, 4, 4, 8, 1)
    assert asked(4, gpus=0) == (1, 0, 1, 8, 1)  # on processors, for tests


def planned(compose, tmp_path, partition, *more):
    """The jobs of three models at scale paper, whose runs take one to 16 GPUs."""
    request = compose(
        "+sweep=lr_ratio",
        "scale=paper",
        "cluster=slurm",
        "hardware=h100",
        "sweep.axes.model=[llama-3.2-1b,llama-3.1-8b,qwen3-32b]",
        *more,
    )
    store = RunStore(tmp_path / "runs")
    now = make_plan(request.points, store, request.exec, planning.hardware_of(request))
    return request, planning.jobs_of(request, store, now.todo, now, partition)


NODES = dataclasses.replace(GPUS, cpus=128, memory_mib=2_000_000, nodes=4)


def test_jobs_train_each_run_as_the_plan_places_it(compose, tmp_path):
    request, jobs = planned(compose, tmp_path, NODES)
    sizes = {j.needed.nodes * j.needed.gpus: j for j in jobs}
    assert list(sizes) == [1, 2, 4, 16] and sizes[16].needed.nodes == 2
    small = [j.needed.mem_gib for j in jobs if j.needed.gpus == 1]
    assert len(small) > 1 and 2 * min(small) < max(small)  # of the small model, and of 8B
    assert sizes[16].needed.tasks == 8 and sizes[16].tasks[0].exec.threads == request.cluster.cpus
    hardware, seen = planning.hardware_of(request), []
    for task in (task for j in jobs for task in j.tasks):
        resources.check_fits(sizes[task.exec.world_size].needed, request.cluster, NODES)
        for pack in task.packs:
            assert pack.micro_batch_size == task.exec.micro_batch_size
            specs = [p.spec for p in pack.points]
            again = (task.exec.activation_checkpointing,)
            placed = place(
                specs,
                hardware,
                pack.micro_batch_size,
                gpus=task.exec.world_size,
                checkpointing=again,
            )
            assert isinstance(placed, Placement), placed
            seen += [s.id for s in specs]
    assert sorted(seen) == sorted(p.id for p in request.points)


@pytest.mark.full
def test_runs_that_the_partition_cannot_hold_are_refused(compose, tmp_path):
    one = dataclasses.replace(NODES, nodes=1)
    request, jobs = planned(compose, tmp_path, one)
    with pytest.raises(ClusterError, match=r"needs 2 nodes .* exec\.max_gpus=8"):
        for same in jobs:
            resources.check_fits(same.needed, request.cluster, one)
    with pytest.raises(SpecError, match=r"takes \d+ GiB a GPU .* It fits with"):
        planned(compose, tmp_path, NODES, "+sweep.axes.batch_size=[1]")
    with pytest.raises(SpecError, match=r"exec\.compile=true works in one process only"):
        planned(compose, tmp_path, NODES, "exec.compile=true")
    _, jobs = planned(compose, tmp_path, NODES, "exec.world_size=16")
    assert {(j.needed.nodes, j.needed.gpus) for j in jobs} == {(2, 8)}


def test_partitions_are_known_by_name():
    with pytest.raises(ClusterError, match=r"partition 'gpx' not found\. Did you mean 'gpu'"):
        partitions.partition_of(Cluster(partition="gpx"), {"gpu": GPUS})
    assert partitions.partition_of(Cluster(), {"gpu": GPUS}) is GPUS


def test_what_sinfo_says_is_read(monkeypatch):
    said = "gpu*|64|512000|gpu:a100:8(S:0-1)|2-00:00:00|n1|\ngpu*|32|256000|gpu:4|2-00:00:00|n2|\nlong|64|9|(null)|infinite|n3|\n"
    monkeypatch.setattr(client, "run", lambda *command: said)
    found = partitions.partitions()
    assert found["gpu"] == Partition(
        "gpu", True, 64, 512_000, 8, 2880.0, frozenset({"n1", "n2"}), 2
    )
    assert found["long"].gpus == 0 and found["long"].time_min == float("inf")
    assert [partitions._minutes(t) for t in ("30", "30:00", "1:30:00", "1-12", "1-00:30:00")] == [
        30,
        30,
        90,
        2160,
        1470,
    ]


@pytest.mark.parametrize(
    "given, said",
    [
        ("cluster.kind=pbs", "cluster.kind 'pbs' not found"),
        ("cluster.cpus=0", "cluster.cpus=0: expected a number above 0"),
        ("cluster.gpus=-1", "cluster.gpus=-1"),
        ("+cluster.options.array=3", "is reserved: lorasweep sets it itself"),
        ("cluster.runs_per_job=0", "or null for the default"),
        (
            "cluster.partition='gpu\nrm -r x'",
            r"cluster\.partition='gpu\\nrm -r x' has a quote, a newline",
        ),
        ('cluster.account="a\\"b"', r"cluster\.account=.* has a quote"),
        ("cluster.constraint='$(id)'", r"cluster\.constraint=.* could read as a command"),
        ("+cluster.options.comment='a`id`'", r"cluster\.options\.comment="),
        ("cluster.setup=['module load x\nid']", r"cluster\.setup has .*one list entry a line"),
    ],
)
def test_settings_that_mean_nothing_are_refused(compose, given, said):
    with pytest.raises(ClusterError, match=said):
        compose("+sweep=lr_ratio", "cluster=slurm", given)


def test_the_profiles_compose(compose):
    for path in sorted((ROOT / "slurm/cluster").glob("*.yaml")):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "lorasweep",
                "--config-dir",
                str(ROOT / "slurm"),
                "+sweep=lr_ratio",
                f"cluster={path.stem}",
                "--cfg",
                "job",
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0 and f"name: {path.stem}" in done.stdout, done.stderr
