"""Objectives: another one in the same loop, what supervised runs measure, which have diverged."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lorasweep.data import load as data
from lorasweep.data.examples import Data, Example, shuffled
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.spec.metric import Metric, metric_of
from lorasweep.spec.streams import stream
from lorasweep.train.loop import train
from lorasweep.train.objectives.base import Objective
from lorasweep.train.objectives.policy_gradient import FIRST_UPDATES, Signal
from lorasweep.train.objectives.sft import Divergence
from tests.training import ROUNDING, Trained, results, small_world

PROMPT, GOOD, DRAWS = (1, 2, 3, 4), 16, 32


class DrawTheGoodSymbol(Objective):
    """A toy: after a fixed prompt, draw one symbol; the good one is rewarded (REINFORCE with a
    running mean of the reward, which is this objective's own state)."""

    metric = Metric("reward", higher_is_better=True, label="reward")

    def __init__(self):
        super().__init__({}, "fp64")
        self.usual = {}

    def log_p(self, model, n):
        """[N, V] after the prompt, one row a run."""
        tokens = torch.tensor(PROMPT).repeat(n, 1)
        return model(input_ids=tokens, use_cache=False).logits[:, -1].log_softmax(-1)

    @torch.no_grad()
    def measured(self, model, n):
        return [{"reward": p} for p in self.log_p(model, n)[:, GOOD].exp().tolist()]

    def start(self, base, runs):
        self.usual = {run.id: 0.0 for run in runs}
        return self.measured(base.model, 1) * len(runs)

    @torch.no_grad()
    def batches(self, model, step, runs):
        symbols, advantages, length = [], [], len(PROMPT) + DRAWS
        for run, p in zip(runs, self.log_p(model, len(runs)).exp().double().numpy()):
            drawn = stream("sample", run.seed, step).choice(len(p), size=DRAWS, p=p / p.sum())
            usual, reward = self.usual[run.id], (drawn == GOOD).mean()
            self.usual[run.id] = 0.9 * usual + 0.1 * reward
            symbols.append(drawn)
            advantages.append((drawn == GOOD) - usual)
        counts = {"tokens_N": (length,) * len(runs), "padded_tokens": length}
        halves = (torch.tensor(np.stack(x)).chunk(2, 1) for x in (symbols, advantages))
        return [SimpleNamespace(symbols_NB=s, advantage_NB=a, **counts) for s, a in zip(*halves)]

    def weights(self, batch):
        return torch.full(batch.symbols_NB.shape[:1], DRAWS / 2)

    def loss(self, model, batch):
        log_p = self.log_p(model, len(batch.symbols_NB)).gather(1, batch.symbols_NB)
        return -(log_p * batch.advantage_NB.to(log_p)).sum(1)

    def metrics(self, losses):
        return [{"surrogate": loss} for loss in losses]

    def diverged(self, run_id, loss):
        return False

    def evaluate(self, model, runs, final):
        return [(found, 1) for found in self.measured(model, len(runs))]

    def facts(self, run):
        return {"good": GOOD}

    def state(self, run_id):
        return {"usual": self.usual[run_id]}

    def load_state(self, run_id, state):
        self.usual[run_id] = state["usual"]


@pytest.fixture(scope="module")
def world():
    spec, base, _ = small_world(lr=1e-2, steps=12)
    return spec, base


def rewards(found, run):
    return [point["reward"] for point in found.results[run.id]["curve"]]


@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()], ids=["lora", "fullft"])
def test_an_objective_that_samples_and_wants_more_trains_through_the_same_loop(world, method):
    spec, base = world
    pack = [dataclasses.replace(spec, method=method, lr=1e-2)]
    if method.name == "lora":
        pack.append(dataclasses.replace(pack[0], lr=1e-3, seed=1))
    found = Trained(train(pack, base, DrawTheGoodSymbol()), at=(6,))
    fast = found.results[pack[0].id]
    start, end = fast["curve"][0]["reward"], fast["curve"][-1]["reward"]
    assert end > max(2 * start, 0.1) and end == fast["reward"] and "test_nll" not in fast
    assert {"good", "surrogate"} <= fast.keys()

    # a result's metric is read back, and decides which of two is better
    metric = metric_of(json.loads(json.dumps(fast)))
    assert metric.name == "reward" and metric.loss(end) < metric.loss(start)
    assert metric_of({"test_nll": 1.0}).loss(1.0) == 1.0
    if len(pack) > 1:
        assert metric.loss(end) < metric.loss(found.results[pack[1].id]["reward"])

    # from a checkpoint at the sixth update, with its own state, it ends in the same numbers
    middle = {i: {**s, "meta": json.loads(json.dumps(s["meta"]))} for i, s in found.at[6].items()}
    again = Trained(train(pack, base, DrawTheGoodSymbol(), middle))
    assert rewards(again, pack[0]) == rewards(found, pack[0])
    for i, state in found.states.items():
        assert all(t.equal(again.states[i]["tensors"][n]) for n, t in state["tensors"].items())
    forgot = {i: {**s, "meta": {**s["meta"], "usual": 0.9}} for i, s in middle.items()}
    other = Trained(train(pack, base, DrawTheGoodSymbol(), forgot))
    assert rewards(other, pack[0]) != rewards(found, pack[0])


def test_runs_measure_their_own_held_out_rows_and_retention(world, other_weights):
    spec, base = world
    few = {"n_test": 24, "n_test_curve": 16}
    theirs = dataclasses.replace(spec.dataset, name="theirs", **few, n_retain=8)
    ours = dataclasses.replace(spec.dataset, name="ours", n_test=20, n_test_curve=16)
    with_retain = data.load(theirs, [])
    rows = [with_retain.test[0], *data.load(spec.dataset, []).test[1:20]]
    pack = [dataclasses.replace(spec, steps=1, dataset=dataset) for dataset in (ours, theirs)]
    without = dataclasses.replace(with_retain, test=rows, retain=())
    both = {pack[0].id: without, pack[1].id: with_retain}
    base.at_start.clear()
    together = results(pack, base, both)
    for run, found in zip(pack, together):
        (alone,) = results([run], other_weights(base), both[run.id])
        for name in ("nll_start", "test_nll", "floor_nats", "n_test", "retain_nll"):
            value = alone.get(name)
            assert found.get(name) == (value and pytest.approx(value, rel=ROUNDING[1])), name
    assert "retain_nll" not in together[0]
    # the base knows its own language better than the dialect
    assert together[1]["retain_start"] < together[1]["nll_start"]
    assert together[0]["nll_start"] != together[1]["nll_start"]


def test_without_rows_for_a_curve_runs_are_measured_at_start_and_end_alone(world):
    """And end as they do with one: measuring changes nothing."""
    spec, base = world
    with_curve = dataclasses.replace(spec, steps=6)
    no_rows = dataclasses.replace(spec.dataset, n_test_curve=0)
    without = dataclasses.replace(with_curve, dataset=no_rows)
    rows = data.load(spec.dataset, [])
    (a,), (b,) = (results([run], base, rows) for run in (with_curve, without))
    assert [p["step"] for p in a["curve"]] == [0, 1, 2, 3, 4, 6]
    assert [p["step"] for p in b["curve"]] == [0, 6]
    assert a["test_nll"] == b["test_nll"] == b["test_nll_curve"]


@pytest.fixture(scope="module")
def hard_world():
    """A base, and a run whose training rows are noise, while its held-out rows are what it knows."""
    spec, base, _ = small_world(method=LoRA(rank=8), batch_size=8, steps=24, eps=1e-8)
    language = {"rule_shift": 0.0, "new_exceptions": 0.0}
    dataset = dataclasses.replace(spec.dataset, generator_params=language)
    rng = stream("noise", "train")
    rows = [Example(rng.integers(0, 32, 24).astype(np.int32), np.arange(24) > 8) for _ in range(64)]
    hard = Data(shuffled(dataset, rows), data.load(dataset, []).test, 64)
    spec = dataclasses.replace(spec, dataset=dataset)
    return spec, base, hard


@pytest.mark.parametrize("rate", [5e-3, 3.0])
def test_only_a_far_too_high_rate_diverges_on_rows_harder_than_the_held_out_ones(hard_world, rate):
    """Resumed, it ends as uninterrupted."""
    spec, base, hard = hard_world
    spec = dataclasses.replace(spec, lr=rate)

    def trained(resume=None):
        base.at_start.clear()
        found = Trained(finetune([spec], base, hard, resume=resume), at=(5,))
        nlls = [r["train_nll"] for r in found.records[spec.id]]
        return found.ends[spec.id], found.results[spec.id], nlls, found.at.get(5)

    state, result, losses, middle = trained()
    assert result["divergence_rule"] == 2
    if rate == 3.0:  # at the first update with eight losses in a row above the bound
        above = [loss > 1.5 * max(losses[0], result["nll_start"]) for loss in losses]
        full = [step for step in range(8, len(above) + 1) if all(above[step - 8 : step])]
        assert state == "diverged" and full == [len(losses)] and len(losses) < 14
    else:
        assert state == "done" and result["steps_done"] == spec.steps
        assert min(losses[:9]) > 1.5 * result["nll_start"]  # the first nine: once called diverged
        assert losses[-1] < losses[0] - 0.5
    assert json.loads(json.dumps(middle[spec.id]["meta"]["first_nll"])) == losses[0]
    again = trained(middle)
    assert again[0] == state and again[2] == losses[5:]


def test_by_hand():
    def judged(held_out, losses):
        rule = Divergence(held_out)
        return next((k for k, nll in enumerate(losses, 1) if rule.note(nll)), None)

    assert judged(2.0, [2.0] + [3.1] * 8) == 9  # above 3 from the second update on
    assert judged(2.0, [2.0] + [3.0] * 50) is None
    assert judged(2.0, [2.0, *[9.0] * 7, 2.9, *[9.0] * 8]) == 17  # eight in a row
    assert judged(2.0, [4.81, 4.7, 4.6, *[4.5] * 20, 4.03]) is None
    assert judged(2.0, [4.0, *[6.1] * 8]) == 9
    assert judged(2.0, [0.9] + [2.0] * 20) is None  # one easy batch is not what the base can do


def collapsed_after(signal, given):
    for k, reward in enumerate(given, 1):
        signal.note({"reward": reward}, 32)
        if signal.collapsed:
            return k


def test_prompts_harder_than_the_held_out_ones_are_no_collapse():
    assert collapsed_after(Signal(0.4), [0.15, 0.1, *[0.15, 0.2] * 10]) is None
    assert collapsed_after(Signal(0.4), [0.4, 0.3, *[0.1] * 8]) == 10
    assert collapsed_after(Signal(0.4), [0.15] * 12 + [0.05] * 8) == 20
    assert collapsed_after(Signal(0.4), [0.4, 0.1, *[0.0] * 20]) == 9  # in its first updates
    # the first updates alone count: a run that has learned and falls back is no worse than the base
    assert collapsed_after(Signal(0.4), [0.15] * 8 + [0.9] * 20 + [0.1] * 20) is None


def test_signals_are_resumed():
    given = [0.15] * 5 + [0.16] * 7 + [0.05] * 8
    whole, first, second = Signal(0.4), Signal(0.4), Signal(0.4)
    assert collapsed_after(whole, given) == 20 and collapsed_after(first, given[:6]) is None
    second.load(json.loads(json.dumps(first.state())))
    assert collapsed_after(second, given[6:]) == 14 and second.state() == whole.state()
    assert FIRST_UPDATES == 8
