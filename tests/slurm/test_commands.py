"""One command of lorasweep as a job: submitted once, run with its log, stopped and queued again."""

import re
from pathlib import Path

import pytest

from lorasweep.launch.slurm.submit import submit_command
from tests.slurm import cluster
from tests.slurm.cluster import ALONE, SMOKE
from tests.world import cli, wait_for

LAYERS = ("action=layers", "model=llama-3.2-1b", "method=lora")


def submit(cwd, name, *arguments, settings=ALONE):
    wanted = cluster.request(cwd, *SMOKE, *settings)
    given = (*arguments, f"exec.runs_dir={cwd}/runs", f"exec.reports_dir={cwd}/reports")
    said = submit_command(wanted.cluster, wanted.exec, given, name, print)
    number, log = re.search(r"job (\d+)[^;]*; log: (\S+)", said).groups()
    return said, number, Path(log)


def test_a_command_runs_as_one_job_with_its_log(queue, tmp_path):
    with queue.closed():
        said, number, log = submit(tmp_path, "look", *LAYERS)
        assert "submitted" in said and list(queue.jobs()) == [number]
        again = submit(tmp_path, "look", *LAYERS)
        assert "queued already" in again[0] and again[1:] == (number, log)
        assert submit(tmp_path, "another", *LAYERS)[1] != number
    queue.drain()
    assert "lora on llama-3.2-1b" in log.read_text(), log.read_text()
    assert cluster.status(tmp_path, *SMOKE)["jobs"] == []
    said, _, log = submit(tmp_path, "look", "action=nothing")  # the first one is over
    queue.drain()
    assert "submitted" in said and "the command ended with status" in log.read_text()


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_a_command_runs_inside_a_container(queue, tmp_path, inside, kind):
    _, _, log = submit(tmp_path, "a", *LAYERS, settings=inside(kind, *ALONE))
    queue.drain()
    (seen,) = inside.notes()
    assert seen["command"][-1] == "cluster=local" and "lora on llama-3.2-1b" in log.read_text()


@pytest.mark.full
def test_a_command_stops_at_its_time_limit_and_goes_on(queue, tmp_path):
    """Its runs resume; Slurm's warning of a time limit is the signal USR2 alone."""
    train = (*SMOKE, "steps=150", "exec.checkpoint_s=0.1", "exec.workers=1", "exec.threads=1")
    _, number, log = submit(tmp_path, "training", *train)
    wait_for(lambda: list((tmp_path / "runs").glob("*/checkpoint/*.json")))
    queue.command("scancel", "--signal=USR2", number)
    wait_for(lambda: "queued again" in log.read_text())
    queue.drain()
    assert len(cluster.results(tmp_path)) == 6
    again = [cluster.read_json(p) for p in (tmp_path / "runs").glob("*/attempts/2/env.json")]
    assert again and all(env["resumed_from_step"] > 0 for env in again), log.read_text()


@pytest.mark.full
def test_a_node_is_checked_in_a_job(queue, tmp_path):
    """action=check_gpu: submitted once, with a page in the reports folder at the end."""
    check = ("action=check_gpu", *ALONE, "cluster.mem_gib=4")
    with queue.closed():
        said = cli(*check, cwd=tmp_path).stdout
        assert "check_gpu: submitted" in said
        assert "check_gpu: job" in cli(*check, cwd=tmp_path).stdout
    queue.drain()
    (page,) = (tmp_path / "reports" / "check_gpu").glob("*/page.md")
    text = page.read_text()
    assert "7 of 7 checks passed" in text and "## Not measured" not in text
