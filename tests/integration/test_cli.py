"""The command line end to end at scale=smoke: an answer, without packages, a wheel, a mirror, a study."""

import csv
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from lorasweep.store.run_store import RunStore
from tests.conftest import SMOKE
from tests.world import ROOT, cli

pytestmark = pytest.mark.slow


@pytest.mark.xdist_group("smoke")
def test_a_sweep_answers_and_asked_again_trains_nothing(smoke_copy, tmp_path, command):
    first = smoke_copy
    assert "UNDECIDED" in first.stdout and "6 runs" in first.stderr
    report = tmp_path / "reports/lr_ratio-smoke"
    assert "report:" in first.stdout and (report / "report.md").is_file()

    def written():
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/result.json")}

    before, second = written(), command(*SMOKE)
    assert second.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    assert "to do" not in second.stderr and written() == before
    status = json.loads(command(*SMOKE, "action=status", "format=json").stdout)
    assert status["runs"]["done"] == 6 and status["left_s"] == 0
    again = command("answer", "lr_ratio")
    assert again.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    for figure in ("lr_nll.png", "learning.png"):
        assert (report / figure).stat().st_size > 8_000
    other = f"exec.runs_dir={tmp_path}/other"
    assert command(*SMOKE, "action=export", f"out={tmp_path}/t.parquet").returncode == 0
    imported = command("action=import", f"table={tmp_path}/t.parquet", other)
    assert "6 runs imported" in imported.stdout
    assert "to do" not in command(*SMOKE, other).stderr


EXAMPLE = ROOT / "examples/lorasweep-example"
OF_SOURCE = ("docs", "examples", "tests", "benchmarks", "*.md", "LICENSE", "CITATION.cff")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, the wheel, that of the source distribution, that of the example."""
    folder = tmp_path_factory.mktemp("built")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", "--target", folder / "hatch", "hatchling"], check=True)
    env = {**os.environ, "PYTHONPATH": str(folder / "hatch")}
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder / "sdist"]
    subprocess.run(build, cwd=ROOT, env=env, check=True, capture_output=True)
    (sdist,) = folder.glob("sdist/*.tar.gz")
    wheels = []
    for k, source in enumerate((ROOT, sdist, EXAMPLE)):
        wheel = [*pip, "wheel", "--no-deps", "-w", folder / str(k), source]
        subprocess.run(wheel, check=True, timeout=300)
        wheels += folder.glob(f"{k}/*.whl")
    return sdist, *wheels


@pytest.mark.full
def test_the_source_distribution_is_whole_and_makes_the_same_wheel(built):
    sdist, wheel, again, _ = built
    listed = ["git", "ls-files", "-z", "--", "lorasweep", "analysis", "sweeps", *OF_SOURCE]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in done.stdout.split("\0") if name}
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert len(tracked) > 300 and not tracked - packed
    in_wheels = [set(zipfile.ZipFile(w).namelist()) for w in (wheel, again)]
    assert in_wheels[0] == in_wheels[1]
    code = {n for n in tracked if n.startswith(("lorasweep/", "analysis/"))}
    kept = {n for n in code if n.startswith("analysis/results/")} - {"analysis/results/rows.csv"}
    conf = {f"lorasweep/{p.relative_to(ROOT)}" for p in ROOT.glob("conf/*/*.yaml")}
    assert "lorasweep/conf/sweep/lr_ratio.yaml" in conf
    (info,) = {n.partition("/")[0] for n in in_wheels[0] if ".dist-info/" in n}
    ours = {n for n in in_wheels[0] if not n.startswith(info)}
    assert ours == (code - kept) | conf | {"lorasweep/conf/config.yaml"}


@pytest.mark.full
def test_an_installed_wheel_answers_in_an_empty_folder(built, tmp_path):
    """Installed without its dependencies and without a network, with a package that adds names, and
    used from a folder that holds nothing but a package of the user's with the name of ours."""
    site, home = tmp_path / "site", tmp_path / "home"
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", site, built[1], built[3]], check=True)
    installed = {p.name for p in site.iterdir() if p.suffix != ".dist-info"} - {"bin"}
    assert installed == {"analysis", "lorasweep", "lorasweep_example"}
    (home / "analysis").mkdir(parents=True)
    (home / "analysis/__init__.py").write_text("raise ImportError('the wrong analysis')")

    def use(*words, module="lorasweep"):
        return subprocess.run(
            [sys.executable, "-P", "-m", module, *map(str, words)],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )

    assert "orthogonal_init" in use().stdout
    nothing = use("lr_ratio", module="analysis")
    assert nothing.returncode == 2 and "no report 'lr_ratio'" in nothing.stderr
    advice = use("action=advise", f"customers={ROOT}/docs/customers.csv", "format=json")
    assert json.loads(advice.stdout)[0]["method"] == "lora", advice.stderr
    for asked, claim in (
        (SMOKE, "10 times"),
        (("+sweep=orthogonal_init", "scale=smoke"), "as it is"),
    ):
        done = use(*asked)
        assert done.returncode == 0 and "Open: " in done.stdout and claim in done.stdout, (
            done.stderr
        )
        again = use(asked[0].partition("=")[2], module="analysis")
        assert again.stdout.splitlines()[0] == done.stdout.splitlines()[0]
    assert "<html" in (home / "reports/lr_ratio-smoke/report.html").read_text()
    table = home / "runs.csv"
    assert (
        use("+sweep=orthogonal_init", "scale=smoke", "action=export", f"out={table}").returncode
        == 0
    )
    rows = list(csv.DictReader(table.open()))
    assert {r["packages"] for r in rows} == {"lorasweep-example 0.1.0"} and len(rows) == 6
    assert {r["method"]: r["method_fields"] for r in rows}["lora_orthogonal"] == "gain=1.0"


def test_finished_runs_are_mirrored_once_and_read_back(tmp_path):
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    one_each = ("sweep.arms.lora.lr=[5e-3]", "sweep.arms.fullft.lr=[2e-3]", "exec.workers=1")
    for _ in range(2):  # not replayed twice
        done = cli(*SMOKE, *one_each, "mirror=wandb", cwd=tmp_path, env=env)
        assert "UNDECIDED" in done.stdout
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    runs = RunStore(tmp_path / "runs")
    assert len(files) == 2
    assert {f.stem.removeprefix("run-") for f in files} == set(runs.existing())
    for path in files:
        text, own = path.read_bytes(), runs.records(path.stem.removeprefix("run-"))
        assert b"lr_ratio" in text and all(repr(r["train_nll"]).encode() in text for r in own)


def test_a_sweep_trains_and_answers_without_packages_that_a_node_may_lack(tmp_path):
    """Python runs sitecustomize at each start, also of the workers."""
    blocked = ("wandb", "plotly", "matplotlib", "datasets", "gguf", "submitit", "jinja2")
    (tmp_path / "site").mkdir()
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    (tmp_path / "site/sitecustomize.py").write_text(code)
    done = cli(*SMOKE, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"})
    assert "UNDECIDED" in done.stdout and "6 runs" in done.stderr
    folder = tmp_path / "reports/lr_ratio-smoke"
    assert {p.name for p in folder.iterdir()} == {"question.json", "results.json", "table.parquet"}
    assert "left out: " in done.stdout and f"{folder}/results.json" in done.stdout
    assert json.loads((folder / "results.json").read_text())["runs"] == 6
    log = next((tmp_path / "runs").glob("*/attempts/*/log.txt"))
    assert "Error" not in log.read_text()


@pytest.mark.full
@pytest.mark.xdist_group("study")
def test_sweeps_of_a_sweep_share_their_runs_and_end_in_one_table(tmp_path):
    names = ("rank", "short_runs", "compute", "invariance", "capacity")
    parts = (f"sweep.parts=[{','.join(names)}]", "exec.pack_size=1")
    done = cli("+sweep=study", *parts, "scale=smoke", cwd=tmp_path, timeout=500)
    assert done.stdout.count("== ") == 5
    folders = {n: tmp_path / f"reports/{n}-smoke" for n in names}
    answers = {n: json.loads((f / "results.json").read_text()) for n, f in folders.items()}
    trained, asked = RunStore(tmp_path / "runs").existing(), [a["runs"] for a in answers.values()]
    assert answers["short_runs"]["runs"] >= 6
    assert len(trained) < sum(asked)  # what sweeps share was trained once
    twin = next(v for v in answers["invariance"]["verdicts"] if v["claim"] == "twins")
    assert twin["outcome"] == "SUPPORTED" and twin["estimate"]["value"] <= 1e-9
    cli("answer", "study", f"out={tmp_path}/all", cwd=tmp_path)
    assert (tmp_path / "all/study.md").read_text().startswith("# When does LoRA match")
    assert "(`rank: order`, study)" in (tmp_path / "all/questions/rank.md").read_text()
    for name, folder in folders.items():
        assert (folder / "report.md").is_file() and (folder / "report.html").is_file()
        for figure, _ in answers[name]["figures"]:
            assert (folder / figure).stat().st_size > 1000
