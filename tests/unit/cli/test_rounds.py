"""What a command adds to a sweep and when: fresh seeds, rounds that are counted, failed runs."""

import json

import pytest

from lorasweep.cli import answer
from lorasweep.cli.actions import act
from lorasweep.errors import SpecError
from tests.planted import Valley, analysed

pytestmark = pytest.mark.slow  # fits hundreds of curves


SMOKE = ("+sweep=lr_ratio", "scale=smoke")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(answer, "judge", analysed)


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        ("sweep.arms.fullft.lr=[3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3]", 5 + 3 + 2 * 3 * 2),
        ("sweep.replicate.arms=[lora]", 3 + 3 + 3 * 2),  # fresh seeds for LoRA only
    ],
)
def test_fresh_seeds_train_at_the_three_best_rates_of_each_arm_that_is_named(
    compose, fake_trainer, change, trained
):
    trainer = fake_trainer(Valley(3).nll)
    act(compose(*SMOKE, "sweep.replicate.seeds=[5,6]", change), trainer)
    assert len(trainer.trained) == trained
    with pytest.raises(SpecError, match=r"arms names 'lorra'.*fullft"):
        compose(*SMOKE, "sweep.replicate.seeds=[5,6]", "sweep.replicate.arms=[lorra]")


def test_a_failed_run_is_named_kept_apart_and_tried_again_only_on_request(
    compose, capsys, fake_trainer
):
    trainer = fake_trainer(Valley(3).nll, fail=lambda s: s.method.name == "lora" and s.lr == 5e-3)
    arguments = (*SMOKE, "exec.pack_size=1")
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
    assert "round 2:" in text and "lr " in text
    assert len(trainer.trained) == before  # adding starts nothing
    with pytest.raises(Exception, match="have not finished"):
        act(extend, trainer)
    assert act(run, trainer) == 0
    second = json.loads(capsys.readouterr().out)
    added = len(trainer.trained) - before
    assert added == int(text.rsplit("round 2: ", 1)[1].split()[0]) > 0
    again = next(v for v in second["verdicts"] if v["claim"] == "ratio")
    assert again["estimate"]["n"] > ratio["estimate"]["n"]
    assert act(extend, trainer) == 0 and act(run, trainer) == 0
    with pytest.raises(Exception, match="optional stopping"):
        act(extend, trainer)


@pytest.mark.full
def test_rounds_are_not_extended_under_other_margins(compose, fake_trainer):
    grid = (
        *("sweep.arms.lora.rank=[4]", "sweep.replicate.seeds=[1,2]"),
        "sweep.arms.fullft.lr=[3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3]",
        "sweep.arms.lora.lr=[3e-3,6e-3,1.2e-2,2.4e-2,4.8e-2]",
    )
    base, trainer = [*SMOKE, *grid], fake_trainer(Valley(10, noise=0.02).nll)
    for extra in ([], ["action=extend"], []):
        assert act(compose(*base, *extra), trainer) == 0
    with pytest.raises(Exception, match="claims, margins or rounds were changed"):
        act(compose(*base, "sweep.claims.ratio.margin=[5,30]", "action=extend"), trainer)
