"""A storm over a sweep on a real Slurm: preemptions, requeues, node failures, kills of jobs and of
the submitting command.

    python -m tests.storm --minutes 20      (make storm)

Afterwards nothing is lost, doubled or different: every run's curve is compared with the one of an
undisturbed local run.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.one_machine import FAST, Slurm, command, curves, environment, results

SWEEP = (
    "+sweep=lr_ratio",
    "scale=smoke",
    "steps=40",
    "batch_size=4",
    "sweep.arms.lora.rank=[2,8]",
    "sweep.arms.fullft.lr=${around:1e-3,4,2}",
    "sweep.arms.lora.lr=${around:3e-3,8,1.7}",
    "sweep.axes.seed=[0,1,2,3,4,5,6,7,8,9]",
    "exec.threads=1",
    "exec.pack_size=4",
    "exec.checkpoint_s=0.5",
)
"""200 runs: 40 of full fine-tuning, 160 of LoRA."""
CLUSTER = (*FAST, "cluster.runs_per_job=8", "exec.max_attempts=50")


class Storm:
    """Does harm to one sweep's jobs, by a seeded choice."""

    def __init__(self, slurm, cwd, seed):
        self.slurm, self.cwd, self.random, self.done = (
            slurm,
            Path(cwd),
            random.Random(seed),
            Counter(),
        )
        self.harms = (
            self.preempt,
            self.requeue,
            self.node_down,
            self.cancel,
            self.kill_job,
            self.kill_submitter,
        )

    def running(self):
        return [j for j, s in self.slurm.queue().items() if s == "RUNNING"]

    def step(self):
        harm = self.random.choice(self.harms)
        with contextlib.suppress(IndexError):  # nothing runs at the moment
            harm()
            self.done[harm.__name__] += 1

    def preempt(self):
        """An urgent job takes a node; its victims get a grace time, or none, by their partition."""
        self.slurm.ask(
            "sbatch",
            "-p",
            "urgent",
            "-J",
            "urgent",
            "-c",
            "2",
            "-o",
            "/dev/null",
            "--wrap",
            "sleep 2",
            check=False,
        )

    def requeue(self):
        job = self.random.choice(self.running())
        self.slurm.ask("scontrol", "requeue", job, check=False)

    def node_down(self):
        node = self.random.choice(["n1", "n2", "n3", "n4"])
        self.slurm.ask(
            "scontrol", "update", f"nodename={node}", "state=down", "reason=storm", check=False
        )
        time.sleep(1)
        self.slurm.ask("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self.slurm.start()  # what died is started again

    def cancel(self):
        self.slurm.ask("scancel", self.random.choice(self.running()), check=False)

    def kill_job(self):
        """kill -9 of one of our processes: a job's, or a worker's."""
        pids = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes()
                if (b"submitit.core._submit" in line or b"lorasweep.launch.worker" in line) and str(
                    self.cwd
                ).encode() in line:
                    pids.append(int(path.parent.name))
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.random.choice(pids), signal.SIGKILL)

    def kill_submitter(self):
        """A user asks for the sweep and dies at some moment of it."""
        process = self.ask()
        time.sleep(self.random.uniform(0.5, 4))
        process.kill()
        process.wait()

    def ask(self):
        part = self.random.choice(["cluster.partition=scavenge", "cluster.partition=main"])
        return subprocess.Popen(
            command(*SWEEP, *CLUSTER, part),
            cwd=self.cwd,
            env=environment(self.cwd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def reference(cwd):
    """Train the sweep undisturbed, on this machine; return its curves."""
    subprocess.run(
        command(*SWEEP), cwd=cwd, env=environment(cwd), check=True, capture_output=True, text=True
    )
    return curves(Path(cwd) / "runs")


def blow(slurm, cwd, seconds, seed=1):
    """Run the sweep for `seconds` in a storm, then in calm to its end; return what happened."""
    storm = Storm(slurm, cwd, seed)
    runs = Path(cwd) / "runs"
    started = time.monotonic()
    told = storm.ask().communicate()[0]
    while time.monotonic() - started < seconds and len(results(runs)) < 200:
        storm.step()
        time.sleep(storm.random.uniform(0.5, 4.0))
    at_end = len(results(runs))
    say(
        f"storm over after {time.monotonic() - started:.0f} s: {at_end} of 200 runs finished; {dict(storm.done)}"
    )
    calm = time.monotonic()
    asks = 0
    while len(results(runs)) < 200:  # asked once more; the rest is the cluster's own doing
        assert asks < 4, f"never finished: {slurm.queue()}\n{told}"
        told, asks, asked = storm.ask().communicate()[0], asks + 1, time.monotonic()
        while slurm.queue() and len(results(runs)) < 200 and time.monotonic() - asked < 400:
            time.sleep(1)
    slurm.drain()
    attempts = [
        len(list(p.glob("attempts/*"))) for p in runs.glob("*/result.json") for p in [p.parent]
    ]
    say(
        f"all finished {time.monotonic() - calm:.0f} s later, asked {asks} time(s); attempts a run: {dict(sorted(Counter(attempts).items()))}"
    )
    return {
        "harm": dict(storm.done),
        "finished_in_storm": at_end,
        "attempts": dict(Counter(attempts)),
    }


def compare(found, wanted):
    """Return the run ids whose curves differ, and those that one side lacks."""
    return sorted(i for i in found.keys() | wanted.keys() if found.get(i) != wanted.get(i))


def say(text):
    print(text, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calm, wild = Path(folder) / "calm", Path(folder) / "wild"
        calm.mkdir()
        wild.mkdir()
        wanted = reference(calm)
        slurm = Slurm()
        try:
            blow(slurm, wild, 60 * options.minutes, options.seed)
            differing = compare(curves(wild / "runs"), wanted)
        finally:
            slurm.stop()
    print(
        f"{len(wanted)} runs, {len(differing)} of them different from the undisturbed ones {differing}"
    )
    return 1 if differing or len(wanted) != 200 else 0


if __name__ == "__main__":
    raise SystemExit(main())
