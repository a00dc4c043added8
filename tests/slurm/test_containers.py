"""Jobs whose workers run inside a container, by stand-ins for apptainer and pyxis."""

import json
import re

import pytest

from lorasweep.launch.slurm.submit import submit_command
from tests.slurm import stand_ins
from tests.slurm.cluster import (
    FAST,
    HELD,
    SMOKE,
    ask,
    attempts,
    curves,
    job_log,
    jobs_of,
    read_json,
    request,
    results,
    submitted,
    train_here,
    wait_for,
)
from tests.slurm.test_interruptions import (
    SLOWLY,
    _interrupted,
    _one_with_a_checkpoint_of_each_job,
)
from tests.slurm.test_sharded import RUN, TWO_NODES, finished
from tests.slurm.trainers import GO

IMAGES = {"apptainer": "image.sif", "pyxis": "image.sqsh"}
kinds = pytest.mark.parametrize("kind", IMAGES)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """`inside(kind, *options)`: these options, with a container; its notes are `inside.notes()`."""
    folder = tmp_path / "bin"
    setup = stand_ins.install(folder)
    monkeypatch.chdir(tmp_path)

    def options(kind, *given):
        (tmp_path / IMAGES[kind]).write_text("")
        found = next(o for o in given if o.startswith("cluster.setup"))
        changed = found.replace("cluster.setup=[", f"cluster.setup=['{setup}',")
        rest = [o for o in given if o != found]
        return [*rest, changed, f"cluster.container={tmp_path}/{IMAGES[kind]}"]

    def notes():
        path = folder / stand_ins.NOTES
        return [json.loads(line) for line in path.read_text().splitlines()]

    options.notes = notes
    return options


@kinds
@pytest.mark.full
def test_a_sweep_inside_a_container_is_stopped_preempted_and_answered(
    queue, tmp_path, inside, kind
):
    here, there = tmp_path / "here", tmp_path / "there"
    train_here(here, *SMOKE, *SLOWLY)
    ask(here, *SMOKE, *SLOWLY)
    with queue.closed():
        options = inside(kind, *FAST)
        ask(there, *SMOKE, *SLOWLY, *options, "cluster.runs_per_job=3", trainer=HELD)
        (submission,) = submitted(there)
        preempted, warned = jobs_of(submission)
        queue.update(f"jobid={preempted}", "partition=scavenge")
    started = wait_for(lambda: _one_with_a_checkpoint_of_each_job(there, submission))
    node = queue.jobs()[preempted][1]
    queue.command("sbatch", "-purgent", f"-w{node}", "-c2", "-o/dev/null", "--wrap", "true")
    queue.command("scancel", "--signal=USR2", warned)  # as at a time limit
    wait_for(lambda: all(_interrupted(there, rid) for rid in started))
    (there / "runs" / GO).touch()
    queue.drain()

    assert "queued again" in job_log(submission, warned)
    assert len(results(there)) == 6
    assert results(there) == results(here) and curves(there) == curves(here)
    for rid in started:
        assert set(attempts(there)[rid]) == {1, 2}
        again = read_json(there / f"runs/{rid}/attempts/2/env.json")
        assert again["resumed_from_step"] > 0
        assert again["slurm"]["container"] == f"{tmp_path}/{IMAGES[kind]}"
    assert list((there / "reports").glob("lr_ratio-smoke-*/report.md"))  # by the follow-up job
    assert len(inside.notes()) == 4  # a worker for each job, twice
    for seen in inside.notes():
        assert f"{there}/runs:{there}/runs" in seen["mounts"]
        command = " ".join(seen["command"])
        assert re.match("env PYTHONNOUSERSITE=1 PYTHONPATH=.* python3 -m lorasweep.launch", command)


@pytest.mark.parametrize(("kind", "per_node"), [("apptainer", 1), ("pyxis", 1), ("pyxis", 2)])
@pytest.mark.full
def test_a_run_of_two_processes_inside_a_container(queue, tmp_path, inside, kind, per_node):
    options = inside(kind, *TWO_NODES)
    spread = ("exec.world_size=2", f"cluster.gpus_per_node={per_node}", "steps=1")
    ask(tmp_path, *RUN, *options, *spread, trainer=None)
    queue.drain()
    store, rid, result = finished(tmp_path)
    assert result["backend"] == "transformers on cpu, 2 processes" and store.last_attempt(rid) == 1
    assert len(inside.notes()) == (2 if kind == "apptainer" else 1)  # one srun starts both


@kinds
def test_a_command_runs_inside_a_container(queue, tmp_path, inside, kind):
    wanted = request(tmp_path, *SMOKE, *inside(kind, *FAST))
    given = ("action=layers", "model=llama-3.2-1b", "method=lora")
    log = re.search("log: (.*) \\(", submit_command(wanted.cluster, wanted.exec, given, "a", print))
    queue.drain()
    (seen,) = inside.notes()
    text = submitted(tmp_path)[0].folder / "jobs"
    assert seen["command"][-3:] == [*given[1:], "cluster=local"] and log, text
    with open(log[1], encoding="utf-8") as file:
        assert "lora on llama-3.2-1b" in file.read()
