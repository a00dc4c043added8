"""Which runs go into which job, what a job requests, and what is refused before submitting."""

import dataclasses
import os
from pathlib import Path

import pytest

from lorasweep.errors import ClusterError, SpecError, StoreError
from lorasweep.launch.slurm import planning, submit
from lorasweep.launch.slurm.queue import Partition
from lorasweep.plan.planner import make_plan, place
from lorasweep.spec.execution import Cluster
from lorasweep.store import checkpoint, claims
from lorasweep.store.run_store import RunStore
from tests.world import ROOT, cli

GPUS = Partition("gpu", True, 64, 512_000, 8, 2880.0, frozenset({"n1"}))
NODES = dataclasses.replace(GPUS, cpus=128, memory_mib=2_000_000, nodes=4)


def slurm_cluster(**settings):
    return Cluster(kind="slurm", **settings)


def test_jobs_hold_every_pack_once_and_as_much_work_as_asked(packs):
    flops_s = sum(p.flops for p in packs) / 3600  # an hour of work in all
    for least, most, minutes in (10, 16, {"work_min": 5}), (1, 2, {"work_min": 60, "work_max": 60}):
        cluster = slurm_cluster(**minutes)
        tasks = planning.group(packs, cluster, flops_s)
        assert sorted(id(p) for t in tasks for p in t) == sorted(map(id, packs))
        assert least <= len(tasks) <= most
        longest = max(sum(p.flops for p in t) / flops_s / 60 for t in tasks)
        assert longest <= max(cluster.work_min, cluster.work_max) + 1e-9
    tasks = planning.group(packs, slurm_cluster(runs_per_job=8), 1e9)
    n_runs = [sum(len(p.points) for p in t) for t in tasks]
    assert max(n_runs) <= 8 and sum(n_runs) == 24
    four = slurm_cluster(gpus=4, work_min=0.01, work_max=0.01)
    tasks = planning.group(packs, four, 1e6)  # a pack for each worker
    assert all(len(t) >= 4 for t in tasks[:-1]) and sum(map(len, tasks)) > 4


def test_a_job_requests_what_its_packs_need(packs):
    tasks = planning.group(packs, slurm_cluster(work_min=10), 1e7)

    def needed(flops_s=1e7, **settings):
        return planning.resources_for(tasks, slurm_cluster(**settings), flops_s, GPUS)

    two = needed(cpus=3, workers=2)
    assert (two.cpus, two.workers) == (6, 2) and 1 < two.mem_gib < 4 and 15 < two.time_min <= 2880
    given = needed(mem_gib=7, time_min=33)
    assert (given.mem_gib, given.time_min) == (7, 33)
    assert needed(flops_s=1.0).time_min == 2880  # the partition's limit; the job requeues itself
    for name, value, limit in ("gpus", 9, 8), ("cpus", 65, 64), ("mem_gib", 600, 500):
        cluster = slurm_cluster(**{name: value})
        with pytest.raises(ClusterError, match=f"{name}={value}.* {limit}"):
            planning.check_fits(planning.resources_for([], cluster, 1.0, GPUS), cluster, GPUS)


@pytest.mark.parametrize(
    ("world_size", "node_gpus", "settings", "expected"),
    [
        (1, 8, {"gpus": 8}, (1, 8, 1, 16, 8)),
        (4, 8, {"gpus": 8}, (1, 8, 1, 16, 2)),
        (4, 8, {"gpus": 1, "cpus": 3}, (1, 4, 1, 12, 1)),
        (16, 8, {"gpus": 1}, (2, 8, 8, 16, 1)),
        (16, 8, {"gpus": 1, "gpus_per_node": 4}, (4, 4, 4, 8, 1)),
        (8, 6, {"gpus": 1}, (2, 4, 4, 8, 1)),
        (4, 8, {"gpus": 0}, (1, 0, 1, 8, 1)),  # on processors, for tests
    ],
)
def test_a_job_has_as_few_nodes_as_hold_its_processes(world_size, node_gpus, settings, expected):
    partition = dataclasses.replace(GPUS, gpus=node_gpus)
    cluster = slurm_cluster(**settings)
    n = planning.resources_for([], cluster, 1.0, partition, world_size)
    assert (n.nodes, n.gpus, n.tasks, n.cpus, n.workers) == expected


def test_jobs_train_each_run_as_the_plan_places_it(compose, tmp_path):
    """Three models, on 1 to 16 GPUs."""

    def planned(*overrides):
        models = "sweep.axes.model=[llama-3.2-1b,llama-3.1-8b,qwen3-32b]"
        given = ("scale=paper", "cluster=slurm", "hardware=h100", models, *overrides)
        request, store = compose("+sweep=lr_ratio", *given), RunStore(tmp_path / "runs")
        now = make_plan(request.points, store, request.exec, planning.hardware_of(request))
        return request, planning.jobs_of(request, store, now.todo, now, NODES)

    request, jobs = planned()
    sizes = {j.needed.nodes * j.needed.gpus: j for j in jobs}
    assert list(sizes) == [1, 2, 4, 16] and sizes[16].needed.nodes == 2
    small = [j.needed.mem_gib for j in jobs if j.needed.gpus == 1]
    assert len(small) > 1 and 2 * min(small) < max(small)  # of the small model, and of 8B
    assert sizes[16].needed.tasks == 8 and sizes[16].tasks[0].exec.threads == request.cluster.cpus
    hardware, seen = planning.hardware_of(request), []
    for task in (task for j in jobs for task in j.tasks):
        size, again = task.exec.world_size, (task.exec.activation_checkpointing,)
        planning.check_fits(sizes[size].needed, request.cluster, NODES)
        for pack in task.packs:
            rows, specs = pack.micro_batch_size, [p.spec for p in pack.points]
            assert rows == task.exec.micro_batch_size
            how = {"gpus": size, "checkpointing": again}
            assert not place(specs[-1], hardware, len(specs), rows, **how).why
            seen += [s.id for s in specs]
    assert sorted(seen) == sorted(p.id for p in request.points)
    with pytest.raises(ClusterError, match=r"nodes=2 .* exec\.max_gpus=8"):
        one = dataclasses.replace(NODES, nodes=1)
        planning.check_fits(sizes[16].needed, request.cluster, one)
    with pytest.raises(SpecError, match=r"exec\.compile=true"):
        planned("exec.compile=true", "sweep.axes.model=[qwen3-32b]")


def test_settings_without_a_meaning_are_refused(compose):
    wrong = {
        **{"kind": "pbs", "container_kind": "docker", "container_mounts": "[/a]", "cpus": "0"},
        **{"gpus": "-1", "runs_per_job": "0", "work_min": "0", "work_max": "1"},
        "options.array": "3",
        # characters that a shell reads
        **{"partition": "'gpu\nrm -r x'", "container": '"a;b"', "account": '"a\\"b"'},
        **{"constraint": "'$(id)'", "setup": "['module load x\nid']", "qos": "'a`id`'"},
    }
    for name, given in wrong.items():
        with pytest.raises(ClusterError, match=f"^cluster.{name}="):
            compose(
                "+sweep=lr_ratio", "cluster=slurm", f"{'+' * ('.' in name)}cluster.{name}={given}"
            )


def test_the_profiles_compose(tmp_path):
    for path in sorted((ROOT / "slurm/cluster").glob("*.yaml")):
        given = ("--config-dir", ROOT / "slurm", "+sweep=lr_ratio", f"cluster={path.stem}")
        assert f"name: {path.stem}" in cli(*given, "--cfg", "job", cwd=tmp_path).stdout


def test_a_run_of_a_machine_that_died_is_found_by_watching(tmp_path, compose, monkeypatch):
    """Its heartbeat does not change, and nobody else knows."""
    monkeypatch.setattr(claims, "SILENCE_S", 0.5)
    monkeypatch.setattr(submit, "SILENCE_S", 0.5)
    store = RunStore(tmp_path / "runs")
    store.prepare()
    point = compose("scale=smoke").points[0]
    with monkeypatch.context() as m:
        m.setenv("LORASWEEP_HOST", "elsewhere")
        store.claim(point.spec)
    shown = []
    assert store.state(point.id) == "running" and store.unsure([point.id]) == [point.id]
    submit.watch_others(store, [point], shown.append)
    assert "1 run" in shown[0] and store.state(point.id) == "interrupted"


def test_folders_that_jobs_cannot_use_are_refused(packs, tmp_path, monkeypatch):
    """Local to this machine; with a colon, at which the path of imports splits; on a full disk."""
    mounts = [("/", "ext4"), ("/scratch", "tmpfs"), ("/home", "nfs4")]
    for folder, why in (("/scratch/runs", "tmpfs"), ("/tmp/runs", r"cluster\.shared=true")):
        with pytest.raises(ClusterError, match=why):
            submit.check_visible(Path(folder), frozenset({"n1", "n2"}), mounts)
    submit.check_visible(Path("/home/me/runs"), frozenset({"n1", "n2"}), mounts)
    submit.check_visible(Path("/tmp/runs"), frozenset({os.uname().nodename}), mounts)
    with pytest.raises(ClusterError, match=r"has a ':' in its name"):
        submit.prepare(Cluster(kind="slurm"), Path("/home/me/2026-11-29T10:00/runs"))
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 2**20)
    with pytest.raises(StoreError, match=r"0\.00 GiB .* 0\.\d\d GiB"):
        submit.check_disk(tmp_path, packs, 4)
