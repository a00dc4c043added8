"""Sweeps and fleets on a cluster from end to end; commands that submit: killed, two at once, refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm.queue import cancel
from tests.customers import make_base, write_rows
from tests.slurm.conftest import (
    ALONE,
    FAST,
    HELD,
    SMOKE,
    STEPS,
    ask,
    attempts,
    command,
    curves,
    jobs_of,
    read_json,
    results,
    start,
    submitted,
    wait_for,
)
from tests.slurm.trainers import GO
from tests.world import ROOT, cli, environment

TWO_STAGES = (*SMOKE, "sweep.replicate.seeds=[1]", "sweep.replicate.n_lrs=2", "exec.threads=1")


def both(tmp_path, *arguments):
    """Ask here and on the cluster, to the end; return both folders, and both outputs."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    sent = cli(*arguments, *FAST, "cluster.runs_per_job=3", cwd=there)
    return here, there, cli(*arguments, cwd=here), sent


@pytest.mark.full
def test_a_sweep_of_two_stages_ends_by_itself_with_the_local_answer(queue, tmp_path):
    here, there, answer, sent = both(tmp_path, *TWO_STAGES)
    queue.drain()
    assert "submitted 6 runs" in sent.stdout and "code snapshot" in sent.stderr
    assert len(results(there)) == 10 and results(there) == results(here)
    assert curves(there) == curves(here)
    (report,) = (there / "reports").glob("lr_ratio-smoke-*/report.md")
    assert report.read_text() == (here / report.relative_to(there)).read_text()
    assert "10 done" in ask(there, *TWO_STAGES, "action=status", trainer=None)
    again = ask(there, *TWO_STAGES, *FAST, trainer=None)
    assert answer.stdout.splitlines()[0] in again and "submitted" not in again
    text = next((there / "runs").glob("*/attempts/1/env.json")).read_text()
    assert json.loads(text)["slurm"]["job"] and json.loads(text)["snapshot"]
    assert "SLURM_CONF" not in text
    # a job that Slurm runs twice does nothing the second time
    tasks = submitted(there)[0].folder / "tasks.jsonl"
    code = f"from lorasweep.launch.slurm import job; job.run({str(tasks)!r}, 0)"
    command = [sys.executable, "-X", "importtime", "-c", code]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "3 runs, 0 to do" in again.stdout and not re.search(r"\btorch\b", again.stderr)
    assert curves(there) == curves(here)


@pytest.mark.full
def test_packs_side_by_side_have_a_gpu_each(queue, tmp_path):
    two = ("cluster.gpus=2", "cluster.cpus=1", "exec.pack_size=1", "steps=200")
    ask(tmp_path, *SMOKE, *ALONE, *two, trainer=HELD)
    wait_for(lambda: len(list((tmp_path / "runs").glob("*/attempts/1/env.json"))) == 2)
    (tmp_path / "runs" / GO).touch()
    queue.drain()
    envs = [read_json(p)["slurm"] for p in (tmp_path / "runs").glob("*/attempts/1/env.json")]
    assert len(envs) == 6 and {e["gpus"] for e in envs} == {"0", "1"}


@pytest.mark.full
def test_a_search_goes_on_in_follow_up_jobs_to_the_local_answer(queue, tmp_path):
    tune = ("+sweep=tune", "scale=smoke", "steps=32", "arms=lora", "budget=7runs")
    here, there, answer, sent = both(tmp_path, *tune)
    queue.drain()
    assert "submitted 5 runs" in sent.stdout
    assert results(there) == results(here) and len(results(here)) > 5
    again = cli(*tune, *FAST, cwd=there)
    assert len({tuple(text.stdout.splitlines()[-3:]) for text in (answer, again)}) == 1


FLEET = ("action=fleet", "customers=customers.yaml", "exec.threads=1")
JOBS = (*FAST, "cluster.runs_per_job=3", "exec.pack_size=3")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Give a folder with a table: two customers, one of few rows, one without its file."""
    base = make_base(tmp_path / "base")
    write_rows(tmp_path / "ann.jsonl", 40, "357 in all {k}")
    write_rows(tmp_path / "bob.jsonl", 25, "No! {k}", question="Is it late? {k}")
    write_rows(tmp_path / "few.jsonl", 5, "Yes {k}")
    row = {"model": str(base / "config.json"), "task": "sft", "epochs": 2}
    table = [{"name": n, "data": f"{n}.jsonl", **row} for n in ("ann", "bob", "few", "gone")]
    (tmp_path / "customers.yaml").write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.full
def test_a_fleet_is_spread_over_jobs_and_collected_by_the_follow_up_job(queue, folder):
    with queue.closed():
        said = ask(folder, *FLEET, *JOBS, trainer=None)
        assert "submitted 7 runs" in said and "7 runs queued" in said
        assert "4 customers: 0 adapters, 3 not trained yet, 1 with errors" in said
        assert said.count("gone.jsonl") == 1
        asked = ("action=status", *FLEET[1:], "format=json", *FAST)
        shown = json.loads(ask(folder, *asked).splitlines()[-1])  # after the errors of rows
        assert shown["runs"]["queued"] == 7 and len(shown["follows"]) == 1
        assert shown["customers"] == {"customers": 4, "adapters": 0, "open": 3, "errors": 1}
        assert "submitted" not in ask(folder, *FLEET, *JOBS, trainer=None)
        (first,) = submitted(folder)
        lost = next(k for k, runs in enumerate(first.tasks) if len(runs) == 3)
        queue.command("scancel", jobs_of(first)[lost])  # before it started
        write_rows(folder / "bob.jsonl", 25, "{k}", question="Is it late? {k}")
    queue.drain()

    page = (folder / "reports/fleet-customers/index.html").read_text()
    assert "4 customers: 2 adapters, 0 not trained yet, 2 with errors" in page
    assert "but the revision" in page and "gone.jsonl" in page
    again = [s for s in submitted(folder) if s.folder != first.folder]
    assert {r for s in again for task in s.tasks for r in task} >= set(first.tasks[lost])
    before = attempts(folder)
    last = ask(folder, *FLEET, *JOBS, trainer=None)
    assert "submitted 3 runs" in last  # bob's, of the rows that are there now; then further rates
    queue.drain()
    trained = attempts(folder)
    assert len(trained) >= len(before) + 4 and all(trained[i] == before[i] for i in before)
    last = ask(folder, *FLEET, *JOBS, trainer=None)
    assert "4 customers: 3 adapters, 0 not trained yet, 1 with errors" in last


def test_two_users_who_ask_at_once_submit_one_sweep(queue, tmp_path):
    with queue.closed():  # a job that starts at once would be reported as running, not as queued
        both = [start(tmp_path, *SMOKE, *FAST, trainer=STEPS) for _ in range(2)]
        outputs = [process.communicate()[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        assert sum("submitted 6 runs" in text for text in outputs) == 1
        assert all("queued" in text for text in outputs) and len(submitted(tmp_path)) == 1
    queue.drain()
    assert len(results(tmp_path)) == 6
    assert all(ends == {1: None} for ends in attempts(tmp_path).values())


@pytest.mark.full
def test_a_sweep_is_cancelled(queue, tmp_path):
    with queue.closed():  # nothing starts for now
        ask(tmp_path, *SMOKE, *FAST, "cluster.runs_per_job=3")
        assert len(queue.jobs()) == 3  # two and the one that follows
        jobs = list(queue.jobs())
        said = ask(tmp_path, *SMOKE, *FAST, "action=cancel")
        assert "cancelled 2 job(s) with 6 unfinished run(s)" in said
        queue.drain()
        cancel([*jobs, "999999"])  # they have ended: no error


def test_what_the_cluster_cannot_do_is_said_and_not_submitted(slurm, tmp_path):
    known = "partition 'gpux' not found. Available: main, scavenge, spot, urgent"
    for given, message in {
        "partition=gpux": known,
        "gpus=3": "Slurm refused the jobs: ",
        "constraint=gold": "Slurm refused the jobs: ",
    }.items():
        with pytest.raises(ClusterError, match=re.escape(message)):
            ask(tmp_path, *SMOKE, *FAST, f"cluster.{given}")
    assert slurm.jobs() == {}


@pytest.mark.full
def test_a_command_killed_at_sbatch_is_put_right_by_the_next_and_a_copy_cancels_nothing(
    queue, tmp_path
):
    """Its jobs are found by their names, fail without submitit's pickle, and are submitted again."""
    two_jobs, fake = (*SMOKE, *FAST, "cluster.runs_per_job=3"), tmp_path / "bin/sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"; kill -9 $PPID; exit 1\n')
    fake.chmod(0o755)
    with queue.closed():
        path = f"{fake.parent}:{os.environ['PATH']}"
        process = start(tmp_path, *two_jobs, trainer=STEPS, PATH=path)
        assert (process.communicate()[0], process.returncode)[1] == -signal.SIGKILL
        assert re.search("submitted [34] runs|6 runs queued", ask(tmp_path, *two_jobs))
        jobs = queue.jobs().keys()
        shutil.copytree(tmp_path / "runs", tmp_path / "copy/runs", symlinks=True)
        assert "nothing to cancel" in ask(tmp_path / "copy", *two_jobs, "action=cancel")
        assert queue.jobs().keys() == jobs and len(jobs) == 3  # and the one that follows
    queue.drain()
    assert len(results(tmp_path)) == 6 and len(submitted(tmp_path)) == 3
    assert all(ends == {1: None} for ends in attempts(tmp_path).values())


@pytest.mark.full
def test_queued_jobs_run_the_code_as_it_was(queue, tmp_path):
    """The checkout is broken while the jobs wait."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    for name in ("lorasweep", "analysis", "conf", "sweeps"):  # with what is not committed yet
        subprocess.run(["cp", "-r", str(ROOT / name), str(clone)], check=True)
    env = {**environment(tmp_path), "PYTHONPATH": f"{clone}:{ROOT}"}
    with queue.closed():
        asked = [sys.executable, *command(*SMOKE, *ALONE, trainer=STEPS)]
        options = {"capture_output": True, "text": True, "check": True}
        done = subprocess.run(asked, cwd=clone, env=env, **options)
        assert re.search(r"code snapshot \w+", done.stderr)
        (clone / "lorasweep/launch/worker.py").write_text("a syntax error")
    queue.drain()
    assert len(results(tmp_path)) == 6
