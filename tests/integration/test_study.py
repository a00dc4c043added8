"""The study at scale smoke: sweeps that share runs, one table of claims."""

import json

import pytest

from analysis.__main__ import main as analysis
from lorasweep.store.run_store import RunStore
from tests.world import cli

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.xdist_group("study")]


def test_sweeps_of_a_sweep_share_their_runs_and_end_in_one_table(tmp_path):
    parts = "sweep.parts=[rank,short_runs,compute,invariance,capacity]"
    done = cli("+sweep=study", parts, "scale=smoke", "exec.pack_size=1", cwd=tmp_path, timeout=500)
    assert done.stdout.count("== ") == 5
    names = ("rank", "short_runs", "compute", "invariance", "capacity")
    folders = {n: tmp_path / f"reports/{n}-smoke" for n in names}
    answers = {n: json.loads((f / "results.json").read_text()) for n, f in folders.items()}
    trained, asked = RunStore(tmp_path / "runs").existing(), [a["runs"] for a in answers.values()]
    assert answers["short_runs"]["runs"] >= 6
    assert len(trained) < sum(asked)  # what sweeps share was trained once
    twin = next(v for v in answers["invariance"]["verdicts"] if v["claim"] == "twins")
    assert twin["outcome"] == "SUPPORTED" and twin["estimate"]["value"] <= 1e-9
    assert (
        analysis(["study", "--reports-dir", f"{tmp_path}/reports", "--out", f"{tmp_path}/all"]) == 0
    )
    page = tmp_path / "all/study.md"
    assert page.read_text().startswith("# When does LoRA match")
    assert "(`rank: order`, study)" in (page.parent / "questions" / "rank.md").read_text()
    for name, folder in folders.items():
        assert (folder / "report.md").is_file() and (folder / "report.html").is_file()
        for figure, _ in answers[name]["figures"]:
            assert (folder / figure).stat().st_size > 1000
