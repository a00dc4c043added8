"""What a job's lines are with a container, and where a command cannot submit jobs."""

import io

import pytest

from lorasweep.errors import ClusterError
from lorasweep.launch import local
from lorasweep.launch.slurm import container
from lorasweep.launch.slurm.container import Container, container_of
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.store.run_store import RunStore

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
    for image, kind in {"x.sif": "apptainer", "x.sqsh": "pyxis", NGC: "pyxis"}.items():
        assert made(image).kind == kind
    assert made("docker://x", container_kind="apptainer").kind == "apptainer"
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert made(NGC, "link").folders[:2] == [f"{tmp_path}/link", f"{tmp_path}/runs"]  # both paths
    for given, match in {
        ("gone.sif",): r"gone\.sif: there is",
        (NGC, "runs:old"): "mounted",
    }.items():
        with pytest.raises(ClusterError, match=match):
            made(*given)


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


@pytest.mark.parametrize(
    ("kind", "size", "nodes", "expected"),
    [
        ("pyxis", 1, 1, ["srun 1 on 1: env GPU=0", "srun 1 on 1: env GPU=1"]),
        ("pyxis", 2, 1, ["srun 2 on 1: env GPU=0", "srun 2 on 1: env GPU=1"]),
        ("pyxis", 4, 2, ["srun 4 on 2: env", "srun 4 on 2: env"]),
        ("apptainer", 1, 1, ["apptainer env GPU=0", "apptainer env GPU=1"]),
        ("apptainer", 2, 1, ["apptainer env GPU=0"] * 2 + ["apptainer env GPU=1"] * 2),
        ("apptainer", 4, 2, ["srun 4 on 2: apptainer env"] * 2),
    ],
)
def test_workers_start_inside(tmp_path, monkeypatch, kind, size, nodes, expected):
    """Two workers of `size` processes on `nodes` nodes; each sees GPUs of its own on one node."""
    started = []

    class Process:
        stdout, returncode = (), 0

        def __init__(self, words, env, **pipes):
            k = words.index("env")
            prefix = []
            if words[0] == "srun":
                given = dict(w.partition("=")[::2] for w in words[:k] if w.startswith("--"))
                prefix = [f"srun {given['--ntasks']} on {given['--nodes']}:"]
                assert ("--container-image" in given) == (kind == "pyxis")
            prefix += ["apptainer"] if "exec" in words[:k] else []
            gpus = [w.replace("CUDA_VISIBLE_DEVICES", "GPU") for w in words if "CUDA_" in w]
            started.append(" ".join([*prefix, "env", *gpus]))
            assert (size == 1) == (not any(w.startswith("MASTER_PORT=") for w in words))

            self.stdin = io.StringIO()

        def wait(self, timeout=None):
            return 0

        def poll(self):
            return None

    store = RunStore(tmp_path / "runs")
    (store.root / ".jobs").mkdir(parents=True)
    monkeypatch.setattr(local.subprocess, "Popen", Process)
    monkeypatch.setattr(local, "devices_of", lambda k, n: {"CUDA_VISIBLE_DEVICES": str(k)})
    monkeypatch.setattr(container.shutil, "which", lambda name: name)
    with local.Workers(store, size, nodes, Container("i", kind, [], [])) as workers:
        workers.run({}, 2, 2, 1, print)
    assert started == expected
