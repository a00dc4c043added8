"""One's own model and file as they are typed: trained once, whatever folder they lie in."""

import csv
import json
import shutil

import pytest

from tests.customers import make_base
from tests.world import cli

pytestmark = pytest.mark.slow
SMALL = ("batch_size=4", "dataset.max_length=64", "exec.workers=1", "exec.threads=1")
ONE = ("model=./base", "dataset=rows.csv", "method.rank=2", "steps=3", "lr=1e-3", *SMALL)
SWEEP = (
    *("+sweep=lr_ratio", "scale=smoke", "sweep.axes.model=[./base]", "steps=3", *SMALL),
    *("sweep.axes.dataset=[rows.csv]", "sweep.arms.lora.rank=2"),
    *("sweep.arms.lora.lr=[1e-3]", "sweep.arms.fullft.lr=[1e-4]"),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_base(folder / "base")
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer", "topic"])
        writer.writerows([f"So? {k}", f"Yes, {k}", "any"] for k in range(60))
    return folder


def results(home):
    return {p.parent.name: p.stat().st_mtime_ns for p in home.glob("runs/*/result.json")}


def test_a_run_on_ones_own_files_is_trained_once_wherever_they_lie(home, tmp_path):
    first = cli(*ONE, cwd=home)
    assert "done, test NLL" in first.stdout
    model, data, example = first.stderr.splitlines()[:3]
    assert data.endswith("tokens a row; rows: 60 understood: 60 prompt_completion")
    assert (
        model.startswith("model base-")
        and "llama, 0.03M parameters, 2 layers, bf16, context 2,048" in model
    )
    assert "csv, prompt_completion, columns question -> answer (not read: topic)" in data
    assert "30 training, 15 validation and 15 test rows" in data
    assert (
        example.startswith("example, [[in the loss]]: <|begin_of_text|>So? ")
        and "\\n[[Yes, " in example
    )
    before = results(home)
    shutil.copytree(home / "base", tmp_path / "base")
    shutil.copy(home / "rows.csv", tmp_path)
    store = f"exec.runs_dir={home}/runs"
    plan = json.loads(cli(*ONE, store, "action=plan", "format=json", cwd=tmp_path).stdout)
    assert plan["runs"]["todo"] == 0 and plan["understood"] == [model, data, example]
    assert results(home) == before
    wrong = cli("model=./bass", "dataset=row.csv", cwd=tmp_path, check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("Did you mean ") == 2
    assert "Traceback" not in wrong.stderr


@pytest.mark.full
def test_a_sweep_on_ones_own_files_shares_the_run_and_all_rows_are_measured(home, tmp_path):
    first, answered = cli(*ONE, cwd=home), cli(*SWEEP, cwd=home)
    assert "report:" in answered.stdout and "2 runs" in answered.stderr
    runs = results(home)
    assert len(runs) == 2 and any(run in first.stdout for run in runs)  # one is of both
    shutil.copytree(home / "base", tmp_path / "base")
    shutil.copy(home / "rows.csv", tmp_path)
    store = f"exec.runs_dir={home}/runs"
    for command, answer in ((ONE, first), (SWEEP, answered)):
        again = cli(*command, store, cwd=tmp_path)
        assert again.stdout.splitlines()[0] == answer.stdout.splitlines()[0]
        assert "to do" not in again.stderr
    assert results(home) == runs
    # all rows are measured, none of them held out
    lines = ("action=measure", "rates=1", "format=json")
    measured = json.loads(cli(*ONE, store, *lines, cwd=tmp_path).stdout)
    assert measured["rows"]["all"] == 60 and measured["rows_sha256"]
