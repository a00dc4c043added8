"""The whole answer: every column counts, every number is traced, habits are flagged, pages are safe."""

import csv
import dataclasses

import pytest

from lorasweep.advise import pages
from lorasweep.advise.advice import SURE_OF, answers, plain_of, totals
from lorasweep.advise.evidence import Sure, read_information
from lorasweep.advise.read import COLUMNS, RowError, check_rows, read_customers
from lorasweep.data import sources
from tests.customers import write_json
from tests.unit.advise.world import advice, known
from tests.world import ROOT

SFT = {
    "name": "acme", "model": "mine", "task": "sft", "examples": 20_000, "tokens_per_example": 200,
    "bits_per_token": 1.0, "max_length": 1024, "batch_size": 64, "hardware": "h100", "gpus": 4,
    "price_per_gpu_h": 2.0, "adapters_served": 3, "max_regret": 2, "layers": "all", "rank": 16,
    "lr": 2e-4, "epochs": 1, "hidden_size": 1024, "n_layers": 28, "n_heads": 16, "n_kv_heads": 8,
    "head_size": 128, "mlp_size": 3072, "vocab_size": 32_000, "tied": False,
}  # fmt: skip
MOVES = {
    "model": "my-qwen", "task": "rl", "examples": 40_000, "tokens_per_example": 300,
    "bits_per_token": 2.0, "max_length": 2048, "epochs": 2, "batch_size": 128, "steps": 300,
    "episodes": 9000, "hardware": "a100", "gpus": 2, "price_per_gpu_h": 4.0, "adapters_served": 30,
    "max_regret": 9, "layers": "attention", "rank": 64, "lr": 1e-5, "hidden_size": 2048,
    "n_layers": 20, "n_heads": 8, "n_kv_heads": 4, "head_size": 64, "mlp_size": 2048,
    "vocab_size": 64_000, "tied": True, "n_experts": 8, "n_active_experts": 4,
}  # fmt: skip
AGAINST = {
    "episodes": {"task": "rl"},
    "n_experts": {"n_experts": 16, "n_active_experts": 2},
    "n_active_experts": {"n_experts": 8, "n_active_experts": 2},
    "steps": {"epochs": None, "examples": None, "steps": 200},
}
"""Changes of SFT with which a changed column is compared."""


def said(**columns):
    values = {k: v for k, v in {**SFT, **columns}.items() if v is not None}
    found = plain_of(advice(**values))
    return {k: v for k, v in found.items() if k not in ("name", "model", "task")}


def answers_to(*rows):
    """The answers to changes of SFT, named a, b, c, ... in rows 2, 3, 4, ..."""
    changed = [{**SFT, "name": "abc"[k], **row} for k, row in enumerate(rows)]
    return answers(check_rows([(f"row {k}", r) for k, r in enumerate(changed, 2)]), known())


@pytest.mark.parametrize("column", sorted(COLUMNS.keys() - {"name", "data", "validation"}))
def test_every_column_moves_an_answer_but_the_name(column):
    base = AGAINST.get(column, {})
    assert said(**base) != said(**{**base, column: MOVES[column]})
    assert said(name="a") == said(name="b")


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x" * 800}]


@pytest.fixture
def rows_file(tmp_path):
    return write_json(tmp_path / "train.jsonl", [{"messages": CHAT}] * 7)


def test_data_are_counted_instead_of_stated(rows_file):
    free = {"examples": None, "batch_size": None}
    counted = said(data=str(rows_file), **free)
    assert counted["bits"] == 7 * 200
    assert said(examples=9, batch_size=None) != counted
    found = advice(**{**SFT, **free, "data": str(rows_file), "tokens_per_example": ""})
    assert found.tokens == 800 / 4
    assert found.reasons["tokens_per_example"].sure is Sure.ASSUMED
    other, gone = answers_to({"data": str(rows_file), "examples": 9}, {"data": "no"})
    assert "9 stated" in other.error and "has 7 rows" in other.error
    assert "column data: " in gone.error
    of_hub = " ".join(advice(data="openai/gsm8k", examples=100).warnings)
    assert "openai/gsm8k" in of_hub and "hub" in of_hub


def test_measured_bits_of_the_same_data_and_model_are_used(rows_file, tmp_path):
    columns = {"examples": "", "tokens_per_example": "", "data": str(rows_file)}

    def measured(sha256, model="mine", value=9000.0):
        """Write a file as action=measure does: three rows of seven were measured."""
        whole = {"value": value, "low": 8000.0, "high": 10_000.0}
        counts = {"rows": {"measured": 3, "all": 7}, "loss_tokens": {"measured": 300, "all": 770}}
        found = {"model": model, "rows_sha256": sha256, "prequential": {"bits": {"all": whole}}}
        write_json(tmp_path / f"information/{model}.json", [found | counts])

    def answer(**more):
        information = read_information([tmp_path / "no", tmp_path])
        world = dataclasses.replace(known(), information=information)
        return advice(world, **{**SFT, **columns, **more})

    sha256 = sources.count(str(rows_file)).sha256[: sources.DIGITS]
    command = f"action=measure model=mine data={rows_file}"
    for useless in ((sha256, "another"), ("0" * 16,), (sha256, "mine", None)):
        measured(*useless)
        assert any(command in text for text in answer().warnings)
    measured(sha256)
    found = answer()
    assert found.bits == (9000, 8000, 10_000)
    assert found.tokens == 110 and not any("action=measure" in w for w in found.warnings)
    reason = found.reasons["bits"]
    assert reason.sure is Sure.MEASURED and "3 of 7 rows" in reason.source
    assert answer(epochs=0.5).bits == (4500, 4000, 5000)


@pytest.mark.parametrize(
    "columns, says",
    [
        ({"layers": "attention"}, ("0.007 to 0.009 nats", "31% of the capacity")),
        ({"rank": 64}, ("rank 64", "advice is rank 16")),
        ({"rank": 256}, ("Rank 256 is 16 times",)),
        ({"lr": 2e-5}, ("0.027 nats on meta-llama/Llama-3.1-8B", "recipes: original REFUTED")),
        ({"lr": 0.5}, ("learning rate 0.5 is above", "advised: 0.000")),
        ({"batch_size": 512}, ("a batch of 512",)),
        ({"rank": 4}, ("planned rank 4",)),
        ({"task": "rl", "rank": 128}, ("collapsed",)),
    ],
)
def test_each_wrong_habit_is_flagged_with_its_cost(columns, says):
    plan = {"examples": 50_000, "tokens_per_example": 300}
    warned = " | ".join(advice(**plan, **columns).warnings)
    assert all(text in warned for text in says), warned
    good = advice(**plan, layers="all", rank=16, lr=3e-4, batch_size=32)
    assert "habit" not in " ".join(good.warnings)
    assert any("habit: rank 64" in text for text in advice(rank=64).warnings)  # without any size


def test_every_number_has_its_source_and_conditions_are_met_missed_or_unknown():
    reasons = advice(**SFT).reasons
    wanted = {"lr_factor", "bits", "flops_ratio", "cost_usd_lora", "hours_full", "serving_gib_full"}
    assert wanted | set(SURE_OF) <= reasons.keys()
    assert all(r.formula and r.source for r in reasons.values())

    def states(**columns):
        return [c["state"] for c in advice(**columns).conditions]

    good = {"examples": 50_000, "tokens_per_example": 300, "lr": 2.5e-4, "batch_size": 32}
    good["rank"] = 16
    bad = {"examples": 10**7, "tokens_per_example": 1000, "lr": 1e-2, "batch_size": 4096}
    bad |= {"rank": 1, "layers": "attention", "steps": 10}
    assert states(**good) == ["met"] * 5 and states(**bad) == ["missed"] * 5
    assert states() == ["unknown", "met", "unknown", "met", "unknown"]
    assert all(c["evidence"] for c in advice(**good).conditions[:4])
    cited = " ".join(advice(task="rl", episodes=10_000).conditions[0]["evidence"])
    assert "rl: rank_1" in cited and "regime" not in cited


def test_a_plan_that_the_model_cannot_have_is_an_error_of_the_row():
    moe = {"model": "qwen3-30b-a3b", "task": "sft", "examples": 20_000}
    (odd,) = answers(check_rows([("row 2", {"name": "a", **moe, "rank": 3})]), known())
    assert "column rank: rank=3" in odd.error and "multiple of 8" in odd.error


HOSTILE = '<img src=x onerror="alert(1)">|`*_'


def test_a_page_holds_no_markup_of_customers_and_no_script():
    found = answers_to({"name": HOSTILE}, {"name": "<b>x</b>", "model": "<i>no</i>"})
    text = pages.html(found, HOSTILE)
    assert not [tag for tag in ("<img", "<b>x", "<i>no", "<script") if tag in text]
    assert "&lt;img src=x onerror=&#34;alert(1)&#34;&gt;" in text
    assert "default-src 'none'" in text and "src=" not in text.replace("src=x", "")
    # of errors alone there are no costs
    shown = [pages.html(answers_to(row), "t") for row in ({"model": ""}, {})]
    assert ["What each choice costs" in text for text in shown] == [False, True]


def test_the_portfolio_counts_and_sums():
    found = answers_to({}, {"examples": 10**9, "adapters_served": 1}, {"model": ""})
    t = totals(found)
    assert (t["customers"], t["lora"], t["full"], t["errors"]) == (3, 1, 1, 1)
    a, b = found[:2]
    assert t["cost_usd"] == pytest.approx(a.lora.cost_usd + b.full.cost_usd)
    adapters = 3 * a.lora.file_mib + b.lora.file_mib
    assert t["serving_gib_lora"] == pytest.approx((a.full.file_mib + adapters) / 1024)


CUSTOMERS = ROOT / "docs/customers.csv"
KEPT = ROOT / "tests/golden/advice.csv"


def table_of(found):
    return [list(pages.HEAD), *(pages.cells(a) for a in found)]


def test_the_answers_for_many_and_varied_customers_are_those_kept():
    """To keep others: python -m tests.unit.advise.test_advice."""
    found = answers(read_customers(CUSTOMERS), known())
    assert len(found) >= 100 and not [a.error for a in found if isinstance(a, RowError)]
    assert {a.method for a in found} == {"lora", "full", "open"}
    assert {a.by for a in found} == {"measured regret", "capacity"}
    assert {a.customer.task for a in found} == {"sft", "rl"}
    with CUSTOMERS.open() as text:
        filled = {k for row in csv.DictReader(text) for k, v in row.items() if v}
    assert COLUMNS.keys() - filled == {"data", "validation", "n_experts", "n_active_experts"}
    with KEPT.open(newline="") as text:
        assert list(csv.reader(text)) == table_of(found)


if __name__ == "__main__":
    with KEPT.open("w", newline="") as file:
        csv.writer(file).writerows(table_of(answers(read_customers(CUSTOMERS), known())))
