"""Every `python -m lorasweep` that a message recommends, run where it is recommended."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file

from tests.customers import make_base, write_rows
from tests.world import cli

pytestmark = pytest.mark.slow
SMALL = ("dataset.max_length=64", "exec.workers=1", "exec.threads=1")
OWN = ("model=./base", "dataset=rows.jsonl", "steps=16", "batch_size=4", *SMALL)
ADAPTER, FULL = "adapter_model.safetensors", "model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_base(folder / "base")
    write_rows(folder / "rows.jsonl", 60, "It is {k}.")
    (folder / "customers.csv").write_text(
        "name,model,task,data,epochs\nann,base/config.json,sft,rows.jsonl,1\n"
    )
    return folder


@pytest.mark.parametrize(
    ("command", "written", "file"),
    [
        (("+sweep=tune", "scale=smoke", *OWN, "arms=lora", "out=best"), "best", ADAPTER),
        (("+sweep=tune", "scale=smoke", *OWN, "arms=fullft", "out=best"), "best", FULL),
        (
            ("action=fleet", "customers=customers.csv", "rates=advised", "exec.threads=1"),
            "reports/fleet-customers/ann",
            ADAPTER,
        ),
    ],
    ids=["tune", "tune fullft", "fleet"],
)
def test_weights_that_were_not_kept_come_from_the_recommended_command(
    home, tmp_path, command, written, file
):
    store = f"exec.runs_dir={tmp_path}/runs"
    cli(*command, store, "budget=4runs" if "out=best" in command else "seed=0", cwd=home)
    (weights,) = (home / written).rglob(file)
    before = load_file(weights)
    shutil.rmtree(home / written)
    for path in tmp_path.glob("runs/*/weights.safetensors"):
        path.unlink()
    again = cli(*command, store, "format=json", cwd=home, check=False)
    said = re.search(r"python -m lorasweep (action=adapter run=\w+ out=)FOLDER", again.stdout)
    assert said, again
    # the folders of model and rows are not in the command: another working directory serves
    cli(*said[1].split()[:2], f"out={tmp_path}/out", store, cwd=tmp_path)
    after = load_file(tmp_path / "out" / file)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    if file == FULL:
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
