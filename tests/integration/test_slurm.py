"""A real Slurm: sweeps end to end, what a cluster does to jobs, commands that die, users who ask
twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorasweep.launch.slurm import submissions
from lorasweep.launch.worker import TorchTrainer
from tests import one_machine, storm
from tests.one_machine import FAST, command, curves, environment, results, wait_for
from tests.world import ROOT, cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SMOKE = ("+sweep=lr_ratio", "scale=smoke")
LONG = (*SMOKE, "steps=300", "batch_size=8", "exec.checkpoint_s=0.3", "exec.threads=1")


@pytest.fixture(scope="session")
def slurm():
    lacking = one_machine.lacking()
    if lacking and os.environ.get("LORASWEEP_NO_SKIP"):
        pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)
    cluster = one_machine.Slurm(SLURM_TEST_MAX_ARRAY="41")
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def empty_queue(slurm):
    """Each test starts with an empty queue and leaves one, whatever became of it."""
    slurm.start()
    yield
    slurm.ask("scancel", "--user=root", check=False)
    slurm.drain(60)


def submit(cwd, *args, check=True):
    return cli(*args, cwd=cwd, check=check)


def submit_with(trainer, cwd, *args):
    """The same with another trainer (package.module:object, or one of this file), which jobs find
    in the working copy."""
    name = trainer if ":" in trainer else f"{__name__}:{trainer}"
    code = (
        "import sys; from lorasweep.cli.actions import act; from lorasweep.config.compose import compose_request as compose\n"
        f"sys.exit(act(compose(sys.argv[1:]), '{name}'))"
    )
    setup = f"cluster.setup=['export LORASWEEP_HOST=$SLURMD_NODENAME','export PYTHONPATH={ROOT}']"
    done = subprocess.run(
        [sys.executable, "-c", code, *args, setup],
        cwd=cwd,
        env=environment(cwd),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def status(cwd, *args):
    return json.loads(cli(*args, "action=status", "format=json", cwd=cwd).stdout)


def records(cwd):
    return submissions.submissions(Path(cwd) / "runs", over=True)


def finished(cwd):
    return results(Path(cwd) / "runs")


# ---------------------------------------------------------------- from end to end


def test_a_sweep_of_two_stages_ends_by_itself_with_the_local_answer(slurm, tmp_path):
    """scale=tiny with few steps and held-out rows: the second stage is submitted, and the answer
    written, by the job that follows."""
    sweep = (
        "+sweep=lr_ratio",
        "scale=tiny",
        "steps=6",
        "dataset.n_test=32",
        "dataset.n_test_curve=8",
        "exec.threads=1",
        "exec.pack_size=4",
    )
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    said = submit(there, *sweep, *FAST, "cluster.runs_per_job=8")
    assert "submitted 21 runs" in said.stdout and "code snapshot" in said.stderr
    local = cli(*sweep, cwd=here, timeout=500)
    slurm.drain(400)
    assert len(finished(there)) > 21 and finished(there) == finished(here)
    assert curves(there / "runs") == curves(here / "runs")
    report = (there / "reports/lr_ratio-tiny/report.md").read_text()
    assert report == (here / "reports/lr_ratio-tiny/report.md").read_text()
    assert (
        "39 done" in cli(*sweep, "action=status", "watch=true", cwd=there).stdout
    )  # ends, as nothing is left
    answer = submit(there, *sweep, *FAST)  # the same command, when all is over, answers
    assert (
        answer.stdout.splitlines()[0] == local.stdout.splitlines()[0]
        and "submitted" not in answer.stdout
    )
    one = next(iter((there / "runs").glob("*/attempts/1/env.json")))
    env = json.loads(one.read_text())
    assert env["slurm"]["job"] and env["snapshot"] and "SLURM_CONF" not in one.read_text()


def test_a_thousand_runs_in_more_jobs_than_an_array_may_have(slurm, tmp_path):
    """A trainer that does nothing; MaxArraySize is 41, so 100 jobs need three arrays."""
    sweep = [
        "+sweep=lr_ratio",
        "scale=smoke",
        "~sweep.arms.fullft",
        "sweep.arms.lora.lr=${around:3e-3,10,1.5}",
        f"sweep.axes.seed={list(range(100))}",
        *FAST,
        "cluster.runs_per_job=10",
        "exec.pack_size=10",
    ]
    assert "submitted 1000 runs" in submit_with(
        "lorasweep.bench.overhead:nothing", tmp_path, *sweep
    )
    assert [a.n for a in records(tmp_path)[0].arrays] == [40, 40, 20, 1]
    slurm.drain(500)
    assert len(finished(tmp_path)) == 1000
    assert all(len(list(p.glob("attempts/*"))) == 1 for p in (tmp_path / "runs").glob("[0-9a-f]*"))


def test_in_a_storm_nothing_is_lost_doubled_or_different(slurm, tmp_path):
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    calm.mkdir()
    wild.mkdir()
    wanted = storm.reference(calm)
    told = storm.blow(slurm, wild, 180, seed=int(os.environ.get("LORASWEEP_STORM_SEED", 1)))
    assert (
        all(told["harm"].get(h.__name__, 0) > 0 for h in storm.Storm(slurm, wild, 0).harms)
        and sum(told["harm"].values()) > 20
    )
    assert max(told["attempts"]) >= 2  # it did harm
    assert len(finished(wild)) == len(wanted) == 200
    assert storm.compare(curves(wild / "runs"), wanted) == []


def test_packs_side_by_side_have_a_gpu_each(slurm, tmp_path):
    """Two fake GPUs a job: two workers, one GPU each."""
    submit(
        tmp_path,
        *SMOKE,
        "sweep.axes.seed=[0,1]",
        *FAST[:1],
        "cluster.gpus=2",
        "cluster.cpus=1",
        "cluster.mem_gib=2",
        "exec.threads=1",
        "exec.pack_size=1",
        "steps=60",
    )
    slurm.drain()
    envs = [
        json.loads(p.read_text())["slurm"]
        for p in (tmp_path / "runs").glob("*/attempts/1/env.json")
    ]
    assert len(envs) == 12 and {e["gpus"] for e in envs} == {"0", "1"}


def test_scripts_for_places_without_submitit(slurm, tmp_path):
    said = submit(tmp_path, *SMOKE, *FAST, "cluster.submit=false", "cluster.runs_per_job=3")
    script = re.search(r"sbatch (\S+)", said.stdout)[1]
    text = Path(script).read_text()
    assert "#SBATCH --array=0-1%64" in text and "submitit" not in text
    slurm.ask("sbatch", script)
    wait_for(lambda: status(tmp_path, *SMOKE)["runs"].get("queued", 0) or finished(tmp_path))
    again = submit(tmp_path, *SMOKE, *FAST)
    assert "submitted" not in again.stdout  # what the script runs is known
    slurm.drain()
    assert len(finished(tmp_path)) == 6


# ---------------------------------------------------------------- what a cluster does to jobs


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The curves of LONG, trained on this machine."""
    here = tmp_path_factory.mktemp("undisturbed")
    cli(*LONG, cwd=here, timeout=500)
    return curves(here / "runs")


@pytest.mark.parametrize("blow", ["grace", "no grace", "requeue", "time limit", "node", "cancel"])
def test_an_interrupted_job_goes_on_with_the_same_curves(slurm, tmp_path, blow, undisturbed):
    there = tmp_path
    place = {
        "grace": ("cluster.partition=scavenge",),
        "time limit": ("cluster.time_min=1", "cluster.warn_s=25"),
    }.get(blow, ())
    submit_with("until_blown", there, *LONG, *FAST, *place)
    wait_for(
        lambda: any(
            max((r["step"] for r in c), default=0) > 50 for c in curves(there / "runs").values()
        ),
        120,
    )
    job = next(j for j, s in slurm.queue().items() if s == "RUNNING")
    if blow in ("grace", "no grace"):
        slurm.ask("sbatch", "-p", "urgent", "-N4", "-c2", "-o", "/dev/null", "--wrap", "sleep 1")
    elif blow == "requeue":
        slurm.ask("scontrol", "requeue", job)
    elif blow == "node":
        slurm.ask("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    elif blow == "cancel":
        submit(there, *LONG, "action=cancel")
    wait_for(lambda: list((there / "runs").glob("*/attempts/*/end.json")), 120)
    (there / "runs/blown").touch()
    if blow == "cancel":
        slurm.drain(60)
        assert len(finished(there)) < 6
        submit(there, *LONG, *FAST)
    slurm.drain(400)
    assert len(finished(there)) == 6 and curves(there / "runs") == undisturbed
    ends = [
        json.loads(p.read_text())["state"] for p in (there / "runs").glob("*/attempts/*/end.json")
    ]
    assert ends and set(ends) == {"stopped"}  # interrupted, and no fault of the runs
    if blow == "time limit":
        assert "queued again" in "".join(
            p.read_text() for p in (there / "runs/.slurm").glob("*/jobs/*.out")
        )


def until_blown(pack, exec_, resume):
    """Train, but after 60 updates so slowly that no machine ends before the blow."""
    for event in TorchTrainer()(pack, exec_, resume):
        yield event
        if event.step > 60 and not Path(exec_.runs_dir, "blown").exists():
            time.sleep(0.5)


def test_a_job_that_slurm_runs_twice_does_nothing_the_second_time(slurm, tmp_path):
    submit(tmp_path, *SMOKE, *FAST, "cluster.follow=false")
    slurm.drain()
    before = curves(tmp_path / "runs")
    task = next((tmp_path / "runs/.slurm").glob("*/tasks/0.json"))
    started = time.monotonic()
    again = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lorasweep.launch.slurm.job", task],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        "6 runs, 0 to do" in again.stdout
        and " torch" not in again.stderr
        and time.monotonic() - started < 20
    )
    assert curves(tmp_path / "runs") == before


def test_a_job_killed_for_its_memory_says_so_and_more_memory_helps(slurm, tmp_path):
    submit(tmp_path, *SMOKE, *FAST, "cluster.mem_gib=0.25", "cluster.follow=false")
    slurm.drain()
    assert len(finished(tmp_path)) < 6
    told = status(tmp_path, *SMOKE)
    lost = [p for p in told["problems"] if p["state"] == "stale"]
    assert lost and all("Slurm: " in p["cause"] and "memory" in p["cause"] for p in lost), told[
        "problems"
    ]
    submit(tmp_path, *SMOKE, *FAST)
    slurm.drain()
    assert len(finished(tmp_path)) == 6


def test_failed_runs_keep_their_cause_and_are_tried_again_up_to_a_bound(slurm, tmp_path):
    """A trainer that fails every time: three attempts, then no more."""
    submit_with("broken", tmp_path, *SMOKE, *FAST, "exec.retry=true", "exec.max_attempts=3")
    slurm.drain()
    assert [len(list(p.glob("*"))) for p in (tmp_path / "runs").glob("*/attempts")] == [3] * 6
    told = status(tmp_path, *SMOKE)
    assert told["runs"]["failed"] == 6 and {p["cause"] for p in told["problems"]} == {
        "RuntimeError: broken on purpose"
    }
    assert all("broken on purpose" in "".join(p["tail"]) for p in told["problems"])


def broken(pack, exec_, resume):
    """Fail at the first step."""
    raise RuntimeError("broken on purpose")


# ---------------------------------------------------------------- commands that die, users who ask twice


DIE = {
    "before sbatch": "launch.submit = lambda *a, **k: die()",
    "after sbatch": "core = submitit.slurm.slurm.SlurmExecutor; was = core._submit_command; core._submit_command = lambda s, c: (was(s, c), die())",
    "before the record": "was = submissions.note_array; submissions.note_array = lambda *a: die()",
    "after the record": "was = submissions.note_array; submissions.note_array = lambda *a: (was(*a), die())",
}


@pytest.mark.parametrize("when", DIE)
def test_a_command_killed_while_it_submits_is_mended_by_the_next(slurm, tmp_path, when):
    code = (
        "import os, sys, signal, submitit; from lorasweep import launch, submissions\n"
        "def die(): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{DIE[when]}\n"
        "from lorasweep.cli.actions import act; from lorasweep.config.compose import compose_request as compose; act(compose(sys.argv[1:]))"
    )
    ask = [sys.executable, "-c", code, *SMOKE, *FAST, "cluster.runs_per_job=3"]
    died = subprocess.run(
        ask, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    reached = when in ("before the record", "after the record")
    said = submit(tmp_path, *SMOKE, *FAST)
    assert ("adopted" in said.stderr) == (when == "before the record")
    assert ("cancelled" in said.stderr) == (when == "after sbatch")
    assert ("submitted 6 runs" in said.stdout) != reached
    slurm.drain()
    submit(tmp_path, *SMOKE, *FAST)
    slurm.drain()
    assert len(finished(tmp_path)) == 6
    assert len(list((tmp_path / "runs").glob("*/attempts/2"))) == 0


def test_two_users_who_ask_at_once_submit_one_sweep(slurm, tmp_path):
    both = [
        subprocess.Popen(
            command(*SMOKE, *FAST),
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = sorted(p.communicate()[0] for p in both)
    assert sum("submitted 6 runs" in s for s in said) == 1 and len(records(tmp_path)) == 1
    assert "6 runs queued" in said[0] or "queued" in said[0]
    slurm.drain()
    assert len(finished(tmp_path)) == 6 and not list((tmp_path / "runs").glob("*/attempts/2"))


def test_an_edited_sweep_submits_what_is_new_and_takes_back_what_is_gone(slurm, tmp_path):
    slurm.ask("scontrol", "update", "partitionname=main", "state=down")  # nothing starts for now
    try:
        submit(
            tmp_path,
            *SMOKE,
            *FAST,
            "cluster.runs_per_job=1",
            "cluster.follow=false",
            "exec.pack_size=1",
        )
        edited = (*SMOKE, "sweep.arms.fullft.lr=[1e-3,3e-3]", "~sweep.arms.lora")
        plan = cli(*edited, *FAST, "action=plan", cwd=tmp_path).stdout
        assert "send 2 runs" in plan or "send 1 runs" in plan
        assert re.search(r"(\d) queued run\(s\) are no longer part of the sweep", plan)[1] in "56"
        said = submit(tmp_path, *edited, *FAST, "prune=true").stdout
        assert re.search(r"submitted [12] runs", said) and re.search(r"cancelled [56] queued", said)
    finally:
        slurm.ask("scontrol", "update", "partitionname=main", "state=up")
    slurm.drain()
    assert len(finished(tmp_path)) == 2


def test_queued_jobs_run_the_code_as_it_was(slurm, tmp_path):
    """The checkout is broken while the jobs wait."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    for name in (
        "lorasweep",
        "analysis",
        "conf",
        "sweeps",
    ):  # what is not committed yet is tested too
        subprocess.run(["cp", "-r", str(ROOT / name), str(clone)], check=True)
    env = {**environment(tmp_path), "PYTHONPATH": str(clone)}
    slurm.ask("scontrol", "update", "partitionname=main", "state=down")
    try:
        done = subprocess.run(
            command(*SMOKE, *FAST), cwd=clone, env=env, capture_output=True, text=True, check=True
        )
        assert re.search(r"code snapshot \w+ of commit \w+", done.stderr)
        (clone / "lorasweep/train/loop.py").write_text("a syntax error")
    finally:
        slurm.ask("scontrol", "update", "partitionname=main", "state=up")
    slurm.drain()
    assert len(finished(tmp_path)) == 6


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "given, said",
    [
        (
            ("cluster.partition=gpux",),
            "partition 'gpux' not found. Available: main, scavenge, urgent",
        ),
        (("cluster.gpus=3",), "cluster.gpus=3, but a node of partition 'main' has at most 2"),
        (
            ("cluster.cpus=64",),
            "asks for 64 processors, but a node of partition 'main' has at most 2",
        ),
        (
            ("cluster.mem_gib=900",),
            "a job asks for 900 GiB, but a node of partition 'main' has at most 7.8",
        ),
        (("cluster.constraint=gold",), "Slurm refused the jobs: "),
        (("cluster.time_min=1", "cluster.warn_s=90"), "would be warned at once"),
        (("cluster.work_min=0",), "cluster.work_min=0.0: more than 0"),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_what_the_cluster_cannot_do_is_said_before_anything_is_submitted(
    slurm, tmp_path, given, said
):
    done = submit(tmp_path, *SMOKE, *FAST, *given, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert slurm.queue() == {}


def test_without_slurm_the_message_says_what_to_do(slurm, tmp_path):
    none = cli(
        *SMOKE,
        "cluster=slurm",
        cwd=tmp_path,
        env={"PATH": str(Path(sys.executable).parent)},
        check=False,
    )
    assert (
        none.returncode == 2 and "no Slurm here" in none.stderr and "cluster=local" in none.stderr
    )
    gone = cli(
        *SMOKE, "cluster=slurm", cwd=tmp_path, env={"SLURM_CONF": "/nowhere.conf"}, check=False
    )
    assert gone.returncode == 2 and "/nowhere.conf is no file" in gone.stderr
