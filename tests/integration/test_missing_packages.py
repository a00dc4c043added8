"""A node that lacks packages of the user interface still trains and answers."""

import json

import pytest

from tests.integration.conftest import SMOKE
from tests.world import ROOT, cli

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smoke")]

BLOCKED = ("wandb", "plotly", "matplotlib", "datasets", "gguf", "submitit", "jinja2")


def test_a_sweep_trains_and_answers_without_packages_that_a_node_may_lack(tmp_path):
    """Python runs sitecustomize at each start, also of the workers."""
    (tmp_path / "site").mkdir()
    code = f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
    (tmp_path / "site/sitecustomize.py").write_text(code)
    done = cli(*SMOKE, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"})
    assert "UNDECIDED" in done.stdout and "6 runs" in done.stderr
    for what in ("figures", "report.html", "report.md"):
        assert f"left out: {what} needs" in done.stdout
    folder = tmp_path / "reports/lr_ratio-smoke"
    assert {p.name for p in folder.iterdir()} == {"question.json", "results.json", "table.parquet"}
    assert str(folder / "results.json") in done.stdout
    assert json.loads((folder / "results.json").read_text())["runs"] == 6
    log = next((tmp_path / "runs").glob("*/attempts/*/log.txt"))
    assert "Error" not in log.read_text()
