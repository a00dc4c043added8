"""`rl_bits` on planted rewards: rank 1 below and beyond its capacity, the control, and an episode."""

import json
import math

import numpy as np
import pytest

from analysis.questions.rl_bits import known_share
from lorasweep.train.objectives.rollouts import bits_learned
from tests.rewards import Rewards, study_of

pytestmark = pytest.mark.slow  # fits a dozen curves

FULL, LORA = 5.6e-4, 2.24e-3


def cells(rate, rank=None, contexts=(64, 4096)):
    ranks = {} if rank is None else {"rank": rank}
    rates = [float(f"{rate * 2.0**k:.3g}") for k in range(-2, 3)]
    common = {"steps": 64, "seed": [100, 101, 102, 103], "lr": rates, **ranks}
    found = [{"generator_params": {"contexts": n}, **common} for n in contexts]
    return json.dumps(found).replace('"', "")


COUNTS = "sweep.withdrawn="
"""Judge the planted runs although the sweep's own answer is withdrawn."""
GRIDS = (
    COUNTS,
    *(f"sweep.arms.fullft.cell={cells(FULL)}", f"sweep.arms.lora.cell={cells(LORA, [1, 4])}"),
    *(f"sweep.arms.taught_fullft.cell={cells(FULL)}", f"sweep.arms.taught_lora.cell={cells(LORA)}"),
)


class Bandit(Rewards):
    """`reward[contexts]` of full fine-tuning and rank 4, lower by `behind[contexts]` with rank 1.

    Told the labels, full fine-tuning knows 98% of their bits and rank 1 `taught` of them.
    """

    def __init__(self, reward, behind, taught, bends, bits=None):
        def top(spec, step):
            n = spec.dataset.generator_params["contexts"]
            return reward[n] - (behind[n] if getattr(spec.method, "rank", 0) == 1 else 0)

        super().__init__(
            top,
            lambda s: FULL if s.method.name == "fullft" else LORA,
            lambda s: bends[s.method.name == "lora"],
        )
        self.taught, self.bits = taught, bits

    def nll(self, spec):
        if spec.objective != "sft":
            return super().nll(spec)
        known = 0.98 if spec.method.name == "fullft" else self.taught
        noise = np.random.default_rng(int(spec.id, 16)).normal(0, 2e-3)
        off = math.log(spec.lr / self.best(spec))
        return math.log(16) * (1 - known) + 0.02 * off**2 + noise

    def curve(self, spec):
        taught = [{"step": 0, "test_nll": 2.8}, {"step": spec.steps, "test_nll": self.nll(spec)}]
        return taught if spec.objective == "sft" else super().curve(spec)

    def more(self, spec):
        if spec.objective == "sft":
            return {"nll_start": 2.8}
        n, found = spec.dataset.generator_params["contexts"], super().more(spec)
        bits = n * bits_learned(found["test_reward"], 16) / (spec.steps * spec.batch_size)
        return {**found, "bits_per_answer": self.bits or bits}


def outcomes(out):
    """By claim and contexts."""
    found = {}
    for v in out["verdicts"]:
        contexts = "64" if "contexts=64)" in v["group"] else "4096"
        found[v["claim"], contexts] = v
    return found


def test_rank_1_behaves_as_its_capacity_says(ask, tmp_path):
    world = Bandit({64: 0.9, 4096: 0.6}, {64: 0.0, 4096: 0.3}, 0.97, (0.04, 0.016))
    out, _ = ask("rl_bits", world, *GRIDS, report=True)
    found = outcomes(out)
    assert {k: v["outcome"] for k, v in found.items()} == {
        ("tie", "64"): "SUPPORTED",
        ("behind", "4096"): "SUPPORTED",
        ("taught", "64"): "SUPPORTED",
        ("one_bit", "64"): "REFUTED",
        ("one_bit", "4096"): "REFUTED",
        ("ratio", "64"): "REFUTED",  # planted: 4
        ("ratio", "4096"): "REFUTED",
        ("wider", "64"): "SUPPORTED",
        ("wider", "4096"): "SUPPORTED",
    }
    assert found["behind", "4096"]["estimate"]["value"] == pytest.approx(-30, abs=0.5)
    assert found["taught", "64"]["estimate"]["value"] == pytest.approx(-1, abs=0.3)
    small, large = out["cells"]
    assert small["load"] == pytest.approx(4 * 64 / (2 * 5232)) and large["load"] > 1
    bits = 4096 * bits_learned(0.6, 16)
    assert large["bits"]["0"]["value"] == pytest.approx(bits, rel=0.02)
    assert large["bits_per_episode"]["0"]["value"] == pytest.approx(bits / 65536, rel=0.02)
    assert large["taught_bits"]["1"]["value"] == pytest.approx(0.97 * 16384, rel=0.01)
    assert [name for name, _ in out["figures"]] == ["rewards.png", "bits.png"]
    report, study = study_of(tmp_path)
    assert "| best reward or NLL |" in report and "group_size" not in report
    assert "of reward at the optimum" in report and "nats at the optimum" in report
    (line,) = [text for text in study.splitlines() if "it ties with full fine-tuning" in text]
    assert "**SUPPORTED** at `smoke`" in line and "parameters an episode" in line


def test_rank_1_behaves_otherwise(ask):
    world = Bandit({64: 0.9, 4096: 0.6}, {64: 0.1, 4096: 0.0}, 0.5, (0.016, 0.04), bits=1.0)
    out, _ = ask("rl_bits", world, *GRIDS)
    found = {k: v["outcome"] for k, v in outcomes(out).items()}
    for claim in (("tie", "64"), ("behind", "4096"), ("taught", "64"), ("wider", "64")):
        assert found[claim] == "REFUTED"
    assert found["one_bit", "64"] == "SUPPORTED"


def test_without_rank_1_or_the_control_claims_stay_open(ask):
    world = Bandit({64: 0.9}, {64: 0.0}, 0.97, (0.04, 0.016))
    removed = (COUNTS, "~sweep.arms.taught_lora", "~sweep.arms.taught_fullft")
    full, lora = cells(FULL, None, [64]), cells(LORA, [1], [64])
    grids = f"sweep.arms.fullft.cell={full}", f"sweep.arms.lora.cell={lora}"
    out, found = ask("rl_bits", world, *grids, *removed)
    assert found["taught"]["outcome"] == "UNDECIDED" and "by cross-entropy" in str(found["taught"])
    assert found["tie"]["outcome"] == "SUPPORTED"
    for claim in ("behind", "ratio"):  # no cell beyond, and no other rank
        assert found[claim]["group"] == "no cell"
    alone = f"sweep.arms.lora.cell={cells(LORA, [4], [64])}"
    out, verdicts = ask("rl_bits", world, grids[0], alone, *removed)
    assert {v["outcome"] for v in out["verdicts"]} == {"UNDECIDED"}
    assert "no curve of lora r1" in str(verdicts["tie"])


def test_the_share_of_a_label_that_is_known():
    assert known_share(math.log(16)) == 0 and known_share(0.0) == 1
    assert known_share(math.log(4)) == pytest.approx(0.5)
