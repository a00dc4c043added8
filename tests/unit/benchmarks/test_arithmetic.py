"""The arithmetic of the benchmarks: simulated designs, fleets, rewarded runs, and the time to an answer."""

import json
import math

import numpy as np
import pytest

from analysis.inference.decide import judge
from analysis.inference.estimate import Estimate, from_draws
from benchmarks import fleet_table, grids, trl_baseline
from benchmarks.calibration.designs import designs, plain_seeds, supported
from benchmarks.calibration.generators import Design, plant
from benchmarks.calibration.run import CLAIM
from benchmarks.fleet import extrapolate, spread
from benchmarks.rewards import compared, differing, panels
from lorasweep.advise.read import read_customers
from lorasweep.config.compose import compose_request
from lorasweep.data.load import load as load_data
from lorasweep.fleet.rows import Rules, rows_of
from lorasweep.launch.trainer import finetune
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.run import RunSpec
from lorasweep.sweep.replicates import lrs_around_optimum
from tests.customers import make_base, model_of, write_rows


@pytest.mark.parametrize("around", [1, 2, 3, 4])
def test_fresh_seeds_get_the_learning_rates_that_a_sweep_gives_them(around):
    design = Design(7, 2.0, 1, fresh=2, noise=1e-9, fresh_rates=around)
    for _ in range(5):
        curves, _ = plant("linex", design, np.random.default_rng(around))
        for c in curves:
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
    many, rng = Design(7, 2.0, 40, noise=1e-3, curves=2), np.random.default_rng
    for paired in (True, False):  # paired seeds shift all curves alike
        curves, _ = plant("linex", many, rng(5), paired=paired)
        shifts = [[c.y[c.seed == s].mean() for s in range(40)] for c in curves]
        assert (np.corrcoef(shifts)[0, 1] > 0.9) == paired


def test_a_scaled_ratio_is_supported_as_the_decision_rule_has_it():
    rng = np.random.default_rng(3)
    for centre, scale in ((1.1, 9.0), (0.9, 9.0), (1.0, 7.1), (1.2, 2.0), (1.0, 13.0)):
        draws = centre * np.exp(0.1 * rng.standard_normal(4000))
        verdict = judge("ratio", CLAIM, "g", from_draws(draws * scale, 9), [], 5, True)
        assert supported(from_draws(draws, 9), scale) == (verdict.outcome == "SUPPORTED")
    assert not supported(Estimate(None), 10.0)


def test_the_plain_grid_with_the_same_interval_is_found_between_those_tried():
    plain = [
        [{"seeds": s, "rates": 7, "ratio_half_width": w}]
        for s, w in ((2, 0.3), (3, 0.2), (6, 0.1), (12, 0.1))
    ]
    found = {w: plain_seeds(w, plain, "ratio") for w in (0.5, 0.3, 0.29, 0.2, 0.141, 0.1, 0.09)}
    assert [found[w] for w in (0.5, 0.3, 0.2)] == pytest.approx([2, 2, 3])
    assert found[0.29] == pytest.approx(2 * 1.5 ** (math.log(30 / 29) / math.log(1.5)))
    assert found[0.141] == pytest.approx(3 * 2 ** (math.log(0.2 / 0.141) / math.log(2)))
    assert (found[0.1], found[0.09]) == (pytest.approx(6), math.inf)
    assert math.isnan(plain_seeds(math.nan, plain, "ratio"))


def curves(*ends):
    return [{4: 0.1, 12: end} for end in ends]


def test_two_sides_agree_within_two_errors_of_the_difference_of_their_means():
    first, last = compared(curves(0.30, 0.32, 0.34), curves(0.33, 0.35, 0.37))
    assert not first["compared"] and first["difference"] == first["error"] == 0 and first["agree"]
    assert last["compared"] and last["difference"] == pytest.approx(-0.03)
    # each mean has the error .02 / sqrt(3)
    assert last["error"] == pytest.approx(0.02 * np.sqrt(2 / 3))
    assert last["agree"]
    assert not compared(curves(0.30, 0.32, 0.34), curves(0.34, 0.36, 0.38))[1]["agree"]


def test_an_answer_that_differs_counts_once():
    def drawn(*answers):
        return [np.array(a) for a in answers]

    alone = drawn([1, 2, 0], [3, 0], [4, 5, 0])
    assert differing(alone, alone) == 0
    assert differing(drawn([1, 2, 0], [3, 0, 0], [5, 4, 0]), alone) == 2


def test_the_figure_shows_two_errors():
    rows = compared(curves(0.30, 0.32, 0.34), curves(0.44, 0.46, 0.48))
    _, difference = panels({"updates": rows, "seeds": [1, 2, 3]})
    assert difference.series[0].high[1] == pytest.approx(-0.14 + 2 * rows[1]["error"])


def test_customers_are_drawn_alike_and_within_bounds(tmp_path):
    rows = [{"question": f"{k}?", "answer": str(k)} for k in range(500)]
    for name in ("one", "two"):
        fleet_table.write_table(tmp_path / name, "tiny", 9, (4, 8), rows)
    for path in (tmp_path / "one/data").iterdir():
        assert path.read_bytes() == (tmp_path / "two/data" / path.name).read_bytes()
        given = [json.loads(line) for line in path.read_text().splitlines()]
        assert fleet_table.FEWEST <= len(given) <= fleet_table.MOST
        assert all(r in rows for r in given) or {"prompt", "completion"} <= set(given[0])
    values = read_customers(tmp_path / "one/customers.csv")
    assert len(values) == 9 and {c.batch_size for c in values} <= {1, 2, 4}
    assert all(4 <= c.steps <= 8 for c in values)


def test_a_sample_is_spread_over_the_tokens_and_extrapolated_by_them():
    tokens = [50, 10, 40, 20, 30]
    assert spread(tokens, 5) == [1, 3, 4, 2, 0] and spread(tokens, 1) == [4]
    times = {"train_s": 1.0, "eval_s": 1.0}
    rows = [
        {"start_s": s, "start_cpu_s": 2 * s, "job_s": c, "job_cpu_s": 2 * c, **times}
        for s, c in ((5.0, 2.0), (7.0, 4.0))
    ]
    found = extrapolate(rows, [20, 40], tokens, 5)
    assert found["whole_s"] == pytest.approx(5 * 6.0 + 6.0 * 150 / 60)
    assert found["cpu_s"] == pytest.approx(2 * found["whole_s"])
    rows[1] |= {"start_s": 0.0, "start_cpu_s": 0.0}
    assert extrapolate(rows, [20, 40], tokens, 1)["whole_s"] == pytest.approx(5.0 + 15.0)


def test_the_loop_starts_from_the_same_loss_and_keeps_the_best_rate(tmp_path):
    peft = pytest.importorskip("peft")
    model = model_of(make_base(tmp_path / "base"))
    path = write_rows(tmp_path / "ann.jsonl", 30, "357 {k}")
    rows = rows_of("ann", str(path), Rules(), None)
    spec = RunSpec(model=model, dataset=rows.dataset, method=LoRA(rank=4), batch_size=2, steps=3)
    specs = [RunSpec(**{**vars(spec), "lr": lr}) for lr in (1e-4, 1e-2)]
    base = models.load(model, ["/"])
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
    points = compose_request(["+sweep=lr_ratio", "scale=tiny"]).points
    timed, logged = [], []

    def process(kind, sample, values, runs, folder):
        timed.append((kind, sample[0].id, runs))
        return {"start_s": 4.0, "train_s": 5.0, "eval_s": 1.0, "run_s": 6.0 + len(timed)}

    whole = {"wall_s": 100.0, "runs": len(points)}
    monkeypatch.setattr(grids, "run_answer", lambda scale, home: (dict(whole), points))
    monkeypatch.setattr(grids, "baseline", process)
    found = grids.time_answer("tiny", {}, logged.append)
    assert [p["rank"] for p in found["processes"]] == [None, 16]
    assert len({i for _, i, _ in timed}) == len(timed) == 2 * grids.SAMPLES
    assert {(kind, runs) for kind, _, runs in timed} == {("trl", 1)}
    seconds = 12 + 15  # of a process of each curve, the mean of three
    assert (found["plain_grid_s"], found["same_interval_s"]) == (21 * seconds, 14 * seconds)
    assert found["vs_plain_grid"] == pytest.approx(21 * seconds / 100)
    assert found["vs_same_interval"] == pytest.approx(14 * seconds / 100)
    assert "3 TRL processes of each curve timed, and multiplied up" in logged[-1]
