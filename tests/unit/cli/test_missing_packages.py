"""A package that is missing is named where it is needed, with what to type; the rest goes on."""

import json
import sys

import pytest

from analysis.__main__ import main as analysis
from analysis.report.report import judge_and_report
from lorasweep.__main__ import main as lorasweep
from lorasweep.cli.actions import act
from lorasweep.config.compose import compose_request
from lorasweep.data import sources
from lorasweep.errors import SpecError
from lorasweep.models.describe import describe_model
from lorasweep.spec.dataset import DatasetSpec
from tests.world import ROOT

KEPT = ROOT / "analysis/results"


@pytest.fixture
def without(monkeypatch):
    """Make packages look as if they were not installed."""

    def block(*packages):
        for name in [m for m in sys.modules if m.split(".")[0] in packages]:
            monkeypatch.delitem(sys.modules, name)
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return block


HUB = DatasetSpec(name="rows", source="hub", location="org/rows", format="text")
NEEDED = {
    **{
        package: (asked, lambda asked=asked: act(compose_request(["scale=smoke", asked])))
        for package, asked in (("wandb", "mirror=wandb"), ("submitit", "cluster=slurm"))
    },
    "gguf": ("some.gguf", lambda: describe_model("some.gguf")),
    "datasets": ("rows", lambda: sources.of_hub(HUB, False)),
}


@pytest.mark.parametrize("package", NEEDED)
def test_what_needs_a_package_is_refused_before_it_trains(without, tmp_path, monkeypatch, package):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    without(package)
    what, ask = NEEDED[package]
    with pytest.raises(SpecError, match=f"(?s){what}.*pip install {package} .*make wheelhouse"):
        ask()
    assert not list(tmp_path.glob("runs/*/spec.json"))


def test_a_python_without_the_environment_is_named(without, monkeypatch, capsys):
    without("hydra", "pandas")
    monkeypatch.setattr(sys, "argv", ["lorasweep", "+sweep=lr_ratio"])
    with pytest.raises(SystemExit) as end:
        lorasweep()
    said = capsys.readouterr().err
    assert end.value.code == 2 and sys.executable in said and "activate" in said
    assert analysis(["lr_ratio"]) == 2 and sys.executable in capsys.readouterr().err


@pytest.mark.parametrize("absent", [(), ("matplotlib",), ("plotly", "jinja2")])
def test_a_report_without_a_package_is_the_same_answer_without_pages(without, tmp_path, absent):
    """The pages of an earlier report are gone, so that none is older than the answer beside it."""
    from analysis.runs.table import read

    folder, pages = KEPT / "lr_ratio-tiny", {"report.md", "report.html"}
    asked = json.loads((folder / "question.json").read_text())
    for old in (*pages, "own.png"):
        (tmp_path / old).write_text("old")
    without(*absent)
    text = judge_and_report(read(folder / "table.parquet"), asked, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["verdicts"]
    there = {p.name for p in tmp_path.iterdir()}
    assert "expected" in text and (tmp_path / "own.png").read_text() == "old"
    assert ("left out: " in text) == bool(absent) == (not pages & there)
    assert all(package in text for package in absent) and ("lr_nll.png" in there) == (not absent)
