"""One run over two nodes of a real Slurm, by gloo: as one process trains it, killed and stopped."""

import contextlib
import os
import re
import signal

import psutil
import pytest

from lorasweep.store.run_store import RunStore
from tests.integration.test_distributed import KINDS, MEASURES, SMALL, same, spread
from tests.slurm.conftest import ALONE, ask, jobs_of, submitted, wait_for
from tests.world import cli

RUN = (*(s for s in SMALL if s != "exec.workers=1"), *KINDS["full"])
TWO_NODES = (*ALONE, "cluster.cpus=1", "cluster.gpus=1", "cluster.mem_gib=2")


def finished(folder):
    """Return the only run's result, and its last record."""
    store = RunStore(folder / "runs")
    (rid,) = store.existing()
    return store, rid, {**store.result(rid), **store.records(rid)[-1]}


@pytest.mark.full
def test_two_processes_on_two_nodes_make_the_update_of_one(queue, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    spread = ("exec.world_size=2", "cluster.gpus_per_node=1")
    text = ask(there, *RUN, *TWO_NODES, *spread, "steps=1", "action=plan", trainer=None)
    assert re.search(r"jobs +nodes +gpus +cpus .*\n +1 +2 +1 +1 ", text)
    ask(there, *RUN, *TWO_NODES, *spread, "steps=1", trainer=None)
    cli(*RUN, "steps=1", cwd=here)
    queue.drain()
    _, _, one = finished(here)
    store, rid, two = finished(there)
    for name in MEASURES:
        assert same(one[name], two[name]), name
    assert two["backend"] == "transformers on cpu, 2 processes" and store.last_attempt(rid) == 1
    (sent,) = submitted(there)
    (job,) = jobs_of(sent)
    nodes = queue.command("sacct", "-n", "-P", "-j", job, "-o", "JobID,NNodes,NTasks")
    steps = dict(line.split("|", 1) for line in nodes.splitlines())
    assert steps[f"{job}.0"] == "1|1" and steps[f"{job}.1"] == "2|2"


@pytest.mark.parametrize(("kind", "per_node"), [("apptainer", 1), ("pyxis", 1), ("pyxis", 2)])
@pytest.mark.full
def test_a_run_of_two_processes_inside_a_container(queue, tmp_path, inside, kind, per_node):
    spread = ("exec.world_size=2", f"cluster.gpus_per_node={per_node}", "steps=1")
    ask(tmp_path, *RUN, *inside(kind, *TWO_NODES), *spread, trainer=None)
    queue.drain()
    store, rid, result = finished(tmp_path)
    assert result["backend"] == "transformers on cpu, 2 processes" and store.last_attempt(rid) == 1
    assert len(inside.notes()) == (2 if kind == "apptainer" else 1)  # one srun starts both


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_four_processes_on_two_nodes_are_killed_and_stopped_and_resume(queue, tmp_path):
    """A process of the second node is killed; then Slurm warns the job, which queues itself."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    long = ("steps=50", "exec.checkpoint_s=0.2")
    ask(there, *RUN, *TWO_NODES, *long, "exec.world_size=4", trainer=None)
    store = RunStore(there / "runs")
    wait_for(lambda: any(len(store.records(i)) > 3 for i in store.existing()))
    (rid,) = store.existing()
    (job,) = jobs_of(submitted(there)[0])
    os.kill(last_process(job, 3), signal.SIGKILL)
    wait_for(lambda: store.last_attempt(rid) == 2)
    wait_for(lambda: len(store.records(rid)) > 10)
    queue.command("scancel", "--signal=USR2", job)
    wait_for(lambda: store.last_attempt(rid) == 3)
    assert store.end(rid, 1) is None and store.end(rid, 2)["state"] == "stopped"
    queue.drain()
    cli(*RUN, *long, cwd=here)
    assert store.env(rid)["resumed_from_step"] > 10
    both = [s.records(rid) for s in (store, RunStore(here / "runs"))]
    two, one = ({r["step"]: r["train_nll"] for r in records} for records in both)
    bound = 100 * spread(50)  # rounding grows over so many updates: see tests/training.py
    assert bound <= 1e-4 and same(two, one, bound) and len(both[0]) == 50


def last_process(job, rank):
    """Return the process id of the process of a run with this number, in a job."""
    wanted = {("SLURM_JOB_ID", job), ("SLURM_PROCID", str(rank))}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command, given = process.cmdline(), process.environ().items()
            if "lorasweep.launch.worker" in command and "srun" not in command and wanted <= given:
                return process.pid
    raise AssertionError(f"job {job} has no process {rank}")
