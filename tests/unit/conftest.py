"""One planted sweep with its whole report, made once: what study pages and tests of tasks read; and
a hub that is out of reach."""

import shutil
from pathlib import Path

import pytest

from lorasweep.cli.actions import act
from tests import small_hub
from tests.conftest import FakeTrainer
from tests.planted import FULL, LORA, START, World
from tests.world import compose_request


@pytest.fixture(scope="session")
def rank_answer(tmp_path_factory):
    """A folder with `runs` and `reports` of the sweep `rank` at scale smoke, 96 updates."""
    folder, world = tmp_path_factory.mktemp("rank"), World(lambda spec: 0.7)
    sweep = ("+sweep=rank", "scale=smoke", "sweep.replicate.seeds=[1,2,3]", "sweep.axes.steps=96")
    places = (f"exec.runs_dir={folder}/runs", f"exec.reports_dir={folder}/reports")
    rates = (("fullft", FULL), ("lora", LORA))
    grids = (f"sweep.arms.{arm}.lr=${{around:{best:g},7,2}}" for arm, best in rates)
    request = compose_request([*sweep, *grids, *places, "format=json"])
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
    small_hub.offline(tmp_path, monkeypatch)
    return tmp_path / "datasets"
