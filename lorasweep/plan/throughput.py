"""How fast this machine trains: seconds a step and member, alone and in packs. Measured once a
machine and shape.

    python -m lorasweep.plan.throughput JOB.json     measures; called by the command line before a sweep starts

The planner reads what is kept (no torch); only measuring trains. A measurement takes at most about
BUDGET_S.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasweep.methods.registry import spec_from
from lorasweep.plan import flops as cost
from lorasweep.plan import hardware as machine
from lorasweep.spec.execution import Exec
from lorasweep.spec.method import canonical_layers
from lorasweep.spec.run import RunSpec, canonical, part_json
from lorasweep.store import files
from lorasweep.tracking import provenance

SIZES = (1, 2, 4, 8, 16)
"""Pack sizes that are tried, smallest first, while the budget lasts and each is faster than the
last."""
GPU_SIZES = (*SIZES, 32, 64, 128)
BUDGET_S = 25.0
STEPS, WARM = 4, 1
"""Updates a measurement, and how many of them at the start do not count; the median of the others
is kept."""
GAIN = 0.96
"""A larger pack must take less than this share of the time of a smaller one, a member: else it is
noise (LOG.md)."""
FORWARD_TOKENS = 4096
"""Tokens of one forward over all members: beyond it nothing is gained, and activations leave the
cache (LOG.md)."""
GPU_FORWARD_TOKENS = 65536
"""The same on a GPU. Assumption: not measured yet."""


@dataclass(frozen=True)
class Speed:
    """What was measured for runs of one shape: pack size -> seconds a step and member, one thread."""

    step_s: dict[int, float]

    def best_size(self) -> int:
        """Return the smallest pack size that no larger one beats by more than noise; 1: packing
        does not pay."""
        best = 1
        for size in sorted(self.step_s):
            if self.step_s[size] < GAIN * self.step_s[best]:
                best = size
        return best


def kind(spec: RunSpec, exec_: Exec) -> str:
    """Name what decides a step's time: shapes and the machine, not rates or seeds."""
    rank = getattr(spec.method, "rank", None)
    layers = canonical_layers(getattr(spec.method, "layers", "all"))
    rest = [
        spec.method.name,
        layers,
        vars(spec.method).get("scope"),
        rank,
        spec.batch_size,
        spec.precision,
    ]
    env = provenance.environment()
    gpus = [gpu.name for gpu in machine.gpus()]
    here = [
        env["processor"],
        machine.cores(),
        gpus,
        env["packages"]["torch"],
        env["lorasweep"],
        exec_.micro_batch_size,
        exec_.compile,
    ]
    text = json.dumps([part_json(spec.model), part_json(spec.dataset), rest, here])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sizes() -> tuple[int, ...]:
    """Return the pack sizes worth trying on this machine."""
    return GPU_SIZES if machine.gpus() else SIZES


def forward_tokens() -> int:
    """Return how many tokens one forward should hold on this machine."""
    return GPU_FORWARD_TOKENS if machine.gpus() else FORWARD_TOKENS


def worker_bytes() -> int:
    """Return the memory that bounds one worker: a GPU's, or this machine's."""
    return min((gpu.memory_bytes for gpu in machine.gpus()), default=machine.memory_bytes())


def micro_batch(spec: RunSpec, members: int) -> int:
    """Return the rows a member and forward: as many as forward_tokens() hold, at least one."""
    return max(1, min(spec.batch_size, forward_tokens() // (members * cost.mean_length(spec))))


def known(spec: RunSpec, exec_: Exec) -> Speed | None:
    """Return the kept measurement for runs like `spec` on this machine; None if there is none."""
    try:
        plain = json.loads(_path(spec, exec_).read_bytes())
        return (
            Speed({int(n): float(s) for n, s in plain["step_s"].items()})
            if plain["step_s"]
            else None
        )
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def ensure(specs: Sequence[RunSpec], exec_: Exec) -> str | None:
    """Measure the shapes among `specs` that are not known, in a process of its own, and keep the
    results.

    Returns None, or why nothing was measured: the plan then goes by its defaults, and says so.
    """
    missing = {kind(s, exec_): s for s in specs if known(s, exec_) is None}
    if not missing:
        return None
    folder = Path(exec_.runs_dir) / ".calibration"
    folder.mkdir(exist_ok=True)
    job = {
        "specs": [json.loads(canonical(s)) for s in missing.values()],
        "exec": dataclasses.asdict(exec_),
    }
    path = folder / f"job-{os.getpid()}-{os.urandom(3).hex()}.json"
    files.write_atomic(path, json.dumps(job).encode())
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[2]), env.get("PYTHONPATH", "")]
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lorasweep.plan.throughput", str(path)],
            env=env,
            check=False,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    finally:
        path.unlink(missing_ok=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return None


def measure(spec: RunSpec, exec_: Exec, budget_s: float = BUDGET_S) -> Speed:
    """Train a few updates of runs like `spec`, alone and in packs, and return their times."""
    import torch

    from lorasweep.data import load as data
    from lorasweep.models import load as models
    from lorasweep.train.loop import train

    few = dataclasses.replace(
        spec.dataset, n_test=1, n_test_curve=1, n_train=min(64, spec.dataset.n_train or 64)
    )
    spec = dataclasses.replace(spec, dataset=few, steps=STEPS, schedule="constant", warmup_steps=0)
    base = models.load(spec.model, exec_.models_dir, spec.precision)
    if exec_.compile:
        base.model.compile(dynamic=True)
    rows = data.load(few, exec_.data_dir, base.tokenizer)
    found: dict[int, float] = {}
    left = budget_s
    for size in sizes()[: 1 if spec.method.MAX_PACK == 1 else None]:
        micro = exec_.micro_batch_size or micro_batch(spec, size)
        if size > 1 and cost.pack_bytes(size, spec, micro) > 0.7 * worker_bytes():
            break
        started = time.monotonic()
        pack = [
            dataclasses.replace(spec, lr=1e-6 * (1 + k)) for k in range(size)
        ]  # too small to move anything
        try:
            times = [
                next(iter(event.records.values()))["step_s"]
                for event in train(pack, base, rows, micro)
            ]
        except torch.OutOfMemoryError:  # of a GPU: the sizes below it stand
            if size == 1:
                raise
            break
        kept = sorted(times[WARM:])
        found[size] = kept[len(kept) // 2]
        took = time.monotonic() - started
        left -= took
        if left < 2 * took or found[size] > 1.05 * min(found.values()):
            break
    return Speed(found)


def _path(spec: RunSpec, exec_: Exec) -> Path:
    return Path(exec_.runs_dir) / ".calibration" / f"{kind(spec, exec_)}.json"


def main(job_path: str) -> None:
    """Measure the shapes of a job file and keep each result as soon as it is there."""
    import torch

    from lorasweep.launch.process import die_with_parent, keep_freed_memory

    die_with_parent()
    keep_freed_memory()
    torch.set_num_threads(1)
    job = json.loads(Path(job_path).read_bytes())
    exec_ = Exec(**job["exec"])
    for plain in job["specs"]:
        spec = spec_from(plain)
        speed = measure(spec, exec_)
        content = {
            "step_s": speed.step_s,
            "model": spec.model.name,
            "method": spec.method.name,
            "batch_size": spec.batch_size,
            "precision": spec.precision,
        }
        files.write_atomic(_path(spec, exec_), json.dumps(content).encode())


if __name__ == "__main__":
    main(sys.argv[1])
