"""`rl_bits` on planted rewards: rank 1 below and beyond its capacity, the control, an episode."""

import math

import numpy as np
import pytest

from lorasweep.train.objectives.rollouts import bits_learned
from tests.planted import Rewards, arms, ask, base

pytestmark = pytest.mark.slow  # fits a dozen curves
FULL, LORA = 5.6e-4, 2.24e-3
GRID = {"full": FULL, "lora": LORA, "n": 5, "steps": 64}
REWARDED = ("objective=policy_gradient", "batch_size=1024", "group_size=16", "max_new_tokens=1")


def bit_runs(contexts=(64, 4096), ranks=(1, 4), supervised=True):
    found = []
    for n in contexts:
        data = ("tiny64-knows", "bandit")
        found += arms(base(*data, *REWARDED, contexts=n), ranks, **GRID)
        found += arms(base(*data, contexts=n), (1,), **GRID) if supervised else []
    return found


def contexts_of(spec):
    return int(spec.plain()["dataset"]["knobs"]["contexts"])


class Bandit(Rewards):
    """`reward[contexts]` of full fine-tuning and rank 4, lower by `behind[contexts]` with rank 1.

    Supervised, full fine-tuning knows 98% of the labels' bits and rank 1 `known` of them.
    """

    def __init__(self, reward, behind, known, bends, bits=None):
        super().__init__(
            lambda s, step: reward[contexts_of(s)] - behind[contexts_of(s)] * (_rank(s) == 1),
            lambda s: LORA if _rank(s) else FULL,
            lambda s: bends[_rank(s) > 0],
        )
        self.known, self.bits = known, bits

    def nll(self, spec):
        if spec.objective != "sft":
            return super().nll(spec)
        noise = np.random.default_rng(int(spec.id, 16)).normal(0, 2e-3)
        off = math.log(spec.lr / self.best(spec))
        return math.log(16) * (1 - (self.known if _rank(spec) else 0.98)) + 0.02 * off**2 + noise

    def curve(self, spec):
        ends = [{"step": 0, "test_nll": 2.8}, {"step": spec.steps, "test_nll": self.nll(spec)}]
        return ends if spec.objective == "sft" else super().curve(spec)

    def results(self, spec):
        if spec.objective == "sft":
            return {"nll_start": 2.8}
        found = super().results(spec)
        bits = contexts_of(spec) * bits_learned(found["test_reward"], 16)
        return {**found, "bits_per_answer": self.bits or bits / (spec.steps * spec.batch_size)}


def _rank(spec):
    return getattr(spec.method, "rank", 0)


def by_contexts(out):
    """Verdicts by claim and contexts."""
    n = {v["group"]: 64 if "contexts=64)" in v["group"] else 4096 for v in out["verdicts"]}
    return {(v["claim"], n[v["group"]]): v for v in out["verdicts"]}


def test_rank_1_behaves_as_its_capacity_says(tmp_path):
    world = Bandit({64: 0.9, 4096: 0.6}, {64: 0.0, 4096: 0.3}, 0.97, (0.04, 0.016))
    out, _ = ask("rl_bits", world, bit_runs(), tmp_path)
    found = by_contexts(out)
    supported = {("tie", 64), ("behind", 4096), ("taught", 64), ("wider", 64), ("wider", 4096)}
    refuted = {(c, n) for c in ("one_bit", "ratio") for n in (64, 4096)}  # planted ratio: 4
    outcomes = dict.fromkeys(supported, "SUPPORTED") | dict.fromkeys(refuted, "REFUTED")
    assert {k: v["outcome"] for k, v in found.items()} == outcomes
    planted = {
        ("behind", 4096): pytest.approx(-30, abs=0.5),
        ("taught", 64): pytest.approx(-1, abs=0.3),
    }
    assert {k: found[k]["estimate"]["value"] for k in planted} == planted
    small, large = out["cells"]
    assert small["load"] == pytest.approx(4 * 64 / (2 * 5232)) and large["load"] > 1
    bits = 4096 * bits_learned(0.6, 16)
    assert large["bits"]["0"]["value"] == pytest.approx(bits, rel=0.02)
    assert large["bits_per_episode"]["0"]["value"] == pytest.approx(bits / 65536, rel=0.02)
    assert large["taught_bits"]["1"]["value"] == pytest.approx(0.97 * 16384, rel=0.01)
    text = (tmp_path / "report.md").read_text()  # of rewards and of losses
    assert "of reward at the optimum" in text and "nats at the optimum" in text


def test_rank_1_behaves_otherwise():
    world = Bandit({64: 0.9, 4096: 0.6}, {64: 0.1, 4096: 0.0}, 0.5, (0.016, 0.04), bits=1.0)
    found = {k: v["outcome"] for k, v in by_contexts(ask("rl_bits", world, bit_runs())[0]).items()}
    for claim in (("tie", 64), ("behind", 4096), ("taught", 64), ("wider", 64)):
        assert found[claim] == "REFUTED"
    assert found["one_bit", 64] == "SUPPORTED"


def test_without_rank_1_or_the_control_claims_stay_open():
    world = Bandit({64: 0.9}, {64: 0.0}, 0.97, (0.04, 0.016))
    _, found = ask("rl_bits", world, bit_runs([64], [1], supervised=False))
    assert found["taught"]["why"] == "no curve of full fine-tuning by cross-entropy"
    assert found["tie"]["outcome"] == "SUPPORTED"
    for claim in ("behind", "ratio"):  # no condition beyond, and no other rank
        assert found[claim]["group"] == "no cell"
    out, found = ask("rl_bits", world, bit_runs([64], [4], supervised=False))
    assert {v["outcome"] for v in out["verdicts"]} == {"UNDECIDED"}
    assert found["tie"]["why"] == "no curve of lora r1"
