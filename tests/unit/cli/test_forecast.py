"""The plan for a cluster's GPUs, whatever machine it is made on; which claims can be decided."""

import json

import pytest

from lorasweep.cli import answer
from lorasweep.errors import NotAtScale
from lorasweep.plan import detect
from tests.world import ROOT

BATCHES = ("+sweep=batch_size", "scale=paper")


CLUSTER = (*BATCHES, "cluster=slurm", "hardware=h100")
ASKED = ("action=plan", "hardware=h100", "format=json")
UNKNOWN = {"rank": ["faster"], "regime": ["nothing", "real", "real_16"], "rl": ["wider"]}
"""Claims of which no data were run at tiny, so that no spread over seeds is known."""


@pytest.fixture
def nowhere(monkeypatch):
    """A machine that may not be asked."""

    def refuse(*_):
        raise AssertionError("the plan asked this machine")

    for name in ("this_machine", "cores", "gpus"):
        monkeypatch.setattr(detect, name, refuse)
    monkeypatch.delenv("SLURM_CONF", raising=False)  # of the cluster that other tests started


@pytest.fixture
def planned(command, nowhere):
    return lambda *args: json.loads(command(*args, *ASKED).stdout)


def test_the_study_is_planned_without_weights_and_without_a_look_at_this_machine(planned):
    found = planned("+sweep=study", "sweep.parts=[lr_ratio,batch_size]", "scale=paper")
    (ratio, batches), total = found["sweeps"], found["total"]
    assert (ratio["name"], batches["name"]) == ("lr_ratio", "batch_size")
    assert total["runs"] == ratio["runs"] + batches["runs"] > 500 and not total["misfits"]
    for name in ("gpu_hours", "cost_usd", "tokens", "flops"):
        assert total[name] == pytest.approx(ratio[name] + batches[name])
    assert total["cost_usd"] == pytest.approx(total["gpu_hours"] * 2.95)
    assert total["memory_gib"] < 79.6 and total["gpus_a_run"] == [1, 16]
    order = next(c for c in ratio["claims"] if c["claim"] == "order")
    assert order["spread_from"] == "small" and order["needed"]


def test_a_users_own_card_is_a_file_and_the_plan_names_it(command, nowhere, tmp_path):
    (tmp_path / "mine/hardware").mkdir(parents=True)
    text = (ROOT / "conf/hardware/h100.yaml").read_text().replace("name: h100", "name: my_card")
    text = text.replace("price_per_gpu_h: 2.95", "price_per_gpu_h: 1")
    (tmp_path / "mine/hardware/my_card.yaml").write_text(text)
    asked = ("action=plan", "hardware=my_card", "hardware.gpus=64")
    out = command("--config-dir", tmp_path / "mine", *BATCHES, *asked).stdout
    for words in (
        "on 64 x NVIDIA H100",
        "$1 per GPU-hour",
        "my_card",
        "(standard deviation at scale tiny)",
    ):
        assert words in out
    row = next(line for line in out.splitlines() if line.startswith("batch_size "))
    assert row.split()[1:4] == ["256", "256", "224"]


def test_the_plan_of_a_cluster_lists_its_jobs_by_what_they_need(command, nowhere):
    plan = json.loads(command(*CLUSTER, "action=plan", "format=json").stdout)
    needed = [(j["nodes"], j["gpus"], j["workers"]) for j in plan["queue"]["jobs"]]
    assert sorted(needed) == [(1, 1, 1), (1, 4, 1)]
    assert plan["queue"]["to_submit"] <= plan["sweeps"][0]["runs"]
    plan = command(*CLUSTER, "hardware.gpu_memory_gib=4", "action=plan")
    assert plan.returncode == 0 and "does not fit: fullft of llama-3.1-8b" in plan.stdout
    done = command(*CLUSTER, "hardware.gpu_memory_gib=4")
    assert done.returncode == 2 and "nothing was started" in done.stderr
    assert "fullft of llama-3.1-8b takes" in done.stderr and "It fits with" in done.stderr


def test_the_hours_of_sampling_are_named(command, planned):
    study = ("+sweep=study", "sweep.parts=[rl,capacity]", "scale=paper")
    found = planned(*study)
    rl, total = found["sweeps"][0], found["total"]
    assert rl["runs"] == 3 * 3 * 7 + 3 * 3 * 3 * 2 and rl["gpus_a_run"] == [1, 8]
    assert total["gpu_hours"] == pytest.approx(sum(s["gpu_hours"] for s in found["sweeps"]))
    text = command(*study, *ASKED[:2]).stdout
    assert f"{rl['gpu_hours_of_sampling']:,.0f} of the GPU-hours" in text


SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml") if p.stem != "study")


@pytest.mark.parametrize(
    "scale", ["tiny", *(pytest.param(s, marks=pytest.mark.full) for s in ("small", "tiny_beyond"))]
)
@pytest.mark.parametrize("sweep", [s for s in SWEEPS if s != "tune"])  # it ends when it is decided
def test_a_shipped_sweep_can_decide_its_claims_or_says_that_it_cannot(compose, sweep, scale):
    """If not: change `sweep.replicate.seeds`, the claim's `sd`, or `underpowered`."""
    try:
        request = compose(f"+sweep={sweep}", f"scale={scale}")
    except NotAtScale:
        return
    found = [o for _, o in answer.outlooks(request.points, request.sweep, scale)]
    wrong = [o.line() for o in found if o.warns or (o.can_decide and o.underpowered)]
    assert len(found) == len(request.sweep.claims) and not wrong, wrong
    if scale == "tiny":
        assert [o.claim for o in found if o.can_decide is None] == UNKNOWN.get(sweep, [])


def test_the_plan_holds_each_claims_expected_interval_against_its_margin(command):
    plan = (
        *("+sweep=lr_ratio", "scale=smoke", "action=plan", "sweep.rounds=1"),
        "++sweep.claims.ratio.planning={smoke: {sd: 0.12}, tiny: {sd: 9}}",
        "++sweep.claims.ratio.underpowered=false",
    )
    enough = "sweep.replicate.seeds=[1,2,3,4,5]"
    text = command(*plan, enough).stdout
    assert "claim ratio: expected interval 10 [8.82, 11.3], margin [7.1, 14.1]: can decide" in text
    few = command(*plan, "sweep.replicate.seeds=[1,2]").stdout
    assert "warning, claim ratio: " in few and "cannot decide: needs 4 seeds (planned 3)" in few
    ratio, *_, parity = json.loads(command(*plan, enough, "format=json").stdout)["claims"]
    assert (ratio["planned"], ratio["can_decide"], parity["can_decide"]) == (6, True, None)
    assert ratio["half_width"] < ratio["room"]
