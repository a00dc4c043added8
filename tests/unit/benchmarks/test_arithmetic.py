"""The arithmetic of the benchmarks: simulated designs, fleets, rewarded runs, and searches."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from analysis.inference.decide import judge
from analysis.inference.estimate import Estimate, from_draws
from benchmarks import fleet, search, speed, trl_baseline
from benchmarks.calibration import CLAIM, designs, plain_seeds, supported
from benchmarks.generators import Design, plant
from benchmarks.rewards import compared
from benchmarks.search import (
    CASES,
    GRID,
    N_GRID,
    SHAPES,
    TABLES,
    TUNE,
    Case,
    Trial,
    additive,
    chosen,
    course,
    regret_at,
    until_right,
)
from lorasweep.advise.read import read_customers
from lorasweep.config.compose import compose_request
from lorasweep.data.load import load as load_data
from lorasweep.fleet.rows import Rules, rows_of
from lorasweep.launch.trainer import finetune
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.sweep.grid import lrs_around_optimum
from tests.customers import make_base, model_of, write_rows


@pytest.mark.parametrize("around", [1, 2, 3, 4])
def test_fresh_seeds_get_the_learning_rates_that_a_sweep_gives_them(around):
    design = Design(7, 2.0, 1, fresh=2, noise=1e-9, fresh_rates=around)
    for c in plant("linex", design, np.random.default_rng(around))[0]:
        assert len(c.x) == design.runs == 7 + 2 * around
        loss = dict(zip(c.x[c.seed == 0], c.y[c.seed == 0]))
        for seed in (1, 2):
            assert list(c.x[c.seed == seed]) == lrs_around_optimum(loss, around)


def test_intervals_of_a_small_case_hold_the_planted_truth():
    shapes = (7, 2.0, 3), (5, 2.0, 1, 5)
    both = (Design(*shape, noise=2e-3, curves=2) for shape in shapes)
    plain, staged = (designs("linex", design, 2.0, 12) for design in both)
    for row in (plain, staged):
        assert row["ratio_answered"] == 1 and row["ratio_coverage"] >= 11 / 12
        assert row["gap_coverage"] >= 22 / 24 and row["false_supported"] == 0
    assert (plain["runs"], staged["runs"]) == (21, 20)
    # The gap in loss gains from seeds at the best rate; its place does not.
    assert staged["gap_half_width"] < plain["gap_half_width"] < 0.02
    assert plain["ratio_half_width"] < staged["ratio_half_width"] < 0.3


def test_a_scaled_ratio_is_supported_as_the_decision_rule_has_it():
    rng = np.random.default_rng(3)
    for centre, scale in ((1.1, 9.0), (0.9, 9.0), (1.0, 7.1), (1.2, 2.0), (1.0, 13.0)):
        draws = centre * np.exp(0.1 * rng.standard_normal(4000))
        verdict = judge("ratio", CLAIM, "g", from_draws(draws * scale, 9), [], 5, True)
        assert supported(from_draws(draws, 9), scale) == (verdict.outcome == "SUPPORTED")
    assert not supported(Estimate(None), 10.0)


def test_the_plain_grid_with_the_same_interval_is_found_between_those_tried():
    plain = pd.DataFrame({"seeds": [2.0, 3, 6, 12], "ratio_half_width": [0.3, 0.2, 0.1, 0.1]})
    found = {w: plain_seeds(w, plain, "ratio") for w in (0.5, 0.3, 0.29, 0.2, 0.141, 0.1, 0.09)}
    assert [found[w] for w in (0.5, 0.3, 0.2)] == pytest.approx([2, 2, 3])
    assert found[0.29] == pytest.approx(2 * 1.5 ** (math.log(30 / 29) / math.log(1.5)))
    assert found[0.141] == pytest.approx(3 * 2 ** (math.log(0.2 / 0.141) / math.log(2)))
    assert (found[0.1], found[0.09]) == (pytest.approx(6), math.inf)
    assert math.isnan(plain_seeds(math.nan, plain, "ratio"))


def test_two_sides_agree_within_two_errors_of_the_difference_of_their_means():
    def curves(*ends):
        return [{4: 0.1, 12: end} for end in ends]

    first, last = compared(curves(0.30, 0.32, 0.34), curves(0.33, 0.35, 0.37))
    assert not first["compared"] and first["difference"] == first["error"] == 0 and first["agree"]
    assert last["compared"] and last["difference"] == pytest.approx(-0.03)
    # each mean has the error .02 / sqrt(3)
    assert last["error"] == pytest.approx(0.02 * np.sqrt(2 / 3))
    assert last["agree"]
    assert not compared(curves(0.30, 0.32, 0.34), curves(0.34, 0.36, 0.38))[1]["agree"]


def test_customers_are_drawn_alike_and_within_bounds(tmp_path):
    rows = [{"question": f"{k}?", "answer": str(k)} for k in range(500)]
    for name in ("one", "two"):
        fleet.write_table(tmp_path / name, "tiny", 9, (4, 8), rows)
    for path in (tmp_path / "one/data").iterdir():
        assert path.read_bytes() == (tmp_path / "two/data" / path.name).read_bytes()
        given = [json.loads(line) for line in path.read_text().splitlines()]
        assert fleet.FEWEST <= len(given) <= fleet.MOST
        assert all(r in rows for r in given) or {"prompt", "completion"} <= set(given[0])
    values = read_customers(tmp_path / "one/customers.csv")
    assert len(values) == 9 and {c.batch_size for c in values} <= {1, 2, 4}
    assert all(4 <= c.steps <= 8 for c in values)


def test_a_sample_is_spread_over_the_tokens_and_extrapolated_by_them():
    tokens = [50, 10, 40, 20, 30]
    assert fleet.spread(tokens, 5) == [1, 3, 4, 2, 0] and fleet.spread(tokens, 1) == [4]
    times = {"train_s": 1.0, "eval_s": 1.0}
    rows = [
        {"start_s": s, "start_cpu_s": 2 * s, "job_s": c, "job_cpu_s": 2 * c, **times}
        for s, c in ((5.0, 2.0), (7.0, 4.0))
    ]
    found = fleet.extrapolate(rows, [20, 40], tokens, 5)
    assert found["whole_s"] == pytest.approx(5 * 6.0 + 6.0 * 150 / 60)
    assert found["cpu_s"] == pytest.approx(2 * found["whole_s"])
    rows[1] |= {"start_s": 0.0, "start_cpu_s": 0.0}
    assert fleet.extrapolate(rows, [20, 40], tokens, 1)["whole_s"] == pytest.approx(5.0 + 15.0)


def test_the_loop_starts_from_the_same_loss_and_keeps_the_best_rate(tmp_path):
    peft = pytest.importorskip("peft")
    model = model_of(make_base(tmp_path / "base"))
    path = write_rows(tmp_path / "ann.jsonl", 30, "357 {k}")
    base = models.load(model, ["/"])
    rows, _ = rows_of("ann", str(path), Rules(), base.tokenizer)
    spec = RunSpec(model=model, dataset=rows.dataset, method=LoRA(rank=4), batch_size=2, steps=3)
    specs = [RunSpec(**{**vars(spec), "lr": lr}) for lr in (1e-4, 1e-2)]
    data = load_data(rows.dataset, ["/"], base.tokenizer)
    (ours,) = [r for e in finetune([specs[1]], base, data) for _, r in e.ended.values()]
    adapted = trl_baseline.adapted(base.model, spec, "loop")
    assert isinstance(adapted, peft.PeftModel)
    row = trl_baseline.customer(adapted, specs, data, "loop", base.tokenizer)
    assert row["before"] == pytest.approx(ours["nll_start"], abs=1e-4)
    # its first matrices are others, so what it gains is only of the same size
    gains = row["before"] - row["after"], ours["nll_start"] - ours["test_nll"]
    assert 0.5 < gains[0] / gains[1] < 2


def test_the_answer_is_timed_whole_and_processes_are_multiplied_up(monkeypatch):
    points, processes = compose_request(["+sweep=lr_ratio", "scale=tiny"]).points, []

    def process(kind, sample, values, folder):
        processes.extend(p.id for p in sample if kind == "trl")
        return {"start_s": 4.0, "train_s": 5.0, "eval_s": 1.0, "run_s": 6.0 + len(processes)}

    ratio = {"rank": None, "ratio": {"value": 4.0, "low": 3.0, "high": 5.0}}
    whole = 100.0, {"ratios": [ratio]}, points
    monkeypatch.setattr(speed, "timed", lambda arguments, home: whole)
    monkeypatch.setattr(speed, "baseline", process)
    found = speed.whole_sweep({}, 1e12)
    assert len(set(processes)) == len(processes) == 2 * speed.SAMPLES
    seconds = 12 + 15  # of a process of each curve, the mean of three
    answer = found["answer"]
    assert (answer["plain_grid_s"], answer["same_interval_s"]) == (21 * seconds, 14 * seconds)
    assert found["process_per_run_s"] == sum(
        c["runs"] * s for c, s in zip(found["process_per_run"], (12, 15))
    )


# ---------------------------------------------------------------- searches


def full(lr, loss, seed=0):
    return Trial(lr, seed, 8, loss)


def test_full_runs_choose_the_vertex_of_the_parabola_or_the_best_of_them():
    lrs = [1e-3, 2e-3, 4e-3]
    valley = [(math.log(lr / 1.7e-3)) ** 2 for lr in lrs]
    assert chosen(map(full, lrs, valley)) == pytest.approx(1.7e-3)
    assert chosen(map(full, lrs, [1.0, 2.0, 3.0])) == 1e-3
    assert chosen(map(full, lrs, [2.0, 1.0, math.inf])) == 2e-3
    assert chosen([]) is None
    # A seed with higher losses, at two of the learning rates only, does not move the choice.
    more = [full(lr, v + 5, 1) for lr, v in zip(lrs[1:], valley[1:])]
    assert chosen([*map(full, lrs, valley), *more]) == pytest.approx(1.7e-3)
    whole = np.array([3.0, 1.0, 2.0]) + np.array([[-0.5], [0.5]])
    seen = whole.copy()
    seen[1, 0] = np.nan
    rate, shift = additive(seen)
    assert rate[:, None].T + shift[:, None] == pytest.approx(whole, abs=1e-6)


def test_updates_count_until_the_choice_stays_right():
    truth = SimpleNamespace(regret=lambda lr: 100 * abs(math.log(lr)))
    trials = [Trial(1.0, 0, 2, None), full(1.0, 3.0), full(2.0, 2.0), full(0.996, 1.0)]
    path = course(trials, 8, truth)
    assert [u for u, _ in path] == [0.25, 1.25, 2.25, 3.25]
    assert until_right(path) == 3.25 and until_right(path[:3]) == math.inf
    assert regret_at(path, 1.25) == 0 and regret_at(path, 1) == math.inf


@pytest.mark.parametrize("name", TABLES)
def test_replays_have_the_losses_of_the_table(name):
    data = search.kept(name)
    for truth, arm in zip(data.truths, data.arms):
        curve = truth.optimum.curve
        first = curve.usable & (curve.seed == min(curve.seed))
        for x, y in zip(curve.x[first], curve.y[first]):
            assert arm.losses(math.exp(x), arm.start.spec.steps, 0) == pytest.approx(y)
        assert truth.regret(truth.optimum.best_lr.value) < 1e-3


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_every_part_runs_and_gives_a_page(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    short = ("scale=tiny", "steps=24", "sweep.arms.lora.rank=16")
    monkeypatch.setitem(CASES, "tiny", Case(short, 0, 4, ("Optuna",)))
    page = search.Page(tmp_path / "search.json", "README.md", search.page, search.draw)
    monkeypatch.setattr(search, "PAGE", page)
    search.main(["replays:3", "coverage:1", "tiny"])
    content = files.read_json(tmp_path / "search.json")
    for row in content["replays"]:
        assert row["methods"][TUNE]["right"] == 1
        assert row["methods"][TUNE]["end"] < row["methods"][GRID]["end"] == N_GRID
    assert max(max(content["tiny"]["methods"][name]["regrets"]) for name in (TUNE, GRID)) < 5
    assert (tmp_path / "README.md").read_text() == search.page(content)
    assert (tmp_path / "search.png").stat().st_size > 0


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_intervals_of_whole_searches_hold_known_optima():
    rows = search.coverage(print, 2)
    assert len(rows) == len(SHAPES) and all(r["right"] == 1 for r in rows)
    for key in ("lr", "gap"):
        n, held = (sum(r[k][key] for r in rows) for k in ("intervals", "held"))
        assert held >= 0.85 * n > 0
