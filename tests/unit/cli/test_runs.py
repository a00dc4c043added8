"""Actions on runs whose losses are planted: fresh seeds, rounds, failed runs, nothing to unknown data;
`+sweep=tune`: its answer, what it keeps, and how a budget ends it. Whatever stands in a store or a table,
questions and actions answer, or say in one line why not; plans, whatever machine they are made on, and
which claims can be decided."""

import dataclasses
import json
import math
import os
import re
from collections import Counter
from unittest.mock import Mock

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.inference import decide
from lorasweep.cli.actions import act
from lorasweep.cli.status import status
from lorasweep.config.compose import shipped_model
from lorasweep.errors import LorasweepError, NotAtScale, SpecError, StoreError, TrainingError
from lorasweep.launch import local
from lorasweep.models.load import load
from lorasweep.plan import detect
from lorasweep.plan.needs import run_flops
from lorasweep.spec.metric import METRICS
from lorasweep.store import checkpoint
from lorasweep.store.exported import table_row
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import question
from lorasweep.sweep.search import arm_key
from lorasweep.work import answer, run, search
from lorasweep.work.again import noise_floor, train_again
from lorasweep.work.printed import Display, duration, time_left
from lorasweep.work.run import CHANGED_CLAIMS
from lorasweep.work.search import all_points, judged
from tests.conftest import SMOKE, FakeTrainer
from tests.planted import FULL_BEST, Rewards, Valley, analysed
from tests.world import ROOT, compose_request, planted_end

FIVE = "sweep.arms.fullft.lr=[3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3]"


@pytest.fixture
def numbers_only(monkeypatch):
    monkeypatch.setattr(answer, "judge", analysed)


@pytest.mark.slow  # fits hundreds of curves
def test_fresh_seeds_are_trained_and_failed_runs_wait_for_retry(compose, capsys, numbers_only):
    trainer = FakeTrainer(Valley(3).nll)
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


@pytest.mark.parametrize("cluster", ["local", "slurm"])
@pytest.mark.parametrize(
    ("model", "weights", "refused"),
    [
        ("tiny256-3m", "planted", r"tiny256-3m .*\(planted\) than here \(none\).*3cd646cf4e"),
        ("tiny64", "planted", r"tiny64 .*\(planted\) than here \(59411e8f\)"),
        ("tiny64", "one planted", r"tiny64 .*\(planted\) than here \(59411e8f\)"),
        ("tiny64", None, ""),
    ],
)
def test_imported_runs_are_not_joined_by_runs_on_another_base(
    compose, tmp_path, monkeypatch, model, weights, refused, cluster
):
    """A base from a recipe differs by machine; runs on both could not be judged together."""
    spec = shipped_model(model)
    here = load(spec, []).sha256 if model == "tiny64" else ""
    one = {"one planted": lambda s: "planted" if s.lr == 6e-4 else here, None: lambda s: here}
    digest = one.get(weights, lambda s: weights)
    trainer = FakeTrainer(Valley(3).nll, more=lambda s: {"base_sha256": digest(s)})
    asked = (*SMOKE, f"model={model}", f"exec.models_dir=[{tmp_path}/m]", FIVE)
    few, there = "sweep.arms.lora.lr=[5e-3]", f"exec.runs_dir={tmp_path}/there"
    request = compose(*asked, few)
    run.train(request, RunStore(request.exec.runs_dir), trainer)
    act(compose(*asked, few, "action=export", f"out={tmp_path}/runs.parquet"))
    act(compose("action=import", f"table={tmp_path}/runs.parquet", there))
    monkeypatch.setattr(run, "submit", Mock(side_effect=SpecError("submitted")))
    request, count = compose(*asked, there, f"cluster={cluster}"), len(trainer.trained)
    if refused:
        with pytest.raises(StoreError, match=refused):
            run.train(request, RunStore(request.exec.runs_dir), trainer)
        assert len(trainer.trained) == count
    elif cluster == "slurm":
        with pytest.raises(SpecError, match="submitted"):
            run.train(request, RunStore(request.exec.runs_dir), trainer)
    else:
        assert act(request, trainer) == 0 and len(trainer.trained) > count
    if weights != "one planted":
        assert act(compose(*asked, few, there, "action=report")) == 0
    if model == "tiny256-3m" and cluster == "local":  # its own runs go on, whatever is here
        assert act(compose(*asked), trainer) == 0


@pytest.mark.full
@pytest.mark.slow
def test_a_sweep_is_extended_in_rounds_that_are_recorded_and_counted(compose, capsys, numbers_only):
    """An open claim, its suggested runs as round 2, and no fourth look."""
    valley = Valley(10, noise=0.05)
    grid = ("sweep.arms.lora.rank=[4,8]", "sweep.replicate.seeds=[1,2,3]", "sweep.rounds=3")
    base = [*SMOKE, "format=json", *grid, *valley.rates()]
    trainer = FakeTrainer(valley.nll)
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


def trained(compose, nll, reward, *overrides):
    """A sweep whose runs are finished, with rewards beside their NLLs; and its store."""
    request = compose(*SMOKE, *overrides)
    store = RunStore(request.exec.runs_dir)
    metric = {"name": "reward", "higher_is_better": True, "label": "reward"}
    trainer = FakeTrainer(nll, more=lambda s: {"metric": metric, "reward": reward(s)})
    local.run_points(request.points, store, request.exec, lambda event: None, trainer)
    return request, store


def test_the_highest_reward_is_the_best_and_its_noise_is_the_metrics(compose):
    """The NLLs of these runs would choose the other end of the rates."""
    how = (lambda s: 1 + s.lr, lambda s: 100 * s.lr, "sweep.replicate.seeds=[7]", FIVE)
    request, store = trained(compose, *how)
    full = [p.spec for p in all_points(request, store) if p.arm == "fullft"]
    assert {s.lr for s in full if s.seed == 7} == {1.2e-3, 2.4e-3, 4.8e-3}
    now = status(request, store)
    best = {a["arm"]: a["best"] for a in now.value["arms"]}["fullft"]
    assert best["reward"] == 100 * 4.8e-3 and "test_nll" not in best
    assert "0.4800" in now.as_text()
    seeds = ("sweep.axes.seed=[0,1]", "sweep.arms.fullft.lr=[1e-3]", "~sweep.arms.lora")
    request, store = trained(compose, lambda s: 1.0, lambda s: 2.0 * s.seed, *seeds)
    assert noise_floor(request.points, store) == 2**0.5


@pytest.mark.parametrize(
    ("before", "now", "left"),
    [
        ({}, {}, math.nan),  # no progress yet
        ({"a": 0.5}, {"a": 0.5}, math.nan),  # resumed, no progress yet
        ({}, {"a": 0.5}, 350),  # 35 of 40 are left, at 5 in 50 s
        ({"a": 0.5}, {"a": 0.75}, 650),  # resumed: 32.5 at 2.5
        ({}, {"a": 1.0, "b": 0.5}, 15 / 25 * 50),
        ({"b": 0.5}, {"a": 1.0, "b": 1.0}, 0),
    ],
)
def test_the_time_left_is_of_planted_numbers(before, now, left):
    found = time_left({"a": 10.0, "b": 30.0}, before, now, 50.0)
    assert found == pytest.approx(left, nan_ok=True)


def test_status_and_progress_say_the_same_time_left(compose, monkeypatch, capsys):
    """A resumed run, a finished one of other size that ran beside it, and one that was stopped."""
    request = compose(*SMOKE, "steps=8", "~sweep.arms.fullft", "+sweep.axes.batch_size=[2,4,8]")
    store = RunStore(request.exec.runs_dir)
    store.prepare()
    resumed, stopped = (p.spec for p in request.points[:2])
    done = next(p.spec for p in request.points if run_flops(p.spec) != run_flops(resumed))
    for spec, step in ((resumed, 4), (done, None), (stopped, None)):
        store.claim(spec)
        store.write_env(spec.id, 1, {"resumed_from_step": step})
        store.record(spec.id, *({"step": k} for k in range(1, 7)))
    store.finish(done.id, "done", planted_end(done, 3.0, 2.0, [])[1])
    store.write_end(stopped.id, 1, "stopped", "")
    ends = {done: (100, "result.json"), resumed: (160, "metrics.jsonl")}
    for spec, (end, name) in ends.items():
        os.utime(store.attempt(spec.id, 1) / "owner.json", (60, 60))
        os.utime(store.folder(spec.id) / name, (end, end))
    work = {p.id: run_flops(p.spec) for p in request.points}
    left = sum(work.values()) - work[done.id] - work[resumed.id] * 6 / 8
    expected = 100 * left / (work[done.id] + work[resumed.id] * 2 / 8)
    assert status(request, store).value["left_s"] == pytest.approx(expected)
    clock = [60.0]
    monkeypatch.setattr("lorasweep.work.printed.time.monotonic", lambda: clock[0])
    display = Display(request.points, request)
    display.event({"runs": [resumed.id], "step": 4})
    display.event({"run": done.id, "ended": "done", "wall_s": 40.0})
    clock[0] = 160.0
    display.event({"runs": [resumed.id], "step": 6})
    assert f"({duration(expected)} left)" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_is_not_trained_again_on_other_data(compose):
    request, store = trained(compose, lambda s: 2.0, lambda s: 1.0)
    other = FakeTrainer(lambda s: 2.0, more=lambda s: {"data_sha256": "other"})
    with pytest.raises(TrainingError, match=r"other data \(fingerprint planted\).*\(other\)"):
        train_again(request.points[0].spec, store, request.exec, other)


TUNE = ("+sweep=tune", "scale=smoke", "steps=64")


@pytest.fixture
def tune(compose, capsys):
    def run(world, *arguments, trainer=None, status=0):
        request = compose(*TUNE, *arguments)
        trainer = trainer or FakeTrainer(world.nll)
        capsys.readouterr()
        assert act(request, trainer) == status
        store = RunStore(request.exec.runs_dir)
        out = capsys.readouterr()
        return out.out, out.err, all_points(request, store), trainer

    return run


@pytest.mark.slow
def test_the_search_finds_planted_optima_and_keeps_only_weights_around_the_best(tune, compose):
    class Slow(Valley):  # a short run's loss is half way to that of the full run
        def nll(self, spec):
            return super().nll(spec) + (0.5 if spec.steps < 64 else 0.0)

    world, request = Slow(10, noise=2e-4), compose(*TUNE)
    text, _, points, _ = tune(world)
    use, exact, _, base, full, lora, gap, left = text.splitlines()
    names = ("base", "full fine-tuning", "LoRA rank 16")
    assert all(line.startswith(name) for name, line in zip(names, (base, full, lora)))
    assert gap.startswith("LoRA rank 16 on attention+mlp gives up ")
    assert gap.endswith("less than 5%")
    assert use.startswith("Use LoRA rank 16 on attention+mlp, learning rate 1.")
    assert left == "open: nothing" and exact.startswith("exact answers: not counted: the test ro")
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
def test_a_search_of_the_ranks_before_resumes_and_a_new_one_has_those_recommended(
    tune, compose, capsys
):
    """Version 0.3 compared ranks 8 and 32; asking again, killed or finished, trains none of them twice."""
    world, before, typed = Valley(10, noise=2e-4), "lora.rank=8,32", [*TUNE]

    def begun(*more):
        asked = [*typed, *more]
        return search.as_begun(compose(*asked), asked, lambda given: compose(*given))

    def ranks(request):
        return {p.spec.method.rank for p in request.points if p.arm == "lora"}

    assert ranks(begun()) == {16}  # the toy is too narrow for the second rank
    tune(world, before, "budget=9runs")
    capsys.readouterr()
    assert ranks(begun()) == {8} and "resuming the search of ranks 8" in capsys.readouterr().err
    assert begun().title == compose(*typed, before).title
    dora = "+sweep.arms.dora={method: dora, rank: 8, layers: attention+mlp}"
    for more in ("arms=lora", dora, "out=ranking"):  # these words set no rank of LoRA
        assert ranks(begun(more)) == {8}
    assert ranks(begun("lora.rank=16")) == {16}  # what is typed holds
    tune(world, "lora.rank=16", "budget=3runs")  # both have begun: what is recommended
    assert ranks(begun()) == {16} and "resuming" not in capsys.readouterr().err


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


def test_an_arm_with_a_learning_rate_of_its_own_starts_there(tune):
    asked = ("fullft.lr=1e-5", "budget=9runs")
    points = tune(Valley(10), *asked)[2]
    lrs = sorted(p.spec.lr for p in points if p.arm == "fullft" and p.spec.steps == 8)
    assert lrs[:5] == pytest.approx([1e-5 * 4.0**k for k in range(-2, 3)], rel=0.01)


@pytest.mark.parametrize(  # with -1.0 the full runs overfit
    "world, budget", [(Hurt(), 60), (Hurt(short=-1.0), 9), (Hurt(math.nan, math.nan), 60)]
)
def test_where_nothing_trains_the_answer_is_the_base(tune, tmp_path, world, budget):
    arguments = (f"budget={budget}runs", "arms=[]", f"out={tmp_path}/flat")
    text = tune(world, *arguments, status=1)[0]
    assert "no learning rate trains" in text and text.startswith("Use the base as it is")
    assert f"nothing is written to {tmp_path}/flat" in text  # `flat` is a doubt elsewhere
    found = json.loads(tune(world, *arguments, "format=json", status=1)[0])["answer"]
    assert found["method"] is found["rank"] is found["lr"] is None
    assert not (tmp_path / "flat").exists()


DORA = "+sweep.arms.dora={method: dora, rank: 16, layers: attention+mlp}"
PISSA = "+sweep.arms.pissa={method: pissa, rank: 16, layers: attention+mlp}"
OTHER_ALPHA = "+sweep.arms.more={method: lora, rank: 16, layers: attention+mlp, alpha: 128}"
OTHER_DECAY = "+sweep.arms.more={method: lora, rank: 16, layers: attention+mlp, weight_decay: 0.1}"
MATRICES = "+sweep.arms.more={method: fullft, scope: matrices, layers: attention+mlp}"
ON = " on attention+mlp"


class Unequal(Valley):
    """The arms' losses are a tenth of the gain apart: the first arm's is the lowest."""

    def __init__(self, starts):
        super().__init__(10, noise=2e-4)
        self.keys = [arm_key(p)[1] for p in starts]

    def nll(self, spec):
        more = 0.1 * self.keys.index(arm_key(Point("", spec))[1])
        return super().nll(spec) + more + (0.3 if spec.steps < 64 else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ((DORA,), ("full fine-tuning", f"LoRA rank 16{ON}", f"DoRA rank 16{ON}")),
        ((DORA, PISSA, "arms=[dora,pissa]"), (f"DoRA rank 16{ON}", f"PiSSA rank 16{ON}")),
        (("sweep.arms.lora.method=dora",), ("full fine-tuning", f"DoRA rank 16{ON}")),
        ((OTHER_ALPHA,), ("full fine-tuning", *(f"LoRA rank 16{ON}, alpha {a}" for a in (32, 128)))),
        (
            (OTHER_DECAY, "arms=[lora,more]"),
            (f"LoRA rank 16{ON}, weight_decay 0", f"LoRA rank 16{ON}, weight_decay 0.1"),
        ),
        (
            ("lora.layers=attention,mlp", "lora.rank=16", "arms=lora"),
            ("LoRA rank 16 on attention", "LoRA rank 16 on mlp"),
        ),
        (
            ("fullft.scope=matrices", "fullft.layers=attention+mlp"),
            (f"full fine-tuning{ON}", f"LoRA rank 16{ON}"),
        ),
        ((MATRICES,), ("full fine-tuning", f"LoRA rank 16{ON}", f"full fine-tuning{ON}")),
    ],
)  # fmt: skip
def test_each_run_counts_in_the_line_of_its_arm_and_the_best_arm_is_named_and_written(
    tune, compose, tmp_path, monkeypatch, asked, names
):
    """Two methods of one rank, or two settings of one method, were one arm or none."""
    written = []
    monkeypatch.setattr(
        "lorasweep.models.load.write_adapter", lambda folder, spec, *_: written.append(spec)
    )
    starts = compose(*TUNE, *asked).points
    for k, best in enumerate(starts):
        places = (f"exec.runs_dir={tmp_path}/{k}", f"out={tmp_path}/best{k}", "format=json")
        world = Unequal([best, *(p for p in starts if p is not best)])
        out, _, points, _ = tune(world, *asked, *places)
        found, full = json.loads(out), {p.id: p for p in points if p.spec.steps == 64}
        assert sorted(names) == sorted(arm["arm"] for arm in found["arms"])
        of_arm = {arm["arm"]: {arm_key(full[rid]) for rid in arm["runs"]} for arm in found["arms"]}
        assert all(len(keys) == 1 for keys in of_arm.values())
        assert sorted(full) == sorted(rid for arm in found["arms"] for rid in arm["runs"])
        answer = found["answer"]
        assert answer["arm"] == names[k] and of_arm[names[k]] == {arm_key(best)}
        assert answer["method"] == best.spec.method.name
        assert written[-1].method == best.spec.method and not answer["open"]
        assert written[-1].weight_decay == best.spec.weight_decay


def test_a_search_that_the_analysis_cannot_divide_into_arms_is_refused_in_the_plan(compose):
    asked = ("+sweep=lr_ratio", "scale=smoke", "steps=64", "sweep.search={}", "sweep.rounds=5")
    request = compose(*asked, *(f"sweep.arms.{arm}.lr=1e-3" for arm in ("fullft", "lora")))
    with pytest.raises(SpecError, match=r"lr_ratio cannot judge .* not each has its own line"):
        run.check(request)


@pytest.mark.parametrize(
    "method, advised",
    [
        ("dora", "+sweep.arms.dora={method: dora, rank: [16, 64], layers: attention+mlp}"),
        ("lora", "arms=lora"),
    ],
)
def test_what_is_advised_instead_of_one_method_for_a_search_is_planned(compose, method, advised):
    with pytest.raises(SpecError) as refused:
        compose(*TUNE, f"method={method}")
    assert advised in str(refused.value)
    assert method in {p.spec.method.name for p in compose(*TUNE, advised).points}


def test_a_search_deletes_no_weights_that_the_user_asked_to_keep(tune, compose):
    """Runs record who asked, so a later search without the setting keeps them, too."""
    asked, world = ("arms=lora", "budget=14runs"), Valley(10, noise=2e-4)
    root = RunStore(compose(*TUNE).exec.runs_dir).root
    for more in (("exec.keep_weights=true",), ()):
        _, _, points, _ = tune(world, *asked, *more)
        kept = {path.parent.name for path in root.glob(f"*/{checkpoint.WEIGHTS}")}
        assert kept == {p.id for p in points} and len(kept) > 9


def test_a_search_deletes_no_weights_of_another_search_nor_once_the_user_keeps_all(tune, compose):
    world = Valley(10, noise=2e-4)
    root = RunStore(compose(*TUNE).exec.runs_dir).root
    asked = ("arms=lora", "budget=10runs")
    for more in ((), ("arms=[lora,fullft]",), ("budget=30runs", "exec.keep_weights=true")):
        before = {path.parent.name for path in root.glob(f"*/{checkpoint.WEIGHTS}")}
        tune(world, *asked, *more)
        after = {path.parent.name for path in root.glob(f"*/{checkpoint.WEIGHTS}")}
        assert before <= after and after != before


def test_runs_that_failed_are_named_and_their_learning_rates_not_called_over_budget(tune):
    world = Valley(10, noise=2e-4)
    asked, short = ("arms=lora", "budget=30runs"), lambda s: s.steps < 64
    out, err, _, _ = tune(world, *asked, trainer=FakeTrainer(world.nll, fail=short), status=1)
    assert "no run of full length has finished, so there is no answer yet" in err and not out
    more = ("exec.retry=true",)
    bad = FakeTrainer(world.nll, fail=lambda s: s.seed != 0)
    out, _, _, _ = tune(world, *asked, *more, trainer=bad, status=1)
    (open_,) = (line for line in out.splitlines() if line.startswith("open: "))
    assert "runs that did not finish, such as " in open_ and "budget did not allow" not in out


def test_a_rewarded_search_is_answered_in_rewards_and_a_plan_says_what_one_takes(
    tune, compose, capsys
):
    world = Rewards(lambda spec, step: 0.8, lambda spec: 1e-3, lambda spec: 0.01)
    trainer = FakeTrainer(world.nll, curve=world.curve, more=world.more)
    asked = ("model=tiny64-knows", "dataset=bandit", "objective=policy_gradient", "group_size=4")
    asked += ("max_new_tokens=1", "budget=9runs", "arms=lora")
    assert "held-out reward" in tune(world, *asked, trainer=trainer)[0].splitlines()[2]
    assert act(compose(*TUNE, "action=plan", "budget=40runs", "out=best")) == 0
    out = capsys.readouterr().out
    assert "search of 2 arm(s): short runs of 8 updates" in out and "runs of 64 updates" in out
    assert "  fullft     -  tiny64     1 " in out  # it waits for LoRA, but its memory is counted
    for more, full in (("lora.rank=2", 10), ("lora.rank=8", 8)):  # no law for rank 2
        assert act(compose(*TUNE, more, "action=plan", "lora.alpha=4")) == 0
        assert f"about {full} of full length" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked, says",
    [
        (("+sweep=lr_ratio", "scale=smoke", "budget=2h"), r"^budget is only for .*\+sweep=tune"),
        (("model=tiny64", "out=b"), r"^out is only for .*action=fleet .*\+sweep=tune"),
        (("action=plan", "+sweep=lr_ratio", "out=b"), "^out is only for"),
        ((*TUNE, "sweep.search.seeds=7"), "sweep.rounds allows up to 6"),
        ((*TUNE, "arms=lorra"), "arm 'lorra' not found. Did you mean 'lora'"),
        ((*TUNE, "out=mine"), "has files"),
        ((*TUNE, "action=extend"), "a search adds runs itself"),
        ((*TUNE, "score=yes"), "score='yes'. Allowed: auto, always, never"),
        (("+sweep=lr_ratio", "scale=smoke", "score=never"), r"^score is only for .*\+sweep=tune"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(compose, tmp_path, monkeypatch, asked, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/own.txt").touch()
    with pytest.raises(SpecError, match=says):
        act(compose(*asked), FakeTrainer(Valley(10).nll))


@pytest.mark.parametrize(
    "losses, outcome, lowest, method, open_, why",
    [
        # full fine-tuning loses 1.0; LoRA is used unless it is known or measured to lose more
        ({None: 1.0, 8: 1.04}, "SUPPORTED", 0.0, "lora", [], "smallest rank within 1%"),
        ({None: 1.0, 8: 1.04}, "UNDECIDED", 0.0, "lora", ["4 seeds"], "smallest rank within 1%"),
        (
            {None: 1.0, 8: 1.06},
            "UNDECIDED",
            0.0,
            "fullft",
            ["4 seeds"],
            "up 6% of the gain, not dec",
        ),
        ({None: 1.0, 8: 0.99, 32: 1.3}, "REFUTED", 0.0, "lora", [], "smallest rank"),
        ({None: 1.0, 8: 1.04}, "REFUTED", 0.0, "fullft", [], "gives up 4% of the gain"),
        # the base stays only for a reason that was measured, and an ended budget is none
        ({8: 2.1}, None, 1e-3, None, [], "lowers the loss on validation and test rows"),
        ({}, None, 1e-3, None, ["were not tried"], "tried from 1.0e-03 on, lowers"),
        ({}, None, 1e-8, None, [], "no learning rate"),
    ],
)
def test_what_is_used_is_what_was_measured(compose, losses, outcome, lowest, method, open_, why):
    verdicts = [{"outcome": outcome, "needed": "4 seeds", "why": ""}] if outcome else []
    rate = {"value": 1e-3, "low": 9e-4, "high": 1.1e-3}
    known = {"best_tried": 1e-3, "flags": [], "best_lr": rate, "known": True}
    known |= {"gap_percent": None, "regret_percent": 0.5}
    methods = {None: "fullft", 8: "lora", 32: "lora"}
    names = {r: f"LoRA rank {r} on attention+mlp" for r in (8, 32)} | {None: "full fine-tuning"}
    arms = [{**known, "method": methods[r], "rank": r, "loss": x} for r, x in losses.items()]
    arms = [{**arm, "arm": names[arm["rank"]]} for arm in arms]
    top = names[max(filter(None, losses))] if None in losses else None
    results = {"arms": arms, "best": names[8] if losses else None, "judged": top}
    results |= {"reference": names[None] if None in losses else None}
    results |= {"start": 2.0, "allowed": 0.05, "verdicts": verdicts, "chosen_on": "validation"}
    request = compose(*TUNE, "lora.rank=8,32")
    found = search.conclude(request, results, lowest)
    assert (found["method"], found["lr"] is None) == (method, method is None)
    left = [text for text in found["open"] if "no run of full" not in text]
    assert len(left) == len(open_) and all(words in text for words, text in zip(open_, left))
    assert re.search(why, found["why"])
    for arm in arms:  # of a curve with two valleys, not the one that the fit took
        arm["best_lr"] = {**rate, "value": 1e-2}
    astray = search.conclude(request, results, lowest)
    assert astray["lr"] == (method and 1e-3) and ("1.0e-02" in str(astray["open"])) == bool(arms)


SWEEPS = sorted({path.stem for path in (ROOT / "sweeps").glob("*.yaml")} - {"study"})
KEPT = {
    "all": lambda specs: specs,
    "one rate": lambda specs: [
        s for s in specs if s.lr == min(t.lr for t in specs if t.method == s.method)
    ],
    "one seed": lambda specs: [s for s in specs if s.seed == specs[0].seed],
    "no fullft": lambda specs: [s for s in specs if s.method.name != "fullft"],
    "no lora": lambda specs: [s for s in specs if s.method.name != "lora"],
}
GOOD = {"fullft": "good", "lora": "good"}
ENDS = ("good", "hurt", "diverged", "nan", "none", "infinite")


def result_of(spec, end="good", curve="whole"):
    """A run's result: its loss falls, rises, stays or is no number; the curve may be missing."""
    metric = METRICS[spec.objective]
    start, gain = (0.3, 0.1) if metric.higher_is_better else (2.0, -0.5)
    off = 0.01 * math.log(spec.lr / 1e-3) ** 2 + 0.001 * (spec.seed % 7)
    change = (-gain if end == "hurt" else gain) + off
    value = {"nan": math.nan, "none": None, "infinite": math.inf, "diverged": None}
    value = value.get(end, start + change)
    points = [{"step": 0, metric.name: start, metric.on_part: start}]
    if curve == "whole" and end != "diverged":
        steps = sorted({1, 2, spec.steps})
        points += [{"step": s, metric.name: start + change * s / spec.steps} for s in steps]
        points[-1] |= {metric.name: value, metric.on_part: value}
    _, result = planted_end(spec, start, start, points if curve != "none" else [])
    more = {"run_id": spec.id, "state": "diverged" if end == "diverged" else "done"}
    return {**result, **more, metric.name: value, metric.on_part: value, **metric.stored()}


def answers(ask, *given):
    """`ask` returns, or raises an error of one line."""
    try:
        ask(*given)
    except LorasweepError as error:
        assert "\n" not in str(error)


CASES = [
    ("rank", "one seed", {**GOOD, "fullft": "diverged"}, "whole"),
    ("compute", "all", {**GOOD, "fullft": "diverged"}, "whole"),
    ("rl", "one rate", GOOD, "whole"),
    ("capacity", "all", dict.fromkeys(GOOD, "nan"), "whole"),
    ("invariance", "one seed", GOOD, "none"),
    ("tune", "no lora", {**GOOD, "fullft": "hurt"}, "start"),
    ("lr_ratio", "all", {**GOOD, "lora": "infinite"}, "whole"),  # ended in the pages
    *((s, f"no {m}", GOOD, "whole") for s in ("rank", "regime", "rl") for m in GOOD),
]


def judge(sweep, kept, ends, curve, folder=None):
    request = compose_request([f"+sweep={sweep}", "scale=smoke"])
    three = [(p.spec, p.spec.seed + k) for k in range(3) for p in request.points]
    specs = {s.id: s for s in (dataclasses.replace(spec, seed=seed) for spec, seed in three)}
    chosen = KEPT[kept]([*specs.values()])
    rows = [table_row(s.plain(), result_of(s, ends[s.method.name], curve)) for s in chosen]
    table, asked = pd.DataFrame(rows), question(request)
    answers(answer.judge, table, asked, folder, folder is None)
    answers(answer.next_round, table, asked)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:2]))
def test_a_table_that_once_ended_in_a_traceback_is_answered(case, tmp_path):
    judge(*case, tmp_path if case[0] == "lr_ratio" else None)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from(("rank", "rl", "tune")),
    st.sampled_from(sorted(KEPT)),
    st.fixed_dictionaries(dict.fromkeys(GOOD, st.sampled_from(ENDS))),
    st.sampled_from(("whole", "start", "none")),
)
def test_any_planted_table_is_answered(sweep, kept, ends, curve):
    judge(sweep, kept, ends, curve)


@pytest.mark.parametrize("action", ["status", "plan", "export", "extend"])
def test_actions_on_any_store_answer(compose, capsys, tmp_path, action):
    asked = compose("+sweep=lr_ratio", "scale=smoke", f"action={action}")
    for ends in ((), ("diverged",), ("good", "hurt", "nan"), ("none",)):
        exec_ = dataclasses.replace(asked.exec, runs_dir=f"{tmp_path}/{'-'.join(ends)}runs")
        more = {"table": f"{tmp_path}/{len(ends)}.csv"} if action == "export" else {}
        request = dataclasses.replace(asked, exec=exec_, **more)
        store = RunStore(exec_.runs_dir)
        store.prepare()
        for k, p in enumerate(request.points if ends else ()):
            store.put(p.spec, result_of(p.spec, ends[k % len(ends)]))
        answers(act, request, FakeTrainer(lambda spec: math.nan))


BATCHES = ("+sweep=batch_size", "scale=paper")
CLUSTER = (*BATCHES, "cluster=slurm", "hardware=h100")
ASKED = ("action=plan", "hardware=h100", "format=json")
UNKNOWN = {"regime": ["nothing"], "rl": ["wider"]}
"""Claims of which no data were run at tiny, so that no spread over seeds is known."""


@pytest.fixture
def nowhere(monkeypatch):
    """A machine that may not be asked."""

    def refuse(*_):
        raise AssertionError("the plan asked this machine")

    for name in ("this_machine", "cores", "gpus"):
        monkeypatch.setattr(detect, name, refuse)
    monkeypatch.delenv("SLURM_CONF", raising=False)  # of the cluster that other tests started


def test_the_study_is_planned_without_weights_and_without_a_look_at_this_machine(command, nowhere):
    study = ("+sweep=study", "sweep.parts=[lr_ratio,batch_size]", "scale=paper")
    found = json.loads(command(*study, *ASKED).stdout)
    (ratio, batches), total = found["sweeps"], found["total"]
    assert (ratio["name"], batches["name"]) == ("lr_ratio", "batch_size")
    assert total["runs"] == ratio["runs"] + batches["runs"] > 500 and not total["misfits"]
    for name in ("gpu_hours", "cost_usd", "tokens", "flops"):
        assert total[name] == pytest.approx(ratio[name] + batches[name])
    assert total["cost_usd"] == pytest.approx(total["gpu_hours"] * 2.95)
    assert total["memory_gib"] < 79.6 and total["gpus_a_run"] == [1, 16]
    order = next(c for c in ratio["claims"] if c["claim"] == "order")
    assert order["spread_from"] == "small" and order["needed"]


def test_a_users_own_card_is_a_file_and_the_plan_names_it(command, nowhere, tmp_path):
    (tmp_path / "mine/hardware").mkdir(parents=True)
    text = (ROOT / "conf/hardware/h100.yaml").read_text().replace("name: h100", "name: my_card")
    text = text.replace("price_per_gpu_h: 2.95", "price_per_gpu_h: 1")
    (tmp_path / "mine/hardware/my_card.yaml").write_text(text)
    asked = ("action=plan", "hardware=my_card", "hardware.gpus=64")
    out = command("--config-dir", tmp_path / "mine", *BATCHES, *asked).stdout
    said = ("on 64 x NVIDIA H100", "$1 per GPU-hour", "my_card", "(standard deviation at scale ti")
    assert not [words for words in said if words not in out]
    row = next(line for line in out.splitlines() if line.startswith("batch_size "))
    assert row.split()[1:4] == ["256", "256", "224"]


def test_the_plan_of_a_cluster_lists_its_jobs_by_what_they_need(command, nowhere):
    small = ("hardware.gpu_memory_gib=60", "exec.max_gpus=1")  # for all runs of one part
    study = ("+sweep=study", "sweep.parts=[rank,experts]", "scale=paper")
    few = command(*study, *ASKED, *small)
    assert few.returncode == 0 and "experts-paper: 49 runs need more than" in few.stderr
    plan = json.loads(command(*CLUSTER, "action=plan", "format=json").stdout)
    needed = [(j["nodes"], j["gpus"], j["workers"]) for j in plan["queue"]["jobs"]]
    assert sorted(needed) == [(1, 1, 1), (1, 4, 1)]
    assert plan["queue"]["to_submit"] <= plan["sweeps"][0]["runs"]
    plan = command(*CLUSTER, "hardware.gpu_memory_gib=4", "action=plan")
    assert plan.returncode == 0 and "does not fit: fullft of llama-3.1-8b" in plan.stdout
    done = command(*CLUSTER, "hardware.gpu_memory_gib=4", "exec.max_gpus=1")
    assert done.returncode == 2 and "nothing was started" in done.stderr
    assert "fullft of llama-3.1-8b takes" in done.stderr and "It fits with" in done.stderr
    assert "exec.max_gpus" not in done.stderr  # which leaves out no run that does not fit


def test_the_hours_of_sampling_are_named(command, nowhere):
    study = ("+sweep=study", "sweep.parts=[rl,capacity]", "scale=paper")
    found = json.loads(command(*study, *ASKED).stdout)
    rl, total = found["sweeps"][0], found["total"]
    assert rl["runs"] == 3 * 3 * 7 + 3 * 3 * 3 * 2 and rl["gpus_a_run"] == [1, 8]
    assert total["gpu_hours"] == pytest.approx(sum(s["gpu_hours"] for s in found["sweeps"]))
    text = command(*study, *ASKED[:2]).stdout
    assert f"{rl['gpu_hours_of_sampling']:,.0f} of the GPU-hours" in text
    assert "\nrl: claim wider: not known: no standard deviation stated\n" in text


@pytest.mark.parametrize(
    "scale", ["tiny", *(pytest.param(s, marks=pytest.mark.full) for s in ("small", "tiny_beyond"))]
)
@pytest.mark.parametrize("sweep", [s for s in SWEEPS if s != "tune"])  # it ends when it is decided
def test_a_shipped_sweep_can_decide_its_claims_or_says_that_it_cannot(compose, sweep, scale):
    """If not: change `sweep.replicate.seeds`, the claim's `sd`, or `underpowered`."""
    try:
        request = compose(f"+sweep={sweep}", f"scale={scale}")
    except NotAtScale:
        return
    found = [o for _, o in answer.outlooks(request.points, request.sweep, scale)]
    wrong = [o.line() for o in found if o.warns or (o.can_decide and o.underpowered)]
    assert len(found) == len(request.sweep.claims) and not wrong, wrong
    if scale == "tiny":
        assert [o.claim for o in found if o.can_decide is None] == UNKNOWN.get(sweep, [])


def test_the_plan_corrects_for_each_verdict_of_a_primary_claim(compose):
    """As many as there are in the kept answers; two bases make twice as many."""
    for path in sorted(answer.KEPT.glob("*/results.json")):
        sweep, _, scale = path.parent.name.rpartition("-")
        if sweep not in SWEEPS or path.parent.name == "regime-tiny":  # one primary claim fewer
            continue
        kept = [v["claim"] for v in json.loads(path.read_text())["verdicts"] if v["primary"]]
        request = compose(f"+sweep={sweep}", f"scale={scale}")
        found = {o.claim: o for _, o in answer.outlooks(request.points, request.sweep, scale)}
        look = (1 - decide.LOOK_LEVELS[request.sweep.rounds]) / len(kept)
        assert {round(1 - found[k].level, 9) for k in kept} == {round(look, 9)}, path
    one, two = (
        [o for _, o in answer.outlooks(request.points, request.sweep, "tiny") if o.claim == "alike"]
        for request in (
            compose("+sweep=rank", f"model={m}") for m in ("tiny128", "tiny128,tiny128-3m")
        )
    )
    assert 1 - two[0].level == pytest.approx((1 - one[0].level) / 2)
    for change in ("+sweep.axes.batch_size=[4,8]", "model=tiny64,tiny128"):
        request = compose("+sweep=lr_ratio", change)
        ratio = answer.outlooks(request.points, request.sweep, "tiny")[0][1]
        assert 1 - ratio.level == pytest.approx((1 - decide.LOOK_LEVELS[request.sweep.rounds]) / 2)
    request = compose("+sweep=regime")  # its growth starts at update 64, which all runs reach
    counts = Counter(v.claim for v in answer.rehearse(request.sweep, request.points))
    assert counts["growth"] == counts["fits"] == 7
    request = compose("+sweep=rl", "model=tiny64-skills")  # both primary claims leave this base out
    assert answer.outlooks(request.points, request.sweep, "tiny")


@pytest.mark.parametrize(
    "asked",
    [
        "growth ~sweep.axes.schedule +sweep.axes.cell=[{schedule:constant},{schedule:cosine,warmup_steps:1}]",
        "growth +sweep.arms.control={method:fullft,scope:matrices,lr:1e-3}",
        "recipes +sweep.arms.control={method:fullft,scope:matrices,lr:1e-3}",
        "regime +sweep.arms.control2={method:fullft,scope:matrices,layers:mlp,lr:1e-3}",
        "rank +sweep.arms.dora={method:dora,rank:[4,8],lr:1e-3}",
        "recipes dataset=dialect_shift",
        "lr_ratio lora.alpha=16,32",
        "invariance lora.rank=1,4",
        "capacity scale=tiny ~sweep.arms.fullft",  # what stays unknown needs one method only
    ],
)
def test_what_a_question_can_judge_is_planned(compose, asked):
    scale = () if "scale=" in asked else ("scale=smoke",)
    request = compose(*f"+sweep={asked}".split(), *scale)
    found = answer.outlooks(request.points, request.sweep, "smoke")
    assert len(found) == len(request.sweep.claims)


def test_capacity_is_not_asked_of_rows(command, tmp_path):
    rows = "".join(f"add 1 and {k},{k + 1}\n" for k in range(90))
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + rows)
    plan = command("plan", "capacity", "tiny64", "rows.csv")
    assert plan.returncode and "it needs dataset=facts" in plan.stderr, plan


def test_alpha_may_follow_the_rank_in_variants(compose):
    arm = "{rank: %d, alpha: %d, lr: [1e-3]}"
    cells = f"sweep.arms.lora.cell=[{arm % (4, 8)},{arm % (16, 32)}]"
    request = compose("+sweep=variants", "~sweep.arms.lora.rank", cells)
    assert answer.outlooks(request.points, request.sweep, "tiny")


ONE_ALPHA = ("batch_size", "capacity", "compute", "invariance", "layers", "rank", "recipes")
ONE_ALPHA += ("regime", "rl", "short_runs")
CUT = ("batch_size", "compute", "short_runs")
FULL_ELSEWHERE = ("compute", "growth", "rank")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("variants +sweep.axes.batch_size=[8,16]", "batch_size=8, 16: only one can be judged"),
        ("variants model=tiny64,tiny128", "model=tiny64, tiny128: "),
        ("variants sweep.axes.steps=[64,128]", "steps=64, 128: "),
        ("variants dora.alpha=32,16", "dora r4, alpha 16, and dora r4, alpha 32: only one"),
        ("variants sweep.arms.plus.lr_b_ratio=[8,16]", "lr_b_ratio 8, and lora r4, lr_b_ratio 16"),
        (
            "variants scale=smoke +sweep.arms.more={method:lora,lr_b_ratio:8,rank:4,lr:1e-3}",
            "lr_b_ratio 8, and lora r4, lr_b_ratio 16",
        ),
        (
            "growth +sweep.axes.batch_size=[8,16]",
            "batch_size=8, 16: only one can be judged",
        ),
        ("growth +sweep.axes.weight_decay=[0,0.1]", "fullft, weight_decay 0, and fullft, weight"),
        (
            "growth lora.rank=8,16",
            "lora r8, and lora r16: only one of them can be compared. Ask for",
        ),
        *((f"{name} lora.alpha=16,32", "alpha 16, and lora r") for name in ONE_ALPHA),
        ("recipes +sweep.axes.schedule=[constant,cosine]", "schedule constant, and lora r1, sche"),
        ("lr_ratio +sweep.axes.weight_decay=[0,0.1]", "fullft, weight_decay 0, and fullft, "),
        *((f"{name} schedule=cosine", "only runs with a constant") for name in CUT),
        *((f"{name} +sweep.axes.batch_size=[4,8]", "batch_size=4, 8: only") for name in CUT[1:]),
        *((f"{name} lora.batch_size=8", "batch_size=16, 8: only") for name in FULL_ELSEWHERE),
        *((f"{name} lora.steps=128", "steps=256, 128: only") for name in ("rank", "compute")),
        ("large_batches scale=smoke lora.alpha=16,32", "alpha 16, and lora r"),
        ("variants lora.rank=4", "variants cannot judge these runs together: "),
        ("recipes lora.layers=attention", "recipes cannot judge these runs together: "),
        ("growth lora.schedule=linear", "growth cannot judge these runs together: "),
        ("regime scale=smoke ~sweep.arms.fullft", "runs together: no curve of fullft"),
        ("lr_ratio ~sweep.arms.fullft", "lr_ratio cannot judge these runs together: "),
        ("ties scale=smoke ~sweep.arms.full", "ties cannot judge these runs together: "),
        ("invariance +sweep.axes.batch_size=[4,8]", "lora r1 (tiny128 on "),
        ("compute sweep.axes.steps=[8,16]", "steps=8, 16: only one can be judged"),
        ("short_runs sweep.axes.steps=[8,16]", "steps=8, 16: only one can be judged"),
        ("rl_unembedding scale=smoke sweep.arms.taught_lora.batch_size=[32,64]", "batch 64, steps"),
        ("ties scale=smoke sweep.arms.dora.rank=[4,8]", "dora r4, and dora r8: only one"),
        ("invariance sweep.arms.start_b.alpha=[16,32]", "alpha 16, and lora r4, alpha 32: only"),
        ("quadrature lora.rank=4,8", "lora r4, and lora r8: only one"),
        ("experts lora.alpha=16,32", "only one of them can be compared"),
        # no losses could decide any claim
        ("batch_size ~sweep.arms.fullft", "batch_size cannot judge these runs together: "),
    ],
)
def test_runs_that_a_question_cannot_judge_together_are_refused_before_they_are_trained(
    compose, asked, says
):
    request = compose(*f"+sweep={asked}".split())
    with pytest.raises(SpecError, match=re.escape(says)):
        answer.outlooks(request.points, request.sweep, "tiny")
    with pytest.raises(SpecError, match=re.escape(says)):
        run.check(request)


def test_a_claim_that_no_losses_could_decide_is_not_planned_as_one_that_can(compose):
    request = compose("+sweep=recipes", "~sweep.arms.attention")
    found = {o.claim: o for _, o in answer.outlooks(request.points, request.sweep, "tiny")}
    lacks = {name for name, o in found.items() if o.lacks}
    assert lacks == {"attention_at_full_lr"} and found["ten_times"].can_decide
    assert "cannot decide: no curve of the recipe" in found["attention_at_full_lr"].line()


def test_without_the_kept_answers_of_an_installed_package_quadrature_is_planned(
    compose, tmp_path, monkeypatch
):
    monkeypatch.setattr(answer, "KEPT", tmp_path / "none")
    for scale in ("tiny", "small"):
        request = compose("+sweep=quadrature", f"scale={scale}")
        found = answer.outlooks(request.points, request.sweep, scale)
        assert any("conditions" in o.lacks for _, o in found)


@pytest.mark.parametrize("setting", ["schedule=cosine", "lora.layers=attention"])
def test_a_claim_on_the_law_is_not_planned_where_the_law_says_nothing(compose, setting):
    request = compose("+sweep=second_model", "scale=smoke", setting)
    found = {o.claim: o for _, o in answer.outlooks(request.points, request.sweep, "smoke")}
    assert "the law: " in found["law_cost"].lacks and not found["match"].lacks


def test_the_tuned_curve_of_recipes_on_rows_is_not_that_of_rank_1(compose):
    request = compose("+sweep=recipes", "dataset=dialect_shift")
    found = {o.claim: o.lacks for _, o in answer.outlooks(request.points, request.sweep, "tiny")}
    assert not found["alpha_twice_rank"], found


def test_a_grid_of_which_no_losses_could_decide_anything_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{k % 37}+{k},{k % 10}\n" for k in range(100))
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + rows)
    plan = command("plan", "variants", "tiny64", "rows.csv")
    assert plan.returncode == 2 and "only 2 of 4 (two data sets at two ranks)" in plan.stderr


def test_the_plan_holds_each_claims_expected_interval_against_its_margin(command):
    plan = (
        *("+sweep=lr_ratio", "scale=smoke", "action=plan", "sweep.rounds=1"),
        "++sweep.claims.ratio.planning={smoke: {sd: 0.12}, tiny: {sd: 9}}",
        "++sweep.claims.ratio.underpowered=false",
    )
    enough = "sweep.replicate.seeds=[1,2,3,4,5]"
    text = command(*plan, enough).stdout
    assert "claim ratio: expected interval 10 [8.82, 11.3], margin [7.1, 14.1]: can decide" in text
    few = command(*plan, "sweep.replicate.seeds=[1,2]").stdout
    assert "warning, claim ratio: " in few and "cannot decide: needs 4 seeds (planned 3)" in few
    ratio, *_, parity = json.loads(command(*plan, enough, "format=json").stdout)["claims"]
    assert (ratio["planned"], ratio["can_decide"], parity["can_decide"]) == (6, True, None)
    assert ratio["half_width"] < ratio["room"]
