"""The seam of objectives: a second one trains through the same loop, and a member may have its own
data."""

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lorasweep.data import load as data
from lorasweep.launch.trainer import TorchTrainer, finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import Metric, metric_of
from lorasweep.spec.streams import stream
from lorasweep.train.loop import train
from lorasweep.train.objectives import nll
from lorasweep.train.objectives.base import Evaluation
from tests.training import EPS, ROUNDING, apart
from tests.world import tiny_spec

PROMPT, GOOD, DRAWS = (1, 2, 3, 4), 16, 32


@dataclass
class Draws:
    """Symbols that each member drew after the prompt, and how much better than usual they are."""

    symbols_NB: torch.Tensor
    advantage_NB: torch.Tensor
    tokens_N: tuple[int, ...]
    laid_out: int


class DrawTheGoodSymbol:
    """A toy: after a fixed prompt, draw one symbol; the good one is rewarded (REINFORCE with a
    running mean of the reward, which is this objective's own state)."""

    metric = Metric("reward", higher_is_better=True, label="reward")

    def __init__(self):
        self.usual = {}

    def log_p(self, model, n):
        """[N, V] after the prompt, one row a member."""
        tokens = torch.tensor(PROMPT).repeat(n, 1)
        return model(input_ids=tokens, use_cache=False).logits[:, -1].log_softmax(-1)

    @torch.no_grad()
    def measured(self, model, n):
        return self.log_p(model, n)[:, GOOD].exp().tolist()

    def start(self, base, members):
        self.usual = {m.id: 0.0 for m in members}
        return [{"reward": r} for r in self.measured(base.model, 1) * len(members)]

    @torch.no_grad()
    def batches(self, model, step, members):
        p = self.log_p(model, len(members)).exp().double().numpy()
        draws = [
            stream("sample", m.seed, step).choice(len(q), size=DRAWS, p=q / q.sum())
            for m, q in zip(members, p)
        ]
        rewards = (np.stack(draws) == GOOD).astype(float)
        usual = np.array([[self.usual[m.id]] for m in members])
        for m, reward in zip(members, rewards):
            self.usual[m.id] = 0.9 * self.usual[m.id] + 0.1 * reward.mean()
        laid_out = len(PROMPT) + DRAWS
        tokens = (laid_out,) * len(members)
        symbols, advantage = torch.from_numpy(np.stack(draws)), torch.from_numpy(rewards - usual)
        half = DRAWS // 2  # two micro-batches
        return [
            Draws(symbols[:, :half], advantage[:, :half], tokens, laid_out),
            Draws(symbols[:, half:], advantage[:, half:], tokens, laid_out),
        ]

    def weights(self, batch):
        n, b = batch.symbols_NB.shape
        return torch.full((n,), float(b))

    def loss(self, model, batch):
        log_p = self.log_p(model, len(batch.symbols_NB)).gather(1, batch.symbols_NB)
        return -(log_p * batch.advantage_NB.to(log_p)).sum(1)

    def metrics(self, losses):
        return [{"surrogate": loss} for loss in losses]

    def diverged(self, run, loss):
        return False

    def evaluate(self, model, members, final):
        return [Evaluation({"reward": r}, 1) for r in self.measured(model, len(members))]

    def at_end(self, model, members):
        return [{} for _ in members]

    def facts(self, member):
        return {"good": GOOD}

    def state(self, run):
        return {"usual": self.usual[run]}

    def load_state(self, run, state):
        self.usual[run] = state["usual"]


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(precision="fp64", method=LoRA(rank=4), lr=1e-2, steps=12)
    return spec, models.load(spec.model, ["/nonexistent"], "fp64")


def run(events):
    """Return {run id: result} and the last state of each run."""
    results, states = {}, {}
    for event in events:
        if event.ended:
            states |= {
                i: {n: t.clone() for n, t in s["tensors"].items()}
                for i, s in event.snapshot().items()
            }
        results |= {i: result for i, (_, result) in event.ended.items()}
    return results, states


def rewards(result):
    return [point["reward"] for point in result["curve"]]


@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()], ids=["lora", "fullft"])
def test_an_objective_that_samples_and_wants_more_trains_through_the_same_loop(world, method):
    spec, base = world
    pack = [dataclasses.replace(spec, method=method, lr=1e-2)]
    if method.name == "lora":
        pack.append(dataclasses.replace(pack[0], lr=1e-3, seed=1))
    results, states = run(train(pack, base, DrawTheGoodSymbol()))
    fast = results[pack[0].id]
    start, end = fast["curve"][0]["reward"], fast["curve"][-1]["reward"]
    assert end > max(2 * start, 0.1) and end == fast["reward"] and "test_nll" not in fast
    assert {"good", "surrogate"} <= fast.keys()

    # what a result says of its metric is read back, and decides which of two is better
    metric = metric_of(json.loads(json.dumps(fast)))
    assert metric.name == "reward" and metric.loss(end) < metric.loss(start)
    assert metric_of({"test_nll": 1.0}).loss(1.0) == 1.0
    if len(pack) > 1:
        assert metric.loss(end) < metric.loss(results[pack[1].id]["reward"])

    # from a checkpoint at the sixth update, with its own state, it ends in the same numbers
    for event in train(pack, base, DrawTheGoodSymbol()):
        if event.step == 6:
            middle = {
                i: {"tensors": {n: t.clone() for n, t in s["tensors"].items()}, "meta": s["meta"]}
                for i, s in event.snapshot().items()
            }
            break
    middle = {i: {**s, "meta": json.loads(json.dumps(s["meta"]))} for i, s in middle.items()}
    again, restated = run(train(pack, base, DrawTheGoodSymbol(), middle))
    assert rewards(again[pack[0].id]) == rewards(fast)
    for i, tensors in states.items():
        assert all(torch.equal(t, restated[i][n]) for n, t in tensors.items())
    forgot = {i: {**s, "meta": {**s["meta"], "usual": 0.9}} for i, s in middle.items()}
    other, _ = run(train(pack, base, DrawTheGoodSymbol(), forgot))
    assert rewards(other[pack[0].id]) != rewards(fast)


@pytest.mark.parametrize("passes", ["cpu_llama", "transformers"])
def test_members_of_a_pack_may_have_data_of_their_own(
    world, passes, monkeypatch, norms_in_float64, other_weights
):
    """Different held-out sets, of different sizes: each member comes out as alone on its own."""
    spec, base = world
    spec = dataclasses.replace(spec, eps=EPS)
    base.at_start.clear()
    if passes == "transformers":
        monkeypatch.setattr(nll, "cpu_llama_for", lambda model: None)
    ours = data.load(spec.dataset, [])
    other = dataclasses.replace(
        spec.dataset, name="other", generator_params={"rule_shift": 0.9}, n_test=40
    )
    theirs = data.load(dataclasses.replace(other, n_test_curve=8), [])
    pack = [
        dataclasses.replace(spec, lr=2e-3, steps=4),
        dataclasses.replace(
            spec, lr=1e-3, steps=4, dataset=dataclasses.replace(other, n_test_curve=8)
        ),
    ]
    both = {pack[0].id: ours, pack[1].id: theirs}
    together, states = run(finetune(pack, base, both))
    for member in pack:
        alone, own = run(finetune([member], other_weights(base), both[member.id]))
        for name in ("nll_start", "test_nll", "floor_nats", "n_test"):
            wanted = pytest.approx(alone[member.id][name], rel=ROUNDING[10])
            assert together[member.id][name] == wanted
        for name, tensor in own[member.id].items():
            assert apart(tensor, states[member.id][name]) < ROUNDING[10], name
    assert together[pack[0].id]["nll_start"] != together[pack[1].id]["nll_start"]
    assert together[pack[0].id]["n_test"] != together[pack[1].id]["n_test"]


def test_a_worker_trains_each_member_on_the_data_of_its_spec(world):
    spec, _ = world
    fewer = dataclasses.replace(spec.dataset, name="fewer", n_test=16, n_test_curve=8)
    pack = [
        dataclasses.replace(spec, steps=1),
        dataclasses.replace(spec, steps=1, seed=1, dataset=fewer),
    ]
    results, _ = run(TorchTrainer()(pack, Exec(models_dir=["/nonexistent"]), None))
    assert [results[m.id]["n_test"] for m in pack] == [spec.dataset.n_test, 16]


def test_members_measure_their_own_held_out_rows_and_what_they_retain(world, other_weights):
    """Held-out sets that begin alike, and a member whose data have nothing of the pretraining."""
    spec, base = world
    spec = dataclasses.replace(spec, eps=EPS)
    few = {"n_test": 24, "n_test_curve": 16}
    theirs = dataclasses.replace(spec.dataset, name="theirs", **few, n_retain=8)
    ours = dataclasses.replace(spec.dataset, name="ours", **few)
    with_retain = data.load(theirs, [])
    rows = [with_retain.test[0], *data.load(spec.dataset, []).test[1:24]]
    pack = [
        dataclasses.replace(spec, lr=2e-3, steps=1, dataset=ours),
        dataclasses.replace(spec, lr=1e-3, steps=1, dataset=theirs),
    ]
    both = {
        pack[0].id: dataclasses.replace(with_retain, test=rows, retain=()),
        pack[1].id: with_retain,
    }
    together, _ = run(finetune(pack, base, both))
    for member in pack:
        alone, _ = run(finetune([member], other_weights(base), both[member.id]))
        for name in ("test_nll", "retain_nll"):
            value = alone[member.id].get(name)
            wanted = value and pytest.approx(value, rel=ROUNDING[1])
            assert together[member.id].get(name) == wanted
    assert "retain_nll" in together[pack[1].id] and "retain_nll" not in together[pack[0].id]


def test_without_rows_for_a_curve_runs_are_measured_at_start_and_end_alone(world):
    """And end as they do with one: measuring changes nothing."""
    spec, base = world
    with_curve = dataclasses.replace(spec, steps=6)
    without = dataclasses.replace(
        with_curve, dataset=dataclasses.replace(spec.dataset, n_test_curve=0)
    )
    rows = data.load(spec.dataset, [])
    (a, b), _ = zip(*(run(finetune([s], base, rows)) for s in (with_curve, without)))
    (a,), (b,) = a.values(), b.values()
    assert [p["step"] for p in a["curve"]] == [0, 1, 2, 3, 4, 6]
    assert [p["step"] for p in b["curve"]] == [0, 6]
    assert a["test_nll"] == b["test_nll"] == b["test_nll_curve"]
