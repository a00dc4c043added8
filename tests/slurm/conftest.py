"""A real Slurm on this machine, shared by these tests; what they ask of it and of a run folder."""

import contextlib
import io
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from lorasweep.cli.actions import act
from lorasweep.config.compose import compose_request
from lorasweep.launch import local
from lorasweep.launch.slurm import queue as commands
from lorasweep.store.run_store import RunStore
from tests import world
from tests.slurm import stand_ins, trainers
from tests.world import ROOT, wait_for

SCRIPTS = ROOT / "slurm" / "one_machine"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd")
NODES = 8
SMOKE = ("+sweep=lr_ratio", "scale=smoke", "exec.pack_size=3")
"""Six runs in two packs, of full fine-tuning and of LoRA."""
FAST = (
    *("cluster=slurm", "cluster.cpus=2", "cluster.mem_gib=1.5", "cluster.time_min=60"),
    *("exec.threads=1", "cluster.shared=true"),
    f"cluster.setup=['export LORASWEEP_HOST=$SLURMD_NODENAME PYTHONPATH={ROOT}']",
)
"""One job a node. Each simulated node counts as another machine: only Slurm knows what runs there,
as on a real cluster. Jobs find the trainers of `tests.slurm.trainers`."""
ALONE = (*FAST, "cluster.follow=false")
"""Without the follow-up job."""
STEPS = "tests.slurm.trainers:steps"
HELD = "tests.slurm.trainers:held"


def free_ports(n):
    """Return the first of `n` neighbouring ports that nobody listens on, below the ephemeral ones."""
    while True:
        first = random.SystemRandom().randrange(15000, 32000 - n)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + n):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return first


class Slurm:
    """A cluster of eight nodes with two CPU cores each: jobs of tests mostly wait."""

    def __init__(self, **settings):
        # munge's socket path must be short
        self.folder = Path(tempfile.mkdtemp(prefix="ls-", dir="/tmp"))
        given = {"DIR": self.folder, "PORT": free_ports(NODES + 2), "NODES": NODES, "CPUS": 2}
        self.env = {f"SLURM_TEST_{k}": str(v) for k, v in {**given, **settings}.items()}
        try:
            self.start()
        except AssertionError:
            self.stop()  # what did start
            raise

    def _script(self, name, *options):
        env = {**os.environ, **self.env}
        return subprocess.run([SCRIPTS / name, *options], env=env, capture_output=True, text=True)

    def start(self):
        """Start what does not run: also after a daemon died."""
        done = self._script("start.sh")
        assert done.returncode == 0, done.stderr
        os.environ["SLURM_CONF"] = shlex.split(done.stdout)[1].partition("=")[2]

    def stop(self):
        self._script("stop.sh", "--wipe")
        os.environ.pop("SLURM_CONF", None)

    @staticmethod
    def command(*words, check=True):
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def update(self, *words, check=True):
        self.command("scontrol", "update", *words, check=check)

    def preempt(self, *where, seconds=0, check=True):
        """Let an urgent job take a node, the one of `-w NODE` if given, for some seconds."""
        words = ("-purgent", *where, "-c2", "-o/dev/null", "--wrap", f"sleep {seconds}")
        self.command("sbatch", *words, check=check)

    def jobs(self):
        """Job (12, 12_3) -> (state, node) of everything that is not over."""
        fields = "JobID:|,ArrayJobID:|,ArrayTaskID:|,State:|,NodeList:|"
        lines = self.command("squeue", "-h", "-r", "-O", fields).splitlines()
        rows = [[cell.strip() for cell in line.split("|")] for line in lines]
        return {f"{r[1]}_{r[2]}" if r[2].isdigit() else r[0]: (r[3], r[4]) for r in rows}

    def running(self):
        return [job for job, (state, _) in self.jobs().items() if state == "RUNNING"]

    def drain(self, timeout=400):
        wait_for(lambda: not self.jobs(), timeout, every=0.2)

    @contextlib.contextmanager
    def closed(self, partition="main"):
        """Let nothing start in a partition for a while."""
        self.update(f"partitionname={partition}", "state=down")
        try:
            yield
        finally:
            self.update(f"partitionname={partition}", "state=up")


WITH_TRAINER = """
import sys
from lorasweep.cli.actions import act
from lorasweep.config.compose import compose_request
sys.exit(act(compose_request(sys.argv[2:]), sys.argv[1]))
"""


def command(*args, trainer=None):
    given = ["-m", "lorasweep"] if trainer is None else ["-c", WITH_TRAINER, trainer]
    return [*given, *map(str, args)]


def start(cwd, *args, trainer=None, **more):
    """Start a command in a new process, with its output in one pipe."""
    given = command(*args, trainer=trainer)
    return world.start(*given, cwd=cwd, env=more, stderr=subprocess.STDOUT)


def request(cwd, *args):
    """Compose a request with outputs below `cwd`."""
    return compose_request([f"exec.runs_dir={cwd}/runs", f"exec.reports_dir={cwd}/reports", *args])


def ask(cwd, *args, trainer=STEPS):
    """Run a command in this process, with jobs that use `trainer`; return its output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        act(request(cwd, *args), trainer)
    return output.getvalue()


def train_here(cwd, *args):
    """Train a sweep's runs in this process by `steps`, in the packs that jobs get too."""
    wanted = request(cwd, *args)
    store = RunStore(wanted.exec.runs_dir)
    store.prepare()
    local.run_points(wanted.points, store, wanted.exec, lambda event: None, trainers.steps)


def status(cwd, *args):
    return json.loads(ask(cwd, *args, "action=status", "format=json"))


def results(cwd):
    """Run id -> (state, test_nll) of what is finished."""
    store = RunStore(Path(cwd) / "runs")
    ended = {i: store.result(i) for i in store.existing()}
    return {i: (r["state"], r["test_nll"]) for i, r in ended.items() if r}


def curves(cwd):
    """Run id -> its records without times; a step that comes twice is an error."""
    store, found = RunStore(Path(cwd) / "runs"), {}
    for i in store.existing():
        records = store.records(i)
        steps = [r["step"] for r in records]
        assert steps == sorted(set(steps)), f"{i}: {steps}"
        found[i] = [{k: v for k, v in r.items() if not k.endswith("_s")} for r in records]
    return {i: curve for i, curve in found.items() if curve}


def attempts(cwd):
    """Run id -> {number: how it ended}: 'stopped', 'failed', or None (open, killed, or finished)."""
    store = RunStore(Path(cwd) / "runs")
    numbers = {i: range(1, (store.last_attempt(i) or 0) + 1) for i in store.existing()}
    return {i: {n: (store.end(i, n) or {}).get("state") for n in ns} for i, ns in numbers.items()}


def read_json(path):
    """Return what a JSON file holds; None if it is not there."""
    return json.loads(path.read_text()) if path.is_file() else None


def submitted(cwd):
    """List the submissions from a run folder, oldest first."""
    paths = (Path(cwd) / "runs/.slurm").glob("*/submission.json")
    return [commands.read(p.parent) for p in sorted(paths, key=lambda p: p.stat().st_mtime_ns)]


def jobs_of(submission):
    """Return the job (12, or 12_3) of each task of a submission; the follow-up job came last."""
    names = [p.name.split("_") for p in submission.folder.glob("*_submitted.pkl")]
    labels = sorted(tuple(map(int, name[:-1])) for name in names)
    return ["_".join(map(str, label)) for label in labels][: len(submission.tasks)]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep these tests in one process: they wait more than they compute."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("slurm"))
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture(scope="session")
def slurm():
    """Give the cluster; MaxArraySize is 6, so that more than five jobs need more than one array."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = ", ".join(c for c in NEEDED if shutil.which(c, path=path) is None)
    reason = "" if os.geteuid() == 0 else "a Slurm for tests needs root"
    reason = f"no {missing} here: the packages are listed in .ci/run" if missing else reason
    if reason and os.environ.get("LORASWEEP_NO_SKIP"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    commands.setting.cache_clear()  # of another cluster, or of a test that invented one
    cluster = Slurm(MAX_ARRAY=6)
    yield cluster
    cluster.stop()
    commands.setting.cache_clear()


@pytest.fixture
def queue(slurm):
    """Give the cluster with an empty queue, and leave one, even after a failed test."""
    yield slurm
    slurm.command("scancel", "--user=root", check=False)
    slurm.start()  # a daemon that died
    slurm.drain(60)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """`inside(kind, *options)`: these options, with a container; its notes are `inside.notes()`."""
    folder = tmp_path / "bin"
    setup = stand_ins.install(folder)
    monkeypatch.chdir(tmp_path)

    def options(kind, *given):
        image = tmp_path / {"apptainer": "image.sif", "pyxis": "image.sqsh"}[kind]
        image.write_text("")
        changed = [o.replace("cluster.setup=[", f"cluster.setup=['{setup}',") for o in given]
        return [*changed, f"cluster.container={image}"]

    def notes():
        return [json.loads(line) for line in (folder / stand_ins.NOTES).read_text().splitlines()]

    options.notes = notes
    return options
