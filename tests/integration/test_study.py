"""The study at scale smoke: sweeps that share runs, one table of claims, tasks judged first."""

import json

import pytest

from lorasweep.store.run_store import RunStore
from tests.world import cli

pytestmark = [pytest.mark.slow, pytest.mark.full, pytest.mark.xdist_group("study")]
ALONE = ("scale=smoke", "exec.pack_size=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


def test_sweeps_of_a_sweep_share_their_runs_and_end_in_one_table(place):
    parts = "sweep.parts=[rank,short_runs,compute,invariance,capacity]"
    done = cli("+sweep=study", parts, *ALONE, cwd=place, timeout=500)
    assert done.stdout.count("== ") == 5
    names = ("rank", "short_runs", "compute", "invariance", "capacity")
    folders = {n: place / f"reports/{n}-smoke" for n in names}
    answers = {n: json.loads((f / "results.json").read_text()) for n, f in folders.items()}
    trained, asked = RunStore(place / "runs").existing(), [a["runs"] for a in answers.values()]
    assert answers["short_runs"]["runs"] >= 6
    assert len(trained) < sum(asked)  # what sweeps share was trained once
    twin = next(v for v in answers["invariance"]["verdicts"] if v["claim"] == "twins")
    assert twin["outcome"] == "SUPPORTED" and twin["estimate"]["value"] <= 1e-9
    (page,) = (place / "reports").glob("study-smoke-*/study.md")
    assert page.read_text().startswith("# When does LoRA match")
    assert "(`rank: order`, study)" in (page.parent / "questions" / "rank.md").read_text()
    for name, folder in folders.items():
        assert (folder / "report.md").is_file() and (folder / "report.html").is_file()
        for figure, _ in answers[name]["figures"]:
            assert (folder / figure).stat().st_size > 1000


def test_tasks_are_judged_first_from_a_few_runs(place):
    asked = ("+sweep=rank", "action=qualify", "format=json", *ALONE)
    judged = json.loads(cli(*asked, cwd=place, check=False).stdout)
    assert judged["qualified"].keys() == {"tiny64 on dialect_smoke, batch 4, steps 12"}
    checks = {c["name"] for c in judged["checks"]}
    assert checks >= {"to be learned", "not solved", "still learning, fullft"}
    refused = cli("action=qualify", cwd=place, check=False)
    assert refused.returncode == 2 and "+sweep=NAME" in refused.stderr
