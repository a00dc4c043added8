"""Jobs that a cluster interrupts: every run ends once, with the curve of an uninterrupted run."""

import json
import os
import re
import signal
from collections import Counter

import psutil
import pytest

from lorasweep.launch.slurm.queue import log_of
from tests.slurm import storm
from tests.slurm.conftest import (
    ALONE,
    FAST,
    HELD,
    SMOKE,
    ask,
    attempts,
    curves,
    jobs_of,
    read_json,
    results,
    status,
    submitted,
    train_here,
    wait_for,
)
from tests.slurm.trainers import FREE_STEPS, GO

SLOWLY = ("steps=1000", "exec.checkpoint_s=0.1")
EIGHT_JOBS = (
    *("+sweep=lr_ratio", "scale=smoke", "~sweep.arms.fullft", *SLOWLY, "exec.pack_size=2"),
    *("sweep.arms.lora.lr=${around:3e-3,8,1.5}", "sweep.axes.seed=[0,1]"),
)
HARMS = (
    *("time limit", "preempted with grace", "preempted at once", "requeued"),
    *("node failed", "cancelled", "worker killed", "job killed"),
)


@pytest.mark.parametrize(
    "kind", [None, *(pytest.param(k, marks=pytest.mark.full) for k in ("apptainer", "pyxis"))]
)
def test_a_submitted_sweep_is_preempted_stopped_and_answered(queue, tmp_path, inside, kind):
    """One job is preempted, one queued again, also in containers; the report is the local one."""
    here, there = tmp_path / "here", tmp_path / "there"
    train_here(here, *SMOKE, *SLOWLY)
    answer = ask(here, *SMOKE, *SLOWLY)
    options = (*(inside(kind, *FAST) if kind else FAST), "cluster.runs_per_job=3")
    with queue.closed():
        sent = ask(there, *SMOKE, *SLOWLY, *options, trainer=HELD)
        assert "submitted 6 runs" in sent and "6 runs queued" in sent
        (submission,) = submitted(there)
        preempted, stopped = jobs_of(submission)
        queue.update(f"jobid={preempted}", "partition=scavenge")
    started = wait_for(lambda: _one_with_a_checkpoint_of_each_job(there, submission))
    queue.preempt("-w", queue.jobs()[preempted][1])
    warn = ("scancel", "--signal=USR2") if kind else ("scontrol", "requeue")
    queue.command(*warn, stopped)
    wait_for(lambda: all(_interrupted(there, rid) for rid in started))
    (there / "runs" / GO).touch()
    queue.drain()

    assert len(results(there)) == 6
    assert results(there) == results(here) and curves(there) == curves(here)
    for rid in started:
        assert set(attempts(there)[rid]) == {1, 2}
        env = read_json(there / f"runs/{rid}/attempts/2/env.json")
        assert env["resumed_from_step"] > 0 and bool(env["slurm"].get("container")) == bool(kind)
    (report,) = (there / "reports").glob("lr_ratio-smoke-*/report.md")
    assert report.read_text() == (here / report.relative_to(there)).read_text()
    again = ask(there, *SMOKE, *SLOWLY, *FAST)
    assert answer.splitlines()[0] in again and len(submitted(there)) == 1
    for seen in inside.notes() if kind else ():  # a worker for each job, twice
        assert f"{there}/runs:{there}/runs" in seen["mounts"] and len(inside.notes()) == 4
        command = " ".join(seen["command"])
        assert re.match("env PYTHONNOUSERSITE=1 PYTHONPATH=.* python3 -m lorasweep.launch", command)


@pytest.mark.full
def test_eight_interrupted_jobs_resume_with_the_same_curves(queue, tmp_path):
    whole, there = tmp_path / "whole", tmp_path / "there"
    train_here(whole, *EIGHT_JOBS)
    with queue.closed():
        ask(there, *EIGHT_JOBS, *FAST, "cluster.runs_per_job=2", "cluster.warn_s=50", trainer=HELD)
        (sent,) = submitted(there)
        arrays = Counter(job.partition("_")[0] for job in jobs_of(sent))
        assert sorted(arrays.values()) == [3, 5]
        jobs = dict(zip(HARMS, jobs_of(sent), strict=True))
        queue.update(f"jobid={jobs['preempted with grace']}", "partition=scavenge")
    runs = dict(zip(HARMS, sent.tasks, strict=True))
    everything = [rid for pair in runs.values() for rid in pair]
    assert len(everything) == 16
    wait_for(lambda: all(_held_with_a_checkpoint(there, rid) for rid in everything))
    where = {job: node for job, (_, node) in queue.jobs().items()}
    assert len({where[job] for job in jobs.values()}) == 8

    # Beyond what has passed, however slow the machine: else the warning and the end come together.
    limit = queue.minutes_run(jobs["time limit"]) + 2
    queue.update(f"jobid={jobs['time limit']}", f"timelimit={limit}")
    queue.update(f"nodename={where[jobs['node failed']]}", "state=down", "reason=test")
    for harm in ("preempted with grace", "preempted at once"):
        queue.preempt("-w", where[jobs[harm]])
    queue.command("scontrol", "requeue", jobs["requeued"])
    queue.command("scancel", jobs["cancelled"])
    os.kill(_worker(there, runs["worker killed"][0]), signal.SIGKILL)
    psutil.Process(_worker(there, runs["job killed"][0])).parent().kill()
    wait_for(lambda: all(_interrupted(there, rid) for rid in everything))
    # Slurm may have taken the node back by itself, and then refuses this.
    queue.update(f"nodename={where[jobs['node failed']]}", "state=resume", check=False)
    queue.update(f"jobid={jobs['time limit']}", "timelimit=60")
    (there / "runs" / GO).touch()
    queue.drain()

    assert len(results(there)) == 16 and curves(there) == curves(whole)
    for harm, pair in runs.items():
        for rid in pair:
            ends = attempts(there)[rid]
            assert len(ends) >= 2 and "failed" not in ends.values(), (harm, ends)
            last = read_json(there / f"runs/{rid}/attempts/{max(ends)}/env.json")
            assert (last["resumed_from_step"] or 0) >= FREE_STEPS, (harm, last)
            assert not (there / f"runs/{rid}/checkpoint").exists()
    log = log_of(sent.folder, jobs["time limit"]).read_text()
    assert "stopped by SIGUSR2;" in log and "queued again" in log
    lost = {rid for harm in ("cancelled", "job killed") for rid in runs[harm]}
    again = [rid for s in submitted(there)[1:] for task in s.tasks for rid in task]
    assert sorted(again) == sorted(lost)  # the follow-up job submitted lost runs only


@pytest.mark.full
def test_jobs_that_a_preemption_cancels_are_submitted_again_and_again(queue, tmp_path):
    """Four times, in which no run finishes: the follow-up job sees that the runs get further."""
    whole, there = tmp_path / "whole", tmp_path / "there"
    one_pack = (*SMOKE, "~sweep.arms.fullft", *SLOWLY)
    train_here(whole, *one_pack)
    spot = ("cluster.partition=spot", "cluster.follow_partition=main", "exec.max_attempts=2")
    ask(there, *one_pack, *FAST, *spot, trainer=HELD)
    for n in range(1, 5):
        job = wait_for(lambda: len(_jobs(there)) == n and _jobs(there)[-1])
        wait_for(lambda: job in queue.running())
        runs = submitted(there)[-1].tasks[0]
        before = _saved(there, runs[0])
        wait_for(lambda: _saved(there, runs[0]) > before)
        queue.preempt("-w", queue.jobs()[job][1])
        if n % 2:  # as on a cluster whose preemption leaves no time
            last = max(attempts(there)[runs[0]])
            os.kill(_worker(there, runs[0], last), signal.SIGKILL)
    wait_for(lambda: len(_jobs(there)) == 5)
    (there / "runs" / GO).touch()
    queue.drain()

    states = [
        queue.command("sacct", "-n", "-X", "-j", j, "-o", "State").split() for j in _jobs(there)
    ]
    assert states == [["PREEMPTED"]] * 4 + [["COMPLETED"]]
    assert len(results(there)) == 3 and curves(there) == curves(whole)
    for ends in attempts(there).values():  # None: killed, twice at least, and at last finished
        assert "failed" not in ends.values() and list(ends.values()).count(None) >= 3, ends
    assert list((there / "reports").glob("lr_ratio-smoke-*/report.md"))


def _jobs(cwd):
    return [job for sent in submitted(cwd) for job in jobs_of(sent)]


def _saved(cwd, rid):
    saved = [read_json(p) for p in (cwd / f"runs/{rid}/checkpoint").glob("*.json")]
    return max((d["step"] for d in saved if d), default=0)


def _one_with_a_checkpoint_of_each_job(cwd, submission):
    saved = [[r for r in task if _held_with_a_checkpoint(cwd, r)] for task in submission.tasks]
    return [runs[0] for runs in saved] if all(saved) else None


def _held_with_a_checkpoint(cwd, rid):
    return _saved(cwd, rid) >= FREE_STEPS


def _interrupted(cwd, rid):
    ends = attempts(cwd)[rid]
    return ends[1] is not None or len(ends) > 1


def _worker(cwd, rid, attempt=1):
    return read_json(cwd / f"runs/{rid}/attempts/{attempt}/owner.json")["pid"]


@pytest.mark.full
def test_in_a_storm_nothing_is_lost_doubled_or_different(queue, tmp_path):
    seed = int(os.environ.get("LORASWEEP_STORM_SEED", 1))
    seen = storm.compare(queue, tmp_path, storm.QUICK, seconds=45, seed=seed)
    assert min(seen.harm.values()) >= 2 and len(seen.harm) == 7  # of each kind at least two
    assert max(seen.attempts) >= 2  # it did harm
    assert seen.finished == seen.wanted == 60 and seen.different == []


@pytest.mark.full
def test_a_job_killed_for_its_memory_says_so_and_more_memory_helps(queue, tmp_path):
    hungry = "tests.slurm.trainers:hungry"
    ask(tmp_path, *SMOKE, *ALONE, "cluster.mem_gib=0.25", trainer=hungry)
    queue.drain()
    assert results(tmp_path) == {}
    lost = [p for p in status(tmp_path, *SMOKE)["problems"] if p["state"] == "interrupted"]
    assert lost and all("Slurm: " in p["cause"] and "memory" in p["cause"] for p in lost), lost
    ask(tmp_path, *SMOKE, *ALONE, trainer=hungry)
    queue.drain()
    assert len(results(tmp_path)) == 6


@pytest.mark.full
def test_failed_runs_keep_their_cause_and_are_tried_again_up_to_a_bound(queue, tmp_path):
    bound = ("exec.retry=true", "exec.max_attempts=2")
    ask(tmp_path, *SMOKE, *FAST, *bound, trainer="tests.slurm.trainers:broken")
    queue.drain()
    assert list(attempts(tmp_path).values()) == [{1: "failed", 2: "failed"}] * 6
    shown = status(tmp_path, *SMOKE)
    assert shown["runs"]["failed"] == 6
    assert {p["cause"] for p in shown["problems"]} == {"RuntimeError: broken on purpose"}
    assert all("broken on purpose" in json.dumps(p["tail"]) for p in shown["problems"])
