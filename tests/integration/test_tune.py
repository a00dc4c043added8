"""One's own model and file: a run that is trained once wherever they lie; `+sweep=tune`, killed, asked
again, and its adapter in PEFT; and a `python -m lorasweep` that a message recommends."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from lorasweep.store import checkpoint
from tests.customers import make_base, write_rows
from tests.world import cli, start, wait_for

pytestmark = pytest.mark.slow
SMALL = ("dataset.max_length=64", "exec.workers=1", "exec.threads=1", "batch_size=4")
TUNE = ("+sweep=tune", "scale=smoke", "model=./base", "dataset=rows.csv", "steps=32", *SMALL)


@pytest.fixture
def home(tmp_path):
    make_base(tmp_path / "base")
    sums = [(7 * k // 3 % 10, 3 * k // 7 % 10) for k in range(80)]
    lines = [f"Case {k}: {a} + {b}?,It is {a + b}" for k, (a, b) in enumerate(sums)]
    (tmp_path / "rows.csv").write_text("\n".join(["instruction,output", *lines]))
    return tmp_path


def test_a_run_on_ones_own_files_is_trained_once_wherever_they_lie(home):
    one = ("model=./base", "dataset=rows.csv", "method.rank=2", "steps=3", "lr=1e-3", *SMALL)
    first = cli(*one, cwd=home)
    assert "done, test NLL" in first.stdout
    model, data, example = first.stderr.splitlines()[:3]
    assert re.match("model base-.*llama, 0.03M parameters, 2 layers, bf16, context 2048", model)
    assert "csv, prompt_completion, columns instruction -> output" in data
    assert example.startswith("example, [[in the loss]]: <|begin_of_text|>Case ")
    elsewhere = home / "elsewhere"
    shutil.copytree(home / "base", elsewhere / "base")
    shutil.copy(home / "rows.csv", elsewhere)
    runs = f"exec.runs_dir={home}/runs"
    plan = cli(*one, "action=plan", "format=json", runs, cwd=elsewhere).stdout
    assert json.loads(plan)["runs"]["todo"] == 0
    assert json.loads(plan)["understood"] == [model, data, example]


def test_a_killed_search_goes_on_and_its_best_adapter_loads_in_peft(home, command):
    tune = (*TUNE, "sweep.arms.lora.rank=2", "arms=lora", "budget=4runs")
    process = start("-m", "lorasweep", *tune, cwd=home, start_new_session=True)
    wait_for(lambda: len(list(home.glob("runs/*/result.json"))) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p.parent.name: p.read_bytes() for p in home.glob("runs/*/result.json")}
    done = command(*tune, "out=best", "format=json")
    found = json.loads(done.stdout)
    now = {p.parent.name: p.read_bytes() for p in home.glob("runs/*/result.json")}
    assert now.items() >= before.items()
    answer, folder, (arm,) = found["answer"], home / "best", found["arms"]
    assert found["chosen_on"] == "validation" and answer["method"] == "lora" and answer["open"]
    # the run that is written is one at the learning rate of the answer, not the luckiest of all
    assert answer["out"] == f"written to best (learning rate {arm['best_tried']:g})"

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), folder)
    assert adapter.peft_config["default"].r == answer["rank"] == 2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].startswith("base-")  # no path of this machine
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert json.loads((folder / "lorasweep.json").read_text())["prompt_form"]["messages"]


def test_full_fine_tuning_alone_is_written_and_a_users_files_stay(home, command):
    from transformers import AutoModelForCausalLM

    asked = (*TUNE, "arms=fullft", "budget=5runs", "out=full")
    assert command(*asked).returncode == 0
    folder = home / "full"
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert (folder / "chat_template.jinja").is_file()
    (folder / "notes.txt").write_text("mine")
    assert command(*asked).returncode == 0
    (folder / "lorasweep.json").write_text("mine")
    refused = command(*asked)
    assert refused.returncode == 2 and "lorasweep.json is not as lorasweep wr" in refused.stderr
    assert (folder / "notes.txt").read_text() == "mine" and "[" not in refused.stdout


SEARCH = (*TUNE, "steps=16", "budget=8runs", "out=best", "arms=fullft")
FLEET = ("action=fleet", "customers=customers.csv", "rates=advised", "exec.threads=1")


@pytest.mark.parametrize(("asked", "file"), [(SEARCH, ""), (FLEET, "adapter_")])
def test_weights_that_were_not_kept_come_from_the_recommended_command(
    command, home, monkeypatch, asked, file
):
    write_rows(home / "rows.jsonl", 60, "It is {k}.")
    row = "ann,base/config.json,sft,rows.jsonl,1"
    (home / "customers.csv").write_text(f"name,model,task,data,epochs\n{row}\n")
    monkeypatch.setattr(checkpoint, "load_weights", lambda folder: None)
    done = command(*asked)
    said = re.search(r"python -m lorasweep (action=adapter run=(\w+) out=)FOLDER", done.stdout)
    assert said, done
    # the folders of model and rows are not in the command: it works from elsewhere
    (home / "elsewhere").mkdir()
    where = (f"out={home}/out", f"exec.runs_dir={home}/runs")
    cli(*said[1].split()[:2], *where, cwd=home / "elsewhere")
    monkeypatch.undo()
    trained = load_file(home / f"out/{file}model.safetensors")
    if not file:
        weights = checkpoint.load_weights(home / "runs" / said[2])
        assert weights and all(torch.equal(trained[n], t) for n, t in weights.items())
