"""Measure step times of single runs and packs on request (action=measure_packs), for the planner.

The measuring process reads its job from stdin:

    {"exec": {...}, "shapes": [{"spec": {...}, "path": FILE}, ...]}
"""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lorasweep.errors import TrainingError
from lorasweep.launch.out_of_memory import is_out_of_memory
from lorasweep.launch.process import die_with_parent, keep_freed_memory, worker_environment
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.methods.registry import spec_from
from lorasweep.plan import detect
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.planner import GPU_SIZES, SIZES, place
from lorasweep.plan.speeds import Speeds, measured_path, shape_of
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore

BUDGET_S = 25.0
"""Seconds per shape (kind of run, `shape_of`) to try larger packs, until one is not faster."""
STEPS, WARM = 4, 1
"""Updates per measurement, and number of first updates that the median leaves out."""
MEMORY_SHARE = 0.7
"""Packs that are expected to need more than this fraction of a worker's memory are not measured."""


def measure_packs(
    specs: Sequence[RunSpec],
    store: RunStore,
    exec_: Exec,
    hardware: Hardware,
    report: Callable[[str], None],
) -> None:
    """Measure the shapes of `specs` that were not measured on this machine, in a separate process.

    Raises TrainingError if the measurement fails; finished shapes are kept. Raises StoreError if
    another process is measuring in this run folder and does not end.
    """
    shapes = list({shape_of(s): s for s in specs}.values())
    lock = store.root / ".calibration" / ".lock"
    with files.locked(lock, 30 + 2 * BUDGET_S * len(shapes), report):
        known = Speeds(store, hardware, exec_)
        unknown = [s for s in shapes if known.of(s) is None]
        missing = {measured_path(store.root, s, hardware, exec_): s for s in unknown}
        if not missing:
            return report("all kinds of run were measured on this machine before")
        bound = f"at most about {BUDGET_S * len(missing):.0f} s"
        report(f"measuring {len(missing)} kind(s) of run on this machine, once: {bound}")
        job = {
            "exec": dataclasses.asdict(exec_),
            "shapes": [{"spec": s.plain(), "path": str(p)} for p, s in missing.items()],
        }
        command = [sys.executable, "-m", "lorasweep.launch.measure_packs"]
        env, text = worker_environment(threads=1), json.dumps(job)
        done = subprocess.run(command, input=text, env=env, text=True, capture_output=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise TrainingError(
            f"the measurement failed: {last}. Run the sweep without it, or lower exec.pack_size."
        )


def measure(
    spec: RunSpec, exec_: Exec, hardware: Hardware, trainer: TorchTrainer
) -> dict[int, float]:
    """Time STEPS updates of packs of runs like `spec`; return size -> seconds per step and run."""
    n_train = min(64, spec.dataset.n_train or 64)
    few = dataclasses.replace(spec.dataset, n_test=1, n_test_curve=1, n_train=n_train)
    spec = dataclasses.replace(spec, dataset=few, steps=STEPS, schedule="constant", warmup_steps=0)
    trainer.data(spec, exec_)  # loads the base
    found: dict[int, float] = {}
    left = BUDGET_S
    sizes = GPU_SIZES if hardware.gpus else SIZES
    for size in sizes[: 1 if spec.method.MAX_PACK == 1 else None]:
        planned = place(spec, hardware, size, exec_.micro_batch_size)
        most = MEMORY_SHARE * (hardware.worker_gib or math.inf)
        if size > 1 and planned.memory_gib > most:
            break
        started = time.monotonic()
        # learning rates too small to change anything
        pack = [dataclasses.replace(spec, lr=1e-6 * (1 + k)) for k in range(size)]
        try:
            as_planned = dataclasses.replace(exec_, micro_batch_size=planned.layout.rows)
            events = trainer(pack, as_planned, None)
            times = [next(iter(event.records.values()))["step_s"] for event in events]
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            break
        found[size] = statistics.median_high(times[WARM:])
        took = time.monotonic() - started
        left -= took
        if left < 2 * took or found[size] > 1.05 * min(found.values()):
            break
    return found


def main() -> None:
    """Measure the shapes of the job in stdin, and save each result as soon as it is known."""
    die_with_parent()
    keep_freed_memory()
    job = json.load(sys.stdin)
    hardware, trainer = detect.this_machine(), TorchTrainer()
    given = Exec(**job["exec"])
    exec_ = dataclasses.replace(given, threads=1, runs_dir=f"{given.runs_dir}/.calibration")
    for shape in job["shapes"]:
        spec = spec_from(shape["spec"])
        step_s = measure(spec, exec_, hardware, trainer)
        names = {"model": spec.model.name, "method": spec.method.name}
        about = {**names, "batch_size": spec.batch_size, "precision": spec.precision}
        files.write_atomic(Path(shape["path"]), json.dumps({"step_s": step_s, **about}).encode())


if __name__ == "__main__":
    main()
