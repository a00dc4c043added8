"""Copies for Weights & Biases: a kill at any place leaves one copy of a run, and a whole one."""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from lorasweep.errors import SpecError, StoreError
from lorasweep.sweep.grid import Point
from lorasweep.tracking.wandb import check, mirror
from tests.world import tiny_spec

POINT = Point("lora", tiny_spec())


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Return a store of one finished run, and a W&B that writes a line a record."""

    def init(id, dir=None, **_):
        n = len(list(tmp_path.rglob("offline-run-*")))
        file = Path(dir or tmp_path, "wandb", f"offline-run-{n}-{id}", "run")
        file.parent.mkdir(parents=True)

        def log(values, step):
            with file.open("a") as f:
                f.write(f"{step}\n")

        return SimpleNamespace(log=log, summary={}, finish=lambda: log({}, "end"))

    errors, api = SimpleNamespace(Error=ConnectionError), SimpleNamespace(api_key=None)
    fake = SimpleNamespace(init=init, Settings=lambda **_: None, errors=errors, api=api)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("lorasweep.tracking.wandb.check_installed", lambda *_: None)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "runs").mkdir()
    records = [{"step": k, "loss": 1.0} for k in (1, 2)]
    given = {"result": {"test_nll": 1.0}, "folder": tmp_path / "runs", "records": records}
    return SimpleNamespace(**{name: lambda run, v=value: v for name, value in given.items()})


@pytest.mark.parametrize("place", ["records", "write_text", "rename"])
def test_a_kill_leaves_one_whole_copy(world, tmp_path, monkeypatch, place):
    """While the records are copied; before the mark; between the mark and the move."""

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        kill = Mock(side_effect=SystemExit)
        patch.setattr(world if place == "records" else Path, place, kill)
        mirror([POINT], world, "g")
    assert [mirror([POINT], world, "g") for _ in range(2)][1] == 0
    (copy,) = (tmp_path / "wandb").rglob("run")
    assert copy.parent.parent == tmp_path / "wandb"
    assert copy.read_text().split() == ["1", "2", "end"]


def test_what_wandb_lacks_is_said_before_training_and_costs_no_answer(
    world, monkeypatch, tmp_path, capsys
):
    """A folder; a key; at last the network."""
    (tmp_path / "file").touch()
    with (
        monkeypatch.context() as m,
        pytest.raises(StoreError, match=r"WANDB_DIR=.*it is no folder"),
    ):
        m.setenv("WANDB_DIR", f"{tmp_path}/file")
        mirror([POINT], world, "g")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(SpecError, match="wandb login"):
        check()
    wandb = sys.modules["wandb"]
    wandb.api.api_key, wandb.init = "key", Mock(side_effect=ConnectionError("no network"))
    assert mirror([POINT], world, "g") == 0 and "no network" in capsys.readouterr().err
