"""Curves without a data fingerprint are judged as they are, and never continued."""

import shutil

import pytest

from lorasweep.cli import answer, finished_runs
from lorasweep.cli.actions import act
from lorasweep.cli.finished_runs import train_again
from lorasweep.errors import StoreError, TrainingError
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import import_table, load_runs

SWEEP = ("+sweep=lr_ratio", "scale=smoke", "format=json")
MORE = "sweep.axes.seed=[0,1]"
ADVICE = r"would continue lr curves .*exec\.runs_dir=.*/runs-2"


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(answer, "judge", lambda *_, **__: "{}")


@pytest.fixture
def trainer(fake_trainer):
    return fake_trainer(lambda spec: 2.0)


@pytest.fixture
def old(compose, trainer, tmp_path):
    """The table of a sweep from before results held a fingerprint, imported into a run folder."""
    before = compose(*SWEEP, f"exec.runs_dir={tmp_path}/before")
    trainer.more = lambda spec: {"data_sha256": None}
    assert act(before, trainer) == 0
    load_runs(tmp_path / "before").to_parquet(tmp_path / "table.parquet")
    import_table(tmp_path / "runs", tmp_path / "table.parquet")
    trainer.more, trainer.trained = (lambda spec: {}), []
    return trainer


def test_a_kept_table_is_judged_again_and_not_continued_and_another_curve_is_trained(old, compose):
    assert act(compose(*SWEEP), old) == 0 and not old.trained
    for action in ("run", "plan"):
        with pytest.raises(StoreError, match=ADVICE):
            act(compose(*SWEEP, MORE, f"action={action}"), old)
    assert not old.trained
    assert act(compose(*SWEEP, "sweep.arms.lora.rank=[4,8]"), old) == 0
    assert len(old.trained) == 3


def test_a_sweep_of_sweeps_is_checked_before_its_first_part_starts(old, compose):
    request = compose("+sweep=study", "sweep.parts=[rank,lr_ratio]", *SWEEP[1:])
    lost = request.parts[1].points[0].id
    shutil.rmtree(RunStore(request.exec.runs_dir).folder(lost))
    with pytest.raises(StoreError, match=ADVICE):
        act(request, old)
    assert not old.trained


def test_no_round_is_added_to_kept_curves(old, compose, monkeypatch):
    request = compose(*SWEEP, "action=extend")
    runs = [{"like": request.points[0].id, "lr": 1e-3, "seed": 9}]
    monkeypatch.setattr(finished_runs.answer, "next_round", lambda *_: (runs, []))
    with pytest.raises(StoreError, match=ADVICE):
        act(request, old)
    assert not (RunStore(request.exec.runs_dir).root / ".rounds").exists()


def test_a_run_is_not_trained_again_on_other_data(compose, trainer):
    request = compose(*SWEEP)
    assert act(request, trainer) == 0
    spec, store = request.points[0].spec, RunStore(request.exec.runs_dir)
    trainer.more = lambda spec: {"data_sha256": "other"}
    with pytest.raises(TrainingError, match=r"other data \(fingerprint planted\).*\(other\)"):
        train_again(spec, store, request.exec, trainer)
