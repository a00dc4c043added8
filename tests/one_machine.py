"""A real Slurm on this machine for tests: started once, with nodes, accounting, preemption and fake
GPUs.

Four nodes of two processors each, so that four jobs of FAST run at once on the two cores that there
may be.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.world import ROOT

SCRIPTS = ROOT / "slurm" / "one_machine"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd")
FAST = (
    "cluster=slurm",
    "cluster.cpus=2",
    "cluster.mem_gib=1.5",
    "cluster.time_min=60",
    "exec.threads=1",
    "cluster.setup=['export LORASWEEP_HOST=$SLURMD_NODENAME']",
)
"""Each simulated node is a machine of its own to the others: who lives there is Slurm's word, as on
a real cluster."""


def lacking():
    """Say why no Slurm can be started here; None if it can."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [c for c in NEEDED if shutil.which(c, path=path) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core"
    return None if os.geteuid() == 0 else "a Slurm for tests needs root"


class Slurm:
    """One running cluster; its commands work in this process and in those that it starts."""

    def __init__(self, **settings):
        self.folder = Path(
            tempfile.mkdtemp(prefix="ls-", dir="/tmp")
        )  # munge's socket path must be short
        self.env = {
            "SLURM_TEST_DIR": str(self.folder),
            "SLURM_TEST_PORT": str(20000 + os.getpid() % 10000),
            "SLURM_TEST_CPUS": "2",
            **settings,
        }
        self.start()

    def start(self):
        """Start what does not run: also after a daemon died."""
        done = subprocess.run(
            [SCRIPTS / "start.sh"],
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.conf = shlex.split(done.stdout)[1].partition("=")[2]
        os.environ["SLURM_CONF"] = self.conf

    def stop(self):
        subprocess.run(
            [SCRIPTS / "stop.sh", "--wipe"],
            env={**os.environ, **self.env},
            capture_output=True,
            check=False,
        )
        os.environ.pop("SLURM_CONF", None)

    @staticmethod
    def ask(*command, check=True):
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def queue(self):
        """Job -> state of everything that is not over: 12, 12_3."""
        lines = self.ask(
            "squeue", "-h", "-r", "-O", "JobID:|,ArrayJobID:|,ArrayTaskID:|,State:|"
        ).splitlines()
        rows = [[c.strip() for c in line.split("|")] for line in lines]
        return {f"{r[1]}_{r[2]}" if r[2].isdigit() else r[0]: r[3] for r in rows}

    def drain(self, timeout=240):
        """Wait until the queue is empty."""
        wait_for(lambda: not self.queue(), timeout)


def wait_for(condition, timeout=60, every=0.3):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(every)
    raise AssertionError(f"waited {timeout} s in vain")


def command(*args):
    return [sys.executable, "-m", "lorasweep", *map(str, args)]


def environment(cwd):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LORASWEEP_RUNS": f"{cwd}/runs",
        "LORASWEEP_REPORTS": f"{cwd}/reports",
    }


def results(runs):
    """Run id -> (state, test_nll) of what is finished."""
    found = {}
    for path in Path(runs).glob("*/result.json"):
        body = json.loads(path.read_text())["result"]
        found[body["run_id"]] = (body["state"], body["test_nll"])
    return found


def curves(runs):
    """Run id -> its records without times; a step that comes twice is an error."""
    found = {}
    for path in Path(runs).glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [r["step"] for r in lines]
        assert steps == sorted(set(steps)), f"{path}: steps {steps}"
        found[path.parent.name] = [
            {k: v for k, v in r.items() if not k.endswith("_s")} for r in lines
        ]
    return found
