"""Which runs go into which job, what it requests and refuses; how its workers start in a container."""

import dataclasses
from pathlib import Path

import pytest

from lorasweep.errors import ClusterError
from lorasweep.launch.local import container_of
from lorasweep.launch.slurm import submit
from lorasweep.launch.slurm.queue import Partition
from lorasweep.plan.planner import make_plan, place
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.store import claims
from lorasweep.store.run_store import RunStore
from tests.world import ROOT, cli

GPUS = Partition(8, 2880.0)


def slurm_cluster(**settings):
    return Cluster(kind="slurm", **settings)


def test_jobs_hold_every_pack_once_and_as_much_work_as_asked(packs):
    flops_s = sum(p.flops for p in packs) / 3600  # an hour of work in all
    for least, most, minutes in (10, 16, {"work_min": 5}), (1, 2, {"work_min": 60, "work_max": 60}):
        cluster = slurm_cluster(**minutes)
        tasks = submit.group(packs, cluster, flops_s)
        assert sorted(id(p) for t in tasks for p in t) == sorted(map(id, packs))
        assert least <= len(tasks) <= most
        longest = max(sum(p.flops for p in t) / flops_s / 60 for t in tasks)
        assert longest <= max(cluster.work_min, cluster.work_max) + 1e-9
    tasks = submit.group(packs, slurm_cluster(runs_per_job=8), 1e9)
    n_runs = [sum(len(p.points) for p in t) for t in tasks]
    assert max(n_runs) <= 8 and sum(n_runs) == 24
    four = slurm_cluster(gpus=4, work_min=0.01, work_max=0.01)
    tasks = submit.group(packs, four, 1e6)  # a pack for each worker
    assert all(len(t) >= 4 for t in tasks[:-1]) and sum(map(len, tasks)) > 4


def test_a_job_requests_what_its_packs_need(packs):
    tasks = submit.group(packs, slurm_cluster(work_min=10), 1e7)

    def needed(flops_s=1e7, **settings):
        return submit.resources_for(tasks, slurm_cluster(**settings), flops_s, GPUS)

    two = needed(cpus=3, workers=2)
    assert (two.cpus, two.workers) == (6, 2) and 1 < two.mem_gib < 4 and 15 < two.time_min <= 2880
    given = needed(mem_gib=7, time_min=33)
    assert (given.mem_gib, given.time_min) == (7, 33)
    for more in ({"flops_s": 1.0}, {"time_min": 3000}):
        assert needed(**more).time_min == 2880  # the partition's limit; the job requeues itself


@pytest.mark.parametrize(
    ("world_size", "node_gpus", "settings", "expected"),
    [
        (1, 8, {"gpus": 8}, (1, 8, 16, 8)),
        (4, 8, {"gpus": 8}, (1, 8, 16, 2)),
        (4, 8, {"gpus": 1, "cpus": 3}, (1, 4, 12, 1)),
        (16, 8, {"gpus": 1}, (2, 8, 16, 1)),
        (16, 8, {"gpus": 1, "gpus_per_node": 4}, (4, 4, 8, 1)),
        (8, 6, {"gpus": 1}, (2, 4, 8, 1)),
        (4, 8, {"gpus": 0}, (1, 0, 8, 1)),  # on processors, for tests
    ],
)
def test_a_job_has_as_few_nodes_as_hold_its_processes(world_size, node_gpus, settings, expected):
    partition = dataclasses.replace(GPUS, gpus=node_gpus)
    cluster = slurm_cluster(**settings)
    n = submit.resources_for([], cluster, 1.0, partition, world_size)
    assert (n.nodes, n.gpus, n.cpus, n.workers) == expected


def test_jobs_train_each_run_as_the_plan_places_it(compose, tmp_path):
    """Three models, on 1 to 16 GPUs."""

    def planned(*overrides):
        models = "sweep.axes.model=[llama-3.2-1b,llama-3.1-8b,qwen3-32b]"
        given = ("scale=paper", "cluster=slurm", "hardware=h100", models, *overrides)
        request, store = compose("+sweep=lr_ratio", *given), RunStore(tmp_path / "runs")
        now = make_plan(request.points, store, request.exec, submit.hardware_of(request))
        return request, submit.jobs_of(request, store, now.todo, now, GPUS)

    request, jobs = planned()
    sizes = [j.needed.nodes * j.needed.gpus for j in jobs]
    assert sorted(set(sizes)) == [1, 2, 4, 16] and sizes == sorted(sizes, reverse=True)
    assert jobs[0].needed.nodes == 2 and jobs[0].exec.threads == request.cluster.cpus
    small = [j.needed.mem_gib for j in jobs if j.needed.gpus == 1]
    assert len(small) > 1 and 2 * min(small) < max(small)  # of the small model, and of 8B
    hardware, seen = submit.hardware_of(request), []
    for job, task in ((j, task) for j in jobs for task in j.tasks):
        how = {"gpus": job.exec.world_size, "checkpointing": (job.exec.activation_checkpointing,)}
        assert how["gpus"] == job.needed.nodes * job.needed.gpus
        for pack in task:
            rows, specs = pack.micro_batch_size, [p.spec for p in pack.points]
            assert rows == job.exec.micro_batch_size
            assert not place(specs[-1], hardware, len(specs), rows, **how).why
            seen += [s.id for s in specs]
    assert sorted(seen) == sorted(p.id for p in request.points)


@pytest.mark.parametrize("given", ["kind=pbs", "container_kind=docker", "cpus=0", "work_min=0"])
def test_settings_without_a_meaning_are_refused(compose, given):
    with pytest.raises(ClusterError, match=f"^cluster.{given.partition('=')[0]}="):
        compose("+sweep=lr_ratio", "cluster=slurm", f"cluster.{given}")


def test_the_profiles_compose_and_letters_that_stdout_lacks_are_escaped(tmp_path):
    how = {"cwd": tmp_path, "env": {"PYTHONIOENCODING": "ascii"}}
    for path in sorted((ROOT / "slurm/cluster").glob("*.yaml")):
        given = ("--config-dir", ROOT / "slurm", "+sweep=lr_ratio", f"cluster={path.stem}")
        said = cli(*given, "--cfg", "job", "cluster.account='é'", **how).stdout
        assert f"name: {path.stem}" in said and "account: \\xe9" in said


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


def test_folders_that_jobs_cannot_use_are_refused(slurm):
    """Local to a machine; with a colon, at which the path of imports splits."""
    slurm("here", sinfo="main*|(null)|infinite|")
    for folder, why in (("/tmp/runs", r"cluster\.shared=true"), ("/me/10:00/runs", "has a ':'")):
        with pytest.raises(ClusterError, match=why):
            submit.prepare(Cluster(kind="slurm"), Path(folder))


# ---------------------------------------------------------------- containers (tests/slurm starts workers in stand-ins)


NGC = "nvcr.io#nvidia/pytorch:25.06-py3"
ENV = {"PYTHONPATH": "/code", "OMP_NUM_THREADS": "4", "OTHER": "x"}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """`made(image, **settings)`: the container of a cluster, in a folder with runs and an image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HOME", raising=False)
    for name in ("runs", "data", "bin"):
        (tmp_path / name).mkdir()
    for name in ("x.sif", "x.sqsh"):
        (tmp_path / name).write_text("")
    (tmp_path / "bin" / "apptainer").write_text("")
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def make(image, runs="runs", **settings):
        cluster = Cluster(kind="slurm", container=image, **settings)
        folders = {"runs_dir": str(tmp_path / runs), "reports_dir": str(tmp_path / "reports")}
        models, data = [str(tmp_path / "models")], [str(tmp_path / "data")]
        return container_of(cluster, Exec(**folders, models_dir=models, data_dir=data))

    return make


def test_the_image_says_the_kind_of_container_and_must_be_there(made, tmp_path):
    for image, by_srun in {"x.sif": False, "x.sqsh": True, NGC: True}.items():
        assert made(image).by_srun == by_srun
    assert not made("docker://x", container_kind="apptainer").by_srun
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert made(NGC, "link").folders[:2] == [f"{tmp_path}/link", f"{tmp_path}/runs"]  # both paths
    with pytest.raises(ClusterError, match=r"gone\.sif: there is"):
        made("gone.sif")


def test_folders_that_exist_are_mounted_at_their_paths(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "bin"))  # as a line of cluster.setup sets it
    mounts = [f"{tmp_path}/{name}:{tmp_path}/{name}" for name in ("runs", "data")]
    mounts += [f"{tmp_path}:{tmp_path}", f"{tmp_path}/bin:{tmp_path}/bin", "/a:/a", "/b:/c:ro"]
    inside = "env PYTHONNOUSERSITE=1 PYTHONPATH=/code {hub}OMP_NUM_THREADS=4 python3".format
    pyxis = made(NGC, container_mounts=["/a", "/b:/c:ro"])
    assert pyxis.srun() == [
        f"--container-image={NGC}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={tmp_path}",
        "--no-container-entrypoint",
    ]
    assert " ".join(pyxis.python(ENV, ["OMP_NUM_THREADS"])) == inside(hub="")
    apptainer = made("x.sif", container_mounts=["/a", "/b:/c:ro"])
    assert apptainer.srun() == []
    start = ["apptainer", "exec", "--nv", "--bind", ",".join(mounts), "--pwd", str(tmp_path)]
    words = apptainer.python({**ENV, "HF_HOME": "/hub"}, ["OMP_NUM_THREADS"])
    assert words == [*start, "x.sif", *inside(hub="HF_HOME=/hub ").split()]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="no apptainer on the PATH"):
        apptainer.python(ENV)
