"""`rl` on planted rewards: points behind, best rates, ranges of good rates, episodes needed."""

import math
import re

import numpy as np
import pytest

from analysis.measures.rewards import good_range
from tests.rewards import START, Rewards, study_of

RATES = (
    "sweep.arms.fullft.lr=${around:1e-4,5,2}",
    "sweep.arms.lora.lr=${around:%s,5,2}",
    "sweep.arms.fullft.task=[{model:tiny64-skilled,dataset:words,batch_size:64,group_size:8,max_new_tokens:6,steps:64}]",
    "sweep.replicate.n_lrs=5",
)


def world(rho, ratio, full_bend, lora_bend, noise=1e-3):
    """Rewards rise by .06 a doubling of the updates; rank 1 makes `rho` of the progress."""

    def top(spec, step):
        share = rho if getattr(spec.method, "rank", 0) == 1 else 1.0
        return START + 0.06 * math.log2(1 + share * step)

    def best(spec):
        return 1e-4 * (ratio if spec.method.name == "lora" else 1)

    def bend(spec):
        return lora_bend if spec.method.name == "lora" else full_bend

    return Rewards(top, best, bend, noise=noise)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rho", "ratio", "bends", "outcomes"),
    [
        (0.5, 4, (0.04, 0.016), ("REFUTED", "SUPPORTED", "REFUTED", "SUPPORTED", "REFUTED")),
        (1.0, 10, (0.016, 0.04), ("SUPPORTED", "SUPPORTED", "SUPPORTED", "REFUTED", "SUPPORTED")),
    ],
)
def test_planted_differences_come_back(ask, rho, ratio, bends, outcomes, tmp_path):
    rates = [r % f"{ratio * 1e-4:g}" if "%" in r else r for r in RATES]
    out, found = ask("rl", world(rho, ratio, *bends), *rates, report=rho < 1)
    claims = ("rank_1", "top_rank", "ratio", "wider", "progress")
    assert tuple(found[c]["outcome"] for c in claims) == outcomes
    planted = 6 * math.log2((1 + 64 * rho) / 65)
    assert found["rank_1"]["estimate"]["value"] == pytest.approx(planted, abs=0.5)
    assert found["ratio"]["estimate"]["value"] == pytest.approx(ratio, rel=0.1)
    assert found["progress"]["estimate"]["value"] == pytest.approx(rho, rel=0.1)
    wider = math.sqrt(bends[0] / bends[1])
    assert found["wider"]["estimate"]["value"] == pytest.approx(wider, rel=0.2)
    (behind,) = out["points_behind"].values()
    assert set(behind) == {"1", "8"}
    if rho < 1:  # with a report
        report, study = study_of(tmp_path)
        assert "Exploratory" not in report  # planted runs at another scale confirm
        assert (
            re.search(r"\| 0 of \d+ \|", report)
            and "| best reward |" in report
            and "within 0.01 |" in report
        )
        assert "reward before training 0.1" in report and "NLL" not in report
        assert "rank 1 does not learn as much as full fine-tuning**" in study
        said = r"The difference was [+-]0\.\d points \[.*\] on tiny64-skilled \(words; rank 8, 64 updates\)"
        assert re.search(said, study)
        (line,) = [
            text for text in study.splitlines() if "rank 1 reaches full" in text and "8.6" in text
        ]
        assert "REFUTED" in line and "parameters an episode" in line
        assert "tiny64-skilled has practised exercises" in study


@pytest.mark.slow
def test_a_task_that_is_nearly_solved_decides_nothing(ask):
    solved = Rewards(lambda s, step: 0.95, lambda s: 2e-4, lambda s: 0.03)
    rates = [r % "2e-4" if "%" in r else r for r in RATES]
    _out, found = ask("rl", solved, *rates)
    assert found["rank_1"]["outcome"] == "UNDECIDED" and "nearly solved" in str(found["rank_1"])


@pytest.mark.slow
def test_of_the_base_that_solves_the_task_only_progress_is_asked(ask):
    """Planted: rank 1 gives up 12 points on the one base, and makes half of the progress on the other."""
    first, second = "tiny64-skilled", "tiny64-skills"

    def top(spec, step):
        alone = spec.method.name == "lora" and spec.method.rank == 1
        if spec.model.name == second:
            return START + 0.13 * math.log2(1 + (0.5 if alone else 1) * step)  # .88 at 64
        return START + 0.06 * math.log2(1 + step) - 0.12 * alone * step / spec.steps

    two = Rewards(top, lambda s: 1e-4 * (4 if s.method.name == "lora" else 1), lambda s: 0.03)
    task = "{model:%s,dataset:words,batch_size:64,group_size:8,max_new_tokens:6,steps:64}"
    tasks = f"sweep.arms.fullft.task=[{task % first},{task % second}]"
    rates = [r % "4e-4" if "%" in r else r for r in RATES if "task=" not in r]
    out, _found = ask("rl", two, tasks, *rates)
    judged = {(v["claim"], v["group"].split(" on ")[0]): v for v in out["verdicts"]}
    of_rewards = ("rank_1", "top_rank", "ratio", "wider")
    assert set(judged) == {*((c, first) for c in (*of_rewards, "progress")), ("progress", second)}
    assert judged["rank_1", first]["outcome"] == "REFUTED"
    assert judged["rank_1", first]["estimate"]["value"] == pytest.approx(-12, abs=0.5)
    assert judged["progress", second]["outcome"] == "REFUTED"
    assert judged["progress", second]["estimate"]["value"] == pytest.approx(0.5, rel=0.1)


@pytest.mark.slow
def test_without_rank_1_the_claims_about_it_stay_open(ask):
    rates = [r % "2e-4" if "%" in r else r for r in RATES]
    _out, found = ask("rl", world(1, 2, 0.03, 0.03), *rates, "sweep.arms.lora.rank=[8]")
    assert "no curve of lora r1" in str(found["rank_1"])
    assert found["top_rank"]["outcome"] == "SUPPORTED"


def test_the_range_of_good_rates_ends_between_rates_or_goes_on():
    x = np.arange(5.0)
    reward = np.array([0.50, 0.54, 0.55, 0.51, 0.20])
    low, high, goes_on = good_range(x, reward)
    # .53 is crossed a quarter of the way from 1 to 0, and half of the way from 2 to 3
    assert (low, high, goes_on) == (pytest.approx(0.75), pytest.approx(2.5), False)
    low, high, goes_on = good_range(x[:3], reward[:3])
    assert (low, high, goes_on) == (pytest.approx(0.75), 2.0, True)
    assert good_range(x, np.array([0.0, 0.5, 0.0, 0.0, 0.5]))[:2] == (
        pytest.approx(0.96),
        pytest.approx(1.04),
    )  # one range, around the best rate
