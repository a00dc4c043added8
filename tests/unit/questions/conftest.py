"""Ask a question of planted runs; the answer ends at the analysis, except where a report is asked for."""

import pytest

from lorasweep.cli import answer
from tests.planted import START, analysed, answer_to

SMOKE = ("scale=smoke", "format=json")


@pytest.fixture
def ask(compose, capsys, fake_trainer, monkeypatch):
    """ask(sweep, world, *overrides): the answer as JSON, and its verdicts by claim."""

    def run(sweep, world, *overrides, report=False):
        request = compose(f"+sweep={sweep}", *SMOKE, "sweep.replicate.seeds=[1,2,3]", *overrides)
        trainer = fake_trainer(world.nll, start=START, curve=world.curve, more=world.more)
        with monkeypatch.context() as patch:
            if not report:
                patch.setattr(answer, "judge", analysed)
            return answer_to(request, trainer, capsys)

    return run


@pytest.fixture
def ask_ratio(compose, capsys, fake_trainer, monkeypatch):
    """The same for `lr_ratio` and a Valley, with fresh seeds at each curve's best rates."""

    def run(valley, *overrides, seeds=(1, 2, 3, 4), report=False):
        request = compose(
            "+sweep=lr_ratio",
            *SMOKE,
            "sweep.arms.lora.rank=[4,8,16]",
            f"sweep.replicate.seeds=[{','.join(map(str, seeds))}]",
            *valley.rates(),
            *overrides,
        )
        trainer = fake_trainer(valley.nll, start=START)
        with monkeypatch.context() as patch:
            if not report:
                patch.setattr(answer, "judge", analysed)
            found = answer_to(request, trainer, capsys)
            if report:  # asked again, nothing is trained twice and the answer is the same
                assert answer_to(request, trainer, capsys) == found
                assert len(trainer.trained) == len(set(trainer.trained))
            return found

    return run
