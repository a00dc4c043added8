"""`action=advise` as typed: a table, one customer, reasons, a page, a sweep that composes."""

import json

import pytest
import yaml

from lorasweep.customers.advice import KEYS

TABLE = (
    "name,model,task,examples,tokens_per_example,hardware\n"
    'acme,llama-3.1-8b,sft,"50,000",300,\n'
    "lab,Qwen/Qwen3-30B-A3B,rl,10000,800,h200\n"
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "customers.csv"
    path.write_text(TABLE)
    return path


@pytest.mark.parametrize("page", ["reports/advice-customers.html", "page.md"])
def test_a_table_is_answered_in_text_with_a_page(command, table, tmp_path, page):
    out = [] if "/" in page else [f"out={tmp_path}/{page}"]
    done = command("action=advise", f"customers={table}", *out)
    assert done.returncode == 0 and "2 customers: 2 LoRA" in done.stdout
    assert "acme" in (tmp_path / page).read_text() and f"{tmp_path}/{page}" in done.stdout


def test_json_is_one_list_and_a_wrong_row_makes_the_status_1(command, table):
    with table.open("a") as rows:
        rows.write("bad,gpt-9,sft,10,10,\n")
    done = command("action=advise", f"customers={table}", "format=json", "hardware=a100")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and [a["name"] for a in found] == ["acme", "lab", "bad"]
    assert all(set(KEYS) <= a.keys() for a in found) and set(KEYS) == found[2].keys()
    assert "NaN" not in done.stdout
    assert [a["gpu"] for a in found] == ["a100", "h200", None]
    assert found[2]["error"].startswith("row 4: column model: model 'gpt-9' not found")
    why = command("action=advise", f"customers={table}", "why=acme")
    assert why.returncode == 0 and "source: " in why.stdout and "lr_factor = 10" in why.stdout


def test_the_name_as_written_wins_and_names_that_look_alike_are_told_apart(command, tmp_path):
    path = tmp_path / "c.csv"
    rows = ["Acme,llama-3.1-8b,sft,500", "acme,llama-3.2-1b,sft,90000"]
    rows += ["M\u00fcller,llama-3.1-8b,sft,500", "M\u00f6ller,llama-3.2-1b,sft,90000"]
    path.write_text("\n".join(["name,model,task,examples", *rows]))
    asked = ("action=advise", f"customers={path}")
    assert "acme: llama-3.2-1b" in command(*asked, "why=acme").stdout
    unclear = command(*asked, "why=m_ller")
    assert (
        unclear.returncode == 2 and "may be 'Müller' or 'Möller'. Write the name" in unclear.stderr
    )
    for name in ("Müller", "Möller"):
        assert command(*asked, f"write_sweep='{name}'").returncode == 0
    assert len(list((tmp_path / "settle/sweep").glob("settle_m_ller_*.yaml"))) == 2
    both = command(*asked, "why=acme", "write_sweep=acme")
    assert both.returncode == 2 and "Ask one at a time" in both.stderr


SHAPE = (
    "hidden_size: 1024, n_layers: 28, n_heads: 16, n_kv_heads: 8, head_size: 128, mlp_size: 3072, "
    "vocab_size: 151936, tied: true"
)


@pytest.mark.parametrize("model", ["llama-3.2-1b", f"my-qwen, {SHAPE}"])
def test_a_written_sweep_composes_and_is_planned(command, tmp_path, model):
    path = tmp_path / "one.yaml"
    path.write_text(f'- {{name: "Big & Co.", task: sft, examples: 40000, model: {model}}}\n')
    done = command("action=advise", f"customers={path}", "write_sweep=big_co")
    assert done.returncode == 0, done.stderr
    sweep = yaml.safe_load((tmp_path / "settle/sweep/settle_big_co.yaml").read_text())
    assert sweep["axes"]["steps"] == [1000] and sweep["arms"]["lora"]["rank"] == [32, 64]
    share = "its runs see 32,000 of 40,000 rows, so the load of rank 64 is"
    assert share in " ".join(sweep["how"].split()) and share in done.stdout
    assert "All of them: sweep.axes.steps=[1250]" in done.stdout
    asked = ("--config-dir", tmp_path / "settle", "+sweep=settle_big_co", "precision=bf16")
    plan = command(*asked, "action=plan", "hardware=h100", "format=json")
    assert plan.returncode == 0, plan.stderr
    found = json.loads(plan.stdout)["total"]
    assert found["runs"] == 3 * 5 + 3 * 3 * 2 and found["cost_usd"] > 0
    # and of reinforcement learning, for a customer by options
    customer = (f"+customer.{f}" for f in ("model=llama-3.2-1b", "task=rl", "examples=2000"))
    assert command("action=advise", *customer, "write_sweep=customer").returncode == 0
    rl = ("--config-dir", tmp_path / "settle", "+sweep=settle_customer", "precision=bf16")
    kinds = command(*rl, "action=layers", "format=json")
    assert len(json.loads(kinds.stdout)["kinds"]) >= 2
