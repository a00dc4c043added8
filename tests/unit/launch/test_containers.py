"""How the workers of a job start inside a container (tests/slurm starts them, with stand-ins)."""

import pytest

from lorasweep.errors import ClusterError
from lorasweep.launch.local import container_of
from lorasweep.spec.execution import Cluster, Exec

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
