"""Whatever stands in a store or a table, questions and actions answer, or say in one line why not; plans,
whatever machine they are made on, and which claims can be decided."""

import dataclasses
import json
import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasweep.cli import answer
from lorasweep.cli.actions import act
from lorasweep.config.compose import compose_request
from lorasweep.errors import LorasweepError, NotAtScale
from lorasweep.plan import detect
from lorasweep.spec.metric import METRICS
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import table_row
from lorasweep.sweep.request import question
from tests.conftest import FakeTrainer
from tests.world import ROOT, planted_end

SWEEPS = sorted({path.stem for path in (ROOT / "sweeps").glob("*.yaml")} - {"study"})
KEPT = {
    "all": lambda specs: specs,
    "one rate": lambda specs: [
        s for s in specs if s.lr == min(t.lr for t in specs if t.method == s.method)
    ],
    "one seed": lambda specs: [s for s in specs if s.seed == specs[0].seed],
    "no fullft": lambda specs: [s for s in specs if s.method.name != "fullft"],
    "no lora": lambda specs: [s for s in specs if s.method.name != "lora"],
}
GOOD = {"fullft": "good", "lora": "good"}
ENDS = ("good", "hurt", "diverged", "nan", "none", "infinite")


def result_of(spec, end="good", curve="whole"):
    """A run's result: its loss falls, rises, stays or is no number; the curve may be missing."""
    metric = METRICS[spec.objective]
    start, gain = (0.3, 0.1) if metric.higher_is_better else (2.0, -0.5)
    off = 0.01 * math.log(spec.lr / 1e-3) ** 2 + 0.001 * (spec.seed % 7)
    change = (-gain if end == "hurt" else gain) + off
    value = {"nan": math.nan, "none": None, "infinite": math.inf, "diverged": None}
    value = value.get(end, start + change)
    points = [{"step": 0, metric.name: start, metric.on_part: start}]
    if curve == "whole" and end != "diverged":
        steps = sorted({1, 2, spec.steps})
        points += [{"step": s, metric.name: start + change * s / spec.steps} for s in steps]
        points[-1] |= {metric.name: value, metric.on_part: value}
    _, result = planted_end(spec, start, start, points if curve != "none" else [])
    more = {"run_id": spec.id, "state": "diverged" if end == "diverged" else "done"}
    return {**result, **more, metric.name: value, metric.on_part: value, **metric.stored()}


def answers(ask, *given):
    """`ask` returns, or raises an error of one line."""
    try:
        ask(*given)
    except LorasweepError as error:
        assert "\n" not in str(error)


CASES = [
    ("rank", "one seed", {**GOOD, "fullft": "diverged"}, "whole"),
    ("compute", "all", {**GOOD, "fullft": "diverged"}, "whole"),
    ("rl", "one rate", GOOD, "whole"),
    ("capacity", "all", dict.fromkeys(GOOD, "nan"), "whole"),
    ("invariance", "one seed", GOOD, "none"),
    ("tune", "no lora", {**GOOD, "fullft": "hurt"}, "start"),
    ("lr_ratio", "all", {**GOOD, "lora": "infinite"}, "whole"),  # ended in the pages
    *((s, f"no {m}", GOOD, "whole") for s in ("rank", "regime", "rl") for m in GOOD),
]


def judge(sweep, kept, ends, curve, folder=None):
    request = compose_request([f"+sweep={sweep}", "scale=smoke"])
    three = [(p.spec, p.spec.seed + k) for k in range(3) for p in request.points]
    specs = {s.id: s for s in (dataclasses.replace(spec, seed=seed) for spec, seed in three)}
    chosen = KEPT[kept]([*specs.values()])
    rows = [table_row(s.plain(), result_of(s, ends[s.method.name], curve)) for s in chosen]
    table, asked = pd.DataFrame(rows), question(request)
    answers(answer.judge, table, asked, folder, folder is None)
    answers(answer.next_round, table, asked)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:2]))
def test_a_table_that_once_ended_in_a_traceback_is_answered(case, tmp_path):
    judge(*case, tmp_path if case[0] == "lr_ratio" else None)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from(("rank", "rl", "tune")),
    st.sampled_from(sorted(KEPT)),
    st.fixed_dictionaries(dict.fromkeys(GOOD, st.sampled_from(ENDS))),
    st.sampled_from(("whole", "start", "none")),
)
def test_any_planted_table_is_answered(sweep, kept, ends, curve):
    judge(sweep, kept, ends, curve)


@pytest.mark.parametrize("action", ["status", "plan", "export", "extend"])
def test_actions_on_any_store_answer(compose, capsys, tmp_path, action):
    asked = compose("+sweep=lr_ratio", "scale=smoke", f"action={action}")
    for ends in ((), ("diverged",), ("good", "hurt", "nan"), ("none",)):
        exec_ = dataclasses.replace(asked.exec, runs_dir=f"{tmp_path}/{'-'.join(ends)}runs")
        more = {"table": f"{tmp_path}/{len(ends)}.csv"} if action == "export" else {}
        request = dataclasses.replace(asked, exec=exec_, **more)
        store = RunStore(exec_.runs_dir)
        store.prepare()
        for k, p in enumerate(request.points if ends else ()):
            store.put(p.spec, result_of(p.spec, ends[k % len(ends)]))
        answers(act, request, FakeTrainer(lambda spec: math.nan))


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


def test_the_study_is_planned_without_weights_and_without_a_look_at_this_machine(command, nowhere):
    study = ("+sweep=study", "sweep.parts=[lr_ratio,batch_size]", "scale=paper")
    found = json.loads(command(*study, *ASKED).stdout)
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
    said = ("on 64 x NVIDIA H100", "$1 per GPU-hour", "my_card", "(standard deviation at scale ti")
    assert not [words for words in said if words not in out]
    row = next(line for line in out.splitlines() if line.startswith("batch_size "))
    assert row.split()[1:4] == ["256", "256", "224"]


def test_the_plan_of_a_cluster_lists_its_jobs_by_what_they_need(command, nowhere):
    small = ("hardware.gpu_memory_gib=60", "exec.max_gpus=1")  # for all runs of one part
    study = ("+sweep=study", "sweep.parts=[batch_size,experts]", "scale=paper")
    few = command(*study, *ASKED, *small)
    assert few.returncode == 0 and "experts-paper: 49 runs need more than" in few.stderr
    plan = json.loads(command(*CLUSTER, "action=plan", "format=json").stdout)
    needed = [(j["nodes"], j["gpus"], j["workers"]) for j in plan["queue"]["jobs"]]
    assert sorted(needed) == [(1, 1, 1), (1, 4, 1)]
    assert plan["queue"]["to_submit"] <= plan["sweeps"][0]["runs"]
    plan = command(*CLUSTER, "hardware.gpu_memory_gib=4", "action=plan")
    assert plan.returncode == 0 and "does not fit: fullft of llama-3.1-8b" in plan.stdout
    done = command(*CLUSTER, "hardware.gpu_memory_gib=4", "exec.max_gpus=1")
    assert done.returncode == 2 and "nothing was started" in done.stderr
    assert "fullft of llama-3.1-8b takes" in done.stderr and "It fits with" in done.stderr
    assert "exec.max_gpus" not in done.stderr  # which leaves out no run that does not fit


def test_the_hours_of_sampling_are_named(command, nowhere):
    study = ("+sweep=study", "sweep.parts=[rl,capacity]", "scale=paper")
    found = json.loads(command(*study, *ASKED).stdout)
    rl, total = found["sweeps"][0], found["total"]
    assert rl["runs"] == 3 * 3 * 7 + 3 * 3 * 3 * 2 and rl["gpus_a_run"] == [1, 8]
    assert total["gpu_hours"] == pytest.approx(sum(s["gpu_hours"] for s in found["sweeps"]))
    text = command(*study, *ASKED[:2]).stdout
    assert f"{rl['gpu_hours_of_sampling']:,.0f} of the GPU-hours" in text
    assert "\nrl: claim wider: not known: no standard deviation stated\n" in text


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
