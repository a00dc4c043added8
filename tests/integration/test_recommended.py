"""Every `python -m lorasweep` that a message recommends, run where it is recommended."""

import re

import pytest
import torch
from safetensors.torch import load_file

from lorasweep.store import checkpoint
from tests.customers import make_base, write_rows
from tests.world import cli

pytestmark = pytest.mark.slow
SMALL = ("dataset.max_length=64", "exec.workers=1", "exec.threads=1")
OWN = ("model=./base", "dataset=rows.jsonl", "steps=16", "batch_size=4", *SMALL)
ADAPTER, FULL = "adapter_model.safetensors", "model.safetensors"


TUNE = ("+sweep=tune", "scale=smoke", *OWN, "budget=8runs", "out=best")
FLEET = ("action=fleet", "customers=customers.csv", "rates=advised", "exec.threads=1")


@pytest.mark.parametrize(
    ("asked", "file"),
    [((*TUNE, "arms=lora"), ADAPTER), ((*TUNE, "arms=fullft"), FULL), (FLEET, ADAPTER)],
    ids=["tune", "tune fullft", "fleet"],
)
def test_weights_that_were_not_kept_come_from_the_recommended_command(
    command, tmp_path, monkeypatch, asked, file
):
    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", 60, "It is {k}.")
    (tmp_path / "customers.csv").write_text(
        "name,model,task,data,epochs\nann,base/config.json,sft,rows.jsonl,1\n"
    )
    monkeypatch.setattr(checkpoint, "load_weights", lambda folder: None)
    done = command(*asked)
    said = re.search(r"python -m lorasweep (action=adapter run=(\w+) out=)FOLDER", done.stdout)
    assert said, done
    # the folders of model and rows are not in the command: it works from elsewhere
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = (f"out={tmp_path}/out", f"exec.runs_dir={tmp_path}/runs")
    cli(*said[1].split()[:2], *where, cwd=elsewhere)
    monkeypatch.undo()
    trained, kept = load_file(tmp_path / "out" / file), tmp_path / "runs" / said[2]
    if file == FULL:
        weights = checkpoint.load_weights(kept)
        assert weights and all(torch.equal(trained[n], t) for n, t in weights.items())
