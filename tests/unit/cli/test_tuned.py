"""`+sweep=tune` on planted losses: its answer, what it keeps, and how a budget ends it."""

import json
import math
import re

import pytest

from lorasweep.cli import finished_runs
from lorasweep.cli.actions import act
from lorasweep.cli.answer import all_points, judged
from lorasweep.errors import SpecError
from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore
from tests.conftest import FakeTrainer
from tests.planted import FULL_BEST, Rewards, Valley

TUNE = ("+sweep=tune", "scale=smoke", "steps=64")


class Slow(Valley):
    """A short run's loss is half way to that of the full run."""

    def nll(self, spec):
        return super().nll(spec) + (0.5 if spec.steps < 64 else 0.0)


@pytest.fixture
def tune(compose, capsys, fake_trainer):
    """Run the search; returns its answer, its runs and the trainer."""

    def run(world, *arguments, trainer=None):
        request = compose(*TUNE, *arguments)
        trainer = trainer or fake_trainer(world.nll)
        capsys.readouterr()
        assert act(request, trainer) == 0
        store = RunStore(request.exec.runs_dir)
        out = capsys.readouterr()
        return out.out, out.err, all_points(request, store), trainer

    return run


@pytest.mark.slow
def test_the_search_finds_planted_optima_and_keeps_only_weights_around_the_best(tune, compose):
    world, request = Slow(10, noise=2e-4), compose(*TUNE)
    text, _, points, _ = tune(world)
    _, base, full, lora, gap, use, left = text.splitlines()
    names = ("base", "full fine-tuning", "LoRA rank 8")
    assert all(line.startswith(name) for name, line in zip(names, (base, full, lora)))
    assert gap.startswith("LoRA at rank 8 gives up ") and gap.endswith("less than 5%")
    assert use.startswith("use: LoRA rank 8 on attention+mlp, learning rate 1.")
    assert left == "open: nothing"
    assert max(p.spec.seed for p in points) < 6  # decided before the last seed
    store, full = RunStore(request.exec.runs_dir), judged(request, points)
    short = [p for p in points if p not in full]
    (judged_runs,) = store.root.parent.glob("reports/tune*/results.json")
    assert {p.spec.steps for p in short} == {8}
    assert json.loads(judged_runs.read_text())["runs"] == len(full)
    kept = [p for p in full if (store.folder(p.id) / checkpoint.WEIGHTS).exists()]
    for arm, best in (("fullft", FULL_BEST), ("lora", 10 * FULL_BEST)):
        by_lr = {}
        for p in (p for p in full if p.arm == arm):
            by_lr.setdefault(p.spec.lr, []).append((world.nll(p.spec), p.id))
        assert min(by_lr) < best < max(by_lr)
        # the best run at each of three neighbouring rates
        mine = {p.spec.lr: p.id for p in kept if p.arm == arm}
        means = {lr: sum(v for v, _ in runs) / len(runs) for lr, runs in by_lr.items()}
        assert len(mine) == 3 and min(means, key=means.get) in mine
        assert all(rid == min(by_lr[lr])[1] for lr, rid in mine.items())
    assert not list(store.root.glob("*/end"))


@pytest.mark.slow
def test_a_budget_ends_the_search_and_a_larger_one_goes_on(tune):
    world = Valley(10, noise=2e-4)
    nothing, said, _, trainer = tune(world, "budget=3runs")
    assert not nothing and "budget=3runs ended before a full run" in said
    text, err, few, trainer = tune(world, "budget=14runs", trainer=trainer)
    assert "used" in text.splitlines()[-1] and "of 14runs" in text
    assert "open: the learning rate of full fine-tuning" in text
    assert "search of 2 arm(s)" in err
    count = len(trainer.trained)
    _, _, again, _ = tune(world, "budget=14runs", trainer=trainer)
    assert len(trainer.trained) == count and [p.id for p in again] == [p.id for p in few]
    _, _, more, _ = tune(world, "budget=60runs", trainer=trainer)
    assert [p.id for p in more[: len(few)]] == [p.id for p in few]
    assert len(trainer.trained) == len(more) > count


class Hurt(Valley):
    """Training raises the loss, from FakeTrainer's 3; `short`: that of a short run."""

    def __init__(self, full=1.0, short=1.0):
        super().__init__(10)
        self.by = {True: short, False: full}

    def nll(self, spec):
        return 3.0 + self.by[spec.steps < 64] * (spec.lr + abs(math.log(spec.lr / 1e-3)) / 1e6)


@pytest.mark.parametrize(
    "world, budget, arms",
    [
        (Hurt(), "60runs", "[]"),
        (Hurt(short=-1.0), "9runs", "[]"),  # the full runs overfit
        (Hurt(math.nan, math.nan), "60runs", "[]"),
    ],
)
def test_where_nothing_trains_the_answer_is_the_base(tune, tmp_path, world, budget, arms):
    arguments = (f"budget={budget}", f"arms={arms}", f"out={tmp_path}/best")
    text = tune(world, *arguments)[0]
    assert "no learning rate trains" in text and "use: the base as it is" in text
    found = json.loads(tune(world, *arguments, "format=json")[0])["answer"]
    assert found["method"] is found["rank"] is found["lr"] is None
    assert not (tmp_path / "best").exists()


def test_a_rewarded_search_is_answered_in_rewards_and_a_plan_says_what_one_takes(
    tune, compose, capsys
):
    world = Rewards(lambda spec, step: 0.8, lambda spec: 1e-3, lambda spec: 0.01)
    trainer = FakeTrainer(world.nll, curve=world.curve, more=world.more)
    asked = ("model=tiny64-knows", "dataset=bandit", "objective=policy_gradient", "group_size=4")
    asked += ("max_new_tokens=1", "budget=9runs", "arms=lora")
    assert "held-out reward" in tune(world, *asked, trainer=trainer)[0].splitlines()[0]
    assert act(compose(*TUNE, "action=plan", "budget=40runs", "out=best")) == 0
    out = capsys.readouterr().out
    assert "search of 2 arm(s): short runs of 8 updates" in out and "runs of 64 updates" in out


@pytest.mark.parametrize(
    "asked, says",
    [
        (("+sweep=lr_ratio", "scale=smoke", "budget=2h"), r"^budget is only for .*\+sweep=tune"),
        (("model=tiny64", "out=b"), r"^out is only for .*action=fleet .*\+sweep=tune"),
        (("action=plan", "+sweep=lr_ratio", "out=b"), "^out is only for"),
        ((*TUNE, "arms=lorra"), "arm 'lorra' not found. Did you mean 'lora'"),
        ((*TUNE, "out=mine"), "has files"),
        ((*TUNE, "action=extend"), "a search adds runs itself"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(compose, fake_trainer, tmp_path, monkeypatch, asked, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/own.txt").touch()
    with pytest.raises(SpecError, match=says):
        act(compose(*asked), fake_trainer(Valley(10).nll))


def arm(rank, loss):
    rate = {"value": 1e-3, "low": 9e-4, "high": 1.1e-3}
    named = {"method": "lora" if rank else "fullft", "rank": rank, "best_tried": 1e-3, "flags": []}
    found = {"best_lr": rate, "loss": loss, "gap_percent": None, "regret_percent": 0.5}
    return {**named, **found, "known": True}


@pytest.mark.parametrize(
    "losses, outcome, lowest, method, open_, why",
    [
        # full fine-tuning loses 1.0; LoRA is used unless it is known or measured to lose more
        ({None: 1.0, 8: 1.04}, "SUPPORTED", 0.0, "lora", [], "smallest rank within 1%"),
        ({None: 1.0, 8: 1.04}, "UNDECIDED", 0.0, "lora", ["4 seeds"], "smallest rank within 1%"),
        ({None: 1.0, 8: 1.06}, "UNDECIDED", 0.0, "fullft", ["4 seeds"], "gives up 6% of the gain"),
        ({None: 1.0, 8: 1.04}, "REFUTED", 0.0, "fullft", [], "gives up 4% of the gain"),
        # the base stays only for a reason that was measured, and an ended budget is none
        ({8: 2.1}, None, 1e-3, None, [], "lowers the loss on validation and test rows"),
        ({}, None, 1e-3, None, ["did not allow"], "tried from 1.0e-03 on, lowers"),
        ({}, None, 1e-8, None, [], "no learning rate"),
    ],
)
def test_what_is_used_is_what_was_measured(compose, losses, outcome, lowest, method, open_, why):
    verdicts = [{"outcome": outcome, "needed": "4 seeds", "why": ""}] if outcome else []
    results = {"arms": [arm(*a) for a in losses.items()], "best_rank": 8 if losses else None}
    results |= {"start": 2.0, "allowed": 0.05, "verdicts": verdicts, "chosen_on": "validation"}
    found = finished_runs.conclude(compose(*TUNE), results, lowest)
    assert (found["method"], found["lr"] is None) == (method, method is None)
    left = [text for text in found["open"] if "no run of full" not in text]
    assert len(left) == len(open_) and all(words in text for words, text in zip(open_, left))
    assert re.search(why, found["why"])
