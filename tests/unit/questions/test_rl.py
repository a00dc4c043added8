"""`rl` and `rl_bits` on planted rewards: points behind, optimal LRs, capacity, bits an episode."""

import dataclasses
import math

import numpy as np
import pytest

from analysis.runs.table import TableError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.sweep.request import question
from lorasweep.train.objectives.policy_gradient import bits_learned
from tests.planted import Rewards, arms, ask, base, check, is_full, rank_of, rewarded
from tests.world import compose_request

pytestmark = pytest.mark.slow  # fits dozens of curves

START = Rewards.start_reward
FULL, LORA = 5.6e-4, 2.24e-3  # optimal LRs in a Bandit


def climbs(spec, step, rho=1.0, gain=0.06):
    """Rewards rise by `gain` a doubling of the updates; rank 1 makes `rho` of the progress."""
    return START + gain * math.log2(1 + (rho if rank_of(spec) == 1 else 1.0) * step)


@pytest.mark.parametrize(
    ("rho", "ratio", "bends", "outcomes"),
    [
        (0.5, 4, (0.04, 0.016), ("REFUTED", "SUPPORTED", "REFUTED", "SUPPORTED", "REFUTED")),
        (1.0, 10, (0.016, 0.04), ("SUPPORTED", "SUPPORTED", "SUPPORTED", "REFUTED", "SUPPORTED")),
    ],
)
def test_planted_differences_come_back(rho, ratio, bends, outcomes):
    out, found = ask(*rewarded(lambda s, t: climbs(s, t, rho), ratio=ratio, bends=bends))
    claims = ("rank_1", "top_rank", "ratio", "wider", "progress")
    assert tuple(found[c]["outcome"] for c in claims) == outcomes
    behind = pytest.approx(6 * math.log2((1 + 64 * rho) / 65), abs=0.5)
    wider = pytest.approx(math.sqrt(bends[0] / bends[1]), rel=0.2)
    check(found, rank_1=behind, ratio=pytest.approx(ratio, rel=0.1), wider=wider)
    check(found, progress=pytest.approx(rho, rel=0.1))
    assert all(len(curves) == 2 for by in out["compared"].values() for curves in by.values())
    text = out["page"]  # in rewards and not in losses
    assert "| best reward |" in text and "NLL" not in text and "| 0 of 4 |" in text


def test_two_curves_of_one_rank_are_refused():
    """With and without an adapter of the unembedding: the difference may be large."""
    sweep, world, specs = rewarded(climbs, (1,))
    fewer = LoRA(rank=1, layers="attention+mlp")
    specs += [dataclasses.replace(s, method=fewer) for s in specs if not is_full(s)]
    with pytest.raises(TableError, match=r"two curves of lora r1.*attention"):
        ask(sweep, world, specs)


@pytest.mark.parametrize("fewer", [0.0, 0.12])
def test_a_control_separates_the_rank_from_the_choice_of_matrices(fewer):
    """Training fewer matrices costs `fewer` of reward, and rank 1 costs .1 more; rank 8 nothing."""

    def top(spec, step):
        behind = 0.1 * (rank_of(spec) == 1) + fewer * (spec.method != FullFT())
        return climbs(spec, step) - behind * step / spec.steps

    _, world, specs = rewarded(top, control=True)
    claims = question(compose_request(["+sweep=rl_matrices", "scale=smoke"]))["claims"]

    def points(outcome, value):
        return outcome, pytest.approx(value, abs=0.3)

    def of(kept=lambda s: True):
        return ask("rl", world, [s for s in specs if kept(s)], claims)

    out, found = of()
    check(
        found,
        control=points("REFUTED" if fewer else "SUPPORTED", -100 * fewer),
        rank_1=points("REFUTED", -10 - 100 * fewer),
        rank_1_control=points("REFUTED", -10),
        top_rank_control=points("SUPPORTED", 0),
    )
    assert "| fullft, scope matrices" in out["page"]
    if fewer:
        others = of(lambda s: s.method != FullFT())[1]
        check(others, rank_1="UNDECIDED", rank_1_control=points("REFUTED", -10))
        absent = ("no curve of lora r1", "no curve of lora")
        check(of(is_full)[1], rank_1_control=absent[0], top_rank_control=absent[1])


def bit_runs(*contexts):
    sizes = ("objective=policy_gradient", "batch_size=1024", "group_size=16", "max_new_tokens=1")
    grid = {"full": FULL, "lora": LORA, "n": 5, "steps": 64}
    found = []
    for n in contexts:
        found += arms(base("tiny64-knows", "bandit", *sizes, contexts=n), (1, 4), **grid)
        found += arms(base("tiny64-knows", "bandit", contexts=n), (1,), **grid)  # supervised
    return found


def contexts_of(spec):
    return int(spec.plain()["dataset"]["knobs"]["contexts"])


class Bandit(Rewards):
    """`reward[contexts]`, less `behind[contexts]` for rank 1, which knows .97 of the labels."""

    def __init__(self, reward, behind):
        def top(spec, step):
            return reward[contexts_of(spec)] - behind[contexts_of(spec)] * (rank_of(spec) == 1)

        def best(spec):
            return FULL if is_full(spec) else LORA

        super().__init__(top, best, lambda s: 0.04 if is_full(s) else 0.016)

    def nll(self, spec):
        if spec.objective != "sft":
            return super().nll(spec)
        noise = np.random.default_rng(int(spec.id, 16)).normal(0, 2e-3)
        off = math.log(spec.lr / self.best(spec))
        return math.log(16) * (0.02 if is_full(spec) else 0.03) + 0.02 * off**2 + noise

    def curve(self, spec):
        ends = [{"step": 0, "test_nll": 2.8}, {"step": spec.steps, "test_nll": self.nll(spec)}]
        return ends if spec.objective == "sft" else super().curve(spec)

    def results(self, spec):
        if spec.objective == "sft":
            return {"nll_start": 2.8}
        found = super().results(spec)
        bits = contexts_of(spec) * bits_learned(found["test_reward"], 16)
        return {**found, "bits_per_answer": bits / (spec.steps * spec.batch_size)}


def test_rank_1_behaves_as_its_capacity_says():
    world = Bandit({64: 0.9, 4096: 0.6}, {64: 0.0, 4096: 0.3})
    out, _ = ask("rl_bits", world, bit_runs(64, 4096))
    few, many = ({}, {})
    for v in out["verdicts"]:
        (few if "contexts=64)" in v["group"] else many)[v["claim"]] = v
    assert few.keys() == {"tie", "taught", "wider", "one_bit", "ratio"}
    assert many.keys() == {"behind", "wider", "one_bit", "ratio"}
    taught = ("SUPPORTED", pytest.approx(-1, abs=0.3))
    check(few, tie="SUPPORTED", taught=taught, wider="SUPPORTED", one_bit="REFUTED")
    bits = pytest.approx(4096 * bits_learned(0.6, 16) / 65536, rel=0.02)
    behind = ("SUPPORTED", pytest.approx(-30, abs=0.5))
    check(many, behind=behind, wider="SUPPORTED", one_bit=("REFUTED", bits))
    assert {v["ratio"]["outcome"] for v in (few, many)} == {"REFUTED"}  # planted: 4
    text = out["page"]  # of rewards and of losses
    assert "of reward at the optimum" in text and "nats at the optimum" in text
    assert f"capacity of rank 1: {4 * 64 / (2 * 5232):.2g}." in text
    _, found = ask("rl_bits", world, [s for s in bit_runs(64) if s.objective != "sft"])
    check(found, taught="no curve of fullft (objective sft)", tie="SUPPORTED")
    assert found["behind"]["group"] == "no cell"  # no condition beyond the capacity
