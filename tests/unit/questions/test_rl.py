"""`rl` and `rl_bits` on planted rewards: points behind, optimal LRs, capacity, bits an episode."""

import dataclasses
import math

import numpy as np
import pytest

from analysis.runs.table import TableError
from lorasweep.methods.fullft import FullFT
from lorasweep.sweep.request import question
from lorasweep.train.objectives.rollouts import bits_learned
from tests.planted import Rewards, arms, ask, base, check
from tests.world import compose_request

pytestmark = pytest.mark.slow  # fits dozens of curves


START = Rewards.start_reward
SIZES = ("objective=policy_gradient", "batch_size=64", "group_size=8", "max_new_tokens=6")


def rl_runs(ratio, ranks=(1, 8), models=("tiny64-skilled",)):
    specs = [base(model, "words", *SIZES) for model in models]
    grid = {"full": 1e-4, "lora": ratio * 1e-4, "n": 5, "steps": 64}
    return [s for spec in specs for s in arms(spec, ranks, **grid)]


def world(rho, ratio, full_bend, lora_bend):
    """Rewards rise by .06 a doubling of the updates; rank 1 makes `rho` of the progress."""

    def top(spec, step):
        share = rho if getattr(spec.method, "rank", 0) == 1 else 1.0
        return START + 0.06 * math.log2(1 + share * step)

    return Rewards(
        top,
        lambda spec: 1e-4 * (ratio if spec.method.name == "lora" else 1),
        lambda spec: lora_bend if spec.method.name == "lora" else full_bend,
    )


@pytest.mark.parametrize(
    ("rho", "ratio", "bends", "outcomes"),
    [
        (0.5, 4, (0.04, 0.016), ("REFUTED", "SUPPORTED", "REFUTED", "SUPPORTED", "REFUTED")),
        (1.0, 10, (0.016, 0.04), ("SUPPORTED", "SUPPORTED", "SUPPORTED", "REFUTED", "SUPPORTED")),
    ],
)
def test_planted_differences_come_back(rho, ratio, bends, outcomes, tmp_path):
    out, found = ask("rl", world(rho, ratio, *bends), rl_runs(ratio), tmp_path if rho < 1 else None)
    claims = ("rank_1", "top_rank", "ratio", "wider", "progress")
    assert tuple(found[c]["outcome"] for c in claims) == outcomes
    planted = 6 * math.log2((1 + 64 * rho) / 65)
    check(found, rank_1=pytest.approx(planted, abs=0.5), ratio=pytest.approx(ratio, rel=0.1))
    wider = math.sqrt(bends[0] / bends[1])
    check(found, progress=pytest.approx(rho, rel=0.1), wider=pytest.approx(wider, rel=0.2))
    assert all(len(curves) == 2 for by in out["compared"].values() for curves in by.values())
    if rho < 1:  # with a report, in rewards and not in losses
        text = (tmp_path / "report.md").read_text()
        assert "| best reward |" in text and "NLL" not in text and "| 0 of 4 |" in text


def test_two_curves_of_one_rank_are_refused():
    """With and without an adapter of the unembedding: the difference may be large."""
    specs = rl_runs(2)
    lora = [s for s in specs if s.method.name == "lora"]
    layers = "attention+mlp"
    specs += [
        dataclasses.replace(s, method=dataclasses.replace(s.method, layers=layers)) for s in lora
    ]
    with pytest.raises(TableError, match=r"two curves of lora r1.*attention"):
        ask("rl", world(0.5, 4, 0.04, 0.016), specs)


def test_of_the_base_that_solves_the_task_only_progress_is_asked():
    """Rank 1 is 12 points behind on one base, and makes half of the progress on the other."""
    first, second = "tiny64-skilled", "tiny64-skills"

    def top(spec, step):
        alone = spec.method.name == "lora" and spec.method.rank == 1
        if spec.model.name == second:
            return START + 0.13 * math.log2(1 + (0.5 if alone else 1) * step)  # .88 at 64
        return START + 0.06 * math.log2(1 + step) - 0.12 * alone * step / spec.steps

    two = Rewards(top, lambda s: 1e-4 * (4 if s.method.name == "lora" else 1), lambda s: 0.03)
    out, _ = ask("rl", two, rl_runs(4, models=(first, second)))
    judged = {(v["claim"], v["group"].split(" on ")[0]): v for v in out["verdicts"]}
    of_rewards = ("rank_1", "top_rank", "ratio", "wider")
    assert set(judged) == {*((c, first) for c in (*of_rewards, "progress")), ("progress", second)}
    for (claim, model), value in {("rank_1", first): -12, ("progress", second): 0.5}.items():
        verdict = {claim: judged[claim, model]}
        check(verdict, **{claim: ("REFUTED", pytest.approx(value, rel=0.1))})


@pytest.mark.parametrize("fewer", [0.0, 0.12])
def test_a_control_separates_the_rank_from_the_choice_of_matrices(fewer, tmp_path):
    """Training fewer matrices costs `fewer` of reward, and rank 1 costs .1 more; rank 8 nothing."""

    def top(spec, step):
        behind = 0.1 * (_rank(spec) == 1) + fewer * (spec.method != FullFT())
        return START + 0.06 * math.log2(1 + step) - behind * step / spec.steps

    planted = Rewards(top, lambda s: 1e-4 * (4 if _rank(s) else 1), lambda s: 0.03)
    specs = rl_runs(4)
    whole = [s for s in specs if s.method == FullFT()]
    specs += [dataclasses.replace(s, method=FullFT(scope="matrices")) for s in whole]
    claims = question(compose_request(["+sweep=rl_matrices", "scale=smoke"]))["claims"]
    _, found = ask("rl", planted, specs, tmp_path, claims)
    same, worse = "SUPPORTED", "REFUTED"
    check(found, control=(worse if fewer else same, pytest.approx(-100 * fewer, abs=0.3)))
    check(found, rank_1=(worse, pytest.approx(-10 - 100 * fewer, abs=0.3)))
    check(found, rank_1_control=(worse, pytest.approx(-10, abs=0.3)))
    check(found, top_rank_control=(same, pytest.approx(0, abs=0.3)))
    text = (tmp_path / "report.md").read_text()
    assert "| fullft, scope matrices" in text
    _, found = ask("rl", planted, rl_runs(4), claims=claims)
    assert found["control"]["why"] == "no curve of fullft of LoRA's matrices"
    _, found = ask("rl", planted, [s for s in specs if s.method.name == "fullft"], claims=claims)
    assert [found[c]["why"] for c in ("rank_1_control", "top_rank_control")] == [
        "no curve of lora r1",
        "no curve of lora",
    ]
    others = [s for s in specs if s.method != FullFT()]
    _, found = ask("rl", planted, others, claims=claims)
    check(found, rank_1="UNDECIDED", rank_1_control=(worse, pytest.approx(-10, abs=0.3)))
    alone = [s for s in specs if s.method == FullFT(scope="matrices")]
    _, found = ask("rl", planted, alone, claims=claims)
    assert {v["outcome"] for v in found.values()} == {"UNDECIDED"}


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
    """`reward[contexts]`, less `behind[contexts]` for rank 1, which knows `known` of the labels."""

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


@pytest.mark.parametrize("costs", [0.0, 0.1])
def test_arms_without_an_adapter_of_the_unembedding_are_judged(costs, tmp_path):
    """Rank 1 costs .05 of reward, and an adapter of the unembedding `costs` more at every rank."""
    plain = Bandit({64: 0.9}, {64: 0.05}, 0.97, (0.04, 0.016))
    reward = plain.top

    def top(spec, step):
        adapted = _rank(spec) > 0 and "unembedding" in spec.method.layers
        return reward(spec, step) - costs * adapted

    plain.top = top
    both = [
        dataclasses.replace(s, method=dataclasses.replace(s.method, layers=layers))
        for s in bit_runs([64])
        for layers in ("attention+mlp", "attention+mlp+unembedding")
        if _rank(s)
    ]
    specs = [*both, *(s for s in bit_runs([64]) if not _rank(s))]
    asked = question(compose_request(["+sweep=rl_unembedding", "scale=smoke"]))["claims"]
    _, found = ask("rl_unembedding", plain, specs, tmp_path, asked)
    check(found, tie=("REFUTED", pytest.approx(-5, abs=0.5)))
    outcome = "SUPPORTED" if costs else "REFUTED"
    check(found, unembedding=(outcome, pytest.approx(100 * costs, abs=0.3)))
    check(found, top_rank=("SUPPORTED", pytest.approx(0, abs=0.3)), taught="SUPPORTED")
    load = 4 * 64 / (2 * 5120)  # without the unembedding
    assert f"capacity of rank 1: {load:.2g}." in (tmp_path / "report.md").read_text()
    _, found = ask("rl_unembedding", plain, bit_runs([64]), claims=asked)
    assert found["unembedding"]["why"].startswith("no curve of")
    check(found, tie=pytest.approx(-5 - 100 * costs, abs=0.5))


def by_contexts(out):
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
    bits = 4096 * bits_learned(0.6, 16)
    check({"one_bit": found["one_bit", 4096]}, one_bit=pytest.approx(bits / 65536, rel=0.02))
    text = (tmp_path / "report.md").read_text()  # of rewards and of losses
    assert "of reward at the optimum" in text and "nats at the optimum" in text
    assert f"capacity of rank 1: {4 * 64 / (2 * 5232):.2g}." in text


def test_without_rank_1_or_the_control_claims_stay_open():
    world = Bandit({64: 0.9}, {64: 0.0}, 0.97, (0.04, 0.016))
    _, found = ask("rl_bits", world, bit_runs([64], [1], supervised=False))
    assert found["taught"]["why"] == "no curve of fullft (objective sft)"
    assert found["tie"]["outcome"] == "SUPPORTED"
    for claim in ("behind", "ratio"):  # no condition beyond, and no other rank
        assert found[claim]["group"] == "no cell"
    _, found = ask("rl_bits", world, bit_runs([64], [4], supervised=False))
    assert found["tie"]["why"].startswith("no curve of lora r1")
