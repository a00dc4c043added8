"""The Slurm that these tests share: started once, kept by one process of pytest-xdist."""

import json
import os
from pathlib import Path

import pytest

from lorasweep.launch.slurm import queue as commands
from tests.slurm import stand_ins
from tests.slurm.cluster import Slurm, missing_commands

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep these tests in one process: they wait more than they compute."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("slurm"))
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture(scope="session")
def slurm():
    """Give the cluster; MaxArraySize is 6, so that more than five jobs need more than one array."""
    reason = missing_commands()
    if reason and os.environ.get("LORASWEEP_NO_SKIP"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    commands.setting.cache_clear()  # of another cluster, or of a test that invented one
    cluster = Slurm(SLURM_TEST_MAX_ARRAY="6")
    yield cluster
    cluster.stop()
    commands.setting.cache_clear()


@pytest.fixture
def queue(slurm):
    """Give the cluster with an empty queue, and leave one, even after a failed test."""
    yield slurm
    slurm.command("scancel", "--user=root", check=False)
    slurm.start()  # a daemon that died
    slurm.drain(60)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """`inside(kind, *options)`: these options, with a container; its notes are `inside.notes()`."""
    folder = tmp_path / "bin"
    setup = stand_ins.install(folder)
    monkeypatch.chdir(tmp_path)

    def options(kind, *given):
        image = tmp_path / {"apptainer": "image.sif", "pyxis": "image.sqsh"}[kind]
        image.write_text("")
        changed = [o.replace("cluster.setup=[", f"cluster.setup=['{setup}',") for o in given]
        return [*changed, f"cluster.container={image}"]

    def notes():
        return [json.loads(line) for line in (folder / stand_ins.NOTES).read_text().splitlines()]

    options.notes = notes
    return options
