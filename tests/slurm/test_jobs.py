"""Jobs and sweeps on a real Slurm, to the end: interrupted, every run ends once with the curve of an
uninterrupted one; over two nodes, by gloo; commands that submit: killed, two at once, refused."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from datetime import datetime, timedelta

import psutil
import pytest

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm.queue import cancel, log_of
from lorasweep.store.run_store import RunStore
from tests.customers import make_base, write_rows
from tests.integration.test_interruptions import KINDS, OF_LOSSES, SMALL, same, spread
from tests.slurm import conftest, storm
from tests.slurm.conftest import ALONE, FAST, SMOKE, ask, attempts, curves, results, submitted
from tests.slurm.trainers import FREE_STEPS, GO
from tests.world import ROOT, cli, environment, wait_for

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
    conftest.train_here(here, *SMOKE, *SLOWLY)
    answer = ask(here, *SMOKE, *SLOWLY)
    options = (*(inside(kind, *FAST) if kind else FAST), "cluster.runs_per_job=3")
    with queue.closed():
        sent = ask(there, *SMOKE, *SLOWLY, *options, trainer=conftest.HELD)
        assert "submitted 6 runs" in sent and "6 runs queued" in sent
        (submission,) = submitted(there)
        preempted, stopped = conftest.jobs_of(submission)
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
        env = conftest.read_json(there / f"runs/{rid}/attempts/2/env.json")
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
def test_a_job_whose_run_a_foreign_command_trains_is_requeued_and_resumes_it(queue, tmp_path):
    words = ["{model}", "{out}", "{lr}", "{seed}", "{rank}", "{alpha}", "{layers}", "{steps}"]
    words += ["{batch_size}"]
    words = [f"{word[1:-1]}={word}" for word in words]
    fake = ROOT / "tests/unit/launch/fake_trainer.py"
    settings = (
        *("scale=smoke", "method.rank=2", "method.layers=attention+mlp", "trainer=command"),
        f"trainer.command={json.dumps([sys.executable, str(fake), *words, 'mode=waits'])}",
        'trainer.resume=["resume={resume}"]',
    )
    assert "submitted 1 runs" in ask(tmp_path, *settings, *FAST, trainer=None)
    saved = "*/attempts/1/out/checkpoint-3/trainer_state.json"
    (found,) = wait_for(lambda: [*(tmp_path / "runs").glob(saved)])
    rid = found.relative_to(tmp_path / "runs").parts[0]
    assert queue.jobs() and len(conftest.jobs_of(submitted(tmp_path)[0])) == 1
    queue.command("scontrol", "requeue", conftest.jobs_of(submitted(tmp_path)[0])[0])
    queue.drain()
    result = RunStore(tmp_path / "runs").result(rid)
    assert (
        result["state"] == "done" and result["resumed"] and set(attempts(tmp_path)[rid]) == {1, 2}
    )
    left = [p for p in psutil.process_iter(["cmdline"]) if str(fake) in (p.info["cmdline"] or ())]
    assert not left


@pytest.mark.full
def test_eight_interrupted_jobs_resume_with_the_same_curves(queue, tmp_path):
    whole, there = tmp_path / "whole", tmp_path / "there"
    conftest.train_here(whole, *EIGHT_JOBS)
    with queue.closed():
        two = ("cluster.runs_per_job=2", "cluster.warn_s=50")
        ask(there, *EIGHT_JOBS, *FAST, *two, trainer=conftest.HELD)
        (sent,) = submitted(there)
        arrays = Counter(job.partition("_")[0] for job in conftest.jobs_of(sent))
        assert sorted(arrays.values()) == [3, 5]
        jobs = dict(zip(HARMS, conftest.jobs_of(sent), strict=True))
        queue.update(f"jobid={jobs['preempted with grace']}", "partition=scavenge")
    runs = dict(zip(HARMS, sent.tasks, strict=True))
    everything = [rid for pair in runs.values() for rid in pair]
    assert len(everything) == 16
    wait_for(lambda: all(_held_with_a_checkpoint(there, rid) for rid in everything))
    where = {job: node for job, (_, node) in queue.jobs().items()}
    assert len({where[job] for job in jobs.values()}) == 8

    # Beyond what has passed, however slow the machine: else the warning and the end come together.
    began = queue.command("squeue", "-h", "-j", jobs["time limit"], "-O", "StartTime:.40").strip()
    limit = (datetime.now() - datetime.fromisoformat(began)) // timedelta(minutes=1) + 2
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
            last = conftest.read_json(there / f"runs/{rid}/attempts/{max(ends)}/env.json")
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
    conftest.train_here(whole, *one_pack)
    spot = ("cluster.partition=spot", "cluster.follow_partition=main", "exec.max_attempts=2")
    ask(there, *one_pack, *FAST, *spot, trainer=conftest.HELD)
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

    asked = ("sacct", "-n", "-X", "-o", "State", "-j")
    states = [queue.command(*asked, job).split() for job in _jobs(there)]
    assert states == [["PREEMPTED"]] * 4 + [["COMPLETED"]]
    assert len(results(there)) == 3 and curves(there) == curves(whole)
    for ends in attempts(there).values():  # None: killed, twice at least, and at last finished
        assert "failed" not in ends.values() and list(ends.values()).count(None) >= 3, ends
    assert list((there / "reports").glob("lr_ratio-smoke-*/report.md"))


def _jobs(cwd):
    return [job for sent in submitted(cwd) for job in conftest.jobs_of(sent)]


def _saved(cwd, rid):
    saved = [conftest.read_json(p) for p in (cwd / f"runs/{rid}/checkpoint").glob("*.json")]
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
    return conftest.read_json(cwd / f"runs/{rid}/attempts/{attempt}/owner.json")["pid"]


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
    lost = [p for p in conftest.status(tmp_path, *SMOKE)["problems"] if p["state"] == "interrupted"]
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
    shown = conftest.status(tmp_path, *SMOKE)
    assert shown["runs"]["failed"] == 6
    assert {p["cause"] for p in shown["problems"]} == {"RuntimeError: broken on purpose"}
    assert all("broken on purpose" in json.dumps(p["tail"]) for p in shown["problems"])


RUN = (*(s for s in SMALL if s != "exec.workers=1"), *KINDS["full"])
TWO_NODES = (*ALONE, "cluster.cpus=1", "cluster.gpus=1", "cluster.mem_gib=2")


def finished(folder):
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
    for name in OF_LOSSES:
        assert same(one[name], two[name]), name
    assert two["backend"] == "transformers on cpu, 2 processes" and store.last_attempt(rid) == 1
    (sent,) = submitted(there)
    (job,) = conftest.jobs_of(sent)
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
    (job,) = conftest.jobs_of(submitted(there)[0])
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
    ask(tmp_path, *SMOKE, *ALONE, *two, trainer=conftest.HELD)
    wait_for(lambda: len(list((tmp_path / "runs").glob("*/attempts/1/env.json"))) == 2)
    (tmp_path / "runs" / GO).touch()
    queue.drain()
    paths = (tmp_path / "runs").glob("*/attempts/1/env.json")
    envs = [conftest.read_json(path)["slurm"] for path in paths]
    assert len(envs) == 6 and {e["gpus"] for e in envs} == {"0", "1"}


@pytest.mark.full
def test_a_search_goes_on_in_follow_up_jobs_to_the_local_answer(queue, tmp_path):
    tune = ("+sweep=tune", "scale=smoke", "steps=32", "lora.rank=8", "lora.alpha=4", "budget=9runs")
    here, there, answer, sent = both(tmp_path, *tune)
    queue.drain()
    assert "submitted 5 runs" in sent.stdout  # LoRA's; full fine-tuning waits for the law's rates
    assert results(there) == results(here) and len(results(here)) == 13
    again = cli(*tune, *FAST, cwd=there)
    said = [text.stdout.splitlines() for text in (answer, again)]  # rows of arms have seconds
    assert len({(lines[0], *lines[-2:]) for lines in said}) == 1


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
        queue.command("scancel", conftest.jobs_of(first)[lost])  # before it started
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
        both = [conftest.start(tmp_path, *SMOKE, *FAST, trainer=conftest.STEPS) for _ in range(2)]
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
def test_a_command_killed_at_sbatch_is_put_right_and_a_copy_cancels_nothing(queue, tmp_path):
    """Its jobs are found by their names, fail without submitit's pickle, and are submitted again."""
    two_jobs, fake = (*SMOKE, *FAST, "cluster.runs_per_job=3"), tmp_path / "bin/sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"; kill -9 $PPID; exit 1\n')
    fake.chmod(0o755)
    with queue.closed():
        path = f"{fake.parent}:{os.environ['PATH']}"
        process = conftest.start(tmp_path, *two_jobs, trainer=conftest.STEPS, PATH=path)
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
        asked = [sys.executable, *conftest.command(*SMOKE, *ALONE, trainer=conftest.STEPS)]
        options = {"capture_output": True, "text": True, "check": True}
        done = subprocess.run(asked, cwd=clone, env=env, **options)
        assert re.search(r"code snapshot \w+", done.stderr)
        (clone / "lorasweep/launch/worker.py").write_text("a syntax error")
    queue.drain()
    assert len(results(tmp_path)) == 6


@pytest.mark.full
def test_jobs_find_the_method_the_model_and_the_data_of_an_installed_package(queue, tmp_path):
    """The package is on the path of the command that submits; jobs run a copy of our code alone."""
    site, example = tmp_path / "site", ROOT / "examples/lorasweep-example"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "install",
        "--no-deps",
        "--target",
        site,
        example,
    ]
    subprocess.run(pip, check=True, timeout=300)
    env = {"PYTHONPATH": f"{ROOT}:{site}"}
    setup = "cluster.setup=['export LORASWEEP_HOST=$SLURMD_NODENAME']"
    asked = ("+sweep=orthogonal_init", "scale=smoke", *ALONE, setup, "cluster.mem_gib=1.8")
    assert "submitted 6 runs" in cli(*asked, cwd=tmp_path, env=env).stdout
    queue.drain()
    assert "an orthogonal start leaves" in cli(*asked, cwd=tmp_path, env=env).stdout
    store = RunStore(tmp_path / "runs")
    packages = {store.result(i)["packages"] for i in store.existing()}
    assert packages == {"lorasweep-example 0.1.0"} and len(store.existing()) == 6
    assert all(store.env(i)["slurm"]["job"] for i in store.existing())
