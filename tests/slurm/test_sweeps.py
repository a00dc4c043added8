"""Sweeps on a cluster from end to end: real training, more jobs than an array may have, GPUs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import (
    ALONE,
    FAST,
    HELD,
    SMOKE,
    ask,
    attempts,
    curves,
    read_json,
    results,
    status,
    submitted,
    wait_for,
)
from tests.slurm.trainers import GO
from tests.world import ROOT, cli

TWO_STAGES = (*SMOKE, "sweep.replicate.seeds=[1]", "sweep.replicate.n_lrs=2", "exec.threads=1")


@pytest.fixture(scope="module")
def trained(slurm, tmp_path_factory):
    """Ask for a sweep of two stages, with real training, here and on the cluster; to the end."""
    folder = tmp_path_factory.mktemp("trained")
    here, there = folder / "here", folder / "there"
    here.mkdir()
    there.mkdir()
    sent = cli(*TWO_STAGES, *FAST, "cluster.runs_per_job=3", cwd=there)
    answer = cli(*TWO_STAGES, cwd=here)
    slurm.drain()
    return here, there, sent, answer


@pytest.mark.full
def test_a_sweep_of_two_stages_ends_by_itself_with_the_local_answer(trained):
    """The follow-up job submits the second stage and writes the answer."""
    here, there, sent, answer = trained
    assert "submitted 6 runs" in sent.stdout and "code snapshot" in sent.stderr
    assert len(results(there)) == 10 and results(there) == results(here)
    assert curves(there) == curves(here)
    (report,) = (there / "reports").glob("lr_ratio-smoke-*/report.md")
    assert report.read_text() == (here / report.relative_to(there)).read_text()
    watched = ask(there, *TWO_STAGES, "action=status", "watch=true", trainer=None)
    assert "10 done" in watched  # and ends, because nothing is left
    again = ask(there, *TWO_STAGES, *FAST, trainer=None)
    assert answer.stdout.splitlines()[0] in again and "submitted" not in again
    text = next((there / "runs").glob("*/attempts/1/env.json")).read_text()
    assert json.loads(text)["slurm"]["job"] and json.loads(text)["snapshot"]
    assert "SLURM_CONF" not in text


@pytest.mark.full
def test_a_job_that_slurm_runs_twice_does_nothing_the_second_time(trained):
    _, there, _, _ = trained
    before = curves(there)
    task = submitted(there)[0].folder / "tasks/0.json"
    job = [sys.executable, "-X", "importtime", "-m", "lorasweep.launch.slurm.job", task]
    again = subprocess.run(job, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "3 runs, 0 to do" in again.stdout and not re.search(r"\btorch\b", again.stderr)
    assert curves(there) == before


@pytest.mark.full
def test_packs_side_by_side_have_a_gpu_each(queue, tmp_path):
    """Two fake GPUs a job: two workers, one GPU each."""
    two = ("cluster.gpus=2", "cluster.cpus=1", "exec.pack_size=1", "steps=200")
    ask(tmp_path, *SMOKE, *ALONE, *two, trainer=HELD)
    wait_for(lambda: len(list((tmp_path / "runs").glob("*/attempts/1/env.json"))) == 2)
    (tmp_path / "runs" / GO).touch()
    queue.drain()
    envs = [read_json(p)["slurm"] for p in (tmp_path / "runs").glob("*/attempts/1/env.json")]
    assert len(envs) == 6 and {e["gpus"] for e in envs} == {"0", "1"}


@pytest.mark.full
def test_scripts_for_places_without_submitit(queue, tmp_path):
    output = ask(tmp_path, *SMOKE, *FAST, "cluster.submit=false", "cluster.runs_per_job=3")
    script = re.search(r"sbatch (\S+)", output)[1]
    text = Path(script).read_text()
    assert "#SBATCH --array=0-1%2" in text and "submitit" not in text
    with queue.closed():
        queue.command("sbatch", script)
        again = ask(tmp_path, *SMOKE, *FAST)
        assert "submitted 6 runs" not in again and "6 runs queued" in again
        assert status(tmp_path, *SMOKE)["runs"]["queued"] == 6
    queue.drain()
    assert len(results(tmp_path)) == 6
    assert all(ends == {1: None} for ends in attempts(tmp_path).values())
    folder = Path(script).parent
    with open(folder / "tasks/1.json", "a") as task:
        task.write(" ")
    queue.command("sbatch", script)
    queue.drain()
    outputs = [path.read_text() for path in (folder / "jobs").glob("*.out")]
    assert sum("tasks/1.json was changed" in text for text in outputs) == 1
