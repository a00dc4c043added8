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
    assert answer["out"] == "written to best"
    folder = home / "best"
    assert (folder / "README.md").is_file() and (home / "best" / "lorasweep.json").is_file()
    short = [p for p in home.glob("runs/*/spec.json") if json.loads(p.read_text())["steps"] == 8]
    assert len(short) >= 5

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "base")
    adapter = PeftModel.from_pretrained(model, folder)
    assert adapter.peft_config["default"].r == answer["rank"] == 2
