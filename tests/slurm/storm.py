"""A storm over a sweep on a real Slurm: preemptions, requeues, node failures, kills of jobs and of
the submitting command.

    python -m tests.slurm.storm --minutes 20      (make storm)

Afterwards nothing is lost, doubled or different: every run's curve is compared with the one of an
undisturbed local run.
"""

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.cluster import FAST, Slurm, attempts, curves, results, start
from tests.slurm.trainers import GO

GRID = (
    "+sweep=lr_ratio",
    "scale=smoke",
    "sweep.arms.fullft.lr=${around:1e-3,4,2}",
    "exec.threads=1",
    "exec.pack_size=4",
)
CLUSTER = (*FAST, "cluster.runs_per_job=8", "exec.max_attempts=50")


@dataclass(frozen=True)
class Target:
    """A sweep to blow at, and its trainer; None: the real one."""

    sweep: tuple[str, ...]
    runs: int
    trainer: str | None


REAL = Target(
    (
        *GRID,
        "steps=40",
        "batch_size=4",
        "sweep.arms.lora.rank=[2,8]",
        "sweep.arms.lora.lr=${around:3e-3,8,1.7}",
        "sweep.axes.seed=[0,1,2,3,4,5,6,7,8,9]",
        "exec.checkpoint_s=0.5",
    ),
    200,
    None,
)
"""40 runs of full fine-tuning, 160 of LoRA."""
QUICK = Target(
    (
        *GRID,
        "steps=300",
        "sweep.arms.lora.lr=${around:3e-3,8,1.7}",
        "sweep.axes.seed=[0,1,2,3,4]",
        "exec.checkpoint_s=0.1",
    ),
    60,
    "tests.slurm.trainers:slow",
)
"""Slow while the storm lasts (a pack takes 6 to 60 s), so that some runs end in it on any machine
and most do not; at once when it is over."""


class Storm:
    """Does harm to one sweep's jobs, each kind once a round, in a seeded order."""

    def __init__(self, slurm, cwd, target, seed):
        self.slurm, self.cwd, self.target = slurm, Path(cwd), target
        self.random, self.round = random.Random(seed), []
        self.harms = (
            self.preempt,
            self.requeue,
            self.node_down,
            self.cancel,
            self.kill_job,
            self.kill_submitter,
        )
        self.done = Counter(dict.fromkeys((h.__name__ for h in self.harms), 0))

    def step(self):
        """Do the next harm; one that finds no victim does not count."""
        if not self.round:
            self.round = self.random.sample(self.harms, len(self.harms))
        harm = self.round.pop()
        with contextlib.suppress(IndexError):  # nothing runs at the moment
            harm()
            self.done[harm.__name__] += 1

    def preempt(self):
        """Let an urgent job take a node; its victims get a grace time, or none, by their
        partition."""
        words = ("-p", "urgent", "-J", "urgent", "-c", "2", "-o", "/dev/null", "--wrap", "sleep 2")
        self.slurm.command("sbatch", *words, check=False)

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
                ours = b"submitit.core._submit" in line or b"lorasweep.launch.worker" in line
                if ours and str(self.cwd).encode() in line:
                    pids.append(int(path.parent.name))
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.random.choice(pids), signal.SIGKILL)

    def kill_submitter(self):
        """Let a user ask for the sweep, and die at some moment of it."""
        process = self.ask()
        time.sleep(self.random.uniform(0.5, 4))
        process.kill()
        process.communicate()

    def ask(self):
        """Start the command that asks for the sweep."""
        part = self.random.choice(["cluster.partition=scavenge", "cluster.partition=main"])
        target = self.target
        return start(self.cwd, *target.sweep, *CLUSTER, part, trainer=target.trainer)


@dataclass(frozen=True)
class Seen:
    """What a storm did, and what was there afterwards."""

    harm: dict[str, int]
    attempts: dict[int, int]
    """Attempts of a run -> how many runs took so many."""
    wanted: int
    finished: int
    different: list[str]
    """Runs whose curves are not those of the undisturbed sweep, or that one side lacks."""


def compare(slurm, folder, target, seconds, seed=1):
    """Run the sweep undisturbed, and in a storm; return what differs."""
    calm, wild = Path(folder) / "calm", Path(folder) / "wild"
    calm.mkdir()
    wild.mkdir()
    (calm / "runs").mkdir()
    (calm / "runs" / GO).touch()
    output = start(calm, *target.sweep, trainer=target.trainer).communicate()[0]
    assert len(results(calm)) == target.runs, output
    harm = blow(slurm, wild, target, seconds, seed)
    a, b = curves(calm), curves(wild)
    return Seen(
        harm,
        dict(sorted(Counter(map(len, attempts(wild).values())).items())),
        len(a),
        len(results(wild)),
        sorted(rid for rid in a.keys() | b.keys() if a.get(rid) != b.get(rid)),
    )


def blow(slurm, cwd, target, seconds, seed):
    """Run the sweep in a storm of `seconds`, and of at least two rounds; then in calm to its end.

    Returns how often each kind of harm was done.
    """
    storm = Storm(slurm, cwd, target, seed)
    started = time.monotonic()
    output = storm.ask().communicate()[0]
    while len(results(cwd)) < target.runs and (
        time.monotonic() - started < seconds or min(storm.done.values()) < 2
    ):
        storm.step()
        time.sleep(storm.random.uniform(0.5, 3.0))
    over = time.monotonic()
    print(
        f"storm over after {over - started:.0f} s: {len(results(cwd))} of {target.runs} runs "
        f"finished; {dict(storm.done)}",
        flush=True,
    )
    (Path(cwd) / "runs" / GO).touch()
    asked = 0
    while len(results(cwd)) < target.runs:  # asked for once more; the rest is the cluster's doing
        assert asked < 4, f"never finished: {slurm.jobs()}\n{output}"
        output, asked, since = storm.ask().communicate()[0], asked + 1, time.monotonic()
        while slurm.jobs() and len(results(cwd)) < target.runs and time.monotonic() - since < 400:
            time.sleep(0.5)
    slurm.drain()
    print(f"all finished {time.monotonic() - over:.0f} s later, asked {asked} time(s)", flush=True)
    return dict(storm.done)


def main():
    """Blow at real training for some minutes; exit with 1 if a run is lost or different."""
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
    print(
        f"{seen.wanted} runs, {len(seen.different)} of them different from the undisturbed ones "
        f"{seen.different}"
    )
    return 1 if seen.different or seen.wanted != REAL.runs else 0


if __name__ == "__main__":
    raise SystemExit(main())
