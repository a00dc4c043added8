"""The plan for a cluster's GPUs: text and JSON, whatever machine it is made on."""

import json

import pytest

from lorasweep.plan import detect
from tests.world import ROOT

BATCHES = ("+sweep=batch_size", "scale=paper")


@pytest.fixture
def nowhere(monkeypatch):
    """A machine that may not be asked."""

    def refuse(*_):
        raise AssertionError("the plan asked this machine")

    for name in ("this_machine", "cores", "memory_bytes", "gpus", "fast_bf16"):
        monkeypatch.setattr(detect, name, refuse)
    monkeypatch.delenv("SLURM_CONF", raising=False)  # of the cluster that other tests started


def test_the_study_is_planned_without_weights_and_without_a_look_at_this_machine(command, nowhere):
    study = ("+sweep=study", "sweep.parts=[lr_ratio,batch_size]", "scale=paper")
    found = json.loads(command(*study, "action=plan", "hardware=h100", "format=json").stdout)
    ratio, batches = found["sweeps"]
    assert (ratio["name"], batches["name"]) == ("lr_ratio", "batch_size")
    total = found["total"]
    assert total["runs"] == ratio["runs"] + batches["runs"] > 500 and ratio["fits"]
    for name in ("gpu_hours", "cost_usd", "tokens", "flops"):
        assert total[name] == pytest.approx(ratio[name] + batches[name])
    assert total["cost_usd"] == pytest.approx(total["gpu_hours"] * 2.95)
    assert total["memory_gib"] < 79.6 and total["gpus_a_run"] == [1, 16]
    assert 0 < ratio["gpu_hours_by_formulas_alone"] < ratio["gpu_hours"]
    assert batches["gpu_hours_by_formulas_alone"] == 0
    beyond = ("llama-3.1-70b", "llama-3.3-70b-instruct", "qwen3-235b-a22b-instruct-2507")
    assert {left["kind"] for left in total["left_out"]} == {f"fullft of {name}" for name in beyond}
    order = next(c for c in ratio["claims"] if c["claim"] == "order")
    assert order["spread_from"] == "small" and order["gpu_hours"] > 0


def test_a_users_own_card_is_a_file_and_the_plan_names_it(command, nowhere, tmp_path):
    (tmp_path / "mine/hardware").mkdir(parents=True)
    text = (ROOT / "conf/hardware/h100.yaml").read_text().replace("name: h100", "name: my_card")
    text = text.replace("price_per_gpu_h: 2.95", "price_per_gpu_h: 1")
    (tmp_path / "mine/hardware/my_card.yaml").write_text(text)
    asked = ("action=plan", "hardware=my_card", "hardware.gpus=64")
    out = command("--config-dir", tmp_path / "mine", *BATCHES, *asked).stdout
    for words in ("on 64 x NVIDIA H100", "$1 per GPU-hour", "my_card", "3 seeds (planned 4)"):
        assert words in out
    row = next(line for line in out.splitlines() if line.startswith("batch_size "))
    assert row.split()[1:4] == ["256", "256", "224"]


CLUSTER = (*BATCHES, "cluster=slurm", "hardware=h100")


def test_what_fits_nowhere_says_what_would_and_submits_nothing(command, nowhere):
    plan = command(*CLUSTER, "hardware.gpu_memory_gib=4", "action=plan")
    assert plan.returncode == 0 and "does not fit: fullft of llama-3.1-8b" in plan.stdout
    done = command(*CLUSTER, "hardware.gpu_memory_gib=4")
    assert done.returncode == 2 and "nothing was started" in done.stderr
    assert "fullft of llama-3.1-8b takes" in done.stderr and "It fits with" in done.stderr
    done = command(*CLUSTER, "exec.max_gpus=1")
    assert "left out" in done.stderr and "nothing was started" not in done.stderr


def test_the_plan_of_a_cluster_lists_its_jobs_by_what_they_need(command, nowhere):
    plan = json.loads(command(*CLUSTER, "action=plan", "format=json").stdout)
    needed = [(j["nodes"], j["gpus"], j["workers"]) for j in plan["queue"]["jobs"]]
    assert needed == [(1, 1, 1), (1, 4, 1)]
    assert plan["queue"]["to_submit"] <= plan["sweeps"][0]["runs"]
    assert "CPU core(s), 4 GPU(s)" in command(*CLUSTER, "action=plan").stdout
