"""The plan for a cluster's GPUs: text and JSON, whatever machine it is made on."""

import json

import pytest

from lorasweep.plan import detect
from tests.world import ROOT

BATCHES = ("+sweep=batch_size", "scale=paper")
PAPER = ("+sweep=study", "sweep.parts=[lr_ratio,batch_size]", "scale=paper", "action=plan")


@pytest.fixture
def nowhere(monkeypatch):
    """A machine that may not be asked."""

    def refuse(*_):
        raise AssertionError("the plan asked this machine")

    for name in ("this_machine", "cores", "memory_bytes", "gpus", "fast_bf16"):
        monkeypatch.setattr(detect, name, refuse)
    monkeypatch.delenv("SLURM_CONF", raising=False)  # of the cluster that other tests started


def test_the_study_is_planned_without_weights_and_without_a_look_at_this_machine(command, nowhere):
    done = command(*PAPER, "hardware=h100", "format=json")
    found = json.loads(done.stdout)
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
    left = {entry["kind"] for entry in total["left_out"]}
    assert left == {f"fullft of {name}" for name in BEYOND}
    order = next(c for c in ratio["claims"] if c["claim"] == "order")
    assert order["spread_from"] == "small" and order["gpu_hours"] > 0


BEYOND = ("llama-3.1-70b", "llama-3.3-70b-instruct", "qwen3-235b-a22b-instruct-2507")


def test_a_users_own_card_is_a_file_and_text_says_what_the_plan_rests_on(
    command, nowhere, tmp_path
):
    (tmp_path / "mine/hardware").mkdir(parents=True)
    text = (ROOT / "conf/hardware/h100.yaml").read_text().replace("name: h100", "name: my_card")
    text = text.replace("price_per_gpu_h: 2.95", "price_per_gpu_h: 1")
    (tmp_path / "mine/hardware/my_card.yaml").write_text(text)
    asked = ("action=plan", "hardware=my_card", "hardware.gpus=64")
    out = command("--config-dir", tmp_path / "mine", *BATCHES, *asked).stdout
    for words in ("on 64 x NVIDIA H100", "$1 a GPU and hour", "my_card", "3 seeds (planned 4)"):
        assert words in out
    row = next(line for line in out.splitlines() if line.startswith("batch_size "))
    assert row.split()[1:4] == ["256", "256", "224"]


def test_a_card_that_is_too_small_says_what_would_fit(command, nowhere):
    run = ("model=llama-3.1-70b", "scale=paper", "method=fullft", "batch_size=8", "action=plan")
    done = command(*run, "hardware=h100", "hardware.gpu_memory_gib=8")
    assert done.returncode == 0 and "does not fit: fullft of llama-3.1-70b" in done.stdout
    assert "Give a GPU with" in done.stdout


def test_what_fits_nowhere_is_refused_before_anything_is_submitted(command, nowhere):
    one = (*BATCHES, "cluster=slurm", "hardware=h100")
    done = command(*one, "hardware.gpu_memory_gib=4")
    assert done.returncode == 2 and "nothing was started" in done.stderr
    assert "fullft of llama-3.1-8b takes" in done.stderr and "It fits with" in done.stderr
    done = command(*one, "exec.max_gpus=1")
    assert "112 runs need more" not in done.stderr and "left out" in done.stderr
    assert "nothing was started" not in done.stderr


def test_the_plan_of_a_cluster_lists_its_jobs_by_what_they_need(command, nowhere):
    one = (*BATCHES, "cluster=slurm", "hardware=h100", "action=plan")
    plan = json.loads(command(*one, "format=json").stdout)
    needed = [(j["nodes"], j["gpus"], j["workers"]) for j in plan["queue"]["jobs"]]
    assert needed == [(1, 1, 1), (1, 4, 1)]
    assert plan["queue"]["to_submit"] <= plan["sweeps"][0]["runs"]
    assert "CPU core(s), 4 GPU(s)" in command(*one).stdout
