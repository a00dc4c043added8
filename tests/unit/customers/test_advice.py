"""The whole answer: every column counts, every number is traced, habits are flagged, pages are safe."""

import dataclasses
import json
import time

import pytest
import yaml

from lorasweep.customers import customer_sweep, pages
from lorasweep.customers.advice import KEYS, plain_of, totals
from lorasweep.customers.advice import answers as answer_all
from lorasweep.customers.evidence import Sure, read_information
from lorasweep.customers.read import COLUMNS, Failed, Row, check_rows
from lorasweep.data import own
from lorasweep.errors import SpecError
from tests.unit.customers.world import advice, known


def answers(rows, world):
    return answer_all(check_rows(rows), world)


SFT = {
    "name": "acme", "model": "mine", "task": "sft", "examples": 20_000, "tokens_per_example": 200,
    "bits_per_token": 1.0, "max_length": 1024, "batch_size": 64, "hardware": "h100", "gpus": 4,
    "price_per_gpu_h": 2.0, "adapters_served": 3, "max_regret": 2, "layers": "all", "rank": 16,
    "lr": 2e-4, "epochs": 1, "hidden_size": 1024, "n_layers": 28, "n_heads": 16, "n_kv_heads": 8,
    "head_size": 128, "mlp_size": 3072, "vocab_size": 32_000, "tied": False,
}  # fmt: skip
MOVES = {
    "model": {"model": "my-qwen"},
    "task": {"task": "rl"},
    "examples": {"examples": 40_000},
    "tokens_per_example": {"tokens_per_example": 300},
    "bits_per_token": {"bits_per_token": 2.0},
    "max_length": {"max_length": 2048},
    "epochs": {"epochs": 2},
    "batch_size": {"batch_size": 128},
    "steps": {"steps": 300},
    "episodes": {"task": "rl", "episodes": 9000},
    "hardware": {"hardware": "a100"},
    "gpus": {"gpus": 2},
    "price_per_gpu_h": {"price_per_gpu_h": 4.0},
    "adapters_served": {"adapters_served": 30},
    "max_regret": {"max_regret": 9},
    "layers": {"layers": "attention"},
    "rank": {"rank": 64},
    "lr": {"lr": 1e-5},
    "hidden_size": {"hidden_size": 2048},
    "n_layers": {"n_layers": 20},
    "n_heads": {"n_heads": 8},
    "n_kv_heads": {"n_kv_heads": 4},
    "head_size": {"head_size": 64},
    "mlp_size": {"mlp_size": 2048},
    "vocab_size": {"vocab_size": 64_000},
    "tied": {"tied": True},
    "n_experts": {"n_experts": 8, "n_active_experts": 2},
    "n_active_experts": {"n_experts": 8, "n_active_experts": 4},
}
AGAINST = {
    "episodes": {"task": "rl"},
    "n_active_experts": {"n_experts": 8, "n_active_experts": 2},
    "steps": {"epochs": None, "examples": None, "steps": 200},
}
"""What a change is held against, where it is not the row as it stands."""
SAYS_ONLY_WHO = ("name", "model", "task")


def said(**columns):
    values = {k: v for k, v in {**SFT, **columns}.items() if v is not None}
    found = advice(**values).plain()
    return {k: v for k, v in found.items() if k not in SAYS_ONLY_WHO}


def test_every_column_is_tried():
    assert MOVES.keys() | {"name", "data"} == COLUMNS.keys()


@pytest.mark.parametrize("column", MOVES)
def test_every_column_but_the_name_moves_an_answer(column):
    base = AGAINST.get(column, {})
    assert said(**base) != said(**{**base, **MOVES[column]})


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x" * 800}]


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps({"messages": CHAT}) + "\n") * 7)
    return path


def test_data_are_counted_instead_of_stated(rows_file):
    free = {"examples": None, "batch_size": None}
    counted = said(data=str(rows_file), **free)
    assert counted["bits"] == 7 * 200
    assert {**counted, "warnings": []} == {
        **said(data=str(rows_file.parent), **free),
        "warnings": [],
    }
    assert said(examples=9, batch_size=None) != counted
    found = advice(**{**SFT, **free, "data": str(rows_file), "tokens_per_example": ""})
    assert found.work.tokens == 800 / 4
    assert found.trace.reasons["tokens_per_example"].sure is Sure.ASSUMED
    rows = [
        Row("row 2", {**SFT, "data": str(rows_file), "examples": 9}),
        Row("row 3", {**SFT, "data": "no", "name": "b"}),
    ]
    (two, gone) = answers(rows, known())
    assert "9 stated" in two.error and "has 7 rows" in two.error and "column data: " in gone.error
    rows_file.write_text("not json\n")
    (broken,) = answers(rows[:1], known())
    assert "train.jsonl:1: not a JSON row" in broken.error


def measured(folder, sha256, model="mine", **whole):
    """A file as action=measure writes it: three rows of seven were measured."""
    values = {"value": 9000.0, "low": 8000.0, "high": 10_000.0, **whole}
    found = {
        "model": model,
        "rows_sha256": sha256,
        "rows": {"measured": 3, "all": 7},
        "loss_tokens": {"measured": 300, "all": 770},
        "prequential": {"bits": {"all": values}},
    }
    (folder / "information").mkdir(exist_ok=True)
    (folder / f"information/{model}.json").write_text(json.dumps(found))


def test_what_was_measured_of_the_data_and_the_model_is_taken(rows_file, tmp_path):
    columns = {"examples": "", "tokens_per_example": "", "data": str(rows_file)}

    def answer(**more):
        world = dataclasses.replace(
            known(), information=read_information([tmp_path / "no", tmp_path])
        )
        return advice(world, **{**SFT, **columns, **more})

    command = f"action=measure model=mine data={rows_file}"
    assert any(command in text for text in answer().trace.warnings)
    sha256 = own.count(str(rows_file)).sha256[: own.DIGITS]
    measured(tmp_path, sha256, model="another")
    measured(tmp_path, "0" * 16)
    assert any(command in text for text in answer().trace.warnings)
    measured(tmp_path, sha256, value=None)
    assert any(command in text for text in answer().trace.warnings)
    measured(tmp_path, sha256)
    found = answer()
    assert (found.work.bits, found.work.bits_low, found.work.bits_high) == (9000, 8000, 10_000)
    assert found.work.tokens == 110 and not any(command in text for text in found.trace.warnings)
    reason = found.trace.reasons["bits"]
    assert reason.sure is Sure.MEASURED and "3 of 7 rows" in reason.source
    assert "over all rows" in reason.formula
    half = answer(epochs=0.5)
    assert (half.work.bits, half.work.bits_low, half.work.bits_high) == (4500, 4000, 5000)
    assert "rows trained on, at the mean of the" in half.trace.reasons["bits"].formula


def test_the_name_moves_nothing():
    a, b = (advice(**{**SFT, "name": name}).plain() for name in ("a", "b"))
    assert {**a, "name": ""} == {**b, "name": ""}


def test_answers_and_errors_have_the_keys_that_are_promised():
    good, bad = answers(
        [Row("row 2", SFT), Row("row 3", {**SFT, "model": "", "name": "b"})], known()
    )
    assert set(KEYS) <= good.plain().keys() and good.plain()["error"] is None
    assert set(KEYS) == plain_of(bad).keys() and plain_of(bad)["error"].startswith("row 3: ")
    json.dumps([good.plain(), plain_of(bad)], allow_nan=False)


def test_every_number_has_a_formula_and_a_source():
    reasons = advice(**SFT).trace.reasons
    wanted = (
        *("method", "load", "rank", "layers", "lr", "batch_size_max", "steps_min", "bits"),
        *("peak_gib_lora", "peak_gib_full", "hours_lora", "hours_full", "cost_usd_lora"),
        *("flops_ratio", "serving_gib_lora", "serving_gib_full", "lr_factor"),
    )
    assert set(wanted) <= reasons.keys()
    assert all(r.formula and r.source and r.line() for r in reasons.values())


# ---------------------------------------------------------------- habits and conditions


def warned(**columns):
    return " | ".join(advice(examples=50_000, tokens_per_example=300, **columns).trace.warnings)


def test_each_wrong_habit_is_flagged_with_what_it_costs():
    assert "attention alone. Expected cost: 0.007 to 0.009 nats" in warned(layers="attention")
    assert "31% of the capacity" in warned(layers="attention")
    assert "rank 64 because a paper says so. The data ask for rank 16" in warned(rank=64)
    assert "a higher rank is better. Rank 256 is 16 times" in warned(rank=256)
    low = warned(lr=2e-5)
    assert (
        "full fine-tuning's learning rate for LoRA" in low
        and "0.027 nats on meta-llama/Llama-3.1-8B" in low
    )
    assert "recipes: original REFUTED" in low
    assert "a batch of 512. Expected cost: up to" in warned(batch_size=512)
    assert "habit" not in warned(layers="all", rank=16, lr=3e-4, batch_size=32)
    assert "may lack capacity" in warned(rank=4) and "collapsed" in warned(task="rl", rank=128)


def test_conditions_are_met_missed_or_unknown():
    def states(**columns):
        return [c.state for c in advice(**columns).conditions]

    good = {
        "examples": 50_000,
        "tokens_per_example": 300,
        "lr": 2.5e-4,
        "batch_size": 32,
        "rank": 16,
    }
    assert states(**good) == ["met"] * 5
    bad = {
        "examples": 10**7, "tokens_per_example": 1000, "lr": 1e-2, "batch_size": 4096,
        "rank": 1, "layers": "attention", "steps": 10,
    }  # fmt: skip
    assert states(**bad) == ["missed"] * 5
    assert states() == ["unknown", "met", "unknown", "met", "unknown"]
    assert all(c.evidence for c in advice(**good).conditions[:4])
    rewarded = advice(task="rl", episodes=10_000).conditions[0]
    cited = " ".join(rewarded.evidence)  # rl_bits is withdrawn
    assert "rl: rank_1" in cited and "rl_bits" not in cited and "regime" not in cited


def test_a_plan_that_the_model_cannot_have_is_an_error_of_the_row():
    moe = {**SFT, "model": "qwen3-30b-a3b", "name": "a"}
    moe = {k: v for k, v in moe.items() if k in ("name", "model", "task", "examples")}
    rows = [
        Row("row 2", {**moe, "rank": 3}),
        Row("row 3", {**moe, "name": "b", "layers": "router"}),
    ]
    odd, router = answers(rows, known())
    assert "column rank: rank=3" in odd.error and "multiple of 8" in odd.error
    assert not isinstance(router, Failed)
    (dense,) = answers([Row("row 2", {**SFT, "layers": "router", "rank": None})], known())
    assert "column layers" in dense.error and "no experts" in dense.error


# ---------------------------------------------------------------- tables, pages, sweeps

HOSTILE = '<img src=x onerror="alert(1)">|`*_'


def test_a_page_holds_no_markup_of_customers_and_no_script():
    rows = [
        Row("row 2", {**SFT, "name": HOSTILE}),
        Row("row 3", {**SFT, "name": "<b>x</b>", "model": "<i>no</i>"}),
    ]
    found = answers(rows, known())
    text = pages.html(found, HOSTILE)
    assert (
        "<img" not in text and "<b>x" not in text and "<i>no" not in text and "<script" not in text
    )
    assert "&lt;img src=x onerror=&#34;alert(1)&#34;&gt;" in text
    assert "default-src 'none'" in text and "src=" not in text.replace("src=x", "")
    written = pages.markdown(found, "t")
    assert "<img" not in written and "\\|" in written and "<b>" not in written


def test_the_portfolio_counts_and_sums():
    rows = [
        Row("row 2", {**SFT, "name": "a"}),
        Row("row 3", {**SFT, "name": "b", "examples": 10**9, "adapters_served": 1}),
        Row("row 4", {**SFT, "name": "c", "model": ""}),
    ]
    found = answers(rows, known())
    t = totals(found)
    assert (t["customers"], t["lora"], t["full"], t["errors"]) == (3, 1, 1, 1)
    a, b = found[:2]
    assert t["cost_usd"] == pytest.approx(a.costs.lora.cost_usd + b.costs.full.cost_usd)
    base = a.costs.full.file_mib
    adapters = 3 * a.costs.lora.file_mib + b.costs.lora.file_mib
    assert t["serving_gib_lora"] == pytest.approx((base + adapters) / 1024)


def test_a_thousand_rows_take_about_a_second():
    models = ("llama-3.1-8b", "qwen3-8b", "llama-3.1-70b", "qwen3-30b-a3b", "llama-3.2-1b")
    rows = [
        Row(
            f"row {k}",
            {
                "name": f"c{k}", "model": models[k % 5], "task": ("sft", "rl")[k % 2],
                "examples": 100 + 997 * k, "tokens_per_example": 50 + 3 * k, "gpus": 1 + k % 8,
            },
        )
        for k in range(1000)
    ]  # fmt: skip
    start = time.process_time()
    found = answers(rows, known())
    assert time.process_time() - start < 5  # 0.7 s on a quiet core
    assert not [a for a in found if isinstance(a, Failed)]


def rewarded(tmp_path, answer):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": answer}) + "\n")
    path.with_name("test.jsonl").write_text(path.read_text())
    return advice(task="rl", episodes=4000, data=str(path), tokens_per_example=200)


@pytest.mark.parametrize(
    ("answer", "verifier"), [("so #### 2", "integer"), (r"so \boxed{\frac{4}{2}}", "math")]
)
def test_a_sweep_for_reinforcement_learning_names_what_verifies_the_answers(
    tmp_path, answer, verifier
):
    lines = customer_sweep.write(rewarded(tmp_path, answer), tmp_path / "settle")
    written = yaml.safe_load((tmp_path / "settle/dataset/settle_acme.yaml").read_text())
    assert (written["verifier"], written["mask"]) == (verifier, "completion")
    sweep = yaml.safe_load((tmp_path / "settle/sweep/settle_acme.yaml").read_text())
    axes = sweep["axes"]
    assert axes["batch_size"][0] % axes["group_size"][0] == 0 and sweep["analysis"] == "rl"
    assert any(f"verifier: {verifier}" in line for line in lines)


def test_no_sweep_is_written_where_nothing_verifies_the_answers(tmp_path):
    with pytest.raises(SpecError, match="nothing verifies the answers"):
        customer_sweep.write(rewarded(tmp_path, "two"), tmp_path)


def test_a_written_sweep_reads_the_customers_own_form(tmp_path):
    path = tmp_path / "support.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    answer = advice(data=str(path), tokens_per_example=9)
    lines = customer_sweep.write(answer, tmp_path / "settle")
    written = yaml.safe_load((tmp_path / "settle/dataset/settle_acme.yaml").read_text())
    assert written["prompt_field"] == "question" and written["train_split"] == "support"
    assert any("put held-out rows in test.jsonl beside" in line for line in lines)
    path.with_name("test.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert not any("held-out" in line for line in customer_sweep.write(answer, tmp_path / "settle"))
