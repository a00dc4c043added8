"""One's own model and file as they are typed: trained once, whatever folder they lie in."""

import json
import re
import shutil
from functools import partial

import pytest

from tests.customers import make_base
from tests.world import cli

pytestmark = pytest.mark.slow
SMALL = ("batch_size=4", "dataset.max_length=64", "exec.workers=1", "exec.threads=1")
ONE = ("model=./base", "dataset=rows.csv", "method.rank=2", "steps=3", "lr=1e-3", *SMALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_base(folder / "base")
    rows = "".join(f'So? {k},"Yes, {k}",any\n' for k in range(60))
    (folder / "rows.csv").write_text(f"question,answer,topic\n{rows}")
    return folder


@pytest.fixture
def elsewhere(home, tmp_path):
    """Run a command on copies of the files in another folder, with the runs of the first."""
    shutil.copytree(home / "base", tmp_path / "base")
    shutil.copy(home / "rows.csv", tmp_path)
    return partial(cli, f"exec.runs_dir={home}/runs", cwd=tmp_path)


def results(home):
    return {p.parent.name: p.stat().st_mtime_ns for p in home.glob("runs/*/result.json")}


def test_a_run_on_ones_own_files_is_trained_once_wherever_they_lie(home, elsewhere):
    first = cli(*ONE, cwd=home)
    assert "done, test NLL" in first.stdout
    model, data, example = first.stderr.splitlines()[:3]
    assert re.match("model base-.*llama, 0.03M parameters, 2 layers, bf16, context 2048", model)
    for words in (
        "csv, prompt_completion, columns question -> answer (not read: topic)",
        "30 training, 15 validation and 15 test rows",
        "tokens a row; rows: 60 understood: 60 prompt_completion",
    ):
        assert words in data
    assert example.startswith("example, [[in the loss]]: <|begin_of_text|>So? ")
    assert "\\n[[Yes, " in example
    before = results(home)
    plan = json.loads(elsewhere(*ONE, "action=plan", "format=json").stdout)
    assert plan["runs"]["todo"] == 0 and plan["understood"] == [model, data, example]
    assert results(home) == before
    wrong = elsewhere("model=./bass", "dataset=row.csv", check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("Did you mean ") == 2
    assert "Traceback" not in wrong.stderr
