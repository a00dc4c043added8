"""The benchmark of fleets: its customers, its arithmetic, and that its baseline trains the same."""

import json

import pytest

from benchmarks import fleet_table, grids, trl_baseline
from benchmarks.fleet import extrapolate, spread
from lorasweep.config.compose import compose_request
from lorasweep.customers.read import read_customers
from lorasweep.customers.rows import Rules, rows_of
from lorasweep.data.load import load as load_data
from lorasweep.launch.trainer import finetune
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.run import RunSpec
from tests.customers import make_base, model_of, write_rows


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


# ---------------------------------------------------------------- the time to an answer


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
