"""What a command adds to a sweep: fresh seeds, rounds, failed runs; nothing to unknown data."""

import json

import pytest

from lorasweep.cli import answer
from lorasweep.cli.actions import act
from lorasweep.cli.answer import all_points
from lorasweep.cli.finished_runs import noise_floor, train_again
from lorasweep.cli.plans import status, status_text
from lorasweep.cli.train import CHANGED_CLAIMS
from lorasweep.errors import TrainingError
from lorasweep.launch import local
from lorasweep.store.run_store import RunStore
from tests.planted import Valley, analysed

SMOKE = ("+sweep=lr_ratio", "scale=smoke")
FIVE = "sweep.arms.fullft.lr=[3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3]"


@pytest.fixture
def numbers_only(monkeypatch):
    monkeypatch.setattr(answer, "judge", analysed)


@pytest.mark.slow  # fits hundreds of curves
@pytest.mark.usefixtures("numbers_only")
def test_fresh_seeds_are_trained_and_failed_runs_wait_for_retry(compose, capsys, fake_trainer):
    trainer = fake_trainer(Valley(3).nll)
    act(compose(*SMOKE, "sweep.replicate.seeds=[5,6]", FIVE), trainer)
    assert len(trainer.trained) == 5 + 3 + 2 * 3 * 2  # at the three best rates of each arm
    trainer.fail = lambda s: s.method.name == "lora" and s.lr == 5e-3
    arguments = (*SMOKE, "exec.pack_size=1", "batch_size=2")
    assert act(compose(*arguments), trainer) == 1
    errors = capsys.readouterr().err
    assert "planted failure" in errors and "exec.retry=true" in errors
    count = len(trainer.trained)
    assert act(compose(*arguments), trainer) == 1 and len(trainer.trained) == count
    trainer.fail = lambda s: False
    assert act(compose(*arguments, "exec.retry=true"), trainer) == 0
    assert len(trainer.trained) == count + 1


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.usefixtures("numbers_only")
def test_a_sweep_is_extended_in_rounds_that_are_recorded_and_counted(compose, capsys, fake_trainer):
    """An open claim, its suggested runs as round 2, and no fourth look."""
    valley = Valley(10, noise=0.05)
    grid = ("sweep.arms.lora.rank=[4,8]", "sweep.replicate.seeds=[1,2,3]", "sweep.rounds=3")
    base = [*SMOKE, "format=json", *grid, *valley.rates()]
    trainer = fake_trainer(valley.nll)
    run, extend = compose(*base), compose(*base, "action=extend")
    assert act(run, trainer) == 0
    first = json.loads(capsys.readouterr().out)
    ratio = next(v for v in first["verdicts"] if v["claim"] == "ratio")
    assert ratio["outcome"] == "UNDECIDED" and "97.8%" in ratio["why"]
    before = len(trainer.trained)
    assert act(extend, trainer) == 0
    text = capsys.readouterr().out
    assert len(trainer.trained) == before  # adding starts nothing
    with pytest.raises(Exception, match="have not finished"):
        act(extend, trainer)
    assert act(run, trainer) == 0
    second = json.loads(capsys.readouterr().out)
    added = len(trainer.trained) - before
    assert added == int(text.rsplit("round 2: ", 1)[1].split()[0]) > 0
    again = next(v for v in second["verdicts"] if v["claim"] == "ratio")
    assert again["estimate"]["n"] > ratio["estimate"]["n"]
    assert act(compose(*base, "sweep.claims.ratio.margin=[1,100]", "format=json"), trainer) == 0
    changed = json.loads(capsys.readouterr().out)["verdicts"]
    assert {v["exploratory"] for v in changed} == {CHANGED_CLAIMS}
    assert act(extend, trainer) == 0 and act(run, trainer) == 0
    capsys.readouterr()
    with pytest.raises(Exception, match="optional stopping"):
        act(extend, trainer)


REWARD = {"name": "reward", "higher_is_better": True, "label": "reward"}


def trained(compose, fake_trainer, nll, reward, *overrides):
    """A sweep whose runs are finished, with rewards beside their NLLs; and its store."""
    request = compose(*SMOKE, *overrides)
    store = RunStore(request.exec.runs_dir)
    trainer = fake_trainer(nll, more=lambda s: {"metric": REWARD, "reward": reward(s)})
    local.run_points(request.points, store, request.exec, lambda event: None, trainer)
    return request, store


def test_the_highest_reward_is_the_best_and_its_noise_is_the_metrics(compose, fake_trainer):
    """The NLLs of these runs would choose the other end of the rates."""
    how = (lambda s: 1 + s.lr, lambda s: 100 * s.lr, "sweep.replicate.seeds=[7]", FIVE)
    request, store = trained(compose, fake_trainer, *how)
    fresh = {
        p.spec.lr for p in all_points(request, store) if p.spec.seed == 7 and p.arm == "fullft"
    }
    assert fresh == {1.2e-3, 2.4e-3, 4.8e-3}
    now = status(request, store, request.points)
    best = {a["arm"]: a["best"] for a in now["arms"]}["fullft"]
    assert best["reward"] == 100 * 4.8e-3 and "test_nll" not in best
    assert "0.4800" in "".join(status_text(request, now))
    seeds = ("sweep.axes.seed=[0,1]", "sweep.arms.fullft.lr=[1e-3]", "~sweep.arms.lora")
    request, store = trained(compose, fake_trainer, lambda s: 1.0, lambda s: 2.0 * s.seed, *seeds)
    assert noise_floor(request.points, store) == 2**0.5


def test_a_run_is_not_trained_again_on_other_data(compose, fake_trainer):
    request, store = trained(compose, fake_trainer, lambda s: 2.0, lambda s: 1.0)
    other = fake_trainer(lambda s: 2.0, more=lambda s: {"data_sha256": "other"})
    with pytest.raises(TrainingError, match=r"other data \(fingerprint planted\).*\(other\)"):
        train_again(request.points[0].spec, store, request.exec, other)
