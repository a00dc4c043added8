"""`+sweep=tune` on a model and a file of one's own: killed, asked again, and its adapter in PEFT."""

import csv
import json
import os
import random
import signal

import pytest

from tests.customers import make_base
from tests.world import cli, start, wait_for

pytestmark = pytest.mark.slow
TUNE = (
    *("+sweep=tune", "scale=smoke", "model=./base", "dataset=rows.csv", "batch_size=4"),
    *("steps=64", "dataset.max_length=64", "sweep.arms.lora.rank=2", "arms=lora", "exec.threads=1"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_base(folder / "base")
    draw = random.Random(0)
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "output"])
        for k in range(80):
            a, b = draw.randint(0, 9), draw.randint(0, 9)
            writer.writerow([f"Case {k}: {a} + {b}?", f"It is {a + b}"])
    return folder


def test_a_killed_search_goes_on_and_its_best_adapter_loads_in_peft(home):
    process = start("-m", "lorasweep", *TUNE, "budget=4runs", cwd=home, start_new_session=True)
    wait_for(lambda: len(list(home.glob("runs/*/result.json"))) >= 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p.parent.name: p.read_bytes() for p in home.glob("runs/*/result.json")}
    done = cli(*TUNE, "budget=4runs", "out=best", "format=json", cwd=home)
    found = json.loads(done.stdout)
    assert {p.parent.name: p.read_bytes() for p in home.glob("runs/*/result.json")}.items() >= (
        before.items()
    )
    answer = found["answer"]
    assert found["chosen_on"] == "validation" and answer["method"] == "lora"
    assert answer["open"] and answer["budget"]["given"] == "4runs"
    folder, (arm,) = home / "best", found["arms"]
    # the run that is written is one at the learning rate of the answer, not the luckiest of all
    assert answer["out"] == f"written to best (learning rate {arm['best_tried']:g})"
    assert f"learning rate {arm['best_tried']:g}," in (folder / "README.md").read_text()
    assert (folder / "README.md").is_file() and (home / "best" / "lorasweep.json").is_file()
    short = [p for p in home.glob("runs/*/spec.json") if json.loads(p.read_text())["steps"] == 8]
    assert len(short) >= 5

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(home / "base")
    adapter = PeftModel.from_pretrained(model, folder)
    assert adapter.peft_config["default"].r == answer["rank"] == 2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"].startswith("base-")  # no path of this machine
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert found_in(folder)["prompt_form"]["messages"]


def found_in(folder):
    return json.loads((folder / "lorasweep.json").read_text())


def test_full_fine_tuning_alone_is_written_and_a_users_files_stay(home):
    from transformers import AutoModelForCausalLM

    settings = [s for s in TUNE if not s.startswith(("steps=", "arms=", "sweep."))]
    asked = (*settings, "steps=32", "arms=fullft", "budget=5runs", "out=full")
    cli(*asked, cwd=home)
    folder = home / "full"
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert not (folder / "adapter").exists() and (folder / "chat_template.jinja").is_file()
    (folder / "notes.txt").write_text("mine")
    cli(*asked, cwd=home)
    (folder / "README.md").write_text("my card")
    refused = cli(*asked, cwd=home, check=False)
    assert refused.returncode == 2 and "README.md is not as lorasweep wrote it" in refused.stderr
    assert (folder / "notes.txt").read_text() == "mine" and "[" not in refused.stdout
