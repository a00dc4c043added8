"""What a command adds to a sweep and when: fresh seeds, rounds that are counted, failed runs."""

import json

import pytest

from lorasweep.cli import answer
from lorasweep.cli.actions import act
from tests.planted import Valley, analysed

pytestmark = pytest.mark.slow  # fits hundreds of curves


SMOKE = ("+sweep=lr_ratio", "scale=smoke")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(answer, "judge", analysed)


def test_fresh_seeds_are_trained_and_failed_runs_wait_for_retry(compose, capsys, fake_trainer):
    rates = "sweep.arms.fullft.lr=[3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3]"
    trainer = fake_trainer(Valley(3).nll)
    act(compose(*SMOKE, "sweep.replicate.seeds=[5,6]", rates), trainer)
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
def test_a_sweep_is_extended_in_rounds_that_are_recorded_and_counted(compose, capsys, fake_trainer):
    """An open claim, its suggested runs as round 2, and no fourth look."""
    valley = Valley(10, noise=0.05)
    grid = ("sweep.arms.lora.rank=[4,8]", "sweep.replicate.seeds=[1,2,3]", "sweep.rounds=3")
    base = [*SMOKE, "format=json", *grid, *valley.rates()]
    trainer = fake_trainer(valley.nll)
    run, extend = compose(*base), compose(*base, "action=extend")
    with pytest.raises(Exception, match="have not finished"):
        act(extend, trainer)
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
    with pytest.raises(Exception, match="claims, margins or rounds were changed"):
        act(compose(*base, "sweep.claims.ratio.margin=[5,30]", "action=extend"), trainer)
    assert act(extend, trainer) == 0 and act(run, trainer) == 0
    with pytest.raises(Exception, match="optional stopping"):
        act(extend, trainer)
