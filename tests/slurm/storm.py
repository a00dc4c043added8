"""A sweep on a real Slurm under preemptions, requeues, node failures, and kills of jobs and of the
submitting command.

    python -m tests.slurm.storm --minutes 20      (make storm)

Afterwards every run's curve is compared with the one of an uninterrupted local run: none may be
lost, trained twice or different.
"""

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from tests.slurm.conftest import FAST, Slurm, attempts, curves, results, start
from tests.slurm.trainers import GO

GRID = (
    *("+sweep=lr_ratio", "scale=smoke", "exec.threads=1", "exec.pack_size=4"),
    *("sweep.arms.fullft.lr=${around:1e-3,4,2}", "sweep.arms.lora.lr=${around:3e-3,8,1.7}"),
)
CLUSTER = (*FAST, "cluster.runs_per_job=8", "exec.max_attempts=50")


LONG = ("steps=40", "batch_size=4", "sweep.arms.lora.rank=[2,8]", "exec.checkpoint_s=0.5")
SHORT = ("steps=300", "sweep.axes.seed=[0,1,2,3,4]", "exec.checkpoint_s=0.1")
SEEDS = "sweep.axes.seed=[0,1,2,3,4,5,6,7,8,9]"
REAL = SimpleNamespace(sweep=(*GRID, *LONG, SEEDS), runs=200, trainer=None)
"""A sweep to disturb, with the real trainer: 40 runs of full fine-tuning, 160 of LoRA."""
QUICK = SimpleNamespace(sweep=(*GRID, *SHORT), runs=60, trainer="tests.slurm.trainers:slow")
"""Slow while the storm lasts (6 to 60 s a pack), so that few runs end in it; fast afterwards."""


class Storm:
    """Disturbs the jobs of one sweep in rounds, each kind once a round, in a seeded order."""

    def __init__(self, slurm, cwd, target, seed):
        self.slurm, self.cwd, self.target = slurm, Path(cwd), target
        self.random, self.round = random.Random(seed), []
        self.harms = (
            *(self.preempt, self.preempt_and_cancel, self.requeue, self.node_down),
            *(self.cancel, self.kill_job, self.kill_submitter),
        )
        self.done = Counter({harm.__name__: 0 for harm in self.harms})

    def step(self):
        """Do the next harm of the round; it does not count if no job is running."""
        self.round = self.round or self.random.sample(self.harms, len(self.harms))
        harm = self.round.pop()
        with contextlib.suppress(IndexError):
            harm()
            self.done[harm.__name__] += 1

    def preempt(self):
        """Let an urgent job take a node; the partition decides on the grace time of its victims."""
        self.slurm.preempt(seconds=2, check=False)

    def preempt_and_cancel(self):
        """Let an urgent job take the node of a job that Slurm then cancels (PreemptMode=CANCEL)."""
        listed = self.slurm.command("squeue", "-h", "-pspot", "-tRUNNING", "-o%N", check=False)
        self.slurm.preempt("-w", self.random.choice(listed.split()), seconds=2, check=False)

    def requeue(self):
        job = self.random.choice(self.slurm.running())
        self.slurm.command("scontrol", "requeue", job, check=False)

    def node_down(self):
        node = f"nodename=n{self.random.randint(1, 8)}"
        self.slurm.update(node, "state=down", "reason=storm", check=False)
        time.sleep(1)
        self.slurm.update(node, "state=resume", check=False)
        self.slurm.start()  # what died is started again

    def cancel(self):
        self.slurm.command("scancel", self.random.choice(self.slurm.running()), check=False)

    def kill_job(self):
        """kill -9 one of the sweep's own processes: a job's, or a worker's."""
        pids = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes()
                names = (b"submitit.core._submit", b"launch.worker", b"--follow")
                if any(name in line for name in names) and str(self.cwd).encode() in line:
                    pids.append(int(path.parent.name))
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.random.choice(pids), signal.SIGKILL)

    def kill_submitter(self):
        """Start the command that submits the sweep, and kill it at a random moment."""
        process = self.ask()
        time.sleep(self.random.uniform(0.5, 4))
        process.kill()
        process.communicate()

    def ask(self, *partitions):
        """Start the command that submits the sweep, to one of these partitions or of all three."""
        part = self.random.choice(partitions or ("scavenge", "main", "spot"))
        given = (*CLUSTER, f"cluster.partition={part}")
        return start(self.cwd, *self.target.sweep, *given, trainer=self.target.trainer)

    def disturb(self, seconds):
        """Disturb the sweep for `seconds`, and at least two rounds; then let it end."""
        started, runs = time.monotonic(), self.target.runs
        output = self.ask("spot").communicate()[0]
        while len(results(self.cwd)) < runs and (
            time.monotonic() - started < seconds or min(self.done.values()) < 2
        ):
            self.step()
            time.sleep(self.random.uniform(0.5, 3.0))
        ended = f"{len(results(self.cwd))} of {runs} runs finished; {dict(self.done)}"
        print(f"storm over after {time.monotonic() - started:.0f} s: {ended}", flush=True)
        (self.cwd / "runs" / GO).touch()
        for _ in range(4):  # submitted again; the cluster does the rest
            if len(results(self.cwd)) == runs:
                break
            output, since = self.ask().communicate()[0], time.monotonic()
            while self.slurm.jobs() and time.monotonic() - since < 400:
                time.sleep(0.5)
        assert len(results(self.cwd)) == runs, f"never finished: {self.slurm.jobs()}\n{output}"
        self.slurm.drain()


def compare(slurm, folder, target, seconds, seed=1):
    """Run the sweep uninterrupted, and in a storm; return the harms done and the differences.

    `different`: runs whose curves differ or are missing on one side. `attempts`: number of attempts
    -> number of runs.
    """
    whole, wild = Path(folder) / "whole", Path(folder) / "wild"
    wild.mkdir()
    (whole / "runs").mkdir(parents=True)
    (whole / "runs" / GO).touch()
    output = start(whole, *target.sweep, trainer=target.trainer).communicate()[0]
    assert len(results(whole)) == target.runs, output
    storm = Storm(slurm, wild, target, seed)
    storm.disturb(seconds)
    a, b = curves(whole), curves(wild)
    counts = Counter(map(len, attempts(wild).values()))
    return SimpleNamespace(
        harm=dict(storm.done),
        attempts=dict(sorted(counts.items())),
        wanted=len(a),
        finished=len(results(wild)),
        different=sorted(rid for rid in a.keys() | b.keys() if a.get(rid) != b.get(rid)),
    )


def main():
    """Disturb real training for some minutes; exit with 1 if a run is lost or different."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slurm = Slurm()
        try:
            seen = compare(slurm, folder, REAL, 60 * options.minutes, options.seed)
        finally:
            slurm.stop()
    print(f"attempts a run: {seen.attempts}")
    print(f"{seen.wanted} runs; different from the uninterrupted ones: {seen.different}")
    return 1 if seen.different or seen.wanted != REAL.runs else 0


if __name__ == "__main__":
    raise SystemExit(main())
