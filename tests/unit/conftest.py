"""One planted sweep with its whole report, made once: what study pages and tests of tasks read; and
a hub that is out of reach."""

import shutil
from pathlib import Path

import pytest

from lorasweep.cli.actions import act
from tests.conftest import FakeTrainer
from tests.planted import GRIDS, START, World
from tests.world import compose_request

RHO = 0.7


@pytest.fixture(scope="session")
def rank_answer(tmp_path_factory):
    """A folder with `runs` and `reports` of the sweep `rank` at scale smoke, 96 updates."""
    folder, world = tmp_path_factory.mktemp("rank"), World(lambda spec: RHO)
    sweep = ("+sweep=rank", "scale=smoke", "sweep.replicate.seeds=[1,2,3]", "sweep.axes.steps=96")
    places = (f"exec.runs_dir={folder}/runs", f"exec.reports_dir={folder}/reports")
    request = compose_request([*sweep, *GRIDS, *places, "format=json"])
    trainer = FakeTrainer(world.nll, start=START, curve=world.curve, more=world.more)
    assert act(request, trainer) == 0
    return folder


@pytest.fixture
def reports(rank_answer, tmp_path) -> Path:
    """A copy of its report as `rank-smoke`, to be changed."""
    (made,) = (rank_answer / "reports").iterdir()
    shutil.copytree(made, tmp_path / "reports" / "rank-smoke")
    return tmp_path / "reports"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Give `datasets` an empty cache and no network; return the cache."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path / "datasets"
