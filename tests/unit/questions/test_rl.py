"""`rl` on planted rewards: points behind, optimal LRs, ranges of good LRs, episodes needed."""

import math

import pytest

from analysis.report.study import page
from analysis.report.study.answers import read_answers
from tests.planted import Rewards, arms, ask, base, check

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
    folder = tmp_path / "reports" / "rl-smoke"
    out, found = ask("rl", world(rho, ratio, *bends), rl_runs(ratio), folder if rho < 1 else None)
    claims = ("rank_1", "top_rank", "ratio", "wider", "progress")
    assert tuple(found[c]["outcome"] for c in claims) == outcomes
    planted = 6 * math.log2((1 + 64 * rho) / 65)
    check(found, rank_1=pytest.approx(planted, abs=0.5), ratio=pytest.approx(ratio, rel=0.1))
    wider = math.sqrt(bends[0] / bends[1])
    check(found, progress=pytest.approx(rho, rel=0.1), wider=pytest.approx(wider, rel=0.2))
    (behind,) = out["points_behind"].values()
    assert set(behind) == {"1", "8"}
    if rho < 1:  # with a report, in rewards and not in losses
        text = (folder / "report.md").read_text()
        assert "| best reward |" in text and "NLL" not in text and "| 0 of 4 |" in text
        study = page.page(read_answers([folder.parent]), tmp_path)
        (line,) = [v for v in study.splitlines() if "rank 1 reaches full" in v and "8.6" in v]
        assert "REFUTED" in line and "parameters an episode" in line


def test_a_task_that_is_nearly_solved_decides_nothing():
    solved = Rewards(lambda s, step: 0.95, lambda s: 2e-4, lambda s: 0.03)
    _, found = ask("rl", solved, rl_runs(2))
    assert {g["code"] for g in found["rank_1"]["gates"]} >= {"TASK"}


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


def test_without_rank_1_the_claims_about_it_stay_open():
    _, found = ask("rl", world(1, 2, 0.03, 0.03), rl_runs(2, ranks=(8,)))
    assert found["rank_1"]["why"] == "no curve of lora r1"
    check(found, top_rank="SUPPORTED")
