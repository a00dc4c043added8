"""`action=advise` as typed: a table, one customer, reasons, a page."""

import json
import shlex

import pytest

from lorasweep.advise.advice import KEYS
from tests.customers import make_base

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


def test_a_table_is_answered_in_text_with_a_page(command, table, tmp_path):
    for page, out in (
        ("reports/advice-customers.html", []),
        ("p.html", [f"out={tmp_path}/p.html"]),
    ):
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
    assert "+sweep=tune model=llama-3.1-8b dataset=ROWS sweep.arms.lora.rank=" in why.stdout


def test_the_name_as_written_wins_and_names_that_look_alike_are_told_apart(command, tmp_path):
    path = tmp_path / "c.csv"
    rows = ["Acme,llama-3.1-8b,sft,500", "acme,llama-3.2-1b,sft,90000"]
    rows += ["M\u00fcller,llama-3.1-8b,sft,500", "M\u00f6ller,llama-3.2-1b,sft,90000"]
    path.write_text("\n".join(["name,model,task,examples", *rows]))
    asked = ("action=advise", f"customers={path}")
    assert "acme: llama-3.2-1b" in command(*asked, "why=acme").stdout
    unclear = command(*asked, "why=m_ller")
    assert unclear.returncode == 2 and "Available: Möller, Müller. Write big_co" in unclear.stderr


def test_the_recommended_search_runs_for_every_row_that_it_is_recommended_for(command, tmp_path):
    """Names with blanks, a config.json in a folder of weights; and none for too few rows."""
    make_base(tmp_path / "base")
    (tmp_path / "my data").mkdir()
    rows = [{"prompt": f"How many? {k}", "completion": f"It is {k}."} for k in range(60)]
    for name, part in (("my data/a 'b.jsonl", rows), ("few.jsonl", rows[:25])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    path = tmp_path / "c.csv"
    named = ["one,./base/config.json,sft,my data/a 'b.jsonl", "two,./base,sft,few.jsonl"]
    path.write_text("\n".join(["name,model,task,data", *named]))
    asked = ("action=advise", f"customers={path}")
    said = command(*asked, "why=one").stdout.strip().splitlines()[-1]
    words = shlex.split(said)
    assert words[:3] == ["python", "-m", "lorasweep"]
    done = command(*words[3:], "scale=smoke", "action=plan")
    assert done.returncode == 0 and "60 understood" in done.stdout, done.stderr
    assert "+sweep=tune" not in command(*asked, "why=two").stdout
