"""A metric of which higher is better, in the second stage, the status and the noise floor."""

from lorasweep.cli.finished_runs import noise_floor
from lorasweep.cli.points import all_points
from lorasweep.cli.status import status, status_text
from lorasweep.launch import local
from lorasweep.store.run_store import RunStore

REWARD = {"name": "reward", "higher_is_better": True, "label": "reward"}


def trained(compose, fake_trainer, nll, reward, *overrides):
    """A sweep whose runs are finished, with rewards beside their NLLs; and its store."""
    request = compose("+sweep=lr_ratio", "scale=smoke", *overrides)
    store = RunStore(request.exec.runs_dir)
    trainer = fake_trainer(nll, more=lambda s: {"metric": REWARD, "reward": reward(s)})
    local.run_points(request.points, store, request.exec, lambda event: None, trainer)
    return request, store


def test_the_highest_reward_is_the_best(compose, fake_trainer):
    """The NLLs of these runs would choose the other end of the rates."""
    rates = "sweep.arms.fullft.lr=[3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3]"
    how = (lambda s: 1 + s.lr, lambda s: 100 * s.lr, "sweep.replicate.seeds=[7]", rates)
    request, store = trained(compose, fake_trainer, *how)
    points = all_points(request, store)
    fresh = {p.spec.lr for p in points if p.spec.seed == 7 and p.arm == "fullft"}
    assert fresh == {1.2e-3, 2.4e-3, 4.8e-3}
    now = status(request, store, request.points)
    best = {a["arm"]: a["best"] for a in now["arms"]}["fullft"]
    assert best["reward"] == 100 * 4.8e-3 and "test_nll" not in best
    assert "0.4800" in status_text(request, now)


def test_the_noise_between_seeds_is_the_metrics(compose, fake_trainer):
    seeds = ("sweep.axes.seed=[0,1]", "sweep.arms.fullft.lr=[1e-3]", "~sweep.arms.lora")
    how = (lambda s: 1.0, lambda s: 2.0 * s.seed, *seeds)
    request, store = trained(compose, fake_trainer, *how)
    assert noise_floor(request.points, store) == 2**0.5
